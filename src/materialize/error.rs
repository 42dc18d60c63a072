//! Reasons why a tree cannot be written, and what to do about them.

use std::io;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;

use crate::source::ReadError;

/// Why a tree cannot be written. Complete files stay, and the same command continues from there.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "materialize.")]
pub enum MaterializeError {
    #[error("cannot {action} {path:?}: {cause}{}", after(.cause))]
    Io {
        action: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error(
        "{path:?} exists, but {reason}; it was not made from this model as it is now. Remove it, replace such files with --force, or choose another directory"
    )]
    Foreign { path: PathBuf, reason: String },
    #[error(
        "{0:?} is a directory, where a file must be written; remove it, or choose another directory"
    )]
    FolderInTheWay(PathBuf),
    #[error(
        "{0:?} appeared while the tree was being written, and is not what belongs there; run the same command again once nothing else writes to that directory"
    )]
    Appeared(PathBuf),
    #[error(
        "{0:?} was not chosen, but the registry would list it, and it holds other bytes, like a file of another model of the same shape; remove it, or choose another directory"
    )]
    OtherModel(PathBuf),
    #[error("{0:?} is not a directory; choose another place to write to")]
    NotADirectory(PathBuf),
    #[error(
        "{0:?} is a link, which is not written through; remove it, or choose another directory"
    )]
    Link(PathBuf),
    #[error(
        "{0:?} was moved or replaced while it was being written to, so nothing more was put there; run the same command again to write what is missing"
    )]
    Replaced(PathBuf),
    #[error("another odmoe-fs is writing to {0:?}; wait until it has finished")]
    Locked(PathBuf),
    #[error(
        "{target:?} has room for {}, but {} are needed{}; free some room, or choose fewer files with --layers, --experts, --base-only or --experts-only",
        HumanBytes(*available), HumanBytes(*needed),
        if *replacing { ", since with --force the old files stay until the new ones are complete" } else { "" }
    )]
    NoRoom {
        target: PathBuf,
        needed: u64,
        available: u64,
        /// Whether the plan replaces files.
        replacing: bool,
    },
    #[error(
        "{target:?} cannot share disk blocks with the model: {reason}; --reflink auto copies them instead"
    )]
    CannotShare { target: PathBuf, reason: String },
    #[error(
        "the model does not have everything that {option} {asked} asks for; its {what} are {existing}"
    )]
    NotThere {
        option: &'static str,
        what: &'static str,
        asked: String,
        existing: String,
    },
    #[error(
        "nothing to write: none of the chosen layers has an expert with one of the chosen numbers; choose others with --layers or --experts"
    )]
    NothingSelected,
    #[error(
        "stopped; files that have their names are complete, and the same command goes on from there"
    )]
    Stopped,
    #[error(transparent)]
    Source(#[from] ReadError),
}

pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> MaterializeError {
    move |cause| MaterializeError::Io {
        action,
        path: path.to_owned(),
        cause,
    }
}

pub(super) const FIND_ROOM: &str = "find out how much room there is in";

/// The end of an error's text: what to do after this error of the system, if its number tells.
fn after(cause: &io::Error) -> String {
    let step = match cause.raw_os_error() {
        Some(libc::EFBIG) => too_large(),
        Some(errno) => step(errno),
        None => "",
    };
    match step {
        "" => String::new(),
        step => format!("; {step}"),
    }
}

fn too_large() -> &'static str {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize);
    match limit.current {
        Some(_) => "raise the limit on file sizes with `ulimit -f`",
        None => "choose a file system that can hold files of this size; FAT ends at 4 GiB",
    }
}

