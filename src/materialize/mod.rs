//! The same tree as real files.
//!
//! The problem: hundreds of gigabytes that must never look finished when they are not.
//!
//! The plan: [`Plan::new`] compares the target with the tree, and refuses before anything is
//! written; [`Plan::run`] writes every missing file under a temporary name, gives it the tree's
//! time, flushes it, and only then its name. So a file that has its name is complete, and the
//! same command finishes what was interrupted. At the end the documents are made anew from the
//! files that are there.

mod selection;
mod write;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;
pub use selection::{NotNumbers, Numbers, Selection};
pub use write::Progress;

use crate::layout::{
    BASE_DIRECTORY, Doc, EXPERTS_DIRECTORY, FileKind, METADATA_GGUF_PATH, METADATA_PATH,
    REGISTRY_PATH,
};
use crate::model::Model;
use crate::source::ReadError;
use crate::sys;
use crate::tree::Ino;

/// What a file system takes for a file beside its bytes is counted as one block of this size.
const BLOCK_BYTES: u64 = 4096;

/// Why a tree cannot be written. What is complete stays, and the same command goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum MaterializeError {
    #[error("cannot {action} {path:?}: {cause}")]
    Io {
        action: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error(
        "{path:?} exists, but {reason}; it was not made from this model as it is now. Remove it, or choose another directory"
    )]
    Foreign { path: PathBuf, reason: String },
    #[error("another odmoe-fs is writing to {0:?}; wait until it has finished")]
    Locked(PathBuf),
    #[error(
        "{target:?} has room for {}, but {} are needed; free some, or choose fewer files with --layers, --experts, --base-only or --experts-only",
        HumanBytes(*available), HumanBytes(*needed)
    )]
    NoRoom {
        target: PathBuf,
        needed: u64,
        available: u64,
    },
    #[error("nothing to write: the model has no such experts (its layers with experts: {layers})")]
    NothingSelected { layers: String },
    #[error(
        "stopped; files that have their names are complete, and the same command goes on from there"
    )]
    Stopped,
    #[error(transparent)]
    Source(#[from] ReadError),
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MaterializeError {
    move |cause| MaterializeError::Io {
        action,
        path: path.to_owned(),
        cause,
    }
}

/// What is to be written to a target, and what is there already.
#[derive(Debug)]
pub struct Plan<'a> {
    model: &'a Model,
    target: PathBuf,
    /// Files to write, in the order of the model.
    missing: Vec<Ino>,
    /// Chosen files that are complete already.
    done: usize,
    /// Of those, the ones that only need the tree's time.
    touch: Vec<Ino>,
    /// By index in [`Layout::files`](crate::layout::Layout::files): is chosen, so that it will be
    /// there when the plan has been run.
    chosen: Vec<bool>,
    bytes: u64,
    incongruent_bytes: u64,
}

impl<'a> Plan<'a> {
    /// Compares a target, which need not exist, with the chosen part of a model's tree. Nothing is
    /// written.
    pub fn new(
        model: &'a Model,
        target: &Path,
        selection: &Selection,
    ) -> Result<Self, MaterializeError> {
        let layout = model.layout();
        let mut plan = Self {
            model,
            target: target.to_owned(),
            missing: Vec::new(),
            done: 0,
            touch: Vec::new(),
            chosen: vec![false; layout.files().len()],
            bytes: 0,
            incongruent_bytes: 0,
        };
        let mut chosen_experts = 0;
        for (index, file) in layout.files().iter().enumerate() {
            if selection.takes(file.kind) {
                if plan.take(plan.find(&file.kind.path()))? {
                    plan.incongruent_bytes += file.incongruent_bytes;
                }
                plan.chosen[index] = true;
                chosen_experts += usize::from(matches!(file.kind, FileKind::Expert { .. }));
            }
        }
        if chosen_experts == 0 && (selection.layers.is_some() || selection.experts.is_some()) {
            let layers = layout.moe_layers().map(|n| n.to_string());
            let layers: Vec<_> = layers.collect();
            return Err(MaterializeError::NothingSelected {
                layers: layers.join(","),
            });
        }
        if !selection.without_base {
            plan.take(plan.find(METADATA_GGUF_PATH))?;
        }
        for (path, doc) in DOCUMENTS {
            plan.check_document(path, doc)?;
            plan.bytes += model.tree().size(plan.find(path)).unwrap_or(0);
        }
        Ok(plan)
    }

    /// The number of files to write, without the two documents.
    pub fn files(&self) -> usize {
        self.missing.len()
    }

    /// The number of chosen files that are complete already.
    pub fn files_done(&self) -> usize {
        self.done
    }

    /// Bytes to write.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Of the bytes to write, those of tensors that are at another place modulo 4096 than in the
    /// model, so that no file system can share their blocks with it.
    pub fn incongruent_bytes(&self) -> u64 {
        self.incongruent_bytes
    }

    /// Fails if the target's file system has less room than the plan needs.
    pub fn check_room(&self) -> Result<(), MaterializeError> {
        let folder = self
            .target
            .ancestors()
            .find(|folder| folder.exists())
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let available =
            sys::available_bytes(folder).map_err(io_error("ask for room in", folder))?;
        let needed = self.bytes + self.missing.len() as u64 * BLOCK_BYTES;
        if needed > available {
            return Err(MaterializeError::NoRoom {
                target: self.target.clone(),
                needed,
                available,
            });
        }
        Ok(())
    }

