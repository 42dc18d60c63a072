//! The FUSE adapter: arguments in, a call of the tree or the model, a reply out. Nothing is
//! decided here but how to say it to the kernel.
//!
//! Since the tree never changes, names and attributes are good for ever, pages stay cached, and
//! files need no opening: `open` and `opendir` answer ENOSYS, which the kernel remembers. (Not with
//! [`Cache::Model`]: that reads go past the page cache, is said when a file is opened.)

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::ahead::ReadAhead;
use crate::model::Model;
use crate::source::ReadError;
use crate::stats::{Operation, Stats};
use crate::tree::{Ino, Kind, ROOT, Tree};

#[cfg(test)]
mod tests;

/// How long the kernel may keep what it was told: longer than any mount lives.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);
/// One generation of inode numbers: they are never reused.
const GENERATION: Generation = Generation(0);
/// The unit of `st_blocks`, by POSIX.
const STAT_BLOCK_BYTES: u64 = 512;
/// The unit of `statfs`.
const STATFS_BLOCK_BYTES: u32 = 4096;
/// Programs size their buffers by `st_blksize`. On Linux 4096 keeps a look at a header small; on
/// macOS it sets the size of reads, where small ones are slow or hang.
const PREFERRED_BLOCK_BYTES: u32 = if cfg!(target_os = "macos") {
    1 << 20
} else {
    4096
};
/// The longest name that Linux file systems allow; ours are far shorter.
const MAX_NAME_BYTES: u32 = 255;

/// Who owns the files of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Whose page cache keeps what was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// That of the mounted files: every way of reading works, and repeated reads are fast.
    #[default]
    Mount,
    /// That of the model: every read of a mounted file comes to us, and is answered from there. Good
    /// for loaders that read each byte once with `pread`, and for bytes that llama.cpp shares.
    Model,
    /// Both, so that other programs find in memory what was read through the mount.
    Both,
}

/// A model as a file system.
#[derive(Debug)]
pub struct OdmoeFs {
    model: Arc<Model>,
    ahead: ReadAhead,
    owner: Owner,
    modified: SystemTime,
    cache: Cache,
    /// What is counted of this mount, if anything is.
    stats: Option<Stats>,
    /// Whether the kernel takes ENOSYS for "needs no opening".
    opens_nothing: bool,
}

thread_local! {
    /// The reply to a read, one per worker thread. It grows to the largest read, 1 MiB.
    static REPLY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl OdmoeFs {
    /// A file system that shows `model`, all of it belonging to `owner`.
    pub fn new(model: Model, owner: Owner, cache: Cache) -> Self {
        let modified = model.source().modified();
        let model = Arc::new(model);
        Self {
            ahead: ReadAhead::new(model.clone()),
            model,
            owner,
            modified,
            cache,
            stats: None,
            opens_nothing: false,
        }
    }

    /// Counts what is asked for from here on, and shows it as extended attributes of the root.
    pub fn count(&mut self) {
        self.stats = Some(Stats::new(&self.model));
    }

    fn named(&self, ino: INodeNo) -> Named<'_> {
        Named(self.model.tree(), ino)
    }

    fn counted(&self, operation: Operation) {
        if let Some(stats) = &self.stats {
            stats.count(operation);
        }
    }

    /// The model that is shown.
    pub fn model(&self) -> &Model {
        &self.model
    }

    fn attributes(&self, ino: Ino) -> Option<FileAttr> {
        let tree = self.model.tree();
        let size = tree.size(ino)?;
        let (kind, perm, nlink) = match tree.kind(ino)? {
            Kind::Directory => {
                // One link for the name, one for `.`, one for `..` of each directory below; only
                // the root has directories.
                let below = if ino == ROOT {
                    tree.children(ino)?
                } else {
                    0..0
                };
                let directories = below.end - below.start;
                (FileType::Directory, 0o555, 2 + directories as u32)
            }
            Kind::File => (FileType::RegularFile, 0o444, 1),
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(STAT_BLOCK_BYTES),
            atime: self.modified,
            mtime: self.modified,
            ctime: self.modified,
            crtime: self.modified,
            kind,
            perm,
            nlink,
            uid: self.owner.uid,
            gid: self.owner.gid,
            rdev: 0,
            blksize: PREFERRED_BLOCK_BYTES,
            flags: 0,
        })
    }

    /// Gives the entries of a directory from the `offset`-th on to `add`, until that says to stop:
    /// `.`, `..`, then the children. With each goes the offset of the entry after it.
    fn list(
        &self,
        directory: Ino,
        offset: u64,
        mut add: impl FnMut(Ino, u64, &str) -> ControlFlow<()>,
    ) -> Result<(), Errno> {
        let tree = self.model.tree();
        let children = tree.children(directory).ok_or(Errno::ENOTDIR)?;
        let parent = tree.parent(directory).unwrap_or(ROOT);
        let dots = [(directory, "."), (parent, "..")];
        let mut next = offset;
        let mut add = |ino, name| {
            next += 1;
            add(ino, next, name)
        };
        for (ino, name) in dots.into_iter().skip(offset.min(2) as usize) {
            if add(ino, name).is_break() {
                return Ok(());
            }
        }
        // Inode numbers count up, so that skipping those listed before costs nothing.
        for ino in children.start.saturating_add(offset.saturating_sub(2))..children.end {
            if add(ino, tree.name(ino).unwrap_or_default()).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn open_nothing(&self, reply: ReplyOpen, flags: FopenFlags) {
        if self.opens_nothing {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), flags);
        }
    }
}

