//! A model as a file system: the answers to requests for names, attributes, listings, bytes and
//! statistics.
//!
//! The problem: a file system must answer every request correctly, and the kernel makes only some
//! of them, in an order of its own, so tests through a mount miss the rest.
//!
//! The plan: everything is decided here, in terms of tree and model, without FUSE. [`crate::fuse`]
//! turns the kernel's requests into these calls and a [`Refusal`] into an errno. The tree never
//! changes, so only the counters and the predictor of reads are shared state.

use std::ops::ControlFlow;
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

use crate::form::Form;
use crate::model::Model;
use crate::predictor::{self, Predictor, Reach};
use crate::source::{Near, ReadError, Traffic};
use crate::spare::Spare;
use crate::stats::{Operation, Stats};
use crate::tree::{Content, Ino, Kind, ROOT};

#[cfg(test)]
mod tests;

/// The unit of `st_blocks`, according to POSIX.
const STAT_BLOCK_BYTES: u64 = 512;
/// The unit of `statfs`.
const ROOM_BLOCK_BYTES: u32 = 4096;
/// `st_blksize`, by which programs size their buffers. On Linux, 4096 keeps a look at a header
/// small. On macOS it sets the size of reads, and small ones are slow or hang.
const PREFERRED_BLOCK_BYTES: u32 = if cfg!(target_os = "macos") {
    1 << 20
} else {
    4096
};
/// The longest name that Linux file systems allow; ours are far shorter.
const MAX_NAME_BYTES: u32 = 255;

/// Memory for answers; each grows to the largest read, 1 MiB.
static ANSWERS: Spare = Spare::new();

/// The owner of the files of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Which page cache keeps what was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// That of the mounted files: every way of reading works, and repeated reads are fast.
    #[default]
    Mount,
    /// That of the model: every read of a mounted file reaches this process and is answered from
    /// that cache. Good for loaders that read each byte once with `pread`, and beside llama.cpp.
    Model,
    /// Both: other programs that read the model find it in memory.
    Both,
}

/// What the kernel is told about opens and pages of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Opens need not be reported, now or later. Pages stay valid for ever.
    NotNeeded,
    /// Every open must be reported. Pages stay valid for ever.
    KeepsPages,
    /// Every open must be reported, and every read: no pages may be kept.
    KeepsNothing,
}

/// What `stat` says about a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub ino: Ino,
    pub kind: Kind,
    /// Bytes; 0 for a directory.
    pub size: u64,
    /// The size in units of 512 bytes, computed from the size.
    pub blocks: u64,
    pub permissions: u16,
    pub links: u32,
    pub owner: Owner,
    /// All times of the node.
    pub modified: SystemTime,
    /// Bytes that programs should read at a time.
    pub preferred_bytes: u32,
}

/// What `statfs` says. Nothing is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Blocks of all files together.
    pub blocks: u64,
    /// Nodes, directories included.
    pub nodes: u64,
    /// Bytes of the longest name that can be looked up.
    pub name_bytes: u32,
}

/// Why a request is refused.
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
    /// This mount never answers such requests; the kernel need not make them again.
    #[error("this mount does not support that")]
    Unsupported,
    #[error(transparent)]
    Io(#[from] ReadError),
}

/// A model as a file system.
#[derive(Debug)]
pub struct Served {
    model: Model,
    /// `None` if reading ahead is of no use.
    predictor: Option<Mutex<Predictor>>,
    owner: Owner,
    modified: SystemTime,
    cache: Cache,
    /// `None` if nothing is counted.
    stats: Option<Stats>,
}

impl Served {
    /// Serves `model`, with all files belonging to `owner`.
    pub fn new(model: Model, owner: Owner, cache: Cache) -> Self {
        let modified = model.source().modified();
        let predictor = model.source().pace().map(|pace| {
            Mutex::new(Predictor::new(Reach {
                ahead: pace.ahead,
                beyond: pace.chunk,
                whole: pace.whole,
                is_eager: pace.is_eager,
            }))
        });
        Self {
            model,
            predictor,
            owner,
            modified,
            cache,
            stats: None,
        }
    }

    /// Counts requests from now on, and shows the counters as extended attributes of the root.
    pub fn count(&mut self) {
        self.stats = Some(Stats::new(&self.model));
    }

    /// The model that is served.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Which page cache keeps what was read.
    pub fn cache(&self) -> Cache {
        self.cache
    }

    fn counted(&self, operation: Operation) {
        if let Some(stats) = &self.stats {
            stats.count(operation);
        }
    }

