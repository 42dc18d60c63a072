//! How a command fails: what is wrong, what to do, a code for programs, and the exit status.
//!
//! Every error of the library becomes a [`Failure`] at `?`; commands add what they were doing with
//! [`Context`].

use std::borrow::Cow;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use odmoe_fs::explain::{Explain, Hint};
use serde::{Deserialize, Serialize};

use super::{Diagnostics, print_json};

/// The exit status of `verify` when a tree is not that of the model, and of `doctor` when a mount
/// will not work.
pub const FOUND_SOMETHING: u8 = 3;
/// That of a command line that cannot be understood.
pub const WRONG_USAGE: u8 = 2;

/// Exit statuses and what they mean, as the manual page lists them.
pub const EXIT_STATUSES: [(&str, &str); 7] = [
    ("0", "done"),
    (
        "1",
        "failed; the error says why, and what to do if that is known",
    ),
    ("2", "wrong usage"),
    (
        "3",
        "verify found a difference or a model that may be incomplete, or doctor something that keeps mounts from working",
    ),
    ("129", "ended by SIGHUP, as when the terminal is closed"),
    ("130", "ended by Ctrl-C (SIGINT)"),
    ("143", "ended by SIGTERM"),
];

/// What a command returns.
pub type Result<T> = std::result::Result<T, Failure>;

/// An error as it is printed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failure {
    /// A name that stays the same when the words change.
    pub code: Cow<'static, str>,
    /// What is wrong.
    pub message: String,
    /// What to do, where that is known.
    pub hint: Option<Hint>,
    #[serde(skip)]
    end: End,
}

/// How a command that failed has ended.
#[derive(Debug, Clone, Copy, Default)]
enum End {
    #[default]
    Failed,
    /// The command line asks for what does not go together.
    WrongUsage,
    /// The reader of its output has seen enough, as `head` does.
    OutputClosed,
    Signal(i32),
}

impl Failure {
    /// For another process to report.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("texts are JSON")
    }

    /// What another process has to report.
    pub fn from_json(json: &[u8]) -> Self {
        serde_json::from_slice(json).unwrap_or_else(|e| Self::unknown(&e))
    }

    /// A failure without an error of the library behind it.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            code: "failed".into(),
            message: message.into(),
            hint: None,
            end: End::Failed,
        }
    }

    /// A wrong command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            code: "usage".into(),
            end: End::WrongUsage,
            ..Self::new(message).hint("see --help")
        }
    }

    pub fn hint(self, hint: impl Into<Hint>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// An error of which only the text is known.
    pub fn unknown(error: &dyn Error) -> Self {
        Self::new(error.to_string())
    }

    /// The failure that another process of this program has printed on its standard error.
    pub fn parsed(stderr: &str) -> Self {
        let line = |name| stderr.lines().find_map(|line| line.strip_prefix(name));
        Self {
            hint: line("hint: ").map(|hint| Cow::Owned(hint.to_owned())),
            ..Self::new(line("error: ").unwrap_or(stderr.trim()))
        }
    }

    /// The output cannot be written.
    pub fn output(error: &io::Error) -> Self {
        let end = match error.kind() {
            io::ErrorKind::BrokenPipe => End::OutputClosed,
            _ => End::Failed,
        };
        Self {
            hint: error.hint(),
            end,
            ..Self::new(format!("cannot write to the standard output: {error}"))
        }
    }

    /// A signal has ended the work.
    pub fn interrupted(signal: i32) -> Self {
        Self {
            code: "interrupted".into(),
            end: End::Signal(signal),
            ..Self::new(format!("interrupted by signal {signal}"))
        }
        .hint("run the same command again")
    }

    /// The same, when a signal has ended the work.
    pub fn by_signal(self, signal: i32) -> Self {
        if self.code == "interrupted" {
            return self; // it says so
        }
        Self {
            code: "interrupted".into(),
            message: format!("interrupted by signal {signal}: {}", self.message),
            end: End::Signal(signal),
            ..self
        }
    }

    /// The same, with what was being done in front of the message.
    pub fn context(self, what: &str) -> Self {
        Self {
            message: format!("{what}: {}", self.message),
            ..self
        }
    }

    /// Whether the reader of our output has seen enough, which is no failure.
    pub fn is_closed_output(&self) -> bool {
        matches!(self.end, End::OutputClosed)
    }

    /// Prints it on the standard error, and with `json` also as `{"error": ...}` where the result
    /// would have been.
    pub fn report(&self, json: bool) {
        let mut text = format!("error: {}\n", self.message);
        if let Some(hint) = &self.hint {
            text += &format!("hint: {hint}\n");
        }
        // In one piece, whatever else writes there.
        let _ = Diagnostics.write_all(text.as_bytes());
        if json {
            self.print_json();
        }
    }

    /// Prints it as JSON, if that is still possible.
    pub fn print_json(&self) {
        let _ = print_json(&serde_json::json!({ "error": self }));
    }

    fn exit_status(&self) -> u8 {
        match self.end {
            End::OutputClosed => 0,
            End::Failed => 1,
            End::WrongUsage => WRONG_USAGE,
            End::Signal(signal) => 128 + signal as u8,
        }
    }
}

