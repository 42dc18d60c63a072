//! Compares the target with what would be written.

use std::fs::{File, Metadata};
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;

use super::{MaterializeError, Plan, copy, io_error};
use crate::folder::{Entry, Kind};
use crate::layout::{Doc, JOINED_PATH};
use crate::on_disk::{Comparer, Fault, OnDisk, Run};
use crate::sys::read;
use crate::tree::Ino;
use crate::work::{Progress, in_parallel};

/// Headers are compared in pieces of this size; most take one.
const PIECE_BYTES: u64 = 64 << 10;

pub(super) enum State {
    Missing,
    Done,
    /// The size and the header are right, but not the time.
    OtherTime,
    /// Not what would be written, for this reason.
    Foreign(String),
    /// A directory, which no file can replace.
    Folder,
}

/// A file whose size and header are right, but not its time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unsure {
    pub ino: Ino,
    /// Otherwise another run has left it there, and the documents would list it.
    pub is_chosen: bool,
}

/// The result for files whose bytes had to be compared, each list in the order of inode numbers.
#[derive(Debug, Default)]
pub(super) struct Compared {
    pub same: Vec<Ino>,
    /// Chosen ones that are to be written.
    pub different: Vec<Ino>,
}

impl Plan<'_> {
    /// Compares size, time and header of a file in the target with what would be written. The
    /// header holds every tensor's name, shape and place. No payload is read, on either side.
    pub(super) fn state(&self, there: &OnDisk, ino: Ino) -> Result<State, MaterializeError> {
        let (path, tree) = (self.path(ino), self.model.tree());
        let (file, metadata) = match there.open(tree, ino) {
            Ok(Entry::There(opened)) => opened,
            Ok(Entry::Missing) => return Ok(State::Missing),
            Ok(Entry::Other(Kind::Folder)) => return Ok(State::Folder),
            Ok(Entry::Other(kind)) => return Ok(State::Foreign(format!("is {}", kind.name()))),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                return Ok(State::Foreign("cannot be read by this user".into()));
            }
            Err(e) => return Err(io_error("open", &path)(e)),
        };
        let size = tree.size(ino).unwrap_or(0);
        if metadata.len() != size {
            let reason = format!("has {} bytes instead of {size}", metadata.len());
            return Ok(State::Foreign(reason));
        }
        // A file without tensors is small, and compared whole.
        let header = match tree.extents(ino).first() {
            Some(first) if path.extension() == Some("safetensors".as_ref()) => first.len,
            _ if tree.path(ino).as_deref() == Some(JOINED_PATH) => {
                self.model.layout().joined_header_bytes()
            }
            _ => size,
        };
        // Otherwise the kernel reads ahead into the payload.
        read::only_what_is_read(&file);
        let mut buffer = vec![0; 2 * header.min(PIECE_BYTES) as usize];
        let comparer = Comparer {
            model: self.model,
            stop: &AtomicBool::new(false),
            progress: &|_| {},
        };
        if self.differs(&comparer, ino, &file, header, &mut buffer)? {
            return Ok(State::Foreign("has another header".into()));
        }
        Ok(match self.has_time(&metadata) {
            true => State::Done,
            false => State::OtherTime,
        })
    }

    /// Whether a file has the tree's time, in a form that the target's file system may give it.
    pub(super) fn has_time(&self, metadata: &Metadata) -> bool {
        let is_known =
            |time| self.methods.times.contains(&time) && self.model.source().is_told_by(time);
        metadata.modified().is_ok_and(is_known)
    }

    /// Compares the bytes of the files that have another time with `jobs` workers.
    pub(super) fn compare_unsure(
        &self,
        target: &OnDisk,
        jobs: NonZeroUsize,
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Compared, MaterializeError> {
        let compared = Mutex::new(Compared::default());
        let comparer = Comparer {
            model: self.model,
            stop,
            progress: &|bytes| progress(Progress { bytes, files: 0 }),
        };
        let tree = self.model.tree();
        let buffer = || copy::buffer(jobs.get().min(self.unsure.len()));
        in_parallel(jobs, &self.unsure, buffer, |unsure, buffer| {
            let Unsure { ino, is_chosen } = unsure;
            let size = tree.size(ino).unwrap_or(0);
            let opened = target.open(tree, ino);
            let differs = match opened.map_err(io_error("open", &self.path(ino)))? {
                Entry::There((file, metadata)) if metadata.len() == size => {
                    read::forget(&file);
                    Some(self.differs(&comparer, ino, &file, size, buffer)?)
                }
                Entry::Missing => None, // removed meanwhile
                _ => Some(true),
            };
            progress(Progress { bytes: 0, files: 1 });
            match differs {
                Some(false) => compared.lock().same.push(ino),
                Some(true) if !is_chosen => {
                    return Err(MaterializeError::OtherModel(self.path(ino)));
                }
                Some(true) if !self.options.force => {
                    return Err(self.foreign(ino, "holds other bytes"));
                }
                _ if is_chosen => compared.lock().different.push(ino),
                _ => {}
            }
            Ok(())
        })?;
        let mut compared = compared.into_inner();
        compared.same.sort_unstable();
        compared.different.sort_unstable();
        Ok(compared)
    }

    /// Whether the first `len` bytes of a file in the target differ from what would be written.
    fn differs(
        &self,
        comparer: &Comparer,
        ino: Ino,
        file: &File,
        len: u64,
        buffer: &mut [u8],
    ) -> Result<bool, MaterializeError> {
        let run = Run {
            ino,
            start: 0,
            len,
            found_start: 0,
        };
        let difference = comparer.first_difference(run, file, buffer);
        Ok(difference
            .map_err(|fault| self.fault(ino, fault))?
            .is_some())
    }

    fn fault(&self, ino: Ino, fault: Fault) -> MaterializeError {
        match fault {
            Fault::Model(e) => e.into(),
            Fault::File { cause, .. } => io_error("read", &self.path(ino))(cause),
            Fault::Stopped => MaterializeError::Stopped,
        }
    }

    /// A document that is there will be replaced, so it must be one of this model.
    pub(super) fn check_document(&self, ino: Ino, doc: Doc) -> Result<(), MaterializeError> {
        let (path, tree) = (self.path(ino), self.model.tree());
        // The documents of a partial tree are shorter, never longer.
        let most = tree.size(ino).unwrap_or(0);
        let found = self.target.there().read(tree, ino, most);
        let found = match found.map_err(io_error("read", &path))? {
            Entry::Missing => return Ok(()),
            Entry::Other(Kind::Folder) => return Err(MaterializeError::FolderInTheWay(path)),
            _ if self.options.force => return Ok(()),
            Entry::Other(kind) => return Err(self.foreign(ino, &format!("is {}", kind.name()))),
            Entry::There(found) => found,
        };
        let mut whole = Vec::new();
        let rendered = self.model.layout().render(doc, &mut whole);
        rendered.expect("writing to memory cannot fail");
        match found {
            Ok(found) if found == whole || is_part_of(doc, &found, &whole) => Ok(()),
            _ => Err(self.foreign(ino, "describes something else")),
        }
    }
}

/// Whether a document can describe a part of the tree that `whole` describes.
fn is_part_of(doc: Doc, found: &[u8], whole: &[u8]) -> bool {
    let parse = |bytes| match serde_json::from_slice(bytes) {
        Ok(serde_json::Value::Object(map)) => Some(map),
        _ => None,
    };
    let (Some(found), Some(whole)) = (parse(found), parse(whole)) else {
        return false;
    };
    match doc {
        Doc::Registry => found
            .iter()
            .all(|(key, entry)| whole.get(key) == Some(entry)),
        _ => ["architecture", "ggml_types", "parts", "gguf"]
            .iter()
            .all(|key| found.get(*key).is_some() && found.get(*key) == whole.get(*key)),
    }
}
