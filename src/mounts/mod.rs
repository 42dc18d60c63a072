//! A mount's life: may it be made, is it ready, when does it end.
//!
//! The problem: a command that returns before the tree answers, a daemon that holds its caller's
//! terminal, or an unmount that hits another file system are each worse than no mount.
//!
//! The plan: [`Mount::prepare`] finds out everything that can be known before (so that a user
//! reads the reason and not an errno), [`Mount::serve`] runs it until it is unmounted or told to
//! stop, [`Mount::serve_in_background`] does so in a daemon whose fate the caller learns, and
//! [`unmount`] ends one of ours.

mod background;
mod holders;
mod preflight;
mod processes;
mod read_ahead;
mod status;
mod table;
mod unmount;

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fuser::{Config, MountOption, Session, SessionACL};
use memmap2::MmapMut;

pub use holders::Holder;
pub use read_ahead::{ReadAheadError, set_read_ahead};
pub use status::{MountStatus, State, state_of, status};
pub use table::{MountEntry, mount_of, mount_table, odmoe_mount_of};
pub(crate) use unmount::fusermount;
pub use unmount::{UnmountError, unmount};

use crate::explain::{ASK_DOCTOR, Explain, Hint, written};
pub use crate::fuse::Cache;
use crate::fuse::{OdmoeFs, Owner};
use crate::model::Model;
use crate::source::PageCache;
use crate::sys::privileges;
pub use crate::sys::privileges::no_new_privileges;
use crate::sys::process::effective_ids;
pub use crate::sys::process::{Signals, close_inherited_descriptors};

/// The file system type in mount tables.
pub const FS_TYPE: &str = "fuse.odmoe";
const SUBTYPE: &str = "odmoe";

/// What a user may choose of a mount.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Mount over a directory that is not empty.
    pub nonempty: bool,
    /// First unmount what of ours is mounted on the directory, in whatever state.
    pub replace: bool,
    /// Let every user in, not only the one who mounts.
    pub allow_other: bool,
    /// The owner of the files, instead of the one who mounts.
    pub uid: Option<u32>,
    /// The group of the files, instead of that of the one who mounts.
    pub gid: Option<u32>,
    /// Worker threads; `None` chooses by the number of processors.
    pub threads: Option<usize>,
    /// Whose page cache keeps what was read.
    pub cache: Cache,
    /// Count what is asked for, and show it as extended attributes of the root ([`crate::stats`]).
    pub stats: bool,
    /// Labels that SELinux gives the mount, such as `context="..."`. Only root may set them, and a
    /// kernel without SELinux refuses them.
    pub security_labels: Vec<String>,
}

/// Why a mount cannot be made, or ended badly. Each says what to do.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "mount.")]
pub enum MountError {
    #[error("{0:?} does not exist; make it with `mkdir -p`")]
    DirectoryMissing(PathBuf),
    #[error("{0:?} is not a directory; a mount needs an empty one")]
    NotADirectory(PathBuf),
    #[error(
        "{0:?} is not empty, and mounting would hide what is in it; choose another directory, or say --nonempty"
    )]
    NotEmpty(PathBuf),
    #[error(
        "{source_name:?} is already mounted on {directory:?}; unmount it first, with `odmoe-fs umount`, or say --replace"
    )]
    AlreadyMounted {
        directory: PathBuf,
        source_name: String,
    },
    #[error(
        "{source_name:?} is mounted on {directory:?}, but {} does not answer; say --replace, or unmount it with `odmoe-fs umount --lazy`, and end the process",
        process(*.pid)
    )]
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
    #[error(
        "{0:?} is locked by another program, perhaps another mount that is being made; try again"
    )]
    DirectoryLocked(PathBuf),
    #[error(
        "{directory:?} lies inside the odmoe-fs mount on {mount:?}; choose a directory elsewhere"
    )]
    InsideMount { directory: PathBuf, mount: PathBuf },
    #[error(
        "{directory:?} holds the model's own file {part:?}, which the mount would hide; choose a directory elsewhere"
    )]
    HidesModel { directory: PathBuf, part: PathBuf },
    #[error("{directory:?} cannot be used: {cause}")]
    Directory {
        directory: PathBuf,
        cause: io::Error,
    },
    #[error(
        "/dev/fuse does not exist, so this kernel has no FUSE; load it with `modprobe fuse`, or start the container with `--device /dev/fuse --cap-add SYS_ADMIN`"
    )]
    NoDevice,
    #[error(
        "no right to open /dev/fuse; let every user with `sudo chmod 0666 /dev/fuse`, as distributions do"
    )]
    DeviceDenied,
    #[error("/dev/fuse cannot be opened: {0}")]
    Device(io::Error),
    #[error(
        "fusermount3 is not installed, and mounting needs it unless you are root; install the package fuse3 (`sudo apt install fuse3`, `sudo dnf install fuse3`)"
    )]
    NoFusermount,
    #[error(
        "--allow-other needs the line `user_allow_other` in /etc/fuse.conf, unless you are root"
    )]
    UserAllowOther,
    #[error("mounting on {directory:?} failed: {reason}")]
    Refused { directory: PathBuf, reason: String },
    #[error("the mount on {directory:?} ended: {cause}")]
    Session {
        directory: PathBuf,
        cause: io::Error,
    },
    #[error(
        "{threads} worker threads cannot be started: {cause}; use fewer with --threads, or allow more with `ulimit -u` and `ulimit -v`"
    )]
    Workers { threads: usize, cause: io::Error },
    #[error("cannot go to the background: {0}")]
    Background(io::Error),
    /// What the daemon said before it ended.
    #[error("{0}")]
    Daemon(String),
    #[error(
        "the background process ended before the mount was ready ({0}); if memory is short, use fewer --threads, else say the same with -f to see why"
    )]
    DaemonDied(String),
}

