//! Ending the work of a command when a signal asks for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use odmoe_fs::mounts::Signals;

use super::failure::{Failure, Result};

/// Turns SIGINT, SIGTERM and SIGHUP into a flag, so that nothing unfinished is left behind. A second
/// one changes nothing: the first is being obeyed.
pub struct Stop {
    /// Set when the work shall end.
    pub flag: Arc<AtomicBool>,
    signal: Arc<OnceLock<i32>>,
}

impl Stop {
    pub fn on_signals() -> Result<Self> {
        let signals = Signals::block(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
        let (flag, signal) = <(Arc<AtomicBool>, Arc<OnceLock<i32>>)>::default();
        let stop = Self {
            flag: flag.clone(),
            signal: signal.clone(),
        };
        std::thread::spawn(move || {
            if let Ok(first) = signals.wait() {
                let _ = signal.set(first);
                flag.store(true, Ordering::Relaxed);
            }
        });
        Ok(stop)
    }

    /// The result of the work, with the signal as the reason if it ended the work.
    pub fn explain<T, E: Into<Failure>>(&self, result: std::result::Result<T, E>) -> Result<T> {
        result.map_err(|e| match self.signal.get() {
            Some(signal) => e.into().by_signal(*signal),
            None => e.into(),
        })
    }
}
