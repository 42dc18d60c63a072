//! The terminal while the live view has it: in raw mode and on a screen of its own, and as it was
//! before when the view has ended, whatever ends it.
//!
//! The problem: the terminal outlives the process. One that a signal ends would leave a shell
//! without an echo, on a screen without its history.
//!
//! The plan: a thread takes every signal that would end the process, and the view looks ten times a
//! second for what that thread has taken. If the view does not, since it waits for something, the
//! thread gives the terminal back itself.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use odmoe_fs::process::Signals;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, enable_raw_mode};
use ratatui::prelude::CrosstermBackend;
use ratatui::{DefaultTerminal, Frame, Terminal};
use rustix::process::{Signal, getpgrp, getpid, getsid, kill_process};

use super::super::failure::{Failure, Result, ensure};
use super::super::text;

/// The signals that end a process if it does nothing about them, but those that tell of a fault of
/// its own (signal(7)).
const ENDING: &[i32] = &[
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGXCPU,
    #[cfg(target_os = "linux")]
    libc::SIGIO,
    #[cfg(target_os = "linux")]
    libc::SIGPWR,
    #[cfg(target_os = "linux")]
    libc::SIGSTKFLT,
];

/// How often the view looks for signals: soon enough for a person.
const LOOK: Duration = Duration::from_millis(100);
/// How long it may take to obey one.
const PATIENCE: Duration = Duration::from_secs(1);

/// The terminal, given back when dropped.
pub struct Screen {
    terminal: DefaultTerminal,
    /// Whether the terminal is ours now. Given back twice, the cursor would be where it was before.
    is_taken: bool,
    /// The signal that was taken last, and not obeyed yet; 0 for none.
    taken: Arc<AtomicI32>,
}

impl Screen {
    /// Takes the terminal.
    pub fn take() -> Result<Self> {
        ensure!(
            io::stdout().is_terminal() && io::stdin().is_terminal(),
            "there is no terminal to show the live view on; pass --once, or --once --json"
        );
        ensure!(
            !text::is_dumb(),
            "this terminal (TERM=dumb) cannot show the live view; pass --once, or --once --json"
        );
        if !is_in_foreground() {
            // As the kernel would: stop until the shell gives us the terminal. But before signals
            // are taken, which could not be obeyed meanwhile.
            kill_process(getpid(), Signal::TTOU).map_err(io::Error::from)?;
        }
        let taken = take_signals()?;
        // Also gives the terminal back if there is a panic.
        let terminal = ratatui::try_init()?;
        Ok(Self {
            terminal,
            is_taken: true,
            taken,
        })
    }

    /// Shows what `draw` renders.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame)) -> Result<()> {
        let drawn = self.terminal.draw(draw).map(drop);
        // A terminal that is gone sends a signal, too, which says it better.
        self.obey_signals()?;
        Ok(drawn?)
    }

    /// Waits for a key. `None` if nothing was pressed until then, or if the view must be drawn anew.
    ///
    /// # Errors
    /// [`Failure::interrupted`] if a signal ends the process.
    pub fn key(&mut self, until: Instant) -> Result<Option<KeyEvent>> {
        loop {
            if self.obey_signals()? {
                return Ok(None);
            }
            let left = until.saturating_duration_since(Instant::now());
            if !event::poll(left.min(LOOK))? {
                if left <= LOOK {
                    return Ok(None);
                }
                continue;
            }
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let with_control = key.modifiers.contains(KeyModifiers::CONTROL);
                    if key.code != KeyCode::Char('z') || !with_control {
                        return Ok(Some(key));
                    }
                    // Without a shell there is nobody to continue us.
                    if getsid(None).map_err(io::Error::from)? != getpgrp() {
                        self.suspend()?;
                    }
                    return Ok(None);
                }
                Event::Resize(..) => return Ok(None),
                _ => {}
            }
        }
    }

    /// Obeys the signal that was taken, if any; says whether the view must be drawn anew.
    fn obey_signals(&mut self) -> Result<bool> {
        match self.taken.load(Ordering::Acquire) {
            0 => Ok(false),
            libc::SIGTSTP => {
                self.suspend()?;
                Ok(true)
            }
            signal => Err(Failure::interrupted(signal)),
        }
    }

    /// Gives the terminal back, stops as a shell expects it after Ctrl-Z, and takes the terminal again
    /// when the shell lets us.
    fn suspend(&mut self) -> Result<()> {
        self.give_back();
        let suspended =
            self.taken
                .compare_exchange(libc::SIGTSTP, 0, Ordering::AcqRel, Ordering::Acquire);
        if matches!(suspended, Ok(_) | Err(0)) {
            kill_process(getpid(), Signal::STOP).map_err(io::Error::from)?;
        }
        // Continued, though perhaps in the background.
        loop {
            std::thread::sleep(LOOK);
            match self.taken.swap(0, Ordering::AcqRel) {
                0 | libc::SIGTSTP if is_in_foreground() => break,
                0 | libc::SIGTSTP => {}
                signal => return Err(Failure::interrupted(signal)),
            }
        }
        self.is_taken = true;
        enable_raw_mode()?;
        execute!(io::stdout(), EnterAlternateScreen)?;
        // One that knows nothing of what was shown before.
        self.terminal = Terminal::new(CrosstermBackend::new(io::stdout()))?;
        Ok(())
    }

    fn give_back(&mut self) {
        if std::mem::take(&mut self.is_taken) {
            ratatui::restore();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Whether the terminal is ours to write to; so it is if no shell shares it out.
fn is_in_foreground() -> bool {
    rustix::termios::tcgetpgrp(io::stdin()).map_or(true, |group| group == getpgrp())
}

/// From here on signals are taken by a thread. What it has taken and nobody has obeyed yet is in what
/// this returns.
fn take_signals() -> io::Result<Arc<AtomicI32>> {
    let signals = Signals::block(&[ENDING, &[libc::SIGTSTP]].concat())?;
    let taken = Arc::new(AtomicI32::new(0));
    let told = taken.clone();
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if signal == libc::SIGTSTP {
                // Never instead of one that ends us.
                let _ = told.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire);
                continue;
            }
            told.store(signal, Ordering::Release);
            std::thread::sleep(PATIENCE);
            ratatui::restore();
            std::process::exit(128 + signal);
        }
    });
    Ok(taken)
}