    fn find(&self, path: &str) -> Ino {
        let found = self.model.tree().find(path);
        found.expect("the layout's files are in the tree")
    }

    /// Puts a chosen file where it belongs in the plan; says whether it is to be written.
    fn take(&mut self, ino: Ino) -> Result<bool, MaterializeError> {
        match self.state(ino)? {
            State::Done => self.done += 1,
            State::OtherTime => {
                let size = self.model.tree().size(ino).unwrap_or(0);
                if !self.starts_as_in_the_tree(ino, size)? {
                    return Err(self.foreign(ino, "holds other bytes"));
                }
                self.done += 1;
                self.touch.push(ino);
            }
            State::Missing => {
                self.bytes += self.model.tree().size(ino).unwrap_or(0);
                self.missing.push(ino);
                return Ok(true);
            }
            State::Foreign(reason) => return Err(self.foreign(ino, &reason)),
        }
        Ok(false)
    }

    fn path(&self, ino: Ino) -> PathBuf {
        let path = self.model.tree().path(ino).unwrap_or_default();
        self.target.join(path)
    }

    fn foreign(&self, ino: Ino, reason: &str) -> MaterializeError {
        MaterializeError::Foreign {
            path: self.path(ino),
            reason: reason.to_owned(),
        }
    }

    /// Compares a file of the target with what would be written: size, time and header, which
    /// holds every tensor's name, shape and place. Reads no payload.
    fn state(&self, ino: Ino) -> Result<State, MaterializeError> {
        let path = self.path(ino);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(State::Missing),
            Err(e) => return Err(io_error("look at", &path)(e)),
        };
        if !metadata.is_file() {
            return Ok(State::Foreign("is no regular file".into()));
        }
        let size = self.model.tree().size(ino).unwrap_or(0);
        if metadata.len() != size {
            let reason = format!("has {} bytes instead of {size}", metadata.len());
            return Ok(State::Foreign(reason));
        }
        // Of a file without tensors, which is small, all of it.
        let header = match self.model.tree().extents(ino).first() {
            Some(first) if path.extension() == Some("safetensors".as_ref()) => first.len,
            _ => size,
        };
        if !self.starts_as_in_the_tree(ino, header)? {
            return Ok(State::Foreign("has another header".into()));
        }
        let modified = metadata.modified().map_err(io_error("look at", &path))?;
        Ok(if modified == self.model.source().modified() {
            State::Done
        } else {
            State::OtherTime
        })
    }

    /// Compares the first `bytes` bytes of a file of the target with what would be written.
    fn starts_as_in_the_tree(&self, ino: Ino, bytes: u64) -> Result<bool, MaterializeError> {
        let path = self.path(ino);
        let file = File::open(&path).map_err(io_error("read", &path))?;
        let piece = bytes.min(write::BUFFER_BYTES as u64) as usize;
        let mut expected = vec![0; piece];
        let mut found = vec![0; piece];
        let mut offset = 0;
        loop {
            let wanted = (bytes - offset).min(piece as u64) as usize;
            let read = self.model.read_at(ino, offset, &mut expected[..wanted])?;
            if read == 0 {
                return Ok(true);
            }
            file.read_exact_at(&mut found[..read], offset)
                .map_err(io_error("read", &path))?;
            if found[..read] != expected[..read] {
                return Ok(false);
            }
            offset += read as u64;
        }
    }

    /// A document that is there will be replaced, so it must be one of this model.
    fn check_document(&self, path: &str, doc: Doc) -> Result<(), MaterializeError> {
        let full_path = self.target.join(path);
        let found = match fs::read(&full_path) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io_error("read", &full_path)(e)),
        };
        let mut whole = Vec::new();
        let rendered = self.model.layout().render(doc, &mut whole);
        rendered.expect("writing to memory cannot fail");
        if found == whole || is_part_of(doc, &found, &whole) {
            return Ok(());
        }
        Err(MaterializeError::Foreign {
            path: full_path,
            reason: "describes something else".into(),
        })
    }

    /// Which files the documents shall list, by index in `Layout::files`: those that were chosen, and
    /// those that other runs have left there.
    fn present(&self) -> Result<Vec<bool>, MaterializeError> {
        let files = self.model.layout().files().iter().zip(&self.chosen);
        files
            .map(|(file, &chosen)| {
                Ok(chosen
                    || matches!(
                        self.state(self.find(&file.kind.path()))?,
                        State::Done | State::OtherTime
                    ))
            })
            .collect()
    }
}

/// The documents that describe what is there.
const DOCUMENTS: [(&str, Doc); 2] = [
    (REGISTRY_PATH, Doc::Registry),
    (METADATA_PATH, Doc::Metadata),
];

const DIRECTORIES: [&str; 2] = [BASE_DIRECTORY, EXPERTS_DIRECTORY];

enum State {
    Missing,
    Done,
    /// Of the right size, with the right header, but with another time.
    OtherTime,
    /// There, but not what would be written; the reason.
    Foreign(String),
}

/// Whether a document can be of a part of the tree that `whole` describes.
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
