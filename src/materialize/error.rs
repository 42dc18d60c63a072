//! Reasons why a tree cannot be written, and what to do about them.

use std::io;
use std::path::{Path, PathBuf};

use crate::explain::{Explain, Hint, hint_of};
use crate::form::Form;
use crate::source::ReadError;
use crate::units::Size;

/// Why a tree cannot be written. Complete files stay, and the same command continues from there.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty)]
#[strum(serialize_all = "snake_case", prefix = "materialize.")]
pub enum MaterializeError {
    #[error("cannot {action} {path:?}: {cause}")]
    Io {
        action: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("{path:?} exists, but {reason}")]
    #[strum(props(
        hint = "it was not made from this model as it is now. Remove it, replace such files with --force, or choose another directory"
    ))]
    Foreign { path: PathBuf, reason: String },
    #[error("{target:?} holds a model in another form ({})", .form.options())]
    OtherForm { target: PathBuf, form: Form },
    #[error("{0:?} is a directory, where a file must be written")]
    #[strum(props(hint = "remove it, or choose another directory"))]
    FolderInTheWay(PathBuf),
    #[error("{0:?} appeared while the tree was being written, and is not what belongs there")]
    #[strum(props(hint = "run the same command again once nothing else writes to that directory"))]
    Appeared(PathBuf),
    #[error(
        "{0:?} was not chosen, but the registry would list it, and it holds other bytes, like a file of another model of the same shape"
    )]
    #[strum(props(hint = "remove it, or choose another directory"))]
    OtherModel(PathBuf),
    #[error("{0:?} is not a directory")]
    #[strum(props(hint = "choose another place to write to"))]
    NotADirectory(PathBuf),
    #[error("{0:?} is a link, which is not written through")]
    #[strum(props(hint = "remove it, or choose another directory"))]
    Link(PathBuf),
    #[error(
        "{0:?} was moved or replaced while it was being written to, so nothing more was put there"
    )]
    #[strum(props(hint = "run the same command again to write what is missing"))]
    Replaced(PathBuf),
    #[error("another odmoe-fs is writing to {0:?}")]
    #[strum(props(hint = "wait until it has finished"))]
    Locked(PathBuf),
    #[error(
        "{target:?} has room for {}, but {} are needed{}",
        Size(*available), Size(*needed),
        if *replacing { ", since with --force the old files stay until the new ones are complete" } else { "" }
    )]
    #[strum(props(
        hint = "free some room, or choose fewer files with --layers, --experts, --base-only or --experts-only"
    ))]
    NoRoom {
        target: PathBuf,
        needed: u64,
        available: u64,
        /// Whether the plan replaces files.
        replacing: bool,
    },
    #[error("{target:?} cannot share disk blocks with the model: {reason}")]
    #[strum(props(hint = "--reflink auto copies them instead"))]
    CannotShare { target: PathBuf, reason: String },
    #[error("the model does not have everything that {option} {asked} asks for")]
    NotThere {
        option: &'static str,
        what: &'static str,
        asked: String,
        existing: String,
    },
    #[error(
        "nothing to write: none of the chosen layers has an expert with one of the chosen numbers"
    )]
    #[strum(props(hint = "choose others with --layers or --experts"))]
    NothingSelected,
    #[error("stopped")]
    #[strum(props(
        hint = "files that have their names are complete, and the same command goes on from there"
    ))]
    Stopped,
    #[error(transparent)]
    Source(#[from] ReadError),
}

impl Explain for MaterializeError {
    fn code(&self) -> &'static str {
        match self {
            Self::Source(cause) => cause.code(),
            _ => self.into(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Io { cause, .. } => io_hint(cause),
            Self::Source(cause) => cause.hint(),
            Self::OtherForm { form, .. } => Some(
                format!(
                    "choose another directory, or use {} as before",
                    form.options()
                )
                .into(),
            ),
            Self::NotThere { what, existing, .. } => {
                Some(format!("its {what} are {existing}").into())
            }
            _ => hint_of(self),
        }
    }
}

pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> MaterializeError {
    // The folder of a name alone is this one.
    let path = match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    };
    move |cause| MaterializeError::Io {
        action,
        path: path.to_owned(),
        cause,
    }
}

pub(super) const FIND_ROOM: &str = "find out how much room there is in";

/// What to do after this error of the target's file system: what is known of any file, unless more
/// is known of one that is being written.
fn io_hint(cause: &io::Error) -> Option<Hint> {
    let errno = cause.raw_os_error();
    errno
        .and_then(step)
        .map(Hint::Borrowed)
        .or_else(|| cause.hint())
}

fn too_large() -> &'static str {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize);
    match limit.current {
        Some(_) => "raise the limit on file sizes with `ulimit -f`",
        None => "choose a file system that can hold files of this size; FAT ends at 4 GiB",
    }
}

/// What to do after an error number (errno(3)), where a target differs from other files.
fn step(errno: i32) -> Option<&'static str> {
    Some(match errno {
        libc::EFBIG => too_large(),
        libc::EROFS => {
            "choose a directory elsewhere, since this file system is mounted read-only; if it was not before, it has found itself damaged, and `dmesg` shows that"
        }
        libc::EPERM => {
            "check with `lsattr -d` whether it is immutable, and with `ls -ld` who owns it: in a directory like /tmp, only the owner can replace or remove a file"
        }
        libc::EISDIR => "remove the directory that is in the way, or choose another",
        libc::ENOTDIR => "remove what is in the way of a directory, or choose another",
        libc::ENOENT => {
            "run the same command again, since it was removed while the tree was being written"
        }
        libc::EBUSY => "unmount what is mounted there, or choose another directory",
        libc::ETXTBSY => "end the program that runs from it, or `swapoff` it",
        libc::EMFILE => "allow more open files with `ulimit -n`, or use fewer --jobs",
        libc::EOPNOTSUPP | libc::ENOSYS => {
            "choose a directory on another file system, since this one cannot do that"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(errno: i32) -> Option<Hint> {
        io_error("write", Path::new("x"))(io::Error::from_raw_os_error(errno)).hint()
    }

    #[test]
    fn the_next_step_is_that_of_a_target() {
        for (errno, words) in [
            (libc::EROFS, "damaged"),
            (libc::EPERM, "lsattr"),
            (libc::EISDIR, "in the way"),
            (libc::ENOTDIR, "in the way"),
            (libc::ENOENT, "was removed"),
            (libc::EBUSY, "unmount"),
            (libc::ETXTBSY, "swapoff"),
            (libc::EMFILE, "--jobs"),
            (libc::EOPNOTSUPP, "another file system"),
            // And of any file.
            (libc::ENOSPC, "df -i"),
            (libc::EIO, "dmesg"),
        ] {
            let hint = hint(errno).unwrap_or_default();
            assert!(hint.contains(words), "{errno}: {hint}");
        }
    }

    #[test]
    fn where_the_number_does_not_tell_nothing_is_advised() {
        for errno in [libc::EINVAL, libc::EBADF, libc::EFAULT, libc::EXDEV] {
            assert_eq!(hint(errno), None);
        }
        let other = io_error("write", Path::new("x"))(io::Error::other("y"));
        assert_eq!(
            (other.to_string(), other.hint()),
            (r#"cannot write "x": y"#.to_owned(), None)
        );
    }
}
