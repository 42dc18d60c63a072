//! The life of a mount: whether it can be made, when it is ready, and how it ends.
//!
//! The problem: a command that returns before the tree answers, a daemon that holds its caller's
//! terminal, or an unmount that hits another file system are each worse than no mount.
//!
//! The plan: [`Mount::prepare`] checks everything that can be checked beforehand, since a user
//! should read a reason and not an errno. [`Mount::serve`] serves the mount until it is unmounted
//! or told to stop. [`launch`] does both in a daemon, and reports to the caller what became of it.
//! [`unmount`] ends a mount of ours.

mod attach;
mod background;
mod copies;
mod holders;
mod log;
mod place;
mod preflight;
mod processes;
mod read_ahead;
mod session;
mod status;
mod table;
mod unmount;
mod workers;

use std::io;
use std::path::{Path, PathBuf};

use fuser::SessionACL;

pub use background::{Caller, Launched, answers, launch};
pub use copies::MountCopy;
pub use holders::{Holder, Users};
pub use log::open_log;
pub use preflight::unmount_stale;
pub use read_ahead::{ReadAheadError, set_read_ahead};
pub use status::{MountStatus, State, state_of, status};
pub use table::{ForeignLink, MountEntry, mount_of, mount_table, odmoe_mount_of};
pub use unmount::{StillServed, UnmountError, Unmounted, unmount};

use self::attach::MountParameters;
use self::place::{Lock, Place};
use self::preflight::Claim;
use crate::explain::{ASK_DOCTOR, Explain, Hint, hint_of};
use crate::fuse::OdmoeFs;
use crate::model::Model;
pub use crate::served::Cache;
use crate::served::{Owner, Served};
use crate::source::PageCache;
use crate::sys::process::{effective_ids, map_large_buffers};

/// The file system type in mount tables.
pub const FS_TYPE: &str = "fuse.odmoe";
const SUBTYPE: &str = "odmoe";

/// What a user can choose about a mount.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Mount over a directory that is not empty.
    pub nonempty: bool,
    /// First unmount an odmoe-fs mount that is on the directory, whatever its state.
    pub replace: bool,
    /// Let every user in, not only the one who mounts.
    pub allow_other: bool,
    /// The owner of the files; `None` is the user who mounts.
    pub uid: Option<u32>,
    /// The group of the files; `None` is that of the user who mounts.
    pub gid: Option<u32>,
    /// The number of worker threads; `None` chooses it by the number of processors and by where the
    /// model is.
    pub threads: Option<usize>,
    /// Which page cache keeps what was read.
    pub cache: Cache,
    /// Count requests, and show the counters as extended attributes of the root ([`crate::stats`]).
    pub stats: bool,
    /// SELinux labels of the mount, such as `context="..."`. Only root may set them, and a kernel
    /// without SELinux refuses them.
    pub security_labels: Vec<String>,
}