impl Explain for MountError {
    fn code(&self) -> &'static str {
        match self {
            Self::Repair { cause, .. } => cause.code(),
            _ => self.into(),
        }
    }

    fn hint(&self) -> Option<Hint> {
        written(self).or_else(|| match self {
            Self::Repair { cause, .. } => cause.hint(),
            Self::Directory { cause, .. } => cause.hint(),
            Self::Session { cause, .. } | Self::Background(cause) => cause.hint(),
            Self::Device(_) | Self::UserAllowOther => Some(ASK_DOCTOR),
            Self::Refused { .. } | Self::Daemon(_) => Some(ASK_DOCTOR),
            _ => None,
        })
    }
}

fn process(pid: Option<u32>) -> String {
    pid.map_or("its process".into(), |pid| format!("its process {pid}"))
}

/// A mount that can be made, as far as can be known before.
#[derive(Debug)]
pub struct Mount {
    file_system: OdmoeFs,
    directory: PathBuf,
    /// Keeps others from mounting on the same directory meanwhile.
    lock: Option<File>,
    config: Config,
}

impl Mount {
    /// Checks that `model` can be mounted on `directory`, and with which options.
    pub fn prepare(
        mut model: Model,
        directory: &Path,
        options: &Options,
    ) -> Result<Self, MountError> {
        let (directory, lock) = preflight::check(&model, directory, options)?;
        if options.cache == Cache::Mount {
            // The mounted files keep the bytes; a second copy would cost twice the memory.
            model.set_page_cache(PageCache::Unchanged);
            if !model.source().can_leave_page_cache() {
                tracing::warn!(
                    "the model's file system reads through the page cache only, so what is read will be in memory twice; --cache direct keeps it once"
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
                "the files belong to user {}, but only user {uid}, who mounts, may enter; say --allow-other to let others in",
                owner.uid
            );
        }
        let config = config(&model, options);
        let mut file_system = OdmoeFs::new(model, owner, options.cache);
        if options.stats {
            file_system.count();
        }
        Ok(Self {
            file_system,
            directory,
            lock,
            config,
        })
    }

    /// The directory, absolute and without links.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The model to be shown.
    pub fn model(&self) -> &Model {
        self.file_system.model()
    }

    /// Mounts, calls `ready`, and serves until somebody unmounts, or until SIGINT, SIGTERM or
    /// SIGHUP: then the mount is taken out of the tree at once, readers finish, and this returns
    /// when the last has left. A second signal ends the process.
    ///
    /// It is for a process that does nothing else, and ends when this returns: the calling thread
    /// receives those signals no more.
    pub fn serve(self, ready: impl FnOnce()) -> Result<(), MountError> {
        // Before any thread starts, so that all of them leave the signals to the one that waits.
        let signals = Signals::block(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])
            .map_err(MountError::Background)?;
        let threads = self.config.n_threads.unwrap_or(1);
        try_workers(threads).map_err(|cause| MountError::Workers { threads, cause })?;
        let directory = self.directory;
        let session = Session::new(self.file_system, &directory, &self.config).map_err(|e| {
            MountError::Refused {
                directory: directory.clone(),
                reason: preflight::explain(&e),
            }
        })?;
        drop(self.lock);
        give_up_privileges();
        let attached = Attached {
            entry: table::mounted_on(&directory),
            directory: directory.clone(),
        };
        let on_signal = attached.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || stop_on_signal(&on_signal, signals))
            .map_err(MountError::Background)?;
        let fail = |cause| MountError::Session {
            directory: directory.clone(),
            cause,
        };
        // At its end a session of fuser unmounts whatever is at its path, though it may be gone
        // and another file system there by then. So it never drops its mount; we end it.
        let mut session = ManuallyDrop::new(session.spawn().map_err(&fail)?);
        let serving = std::mem::replace(&mut session.guard, std::thread::spawn(|| Ok(())));
        tracing::info!("mounted on {directory:?}, {threads} worker threads");
        ready();
        let served = serving
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the workers panicked")));
        tracing::info!("the mount on {directory:?} has ended");
        served.map_err(|cause| {
            // Not ended by the kernel, so the mount may still be there, and nobody serves it.
            if let Err(e) = attached.detach() {
                tracing::error!("{e}");
            }
            fail(cause)
        })
    }
}