impl<E: Explain> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            code: error.code().into(),
            hint: error.hint(),
            ..Self::new(error.to_string())
        }
    }
}

/// What was being done when something failed.
pub trait Context<T> {
    /// Puts a text in front of the message.
    fn with_context(self, what: impl FnOnce() -> String) -> Result<T>;

    /// The same, with a text that is there already.
    fn context(self, what: &str) -> Result<T>
    where
        Self: Sized,
    {
        self.with_context(|| what.to_owned())
    }
}

impl<T, E: Into<Failure>> Context<T> for std::result::Result<T, E> {
    fn with_context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.into().context(&what()))
    }
}

/// The context of `None` says what is missing.
impl<T> Context<T> for Option<T> {
    fn with_context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.ok_or_else(|| Failure::new(what()))
    }
}

pub fn exit_code(result: Result<()>, json: bool) -> ExitCode {
    let Err(failure) = result else {
        return ExitCode::SUCCESS;
    };
    if !failure.is_closed_output() {
        failure.report(json);
    }
    ExitCode::from(failure.exit_status())
}

#[cfg(test)]
mod tests {
    use super::*;
    use odmoe_fs::mounts::MountError;

    fn broken_pipe() -> io::Error {
        io::ErrorKind::BrokenPipe.into()
    }

    #[test]
    fn an_error_of_the_library_keeps_its_code_and_hint_below_a_context() {
        let failed: std::result::Result<(), _> = Err(MountError::NoFusermount);
        let failure = failed.context("cannot start").unwrap_err();
        assert_eq!(failure.code, "mount.no_fusermount");
        assert!(failure.message.starts_with("cannot start: fusermount3 is"));
        assert!(failure.hint.unwrap().contains("apt install fuse3"));
    }

    #[test]
    fn only_a_closed_output_is_no_failure() {
        assert_eq!(Failure::output(&broken_pipe()).exit_status(), 0);
        assert_eq!(Failure::from(broken_pipe()).exit_status(), 1);
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(Failure::output(&full).exit_status(), 1);
    }

    #[test]
    fn a_signal_decides_the_exit_status_and_leaves_the_hint() {
        for (signal, status) in [
            (libc::SIGHUP, 129),
            (libc::SIGINT, 130),
            (libc::SIGTERM, 143),
        ] {
            let failure = Failure::new("stopped").hint("go on").by_signal(signal);
            assert_eq!(
                (&*failure.code, failure.exit_status()),
                ("interrupted", status)
            );
            assert_eq!(failure.hint.unwrap(), "go on");
            assert!(
                EXIT_STATUSES
                    .iter()
                    .any(|(listed, _)| *listed == status.to_string())
            );
        }
    }

    #[test]
    fn what_another_process_told_is_told_in_the_same_parts() {
        let failure = Failure::parsed(" WARN x\nerror: no way\nhint: turn back\n");
        assert_eq!(failure.message, "no way");
        assert_eq!(failure.hint.unwrap(), "turn back");
        let failure = Failure::parsed("Killed\n");
        assert_eq!((&*failure.message, failure.hint), ("Killed", None));
    }
}