/// Why a mount cannot be made, or ended badly.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr, strum::EnumProperty)]
#[strum(serialize_all = "snake_case", prefix = "mount.")]
pub enum MountError {
    #[error("{0:?} does not exist")]
    #[strum(props(hint = "make it with `mkdir -p`"))]
    DirectoryMissing(PathBuf),
    #[error("{0:?} is not a directory")]
    #[strum(props(hint = "a mount needs an empty one"))]
    NotADirectory(PathBuf),
    #[error("{0:?} is not empty, and mounting would hide what is in it")]
    #[strum(props(hint = "choose another directory, or pass --nonempty"))]
    NotEmpty(PathBuf),
    #[error("{source_name:?} is already mounted on {directory:?}")]
    #[strum(props(hint = "unmount it first, with `odmoe-fs umount`, or pass --replace"))]
    AlreadyMounted {
        directory: PathBuf,
        source_name: String,
    },
    #[error(
        "{source_name:?} is mounted on {directory:?}, but {} does not answer",
        process(*.pid)
    )]
    #[strum(props(
        hint = "pass --replace, or unmount it with `odmoe-fs umount --lazy`, and end the process"
    ))]
    NotAnswering {
        directory: PathBuf,
        source_name: String,
        pid: Option<u32>,
    },
    #[error("{directory:?} is a mount whose process is dead, and cannot be repaired: {cause}")]
    Repair {
        directory: PathBuf,
        cause: UnmountError,
    },
    #[error("the mount on {directory:?} cannot be replaced: {cause}")]
    CannotReplace {
        directory: PathBuf,
        cause: UnmountError,
    },
    #[error("{0:?} was moved, replaced or unmounted while the mount was being made")]
    #[strum(props(hint = "check what is there now, and mount again"))]
    Moved(PathBuf),
    #[error("{0:?} is locked by another program, perhaps another mount that is being made")]
    #[strum(props(hint = "try again"))]
    DirectoryLocked(PathBuf),
    #[error("{directory:?} lies inside the odmoe-fs mount on {mount:?}")]
    #[strum(props(hint = "choose a directory outside of it"))]
    InsideMount { directory: PathBuf, mount: PathBuf },
    #[error("{directory:?} holds the model's own file {part:?}, which the mount would hide")]
    #[strum(props(hint = "choose another directory"))]
    HidesModel { directory: PathBuf, part: PathBuf },
    #[error("{directory:?} cannot be used: {cause}")]
    Directory {
        directory: PathBuf,
        cause: io::Error,
    },
    #[error("/dev/fuse does not exist, so this kernel has no FUSE")]
    #[strum(props(
        hint = "load it with `modprobe fuse`, or start the container with `--device /dev/fuse --cap-add SYS_ADMIN`"
    ))]
    NoDevice,
    #[error("this user may not open /dev/fuse")]
    #[strum(props(
        hint = "open it to all users with `sudo chmod 0666 /dev/fuse`, as distributions do"
    ))]
    DeviceDenied,
    #[error("/dev/fuse cannot be opened: {0}")]
    Device(io::Error),
    #[error("fusermount3 is not installed, and mounting needs it unless you are root")]
    #[strum(props(
        hint = "install the package fuse3 (`sudo apt install fuse3`, `sudo dnf install fuse3`)"
    ))]
    NoFusermount,
    #[error("FUSERMOUNT_PATH is {0:?}, which is not a program")]
    #[strum(props(hint = "unset it, or name the fusermount3 of the package fuse3"))]
    WrongHelper(PathBuf),
    #[error(
        "--allow-other needs the line `user_allow_other` in /etc/fuse.conf, unless you are root"
    )]
    UserAllowOther,
    #[error("mounting on {directory:?} failed: {reason}")]
    Refused {
        directory: PathBuf,
        /// The message of the mount helper or the kernel.
        reason: String,
        /// What to do, in the usual cases.
        hint: Option<Hint>,
    },
    #[error("the mount on {directory:?} ended: {cause}")]
    Session {
        directory: PathBuf,
        cause: io::Error,
    },
    #[error("{threads} worker threads cannot be started: {cause}")]
    #[strum(props(
        hint = "use fewer with --threads, or allow more with `ulimit -u` and `ulimit -v`"
    ))]
    Workers { threads: usize, cause: io::Error },
    #[error("cannot go to the background: {0}")]
    #[strum(props(
        hint = "mount with -f, or allow more processes: `ulimit -u`, and `pids.max` of the control group"
    ))]
    Background(io::Error),
    #[error("interrupted by signal {0} before the mount could be used")]
    Interrupted(i32),
    #[error("unmounted again, since the command that asked for the mount has ended: {0}")]
    Abandoned(io::Error),
    #[error(
        "the connection of the mount on {0:?} was aborted (by `umount -f`, perhaps in a container that has a copy of the mount, or through /sys/fs/fuse)"
    )]
    #[strum(props(hint = "mount again"))]
    Aborted(PathBuf),
    #[error("the background process ended before the mount was ready ({0})")]
    #[strum(props(
        hint = "if memory is short, use fewer --threads; otherwise mount with -f to see why"
    ))]
    DaemonDied(String),
}

impl Explain for MountError {
    fn code(&self) -> &'static str {
        match self {
            Self::Repair { cause, .. } | Self::CannotReplace { cause, .. } => cause.code(),
            _ => self.into(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::Repair { cause, .. } | Self::CannotReplace { cause, .. } => cause.hint(),
            Self::Directory { cause, .. } => cause.hint(),
            Self::Session { cause, .. } => cause.hint(),
            Self::Background(cause) => cause.hint().or_else(|| hint_of(self)),
            Self::Device(_) | Self::UserAllowOther => Some(ASK_DOCTOR),
            Self::Refused { hint, .. } => hint.clone().or(Some(ASK_DOCTOR)),
            _ => hint_of(self),
        }
    }
}