/// The next step after an error number (errno(3)) of the target.
fn step(errno: i32) -> &'static str {
    match errno {
        libc::ENOSPC => {
            "free some room or some inodes (`df -h` and `df -i` show both), and run the same command again"
        }
        libc::EDQUOT => "free some of the quota or have it raised, and run the same command again",
        libc::EROFS => {
            "choose a directory elsewhere, since this file system is mounted read-only; if it was not before, it has found itself damaged, and `dmesg` shows that"
        }
        libc::EACCES => {
            "check the permissions of that directory and of those above it, or choose another"
        }
        libc::EPERM => {
            "check with `lsattr -d` whether it is immutable, and with `ls -ld` who owns it: in a directory like /tmp, only the owner can replace or remove a file"
        }
        libc::EISDIR => "remove the directory that is in the way, or choose another",
        libc::ENOTDIR => "remove what is in the way of a directory, or choose another",
        libc::ENAMETOOLONG => "choose a directory with a shorter path",
        libc::ELOOP => "check the links on the path",
        libc::ENOENT => {
            "run the same command again, since it was removed while the tree was being written"
        }
        libc::EBUSY => "unmount what is mounted there, or choose another directory",
        libc::ETXTBSY => "end the program that runs from it, or `swapoff` it",
        libc::EMFILE => "allow more open files with `ulimit -n`, or use fewer --jobs",
        libc::ENFILE => "wait until other programs have closed some of the files of this machine",
        libc::ENOMEM => "free some memory, and run the same command again",
        libc::EIO => "check the disk that holds it; `dmesg` shows its errors",
        libc::ENXIO | libc::ENODEV => "attach the disk again, and run the same command again",
        libc::ESTALE => {
            "mount that file system again, since its server has replaced the file or directory"
        }
        libc::ENOTCONN | libc::ECONNABORTED => {
            "unmount that file system and mount it again, since its process is dead"
        }
        libc::ETIMEDOUT
        | libc::EHOSTDOWN
        | libc::EHOSTUNREACH
        | libc::ENETDOWN
        | libc::ENETUNREACH
        | libc::ECONNREFUSED
        | libc::ECONNRESET => "check the file server and the network to it",
        libc::EOPNOTSUPP | libc::ENOSYS => {
            "choose a directory on another file system, since this one cannot do that"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(errno: i32) -> String {
        io_error("write", Path::new("x"))(io::Error::from_raw_os_error(errno)).to_string()
    }

    #[test]
    fn the_next_step_follows_the_number_of_the_error() {
        for (errno, words) in [
            (libc::ENOSPC, "df -i"),
            (libc::EDQUOT, "quota"),
            (libc::EROFS, "read-only"),
            (libc::EACCES, "permissions"),
            (libc::EPERM, "lsattr"),
            (libc::EISDIR, "in the way"),
            (libc::ENOTDIR, "in the way"),
            (libc::ENAMETOOLONG, "shorter"),
            (libc::ELOOP, "links"),
            (libc::ENOENT, "was removed"),
            (libc::EBUSY, "unmount"),
            (libc::ETXTBSY, "swapoff"),
            (libc::EMFILE, "ulimit -n"),
            (libc::ENFILE, "other programs"),
            (libc::ENOMEM, "memory"),
            (libc::EIO, "dmesg"),
            (libc::ENXIO, "attach"),
            (libc::ENODEV, "attach"),
            (libc::ESTALE, "its server"),
            (libc::ENOTCONN, "process is dead"),
            (libc::ETIMEDOUT, "network"),
            (libc::ECONNRESET, "network"),
            (libc::EOPNOTSUPP, "another file system"),
        ] {
            let text = text(errno);
            let (what, step) = text.split_once("; ").unwrap_or_default();
            assert!(what.contains(r#"cannot write "x": "#), "{text}");
            assert!(step.contains(words), "{text}");
        }
    }

    #[test]
    fn where_the_number_does_not_tell_nothing_is_advised() {
        for errno in [libc::EINVAL, libc::EBADF, libc::EFAULT, libc::EXDEV] {
            assert!(!text(errno).contains(';'));
        }
        let other = io_error("write", Path::new("x"))(io::Error::other("y"));
        assert_eq!(other.to_string(), r#"cannot write "x": y"#);
    }
}
