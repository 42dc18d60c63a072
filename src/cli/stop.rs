//! Ending the work of a command when a signal asks for it.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use odmoe_fs::process::Signals;

use super::Diagnostics;
use super::failure::{Failure, Result};

/// Turns SIGINT, SIGTERM and SIGHUP into a flag, so that nothing unfinished is left behind. A second
/// one ends the process at once, whatever that leaves.
pub struct Stop {
    /// Set when the work must end.
    pub flag: Arc<AtomicBool>,
    signal: Arc<OnceLock<i32>>,
    /// Whether a signal ends the process.
    at_once: Arc<AtomicBool>,
}

impl Stop {
    pub fn on_signals() -> Result<Self> {
        Self::new(false, false)
    }

    /// The same, but until [`begin`](Self::begin) a signal ends the process, which says so: there is
    /// nothing yet that could be left unfinished, and a server may not answer for long. With `json`
    /// it says it to programs as well.
    pub fn at_once(json: bool) -> Result<Self> {
        Self::new(true, json)
    }

    /// From here on the work ends itself.
    pub fn begin(&self) {
        self.at_once.store(false, Ordering::Relaxed);
    }

    fn new(at_once: bool, json: bool) -> Result<Self> {
        let signals = Signals::block(Signals::STOPPING)?;
        let stop = Self {
            flag: Arc::default(),
            signal: Arc::default(),
            at_once: Arc::new(AtomicBool::new(at_once)),
        };
        let (flag, signal) = (stop.flag.clone(), stop.signal.clone());
        let at_once = stop.at_once.clone();
        let wait = move || {
            if let Ok(first) = signals.wait() {
                if at_once.load(Ordering::Relaxed) {
                    // The cursor may stand behind a bar.
                    let new_line = if io::stderr().is_terminal() { "\n" } else { "" };
                    let _ = Diagnostics.write_all(new_line.as_bytes());
                    Failure::interrupted(first).report(json);
                    std::process::exit(128 + first);
                }
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
