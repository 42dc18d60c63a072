//! What is in the target, compared with what would be written.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{MaterializeError, Plan, Progress, io_error};
use crate::layout::Doc;
use crate::sys::read;
use crate::tree::Ino;
use crate::verify::{Fault, first_difference};

/// Headers are compared in pieces of this size; most take one.
const PIECE_BYTES: u64 = 64 << 10;

pub(super) enum State {
    Missing,
    Done,
    /// Of the right size, with the right header, but with another time.
    OtherTime,
    /// There, but not what would be written; the reason.
    Foreign(String),
}

impl Plan<'_> {
    /// Compares a file of the target with what would be written: size, time and header, which
    /// holds every tensor's name, shape and place. Reads no payload, of either side.
    pub(super) fn state(&self, ino: Ino) -> Result<State, MaterializeError> {
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
        let file = File::open(&path).map_err(io_error("read", &path))?;
        // Else the kernel reads payload ahead.
        read::only_what_is_read(&file);
        let mut buffer = vec![0; 2 * header.min(PIECE_BYTES) as usize];
        if self
            .first_difference(ino, &file, 0..header, &mut buffer)?
            .is_some()
        {
            return Ok(State::Foreign("has another header".into()));
        }
        let modified = metadata.modified().map_err(io_error("look at", &path))?;
        Ok(if modified == self.model.source().modified() {
            State::Done
        } else {
            State::OtherTime
        })
    }

    /// The first byte of a file in the target that is not what would be written. Reads past the
    /// page cache where the kernel can do that, so that the disk is asked and not the memory.
    pub(super) fn payload_difference(
        &self,
        ino: Ino,
        buffer: &mut [u8],
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Option<u64>, MaterializeError> {
        let path = self.path(ino);
        let file = File::open(&path).map_err(io_error("read", &path))?;
        read::forget(&file);
        let size = self.model.tree().size(ino).unwrap_or(0);
        let found = file.metadata().map_err(io_error("look at", &path))?.len();
        let common = size.min(found);
        let piece = buffer.len() as u64 / 2;
        for start in (0..common).step_by(piece as usize) {
            if stop.load(Ordering::Relaxed) {
                return Err(MaterializeError::Stopped);
            }
            let range = start..common.min(start + piece);
            let bytes = range.end - range.start;
            if let Some(offset) = self.first_difference(ino, &file, range, buffer)? {
                return Ok(Some(offset));
            }
            progress(Progress { bytes, files: 0 });
        }
        progress(Progress { bytes: 0, files: 1 });
        Ok((size != found).then_some(common))
    }

    fn first_difference(
        &self,
        ino: Ino,
        file: &File,
        range: std::ops::Range<u64>,
        buffer: &mut [u8],
    ) -> Result<Option<u64>, MaterializeError> {
        first_difference(self.model, ino, file, range, buffer).map_err(|fault| match fault {
            Fault::Model(e) => e.into(),
            Fault::File { cause, .. } => io_error("read", &self.path(ino))(cause),
        })
    }

    /// A document that is there will be replaced, so it must be one of this model.
    pub(super) fn check_document(&self, path: &str, doc: Doc) -> Result<(), MaterializeError> {
        let full_path = self.target.join(path);
        match fs::symlink_metadata(&full_path) {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => {
                return Err(MaterializeError::Foreign {
                    path: full_path,
                    reason: "is no regular file".into(),
                });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io_error("look at", &full_path)(e)),
        }
        let found = fs::read(&full_path).map_err(io_error("read", &full_path))?;
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
}

/// Whether a path is a folder, which no option replaces by a file.
pub(super) fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
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
