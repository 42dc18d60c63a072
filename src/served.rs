//! A model as a file system: what is answered to whoever asks for names, attributes, listings,
//! bytes and statistics.
//!
//! The problem: what a file system answers must be right for every question, and the kernel asks
//! only some of them, in an order of its own.
//!
//! The plan: all that is decided, is decided here, in terms of the tree and the model, without FUSE.
//! [`crate::fuse`] turns the kernel's requests into these calls, and a [`Refusal`] into an errno.
//! Nothing changes while a model is served, so that there is nothing to lock but what is counted
//! and what is read ahead.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::ahead::ReadAhead;
use crate::model::Model;
use crate::source::ReadError;
use crate::stats::{Operation, Stats};
use crate::tree::{Ino, Kind, ROOT};

#[cfg(test)]
mod tests;

/// The unit of `st_blocks`, by POSIX.
const STAT_BLOCK_BYTES: u64 = 512;
/// The unit of `statfs`.
const ROOM_BLOCK_BYTES: u32 = 4096;
/// Programs size their buffers by `st_blksize`. On Linux 4096 keeps a look at a header small; on
/// macOS it sets the size of reads, where small ones are slow or hang.
const PREFERRED_BLOCK_BYTES: u32 = if cfg!(target_os = "macos") {
    1 << 20
} else {
    4096
};
/// The longest name that Linux file systems allow; ours are far shorter.
const MAX_NAME_BYTES: u32 = 255;

thread_local! {
    /// The answer to a read, one for each thread that answers. It grows to the largest read, 1 MiB.
    static ANSWER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

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

/// What opening a file means to whoever keeps its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Nothing: no open of any file need be asked for, now or later, and pages stay good for ever.
    NotNeeded,
    /// Pages stay good for ever, but every open must be asked for.
    KeepsPages,
    /// No pages are to be kept: each read must be asked for.
    KeepsNothing,
}

/// What `stat` tells of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub ino: Ino,
    pub kind: Kind,
    /// Bytes; 0 for a directory.
    pub size: u64,
    /// The size in units of 512 bytes, whatever lies on the disk.
    pub blocks: u64,
    pub permissions: u16,
    pub links: u32,
    pub owner: Owner,
    /// Every time of the node.
    pub modified: SystemTime,
    /// Bytes that programs should read at a time.
    pub preferred_bytes: u32,
}

/// What `statfs` tells; nothing is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Blocks of all files together.
    pub blocks: u64,
    /// Nodes, directories included.
    pub nodes: u64,
    /// Bytes of the longest name that may be asked for.
    pub name_bytes: u32,
}

/// Why something is not answered.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("there is no such file")]
    NotFound,
    #[error("it is not a directory")]
    NotADirectory,
    #[error("the name is too long")]
    NameTooLong,
    #[error("there is no such extended attribute")]
    NoAttribute,
    #[error("the extended attribute is longer than the caller has room for")]
    AttributeTooLong,
    #[error("nothing here can be changed")]
    ReadOnly,
    /// Not here, and of no file: it need not be asked for again.
    #[error("this mount has none of it")]
    Unsupported,
    #[error(transparent)]
    Io(#[from] ReadError),
}

/// A model as a file system.
#[derive(Debug)]
pub struct Served {
    model: Arc<Model>,
    ahead: ReadAhead,
    owner: Owner,
    modified: SystemTime,
    cache: Cache,
    /// What is counted of this mount, if anything is.
    stats: Option<Stats>,
}