/// A node as messages name it: its path below the root of the mount, which is `.`. It costs nothing
/// unless the message is written.
struct Named<'a>(&'a Tree, INodeNo);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.path(self.1.0) {
            Some(path) if !path.is_empty() => write!(f, "{path:?}"),
            _ => write!(f, "\".\""),
        }
    }
}

/// Runs a callback, and tells with `-vv` `what` it is asked for. A panic must not cost the user the
/// mount: the reply, dropped on the way out, tells the caller EIO.
fn guarded(operation: &str, ino: INodeNo, what: impl fmt::Display, callback: impl FnOnce()) {
    tracing::debug!("{operation} {what}");
    let callback = || {
        #[cfg(test)]
        tests::panic_if_told(operation);
        callback();
    };
    if catch_unwind(AssertUnwindSafe(callback)).is_err() {
        tracing::error!("{operation} of inode {ino} panicked; this is a bug in odmoe-fs");
    }
}

/// What a reader is told of a failed read.
fn errno(error: &ReadError) -> Errno {
    match error {
        // Said once, by the source.
        ReadError::Changed { .. } | ReadError::Reopen { .. } => {}
        ReadError::Read { .. } => tracing::error!("{error}"),
    }
    Errno::EIO
}

/// Who asks with size 0 wants to know the size.
fn reply_xattr(reply: ReplyXattr, value: &[u8], size: u32) {
    match size {
        0 => reply.size(value.len() as u32),
        size if value.len() > size as usize => reply.error(Errno::ERANGE),
        _ => reply.data(value),
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

impl Filesystem for OdmoeFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Wishes, each refused by kernels that do not know it; all works without.
        for wish in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
        ] {
            if config.add_capabilities(wish).is_err() {
                tracing::info!("the kernel does not offer {wish:?}");
            }
        }
        if self.cache == Cache::Model
            && config
                .add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP)
                .is_err()
        {
            tracing::warn!(
                "this kernel (before 6.6) allows no shared maps with --cache direct: np.memmap and candle will fail with ENODEV"
            );
        }
        let no_opening = InitFlags::FUSE_NO_OPEN_SUPPORT | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        self.opens_nothing = config.add_capabilities(no_opening).is_ok();
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let what = format_args!("{name:?} in {}", self.named(parent));
        guarded("lookup", parent, what, || {
            self.counted(Operation::Lookup);
            let child = self.model.tree().lookup(parent.0, name.as_bytes());
            match child.and_then(|ino| self.attributes(ino)) {
                Some(attributes) => reply.entry(&FOR_EVER, &attributes, GENERATION),
                None if name.len() > MAX_NAME_BYTES as usize => reply.error(Errno::ENAMETOOLONG),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        guarded("getattr", ino, self.named(ino), || {
            self.counted(Operation::Getattr);
            match self.attributes(ino.0) {
                Some(attributes) => reply.attr(&FOR_EVER, &attributes),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        guarded("open", ino, self.named(ino), || {
            if let Some(stats) = &self.stats {
                stats.opened(ino.0);
            }
            match self.cache {
                // Who is told of every open cannot leave opening to the kernel.
                Cache::Mount | Cache::Both if self.stats.is_some() => {
                    reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
                }
                Cache::Mount | Cache::Both => {
                    self.open_nothing(reply, FopenFlags::FOPEN_KEEP_CACHE);
                }
                Cache::Model => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
            }
        });
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        guarded("opendir", ino, self.named(ino), || {
            let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
            self.open_nothing(reply, flags);
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
        let what = format_args!("{}: {size} bytes at {offset}", self.named(ino));
        guarded("read", ino, what, || {
            let counted = self.stats.as_ref().map(|stats| (stats, Instant::now()));
            REPLY.with_borrow_mut(|buffer| {
                let reply = |read: Result<&[u8], ReadError>| {
                    let bytes = read.as_ref().ok().map(|bytes| bytes.len() as u64);
                    match read {
                        Ok(bytes) => reply.data(bytes),
                        Err(error) => reply.error(errno(&error)),
                    }
                    if let Some((stats, began)) = counted {
                        stats.read(ino.0, bytes, began.elapsed());
                    }
                };
                self.ahead.read(ino.0, offset, size.into(), buffer, reply);
            });
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
        let what = format_args!("{} from entry {offset}", self.named(ino));
        guarded("readdir", ino, what, || {
            self.counted(Operation::Readdir);
            let tree = self.model.tree();
            let listed = self.list(ino.0, offset, |ino, next, name| {
                let kind = match tree.kind(ino) {
                    Some(Kind::Directory) => FileType::Directory,
                    _ => FileType::RegularFile,
                };
                until_full(reply.add(INodeNo(ino), next, kind, name))
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
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
        let what = format_args!("{} from entry {offset}", self.named(ino));
        guarded("readdirplus", ino, what, || {
            self.counted(Operation::Readdir);
            let listed = self.list(ino.0, offset, |ino, next, name| {
                let Some(attributes) = self.attributes(ino) else {
                    return ControlFlow::Break(());
                };
                let ino = INodeNo(ino);
                until_full(reply.add(ino, next, name, &FOR_EVER, &attributes, GENERATION))
            });
            match listed {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn statfs(&self, _: &Request, ino: INodeNo, reply: ReplyStatfs) {
        guarded("statfs", ino, self.named(ino), || {
            self.counted(Operation::Statfs);
            let tree = self.model.tree();
            let blocks = tree.total_size().div_ceil(STATFS_BLOCK_BYTES.into());
            reply.statfs(
                blocks,
                0,
                0,
                tree.len(),
                0,
                STATFS_BLOCK_BYTES,
                MAX_NAME_BYTES,
                STATFS_BLOCK_BYTES,
            );
        });
    }

    // ENOSYS holds for the whole connection: without it every `ls -l` asks twice per file.

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let what = format_args!("{name:?} of {}", self.named(ino));
        guarded("getxattr", ino, what, || match &self.stats {
            None => reply.error(Errno::ENOSYS),
            Some(stats) => {
                let is_root = ino.0 == ROOT;
                let layout = self.model.layout();
                let value = is_root.then(|| stats.attribute(name.as_bytes(), layout));
                match value.flatten() {
                    Some(value) => reply_xattr(reply, &value, size),
                    None => reply.error(Errno::NO_XATTR),
                }
            }
        });
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        guarded("listxattr", ino, self.named(ino), || match &self.stats {
            None => reply.error(Errno::ENOSYS),
            Some(stats) if ino.0 == ROOT => reply_xattr(reply, &stats.attribute_names(), size),
            Some(_) => reply_xattr(reply, &[], size),
        });
    }

    // The mount is read-only, so the kernel refuses changes itself. These are for a mount that
    // root has made writable with `mount -o remount,rw`.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}
