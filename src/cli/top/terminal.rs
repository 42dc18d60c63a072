//! The terminal of the live view: in raw mode and on a screen of its own while the view has it, and
//! as it was before when the view ends, whatever ends it.
//!
//! The problem: the terminal outlives the process. A process that is ended by a signal would leave
//! the shell without echo, on an empty screen.
//!
//! The plan: a thread takes every signal that would end the process, and ten times a second the
//! view checks what it has taken. If the view is busy with something else, the thread restores the
//! terminal and ends the process itself.

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

use super::super::failure::{Context, Failure, Result};
use super::super::text;

/// The signals that end a process by default (signal(7)), except those for faults of its own.
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

/// How often the view checks for signals: soon enough for a person.
const LOOK: Duration = Duration::from_millis(100);
/// How long it may take to obey one.
const PATIENCE: Duration = Duration::from_secs(1);

/// The terminal, given back when dropped.
pub struct LiveTerminal {
    terminal: DefaultTerminal,
    /// Whether the view has the terminal. Restoring it twice would move the shell's cursor.
    is_taken: bool,
    /// The signal that was taken and not obeyed yet; 0 for none.
    taken: Arc<AtomicI32>,
}

impl LiveTerminal {
    /// Takes the terminal.
    pub fn take() -> Result<Self> {
        let refused = |why| Err(Failure::new(why).hint("pass --once, or --once --json"));
        if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
            return refused("there is no terminal to show the live view on");
        }
        if text::is_dumb() {
            return refused("this terminal (TERM=dumb) cannot show the live view");
        }
        if !is_in_foreground() {
            // Stop until the shell gives us the terminal, as the kernel would make us; but do it
            // before signals are taken, since a stopped process could not obey them.
            kill_process(getpid(), Signal::TTOU).map_err(io::Error::from)?;
        }
        let taken = take_signals().context("cannot start a thread")?;
        // This also restores the terminal after a panic.
        let terminal = ratatui::try_init()?;
        Ok(Self {
            terminal,
            is_taken: true,
            taken,
        })
    }

    /// Draws the view.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame)) -> Result<()> {
        let drawn = self.terminal.draw(draw).map(drop);
        // If the terminal is gone, the signal that says so is the better reason.
        self.obey_signals()?;
        Ok(drawn?)
    }

    /// Waits for a key. `None` if none was pressed in time, or if the view must be drawn again.
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
                    // Without a shell, nobody would continue us.
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

    /// Obeys the signal that was taken, if any. `true` if the view must be drawn again.
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

    /// Restores the terminal and stops, as a shell expects after Ctrl-Z; takes the terminal again
    /// once the process is in the foreground.
    fn suspend(&mut self) -> Result<()> {
        self.give_back();
        let suspended =
            self.taken
                .compare_exchange(libc::SIGTSTP, 0, Ordering::AcqRel, Ordering::Acquire);
        if matches!(suspended, Ok(_) | Err(0)) {
            kill_process(getpid(), Signal::STOP).map_err(io::Error::from)?;
        }
        // Continued, but perhaps in the background.
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
        // A new one, which does not assume that the screen still shows what it drew.
        self.terminal = Terminal::new(CrosstermBackend::new(io::stdout()))?;
        Ok(())
    }

    fn give_back(&mut self) {
        if std::mem::take(&mut self.is_taken) {
            ratatui::restore();
        }
    }
}

impl Drop for LiveTerminal {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Whether this process may write to the terminal; always, if no shell controls that.
fn is_in_foreground() -> bool {
    rustix::termios::tcgetpgrp(io::stdin()).map_or(true, |group| group == getpgrp())
}

/// Starts the thread that takes signals. The result holds the one that was taken and not obeyed
/// yet.
fn take_signals() -> io::Result<Arc<AtomicI32>> {
    let signals = Signals::block(&[ENDING, &[libc::SIGTSTP]].concat())?;
    let taken = Arc::new(AtomicI32::new(0));
    let told = taken.clone();
    let take = move || {
        while let Ok(signal) = signals.wait() {
            if signal == libc::SIGTSTP {
                // Never replaces a signal that ends the process.
                let _ = told.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire);
                continue;
            }
            told.store(signal, Ordering::Release);
            std::thread::sleep(PATIENCE);
            ratatui::restore();
            std::process::exit(128 + signal);
        }
    };
    std::thread::Builder::new().spawn(take)?;
    Ok(taken)
}
