//! What an error tells people and programs: what is wrong, what to do, and a code.
//!
//! The problem: an error passes through several layers. The outermost knows the file; the innermost
//! knows what went wrong, and therefore what to do next.
//!
//! The plan: every error of this library implements one trait, and an error that wraps another
//! forwards to it. There is a hint only if the next step is known, since a general one would
//! mislead many readers.

use std::borrow::Cow;
use std::error::Error;
use std::io;

use strum::EnumProperty;

use crate::mounts::ForeignLink;

/// What to do about an error, in a sentence without a full stop.
pub type Hint = Cow<'static, str>;

/// An error that explains itself to a person and to a program.
pub trait Explain: Error {
    /// A name that stays the same when the words change, such as `model.missing`.
    fn code(&self) -> &'static str;

    /// What to do; `None` if no next step is known.
    fn hint(&self) -> Option<Hint>;

    /// What is wrong, and what to do, in one line, as for a log.
    fn line(&self) -> String {
        match self.hint() {
            Some(hint) => format!("{self}; {hint}"),
            None => self.to_string(),
        }
    }
}

/// The hint of a variant of an error: `#[strum(props(hint = "..."))]`.
pub fn hint_of(error: &impl EnumProperty) -> Option<Hint> {
    error.get_str("hint").map(Hint::Borrowed)
}

/// The hint of an error of the system follows from its number.
impl Explain for io::Error {
    fn code(&self) -> &'static str {
        "failed"
    }

    fn hint(&self) -> Option<Hint> {
        let inner = self.get_ref().map(|inner| inner.downcast_ref());
        if let Some(Some(link)) = inner {
            return ForeignLink::hint(link);
        }
        let errno = self.raw_os_error().or_else(|| errno_of(self.kind()));
        errno.and_then(step).map(Cow::Borrowed)
    }
}

/// The hint for mounts that fail for a reason outside of this program.
pub(crate) const ASK_DOCTOR: Hint =
    Cow::Borrowed("run `odmoe-fs doctor`, which checks this machine for mounting");

/// The number of an error that a library has wrapped, if its kind still shows it.
fn errno_of(kind: io::ErrorKind) -> Option<i32> {
    Some(match kind {
        io::ErrorKind::NotFound => libc::ENOENT,
        io::ErrorKind::PermissionDenied => libc::EACCES,
        io::ErrorKind::NotADirectory => libc::ENOTDIR,
        io::ErrorKind::IsADirectory => libc::EISDIR,
        io::ErrorKind::InvalidFilename => libc::ENAMETOOLONG,
        io::ErrorKind::ReadOnlyFilesystem => libc::EROFS,
        io::ErrorKind::FileTooLarge => libc::EFBIG,
        io::ErrorKind::StorageFull => libc::ENOSPC,
        io::ErrorKind::QuotaExceeded => libc::EDQUOT,
        io::ErrorKind::OutOfMemory => libc::ENOMEM,
        io::ErrorKind::StaleNetworkFileHandle => libc::ESTALE,
        io::ErrorKind::TimedOut => libc::ETIMEDOUT,
        io::ErrorKind::NotConnected => libc::ENOTCONN,
        _ => return None,
    })
}

