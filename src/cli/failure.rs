//! How a command fails: a sentence that says what, one that says what to do, and a name for programs.
//!
//! An error's text is "what; what to do", on one line, so that it can also stand in a log. Quoted
//! in it are paths and names from models, in which nothing separates.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use odmoe_fs::materialize::MaterializeError;
use odmoe_fs::model::ModelError;
use odmoe_fs::mounts::{MountError, UnmountError};
use odmoe_fs::source::{OpenError, ReadError};
use odmoe_fs::verify::VerifyError;
use serde::Serialize;

use super::stop::Interrupted;
use super::top::TopError;
use super::{Diagnostics, print_json};

/// The exit status of `verify` when a tree is not that of the model, and of `doctor` when a mount will
/// not work.
pub const FOUND_SOMETHING: u8 = 3;
/// That of a command line that cannot be understood.
pub const WRONG_USAGE: u8 = 2;

/// Exit statuses and what they mean, as the manual page lists them.
pub const EXIT_STATUSES: [(&str, &str); 6] = [
    ("0", "done"),
    ("1", "failed; the error says why, and what to do"),
    ("2", "wrong usage"),
    (
        "3",
        "verify found a difference or a model that may be incomplete, or doctor something that keeps mounts from working",
    ),
    ("130", "ended by Ctrl-C (SIGINT)"),
    ("143", "ended by SIGTERM"),
];

/// An error as it is told.
#[derive(Serialize)]
pub struct Failure {
    /// A name that stays the same when the words change.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

impl Failure {
    pub fn of(error: &anyhow::Error) -> Self {
        let code = code(error);
        let text = format!("{error:#}");
        let (message, hint) = match split(&text) {
            (message, Some(hint)) => (message, hint.to_owned()),
            (message, None) => (message, general_hint(code, error)),
        };
        Self {
            code,
            message: message.to_owned(),
            hint,
        }
    }

    /// Tells it on the standard error, and with `json` also as `{"error": ...}` where the result
    /// would have been.
    pub fn tell(&self, json: bool) {
        // In one piece, whatever else writes there.
        let text = format!("error: {}\nhint: {}\n", self.message, self.hint);
        let _ = Diagnostics.write_all(text.as_bytes());
        if json {
            self.print_json();
        }
    }

    /// Nobody can be told if that fails, too.
    pub fn print_json(&self) {
        let _ = print_json(&serde_json::json!({ "error": self }));
    }
}

pub fn exit_code(result: anyhow::Result<()>, json: bool) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            Failure::of(&e).tell(json);
            match e.downcast_ref::<Interrupted>() {
                Some(Interrupted(signal)) => ExitCode::from(128 + *signal as u8),
                None => ExitCode::FAILURE,
            }
        }
    }
}

/// Whether the reader of our output has seen enough, as `head` does.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|e| e.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// What is before the first `; ` outside of quotes, and what is behind it.
fn split(text: &str) -> (&str, Option<&str>) {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ';' if !quoted => {
                if let Some(hint) = text[at..].strip_prefix("; ") {
                    return (&text[..at], Some(hint));
                }
            }
            _ => {}
        }
    }
    (text, None)
}

fn code(error: &anyhow::Error) -> &'static str {
    if error.is::<Interrupted>() {
        return "interrupted";
    }
    // From the outermost to what it was made from, as far as these say so.
    let known = error.chain().find_map(known_code);
    known.unwrap_or("failed")
}

fn known_code(error: &(dyn Error + 'static)) -> Option<&'static str> {
    None.or_else(|| error.downcast_ref().map(model_code))
        .or_else(|| error.downcast_ref().map(open_code))
        .or_else(|| error.downcast_ref::<UnmountError>().map(Into::into))
        .or_else(|| error.downcast_ref::<TopError>().map(Into::into))
        .or_else(|| error.downcast_ref::<ReadError>().map(Into::into))
        .or_else(|| match error.downcast_ref::<MountError>()? {
            MountError::Repair { cause, .. } => Some(cause.into()),
            e => Some(e.into()),
        })
        .or_else(|| match error.downcast_ref::<MaterializeError>()? {
            MaterializeError::Source(e) => Some(e.into()),
            e => Some(e.into()),
        })
        .or_else(|| match error.downcast_ref::<VerifyError>()? {
            VerifyError::Model(e) => Some(e.into()),
            e => Some(e.into()),
        })
}

fn model_code(error: &ModelError) -> &'static str {
    match error {
        ModelError::Open(e) => open_code(e),
        ModelError::Layout { cause, .. } => cause.into(),
    }
}

fn open_code(error: &OpenError) -> &'static str {
    match error {
        OpenError::Header { cause, .. } => (&cause.problem).into(),
        OpenError::Split { cause, .. } => cause.into(),
        e => e.into(),
    }
}

/// What to do about an error that does not say it itself.
fn general_hint(code: &str, error: &anyhow::Error) -> String {
    let family = code.split_once('.').map_or(code, |(family, _)| family);
    let hint = match (family, code) {
        (_, "interrupted") => "say the same command again",
        ("gguf" | "split" | "layout", _) => {
            "compare the file's checksum with the published one, and download it again if it differs"
        }
        (_, "model.io") => "check the path, and that you may read the file",
        ("read", _) => "check the disk that holds the model (`dmesg` tells its errors)",
        ("mount" | "umount", _) => "say `odmoe-fs doctor`, which checks this machine for mounting",
        _ => cause_hint(error),
    };
    hint.to_owned()
}

/// What to do about an error of the system.
fn cause_hint(error: &anyhow::Error) -> &'static str {
    let cause = error.chain().find_map(|e| e.downcast_ref::<io::Error>());
    match cause.map(io::Error::kind) {
        Some(io::ErrorKind::NotFound) => "check the path",
        Some(io::ErrorKind::PermissionDenied) => "choose a place that you have the right to use",
        Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => "free some room",
        _ => "say the same with -v to learn more",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_follows_the_first_semicolon_outside_of_quotes() {
        assert_eq!(split("a; b; c"), ("a", Some("b; c")));
        assert_eq!(
            split(r#""a; \"; b" is bad; go"#),
            (r#""a; \"; b" is bad"#, Some("go"))
        );
        assert_eq!(split("a;b"), ("a;b", None));
    }

    #[test]
    fn codes_are_those_of_the_innermost_error() {
        let open = OpenError::Missing {
            folder: "/".into(),
            missing: vec!["x".into()],
            count: 2,
        };
        assert_eq!(code(&ModelError::Open(open).into()), "model.missing");
        let error = anyhow::Error::from(MountError::NoDevice).context("more");
        assert_eq!(code(&error), "mount.no_device");
        assert_eq!(code(&anyhow::anyhow!("x")), "failed");
    }
}
