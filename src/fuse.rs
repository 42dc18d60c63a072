//! The FUSE adapter: a request of the kernel in, a call of [`Served`], a reply out. It only
//! translates, and logs refusals.
//!
//! The tree never changes, so names and attributes stay valid for ever, pages stay cached, and
//! opens need not be reported: `open` and `opendir` answer ENOSYS, which the kernel remembers.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use self::errors::ErrorLog;
use crate::served::{Attributes, Cache, Opening, Refusal, Served};
use crate::sys::probe::{CHANGED_PARTS, TRAFFIC};
use crate::tree::{Kind, Tree};

mod errors;
#[cfg(test)]
mod tests;

/// How long names and attributes stay valid: longer than any mount lives.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);
/// One generation of inode numbers: they are never reused.
const GENERATION: Generation = Generation(0);
/// Reads that the kernel passes on without a reader of their own, at most: fewer than a mount of a model
/// elsewhere has workers, and many, since those for a server that is gone hold up those of the cache.
const REMOTE_BACKGROUND: u16 = 48;

/// A model as the kernel sees it.
#[derive(Debug)]
pub struct OdmoeFs {
    served: Served,
    errors: ErrorLog,
    /// Whether the kernel understands ENOSYS as "opens need not be reported".
    opens_nothing: bool,
}

impl OdmoeFs {
    /// A file system of the kernel that shows what is served.
    pub fn new(served: Served) -> Self {
        Self {
            served,
            errors: ErrorLog::default(),
            opens_nothing: false,
        }
    }

    /// The file system without FUSE.
    pub fn served(&self) -> &Served {
        &self.served
    }

    fn named(&self, ino: INodeNo) -> Named<'_> {
        Named(self.served.model().tree(), ino)
    }

    /// Answers a request, which is logged as its `operation` and `subject`. A panic must not end
    /// the mount: unwinding drops the reply, which makes it EIO for the caller.
    fn answer(&self, operation: &str, subject: fmt::Arguments, callback: impl FnOnce(&Call)) {
        tracing::debug!("{operation} {subject}");
        let call = Call {
            errors: &self.errors,
            operation,
            subject,
        };
        let callback = || {
            #[cfg(test)]
            tests::panic_if_wanted(operation);
            callback(&call);
        };
        if catch_unwind(AssertUnwindSafe(callback)).is_err() {
            tracing::error!("{call} panicked; this is a bug in odmoe-fs");
        }
    }

    fn open_nothing(&self, call: &Call, reply: ReplyOpen, flags: FopenFlags) {
        if self.opens_nothing {
            reply.error(call.refused(&Refusal::Unsupported));
        } else {
            reply.opened(FileHandle(0), flags);
        }
    }
}

/// A request as the log shows it, such as `read "experts/registry.json": 4096 bytes at 0`.
struct Call<'a> {
    errors: &'a ErrorLog,
    operation: &'a str,
    subject: fmt::Arguments<'a>,
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.operation, self.subject)
    }
}

impl Call<'_> {
    /// The errno of a refusal. This is the only place that logs one.
    fn refused(&self, refusal: &Refusal) -> Errno {
        let errno = match refusal {
            Refusal::NotFound => Errno::ENOENT,
            Refusal::NotADirectory => Errno::ENOTDIR,
            Refusal::NameTooLong => Errno::ENAMETOOLONG,
            Refusal::NoAttribute => Errno::NO_XATTR,
            Refusal::AttributeTooLong => Errno::ERANGE,
            Refusal::ReadOnly => Errno::EROFS,
            Refusal::Unsupported => Errno::ENOSYS,
            Refusal::Io(_) => Errno::EIO,
        };
        match refusal {
            Refusal::Io(error) => self.errors.log(self, error),
            // Not an error: programs look for missing files all the time.
            _ => tracing::debug!("{self}: {refusal}"),
        }
        errno
    }
}

