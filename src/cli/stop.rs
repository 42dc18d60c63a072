//! Ending the work of a command when a signal asks for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use odmoe_fs::process::Signals;

use super::failure::{Failure, Result};

/// Turns SIGINT, SIGTERM and SIGHUP into a flag, so that nothing unfinished is left behind. A second
/// one ends the process at once, whatever that leaves.
pub struct Stop {
    /// Set when the work must end.
    pub flag: Arc<AtomicBool>,
    signal: Arc<OnceLock<i32>>,
}

impl Stop {
    pub fn on_signals() -> Result<Self> {
        let signals = Signals::block(Signals::STOPPING)?;
        let (flag, signal) = <(Arc<AtomicBool>, Arc<OnceLock<i32>>)>::default();
        let stop = Self {
            flag: flag.clone(),
            signal: signal.clone(),
        };
        let wait = move || {
            if let Ok(first) = signals.wait() {
                let _ = signal.set(first);
                flag.store(true, Ordering::Relaxed);
            }
            if let Ok(second) = signals.wait() {
                std::process::exit(128 + second);
            }
        };
        if let Err(e) = std::thread::Builder::new().spawn(wait) {
            tracing::info!("signals end this command at once, since no thread waits for them: {e}");
            signals.unblock()?;
        }
        Ok(stop)
    }

    /// Fails if a signal has come.
    pub fn check(&self) -> Result<()> {
        match self.signal.get() {
            Some(signal) => Err(Failure::interrupted(*signal)),
            None => Ok(()),
        }
    }

    /// The result of the work, with the signal as the reason if it ended the work.
    pub fn explain<T, E: Into<Failure>>(&self, result: std::result::Result<T, E>) -> Result<T> {
        result.map_err(|e| match self.signal.get() {
            Some(signal) => e.into().by_signal(*signal),
            None => e.into(),
        })
    }
}