/// What to do about an error number (errno(3)); `None` if that does not follow from the number.
fn step(errno: i32) -> Option<&'static str> {
    Some(match errno {
        libc::ENOENT => "check the path; `namei PATH` shows where it ends",
        libc::EACCES => {
            "check the permissions of it and of the directories above it, with `namei -l PATH`"
        }
        libc::ENOTDIR => "check the path: it leads through something that is not a directory",
        libc::EISDIR => "name a file: this is a directory",
        libc::ELOOP => "check the symbolic links on the path, with `namei PATH`",
        libc::ENAMETOOLONG => "choose a shorter name or path",
        libc::EROFS => {
            "choose another directory: this file system is mounted read-only (`findmnt -T PATH`)"
        }
        libc::EFBIG => {
            "raise the limit on file sizes (`ulimit -f`), or choose a file system for larger files"
        }
        libc::ENOSPC => {
            "make room, or choose another file system: `df -h` and `df -i` show which are full"
        }
        libc::EDQUOT => {
            "make room in your quota (`quota -s` shows it), or choose another file system"
        }
        libc::EMFILE => "allow more open files with `ulimit -n`",
        libc::ENFILE => {
            "allow more open files on this machine, with `sudo sysctl fs.file-max=NUMBER`"
        }
        libc::ENOMEM => "close other programs, or allow more memory with `ulimit -v`",
        libc::EIO => "check the disk; `sudo dmesg` lists its errors",
        libc::ENXIO | libc::ENODEV => "attach the disk again, and run the command again",
        libc::ESTALE => {
            "check whether the file server has replaced the file, and run the command again"
        }
        libc::ETIMEDOUT
        | libc::EHOSTDOWN
        | libc::EHOSTUNREACH
        | libc::ENETDOWN
        | libc::ENETUNREACH
        | libc::ECONNREFUSED
        | libc::ECONNRESET => {
            "check the file server and the network to it, and run the command again"
        }
        libc::ENOTCONN | libc::ECONNABORTED => {
            "unmount the file system that it is on and mount that again: the process that served it is dead"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{HeaderError, Problem, SplitError};
    use crate::layout::{LayoutError, PartitionError};
    use crate::materialize::MaterializeError;
    use crate::model::ModelError;
    use crate::mounts::{MountError, ReadAheadError, UnmountError};
    use crate::source::{OpenError, ReadError};
    use crate::toy::ToyError;
    use crate::verify::VerifyError;

    fn system(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    #[test]
    fn codes_and_hints_are_those_of_the_innermost_error() {
        let open = OpenError::Header {
            path: "m; n.gguf".into(),
            cause: Box::new(HeaderError {
                offset: 4,
                field: "version".to_owned(),
                problem: Problem::Version(9),
            }),
            hint: None,
        };
        let error = ModelError::Open(open);
        assert_eq!(error.code(), "gguf.version");
        assert!(
            error
                .to_string()
                .ends_with("version 9 is not supported (only 2 and 3 are)")
        );
        assert!(error.hint().unwrap().contains("newer odmoe-fs"));

        let gone = || ReadError::Read {
            path: "m.gguf".into(),
            offset: 0,
            cause: system(libc::ESTALE),
        };
        for error in [
            &MaterializeError::from(gone()) as &dyn Explain,
            &VerifyError::from(gone()),
            &gone(),
        ] {
            assert_eq!(error.code(), "read.read");
            assert!(error.hint().unwrap().contains("file server"));
        }
        let repair = MountError::Repair {
            directory: "/m".into(),
            cause: UnmountError::NoFusermount,
        };
        assert_eq!(repair.code(), "umount.no_fusermount");
        assert!(repair.hint().unwrap().contains("package fuse3"));
    }

    #[test]
    fn an_error_of_the_system_has_the_hint_of_its_number_in_whatever_wraps_it() {
        let wrapped = |errno| ReadError::Read {
            path: "x".into(),
            offset: 0,
            cause: system(errno),
        };
        for (errno, words) in [
            (libc::ENOENT, "namei"),
            (libc::EACCES, "permissions"),
            (libc::ENOTDIR, "not a directory"),
            (libc::EISDIR, "name a file"),
            (libc::ELOOP, "symbolic links"),
            (libc::ENAMETOOLONG, "shorter"),
            (libc::EROFS, "read-only"),
            (libc::EFBIG, "ulimit -f"),
            (libc::ENOSPC, "df -i"),
            (libc::EDQUOT, "quota"),
            (libc::EMFILE, "ulimit -n"),
            (libc::ENFILE, "file-max"),
            (libc::ENOMEM, "memory"),
            (libc::EIO, "dmesg"),
            (libc::ESTALE, "file server"),
            (libc::ETIMEDOUT, "network"),
            (libc::ENOTCONN, "dead"),
        ] {
            let hint = wrapped(errno).hint().unwrap_or_default();
            assert!(hint.contains(words), "{errno}: {hint}");
            assert_eq!(system(errno).hint(), Some(hint));
        }
    }

    #[test]
    fn an_error_that_a_library_has_wrapped_has_the_hint_of_its_kind() {
        for errno in [libc::ENOENT, libc::EACCES, libc::EROFS, libc::ENOSPC] {
            let wrapped = io::Error::new(system(errno).kind(), "wrapped");
            assert_eq!(wrapped.hint(), system(errno).hint());
            assert!(wrapped.hint().is_some());
        }
    }

    #[test]
    fn a_fault_of_ours_asks_for_a_report_and_has_one_code() {
        let fault = || PartitionError {
            part: 1,
            offset: 2,
            what: "is in two files, or no tensor's",
        };
        let error = LayoutError::from(fault());
        assert_eq!(error.code(), fault().code());
        assert!(error.hint().unwrap().contains("report"));
    }

    #[test]
    fn every_public_error_explains_itself() {
        fn explains<E: Explain>() {}
        explains::<HeaderError>();
        explains::<LayoutError>();
        explains::<MaterializeError>();
        explains::<ModelError>();
        explains::<MountError>();
        explains::<OpenError>();
        explains::<PartitionError>();
        explains::<Problem>();
        explains::<ReadAheadError>();
        explains::<ReadError>();
        explains::<SplitError>();
        explains::<ToyError>();
        explains::<UnmountError>();
        explains::<VerifyError>();
    }

    #[test]
    fn where_no_step_is_known_there_is_no_hint() {
        for errno in [libc::EPERM, libc::EINVAL, libc::EBADF] {
            assert_eq!(system(errno).hint(), None);
        }
        assert_eq!(io::Error::other("x; y").hint(), None);
        assert_eq!(VerifyError::Stopped.hint(), None);
    }
}