/// A node as the log shows it: its path below the root, or `.` for the root. Unless the message is
/// written, it costs nothing.
struct Named<'a>(&'a Tree, INodeNo);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.path(self.1.0) {
            Some(path) if !path.is_empty() => write!(f, "{path:?}"),
            _ => write!(f, "\".\""),
        }
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    let time = attributes.modified;
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes.kind),
        perm: attributes.permissions,
        nlink: attributes.links,
        uid: attributes.owner.uid,
        gid: attributes.owner.gid,
        rdev: 0,
        blksize: attributes.preferred_bytes,
        flags: 0,
    }
}

/// Size 0 asks for the length.
fn reply_xattr(call: &Call, reply: ReplyXattr, value: Result<Vec<u8>, Refusal>, size: u32) {
    match value {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() <= size as usize => reply.data(&value),
        Ok(_) => reply.error(call.refused(&Refusal::AttributeTooLong)),
        Err(refusal) => reply.error(call.refused(&refusal)),
    }
}

/// A full reply buffer ends a listing.
fn until_full(full: bool) -> ControlFlow<()> {
    if full {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// Callbacks that would change the tree. The mount is read-only, so the kernel refuses changes
/// itself; these are for a mount that root has made writable with `mount -o remount,rw`.
macro_rules! refused {
    ($($callback:ident($($argument:ty),*) -> $reply:ty;)*) => {
        $(fn $callback(&self, _: &Request, $(_: $argument,)* reply: $reply) {
            let subject = format_args!("that would change the tree");
            let refused = |call: &Call| reply.error(call.refused(&Refusal::ReadOnly));
            self.answer(stringify!($callback), subject, refused);
        })*
    };
}

impl Filesystem for OdmoeFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // A kernel that does not know one of these refuses it, and everything works without them.
        for capability in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // File handles, such as those of NFS, stay valid when the kernel forgets the file.
            InitFlags::FUSE_EXPORT_SUPPORT,
        ] {
            if config.add_capabilities(capability).is_err() {
                tracing::info!("the kernel does not support {capability:?}");
            }
        }
        if self.served.cache() == Cache::Model
            && config
                .add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP)
                .is_err()
        {
            tracing::warn!(
                "with --cache direct, this kernel (before 6.6) does not allow shared maps: np.memmap and candle will fail with ENODEV"
            );
        }
        let no_opening = InitFlags::FUSE_NO_OPEN_SUPPORT | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        if self.served.model().source().is_remote() {
            let _ = config.set_max_background(REMOTE_BACKGROUND);
        }
        self.opens_nothing = config.add_capabilities(no_opening).is_ok();
        Ok(())
    }

    fn destroy(&mut self) {
        self.errors.log_rest();
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let subject = format_args!("{name:?} in {}", self.named(parent));
        self.answer("lookup", subject, |call| {
            match self.served.lookup(parent.0, name.as_bytes()) {
                Ok(attributes) => reply.entry(&FOR_EVER, &file_attr(&attributes), GENERATION),
                Err(refusal) => reply.error(call.refused(&refusal)),
            }
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(
            "getattr",
            format_args!("{}", self.named(ino)),
            |call| match self.served.attributes(ino.0) {
                Ok(attributes) => reply.attr(&FOR_EVER, &file_attr(&attributes)),
                Err(refusal) => reply.error(call.refused(&refusal)),
            },
        );
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.answer(
            "open",
            format_args!("{}", self.named(ino)),
            |call| match self.served.open(ino.0) {
                Opening::NotNeeded => self.open_nothing(call, reply, FopenFlags::FOPEN_KEEP_CACHE),
                Opening::KeepsPages => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
                Opening::KeepsNothing => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            },
        );
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.answer("opendir", format_args!("{}", self.named(ino)), |call| {
            let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
            self.open_nothing(call, reply, flags);
        });
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let subject = format_args!("{}: {size} bytes at {offset}", self.named(ino));
        self.answer("read", subject, |call| {
            self.served
                .read(ino.0, offset, size.into(), |answer| match answer {
                    Ok(bytes) => {
                        reply.data(bytes);
                        self.errors.log_overdue();
                    }
                    Err(refusal) => reply.error(call.refused(&refusal)),
                });
        });
    }

    /// The request of `status`, with a number of our own.
    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        number: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        let subject = format_args!("number {number:#x}");
        self.answer("ioctl", subject, |call| match number {
            CHANGED_PARTS => reply.ioctl(0, &self.served.changed_parts().to_ne_bytes()),
            TRAFFIC => {
                let numbers = self.served.traffic().to_numbers();
                reply.ioctl(0, numbers.map(u64::to_ne_bytes).as_flattened());
            }
            _ => reply.error(call.refused(&Refusal::Unsupported)),
        });
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let subject = format_args!("{} from entry {offset}", self.named(ino));
        self.answer("readdir", subject, |call| {
            let listed = self.served.list(ino.0, offset, |entry, next, name| {
                until_full(reply.add(INodeNo(entry.ino), next, file_type(entry.kind), name))
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(refusal) => reply.error(call.refused(&refusal)),
            }
        });
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let subject = format_args!("{} from entry {offset}", self.named(ino));
        self.answer("readdirplus", subject, |call| {
            let listed = self.served.list(ino.0, offset, |entry, next, name| {
                let (ino, attr) = (INodeNo(entry.ino), file_attr(&entry));
                until_full(reply.add(ino, next, name, &FOR_EVER, &attr, GENERATION))
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(refusal) => reply.error(call.refused(&refusal)),
            }
        });
    }

    fn statfs(&self, _: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.answer("statfs", format_args!("{}", self.named(ino)), |_| {
            let room = self.served.room();
            let block = room.block_bytes;
            reply.statfs(
                room.blocks,
                0,
                0,
                room.nodes,
                0,
                block,
                room.name_bytes,
                block,
            );
        });
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let subject = format_args!("{name:?} of {}", self.named(ino));
        self.answer("getxattr", subject, |call| {
            let value = self.served.extended_attribute(ino.0, name.as_bytes());
            reply_xattr(call, reply, value, size);
        });
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer("listxattr", format_args!("{}", self.named(ino)), |call| {
            reply_xattr(call, reply, self.served.extended_attributes(ino.0), size);
        });
    }

    refused! {
        setattr(
            INodeNo, Option<u32>, Option<u32>, Option<u32>, Option<u64>, Option<TimeOrNow>,
            Option<TimeOrNow>, Option<SystemTime>, Option<FileHandle>, Option<SystemTime>,
            Option<SystemTime>, Option<SystemTime>, Option<BsdFileFlags>
        ) -> ReplyAttr;
        mknod(INodeNo, &OsStr, u32, u32, u32) -> ReplyEntry;
        mkdir(INodeNo, &OsStr, u32, u32) -> ReplyEntry;
        unlink(INodeNo, &OsStr) -> ReplyEmpty;
        rmdir(INodeNo, &OsStr) -> ReplyEmpty;
        symlink(INodeNo, &OsStr, &Path) -> ReplyEntry;
        rename(INodeNo, &OsStr, INodeNo, &OsStr, RenameFlags) -> ReplyEmpty;
        link(INodeNo, INodeNo, &OsStr) -> ReplyEntry;
        create(INodeNo, &OsStr, u32, u32, i32) -> ReplyCreate;
        write(
            INodeNo, FileHandle, u64, &[u8], WriteFlags, OpenFlags, Option<LockOwner>
        ) -> ReplyWrite;
        fallocate(INodeNo, FileHandle, u64, u64, i32) -> ReplyEmpty;
        copy_file_range(
            INodeNo, FileHandle, u64, INodeNo, FileHandle, u64, u64, CopyFileRangeFlags
        ) -> ReplyWrite;
        setxattr(INodeNo, &OsStr, &[u8], i32, u32) -> ReplyEmpty;
        removexattr(INodeNo, &OsStr) -> ReplyEmpty;
    }
}