/// One of our mounts as the table showed it at the start: what is at its place later may be
/// another's. While the session lives the two cannot be mistaken for each other; afterwards the
/// kernel gives its numbers to other mounts.
#[derive(Clone)]
struct Attached {
    directory: PathBuf,
    entry: Option<MountEntry>,
}

impl Attached {
    /// Takes the mount out of the tree if it is still there. Only while the session lives.
    fn detach(&self) -> Result<(), UnmountError> {
        let here = table::mounted_on(&self.directory);
        // Only Linux has a table to look at.
        if !cfg!(target_os = "linux") || (here.is_some() && here == self.entry) {
            unmount::detach(&self.directory)?;
        }
        Ok(())
    }
}

/// Ends a mount when a signal asks for it.
fn stop_on_signal(mount: &Attached, signals: Signals) {
    if signals.wait().is_err() {
        return;
    }
    match mount.detach() {
        // Usually the session ends at once, and the process with it.
        Ok(()) => {
            std::thread::sleep(Duration::from_millis(300));
            tracing::warn!(
                "unmounted {:?}, but files of it are still open: waiting for them; a second signal ends the process now",
                mount.directory
            );
        }
        Err(e) => tracing::error!("{e}; a second signal ends the process now"),
    }
    if let Ok(second) = signals.wait() {
        std::process::exit(128 + second);
    }
}

/// From here on nothing is mounted, only served and unmounted. A user's daemon unmounts with the
/// set-user-id helper, which has to keep working; it has no privileges of its own to give up.
fn give_up_privileges() {
    if effective_ids().0 == 0 {
        if let Err(e) = privileges::keep_what_serving_needs() {
            tracing::warn!("the daemon keeps all privileges of root: {e}");
        }
        privileges::no_new_privileges();
    }
}

/// The buffer of a worker of fuser and what else it reserves, and its stack.
const WORKER_BYTES: usize = 17 << 20;
const STACK_BYTES: usize = 2 << 20;

/// Starts as many threads as there will be workers, with as much memory, and ends them again. fuser
/// starts its own when the mount is made already, and would leave it without anybody to serve it.
///
/// The memory is not taken from the allocator, which would keep it, and take later buffers from what
/// is not fresh: then zeroing them uses them.
fn try_workers(threads: usize) -> io::Result<()> {
    // All at once first: what a thread lacks while it starts is no error but its end.
    drop(MmapMut::map_anon(threads * (WORKER_BYTES + STACK_BYTES))?);
    let gate = parking_lot::Mutex::new(());
    let started = || {
        let reserved = MmapMut::map_anon(WORKER_BYTES);
        drop(gate.lock()); // until all of them are there
        reserved.map(drop)
    };
    std::thread::scope(|scope| {
        let closed = gate.lock();
        let workers: Vec<_> = (0..threads)
            .map(|_| std::thread::Builder::new().spawn_scoped(scope, started))
            .collect();
        drop(closed);
        workers.into_iter().try_for_each(|worker| {
            let ended = worker?.join();
            ended.unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    })
}

fn config(model: &Model, options: &Options) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
        MountOption::DefaultPermissions,
        MountOption::FSName(source_name(model)),
        // Not `Subtype`, which fuser drops when it mounts as root.
        MountOption::CUSTOM(format!("subtype={SUBTYPE}")),
    ];
    let labels = options.security_labels.iter();
    config
        .mount_options
        .extend(labels.cloned().map(MountOption::CUSTOM));
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(options.threads.unwrap_or_else(default_threads));
    config
}

/// The name of the source in mount tables: the model's path, unless that could be taken for
/// options, since they are joined with commas and unescaped.
fn source_name(model: &Model) -> String {
    model
        .source()
        .given_path()
        .to_str()
        .filter(|path| !path.contains([',', '\\']) && !path.contains(char::is_control))
        .unwrap_or(SUBTYPE)
        .to_owned()
}

/// Workers wait for the disk as much as they work, so there are more than processors.
fn default_threads() -> usize {
    if !cfg!(target_os = "linux") {
        return 1; // fuser has one event loop elsewhere
    }
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    (4 * processors).clamp(8, 16)
}
