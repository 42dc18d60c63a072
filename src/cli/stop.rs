//! Ending the work of a command when a signal asks for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use odmoe_fs::mounts::Signals;

/// Turns SIGINT, SIGTERM and SIGHUP into a flag, so that nothing unfinished is left behind. A second
/// one changes nothing: the first is being obeyed.
pub struct Stop {
    /// Set when the work shall end.
    pub flag: Arc<AtomicBool>,
    signal: Arc<OnceLock<i32>>,
}

impl Stop {
    pub fn on_signals() -> anyhow::Result<Self> {
        let signals = Signals::block(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
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
        };
        if let Err(e) = std::thread::Builder::new().spawn(wait) {
            tracing::info!("signals end this command at once, since no thread waits for them: {e}");
            signals.unblock()?;
        }
        Ok(stop)
    }

    /// The result of the work, with the signal as the reason if it ended the work.
    pub fn explain<T, E: Into<anyhow::Error>>(&self, result: Result<T, E>) -> anyhow::Result<T> {
        result.map_err(|e| match self.signal.get() {
            Some(signal) => e.into().context(Interrupted(*signal)),
            None => e.into(),
        })
    }
}

/// The context of an error when a signal ended the work: the exit status is 128 and its number.
#[derive(Debug)]
pub struct Interrupted(pub i32);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted by signal {}", self.0)
    }
}