    /// Finds a child of a directory by its name. `.` is any node itself, and `..` is its directory:
    /// an NFS server, which has only a file's handle, asks for them.
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
                // One link for the name, one for `.`, and one for `..` of each directory below.
                // Only the root contains directories.
                let below = tree.children(ino).filter(|_| ino == ROOT).unwrap_or(0..0);
                let below = below.filter(|&child| tree.kind(child) == Some(Kind::Directory));
                (0o555, 2 + below.count() as u32)
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

    /// Counts an open of a file, and says what the kernel must know about it.
    pub fn open(&self, file: Ino) -> Opening {
        if let Some(stats) = &self.stats {
            stats.opened(file);
        }
        match self.cache {
            Cache::Model => Opening::KeepsNothing,
            // Opens can only be counted if they are reported.
            Cache::Mount | Cache::Both if self.stats.is_some() => Opening::KeepsPages,
            Cache::Mount | Cache::Both => Opening::NotNeeded,
        }
    }

    /// Passes `len` bytes of a file from `offset` to `reply`, fewer only at the end of the file.
    /// Then starts fetching what will be asked for next.
    pub fn read(
        &self,
        file: Ino,
        offset: u64,
        len: u64,
        reply: impl FnOnce(Result<&[u8], Refusal>),
    ) {
        let counted = self.stats.as_ref().map(|stats| (stats, Instant::now()));
        let size = self.model.tree().size(file).unwrap_or(0);
        let range = offset.min(size)..offset.saturating_add(len).min(size);
        if let Some(predictor) = &self.predictor {
            predictor.lock().note(self.shape(file), &range);
        }
        // A server sends what comes next while it sends this. A disk would only be held up.
        if !self.model.is_on_disk(file, range.clone()) {
            self.fetch_ahead(file, range.end);
        }
        ANSWERS.lend(|space| {
            let read = self.model.bytes(file, range.clone(), space);
            // Before the reply: what a program has got must be counted when it looks.
            if let Some((stats, _)) = counted {
                stats.read(file, read.as_ref().ok().map(|bytes| bytes.len() as u64));
            }
            match read {
                Ok(bytes) => reply(Ok(&bytes)),
                Err(error) => reply(Err(Refusal::Io(error))),
            }
            if let Some((stats, began)) = counted {
                stats.took(began.elapsed());
            }
        });
        self.fetch_ahead(file, range.end);
    }

    /// Starts fetching what the reader whose request ended at `end` will ask for next.
    fn fetch_ahead(&self, file: Ino, end: u64) {
        if let Some(predictor) = &self.predictor {
            let mut predictor = predictor.lock();
            let slice = || self.model.slice_around(file, end.saturating_sub(1));
            // Still locked, so that an older prediction cannot replace a newer one.
            if let Some(wanted) = predictor.wanted(self.shape(file), end, slice) {
                let near = Near {
                    from_server: wanted.near,
                    from_disk: wanted.from_disk,
                };
                self.model
                    .fetch_ahead(wanted.reader, file, wanted.range, near);
            }
        }
    }

    /// What the predictor must know about a file.
    fn shape(&self, file: Ino) -> predictor::File {
        let tree = self.model.tree();
        let header = tree.extents(file).first();
        let header = header.filter(|extent| matches!(extent.content, Content::Made(_)));
        predictor::File {
            id: file,
            header: header.map_or(0, |extent| extent.len),
            size: tree.size(file).unwrap_or(0),
            source: self.model.source_bytes(file),
            shares: matches!(self.model.layout().form(), Form::Mlx { .. }),
        }
    }

    /// Passes the entries of a directory to `add`, from the `offset`-th on, until that says to
    /// stop: `.`, `..`, then the children. With each goes the offset of the next entry.
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
        // Inode numbers count up, so skipping the entries before costs nothing.
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

    /// The room that the tree takes.
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
    /// fail. Looks at every part.
    pub fn changed_parts(&self) -> u64 {
        self.model.source().changed_parts()
    }

    /// What was asked of servers so far, and what came; zeros of a model on this machine.
    pub fn traffic(&self) -> Traffic {
        self.model.source().traffic().unwrap_or_default()
    }

    /// The value of an extended attribute.
    pub fn extended_attribute(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, Refusal> {
        // Answering would cost `ls -l` two requests for each file, so it is not the default.
        let stats = self.stats.as_ref().ok_or(Refusal::Unsupported)?;
        let value = match ino {
            ROOT => {
                let traffic = self.model.source().traffic();
                stats.attribute(name, self.model.layout(), traffic)
            }
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