impl Served {
    /// Shows `model`, all of it belonging to `owner`.
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
        }
    }

    /// Counts what is asked for from here on, and shows it as extended attributes of the root.
    pub fn count(&mut self) {
        self.stats = Some(Stats::new(&self.model));
    }

    /// The model that is shown.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Whose page cache keeps what was read.
    pub fn cache(&self) -> Cache {
        self.cache
    }

    fn counted(&self, operation: Operation) {
        if let Some(stats) = &self.stats {
            stats.count(operation);
        }
    }

    /// The attributes of the child of a directory with this name. `.` is any node itself and `..` its
    /// directory, as whoever has only a file's handle asks for them (NFS exports).
    pub fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Attributes, Refusal> {
        self.counted(Operation::Lookup);
        let tree = self.model.tree();
        let found = match name {
            b"." => Some(directory),
            b".." => tree.parent(directory),
            _ => tree.lookup(directory, name),
        };
        match found {
            Some(found) => self.attributes_of(found),
            None if name.len() > MAX_NAME_BYTES as usize => Err(Refusal::NameTooLong),
            None => Err(Refusal::NotFound),
        }
    }

    /// The attributes of a node.
    pub fn attributes(&self, ino: Ino) -> Result<Attributes, Refusal> {
        self.counted(Operation::Getattr);
        self.attributes_of(ino)
    }

    fn attributes_of(&self, ino: Ino) -> Result<Attributes, Refusal> {
        let tree = self.model.tree();
        let kind = tree.kind(ino).ok_or(Refusal::NotFound)?;
        let size = tree.size(ino).unwrap_or(0);
        let (permissions, links) = match kind {
            Kind::Directory => {
                // One link for the name, one for `.`, one for `..` of each directory below; only
                // the root has directories.
                let below = tree.children(ino).filter(|_| ino == ROOT).unwrap_or(0..0);
                (0o555, 2 + (below.end - below.start) as u32)
            }
            Kind::File => (0o444, 1),
        };
        Ok(Attributes {
            ino,
            kind,
            size,
            blocks: size.div_ceil(STAT_BLOCK_BYTES),
            permissions,
            links,
            owner: self.owner,
            modified: self.modified,
            preferred_bytes: PREFERRED_BLOCK_BYTES,
        })
    }

    /// Notes that a file is opened, and tells what that means.
    pub fn open(&self, file: Ino) -> Opening {
        if let Some(stats) = &self.stats {
            stats.opened(file);
        }
        match self.cache {
            Cache::Model => Opening::KeepsNothing,
            // Who counts opens must be asked for each.
            Cache::Mount | Cache::Both if self.stats.is_some() => Opening::KeepsPages,
            Cache::Mount | Cache::Both => Opening::NotNeeded,
        }
    }

    /// Gives `len` bytes of a file from `offset`, fewer only at its end, to `reply`, and then looks
    /// ahead.
    pub fn read(
        &self,
        file: Ino,
        offset: u64,
        len: u64,
        reply: impl FnOnce(Result<&[u8], Refusal>),
    ) {
        let counted = self.stats.as_ref().map(|stats| (stats, Instant::now()));
        let reply = |read: Result<&[u8], ReadError>| {
            let bytes = read.as_ref().ok().map(|bytes| bytes.len() as u64);
            reply(read.map_err(Refusal::Io));
            if let Some((stats, began)) = counted {
                stats.read(file, bytes, began.elapsed());
            }
        };
        ANSWER.with_borrow_mut(|space| self.ahead.read(file, offset, len, space, reply));
    }

    /// Gives the entries of a directory from the `offset`-th on to `add`, until that says to stop:
    /// `.`, `..`, then the children. With each goes the offset of the entry after it.
    pub fn list(
        &self,
        directory: Ino,
        offset: u64,
        mut add: impl FnMut(Attributes, u64, &str) -> ControlFlow<()>,
    ) -> Result<(), Refusal> {
        self.counted(Operation::Readdir);
        let tree = self.model.tree();
        let children = tree.children(directory).ok_or(Refusal::NotADirectory)?;
        let parent = tree.parent(directory).unwrap_or(ROOT);
        let dots = [(directory, "."), (parent, "..")];
        // Inode numbers count up, so that skipping those listed before costs nothing.
        let first = children.start.saturating_add(offset.saturating_sub(2));
        let children =
            (first..children.end).map(|child| (child, tree.name(child).unwrap_or_default()));
        let entries = dots
            .into_iter()
            .skip(offset.min(2) as usize)
            .chain(children);
        for ((ino, name), next) in entries.zip(offset.saturating_add(1)..) {
            if add(self.attributes_of(ino)?, next, name).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// How much room the tree takes; there is no more.
    pub fn room(&self) -> Room {
        self.counted(Operation::Statfs);
        let tree = self.model.tree();
        Room {
            block_bytes: ROOM_BLOCK_BYTES,
            blocks: tree.total_size().div_ceil(ROOM_BLOCK_BYTES.into()),
            nodes: tree.len(),
            name_bytes: MAX_NAME_BYTES,
        }
    }

    /// How many parts of the model are not as they were when it was opened, so that reads of them
    /// fail. Looks at each.
    pub fn changed_parts(&self) -> u64 {
        let source = self.model.source();
        let parts = 0..source.paths().len() as u32;
        parts.filter(|&part| source.check(part).is_err()).count() as u64
    }

    /// The value of an extended attribute.
    pub fn extended_attribute(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, Refusal> {
        // Answering costs every `ls -l` two requests for each file.
        let stats = self.stats.as_ref().ok_or(Refusal::Unsupported)?;
        let value = match ino {
            ROOT => stats.attribute(name, self.model.layout()),
            _ => None,
        };
        value.ok_or(Refusal::NoAttribute)
    }

    /// The names of all extended attributes of a node, each ended by NUL.
    pub fn extended_attributes(&self, ino: Ino) -> Result<Vec<u8>, Refusal> {
        let stats = self.stats.as_ref().ok_or(Refusal::Unsupported)?;
        Ok(match ino {
            ROOT => stats.attribute_names(),
            _ => Vec::new(),
        })
    }
}