fn process(pid: Option<u32>) -> String {
    pid.map_or("its process".into(), |pid| format!("its process {pid}"))
}

/// A mount that can be made, as far as that can be known beforehand.
#[derive(Debug)]
pub struct Mount {
    file_system: OdmoeFs,
    place: Place,
    /// These keep others from mounting on the same directory meanwhile.
    locks: Vec<Lock>,
    parameters: MountParameters,
    acl: SessionACL,
    threads: usize,
}

impl Mount {
    /// Checks that `model` can be mounted on `directory` with these options.
    pub fn prepare(
        mut model: Model,
        directory: &Path,
        options: &Options,
    ) -> Result<Self, MountError> {
        preflight::usable_fuse(options)?;
        let threads = usable_threads(options.threads, model.source().is_remote())?;
        if options.cache == Cache::Mount {
            // The mounted files keep the bytes; a second copy would cost twice the memory.
            model.set_page_cache(PageCache::Unchanged);
            if !model.source().can_leave_page_cache() {
                tracing::warn!(
                    "the model's file system reads only through the page cache, so what is read will be in memory twice; --cache direct keeps it once"
                );
            }
        }
        let (uid, gid) = effective_ids();
        let owner = Owner {
            uid: options.uid.unwrap_or(uid),
            gid: options.gid.unwrap_or(gid),
        };
        if !options.allow_other && owner.uid != uid {
            tracing::warn!(
                "the files belong to user {}, but only user {uid}, who mounts, may enter; pass --allow-other to let others in",
                owner.uid
            );
        }
        let parameters = MountParameters {
            source: source_name(&model),
            allow_other: options.allow_other,
            security_labels: options.security_labels.clone(),
        };
        // Last, since `replace` unmounts what is there.
        let Claim { place, locks } = preflight::claim(&model, directory, options)?;
        let mut served = Served::new(model, owner, options.cache);
        if options.stats {
            served.count();
        }
        Ok(Self {
            file_system: OdmoeFs::new(served),
            place,
            locks,
            parameters,
            acl: if options.allow_other {
                SessionACL::All
            } else {
                SessionACL::Owner
            },
            threads,
        })
    }

    /// The directory, absolute and without links.
    pub fn directory(&self) -> &Path {
        self.place.path()
    }

    /// The model to be shown.
    pub fn model(&self) -> &Model {
        self.file_system.served().model()
    }
}

/// The name of the source in mount tables: the model's path, unless the mount helper, which gets
/// all options in one string with commas between them, could take a part of it for an option.
fn source_name(model: &Model) -> String {
    model
        .source()
        .given_path()
        .to_str()
        .filter(|path| !path.contains([',', '\\']) && !path.contains(char::is_control))
        .unwrap_or(SUBTYPE)
        .to_owned()
}

/// Workers of a mount of a model elsewhere. Whoever waits for a server that is gone takes one, and
/// they must not run out: names, attributes and what is cached are still to be had.
const REMOTE_THREADS: usize = 64;

/// The number of workers, all of which can start.
fn usable_threads(wanted: Option<usize>, is_remote: bool) -> Result<usize, MountError> {
    if wanted.is_none() && is_remote && cfg!(target_os = "linux") {
        // Of so many buffers for requests, few are ever filled.
        map_large_buffers();
        match workers::try_workers(REMOTE_THREADS) {
            Ok(()) => return Ok(REMOTE_THREADS),
            Err(cause) => tracing::debug!("{REMOTE_THREADS} workers cannot start: {cause}"),
        }
    }
    let threads = wanted.unwrap_or_else(default_threads);
    workers::try_workers(threads).map_err(|cause| MountError::Workers { threads, cause })?;
    Ok(threads)
}

/// More workers than processors, since they wait for the disk as much as they work.
fn default_threads() -> usize {
    if !cfg!(target_os = "linux") {
        return 1; // fuser has one event loop elsewhere
    }
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    (4 * processors).clamp(8, 16)
}
