//! The files that a tree's documents claim it holds.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::Ordering;

use serde_json::Value;

use super::{Comparison, DOCUMENTS, DifferenceKind, NO_FILE, VerifyError};
use crate::folder::Entry;
use crate::layout::{
    FileKind, HF_DIRECTORY, JOINED_PATH, METADATA_GGUF_PATH, METADATA_PATH, REGISTRY_PATH,
    TensorFile,
};
use crate::model::Model;
use crate::tree::Ino;

/// Whether a tree claims to hold each safetensors file of `Layout::files`.
pub(super) struct Claims(Vec<bool>);

impl Claims {
    pub(super) fn counts(&self, model: &Model) -> (usize, usize) {
        let base = model.layout().files().len() - model.layout().experts().len();
        let count = |claimed: &[bool]| claimed.iter().filter(|claimed| **claimed).count();
        (count(&self.0[base..]), count(&self.0[..base]))
    }

    /// The files to compare, without the two documents, sorted by inode number.
    pub(super) fn files<'a>(&self, model: &'a Model) -> Vec<Expected<'a>> {
        let tree = model.tree();
        let find = |path: &str| tree.find(path).expect("the layout's files are in the tree");
        let files = model.layout().files();
        let claimed = files.iter().zip(&self.0).filter(|(_, claimed)| **claimed);
        let mut expected: Vec<_> = claimed
            .map(|(file, _)| Expected {
                ino: find(&file.kind.path()),
                file: Some(file),
                header_bytes: file.header_bytes,
                is_required: true,
            })
            .collect();
        expected.extend(others(model));
        let has_base = files
            .first()
            .is_some_and(|f| matches!(f.kind, FileKind::Base(_)));
        if let Some(ino) = tree.find(METADATA_GGUF_PATH) {
            expected.push(Expected {
                ino,
                file: None,
                header_bytes: tree.size(ino).unwrap_or(0),
                // It belongs to the base files.
                is_required: !has_base || self.counts(model).1 > 0,
            });
        }
        expected.sort_by_key(|file| file.ino);
        expected
    }
}

/// A file of the tree that must be compared.
pub(super) struct Expected<'a> {
    pub(super) ino: Ino,
    /// `None` for files that the documents do not list.
    pub(super) file: Option<&'a TensorFile>,
    /// What a quick comparison reads of it.
    pub(super) header_bytes: u64,
    pub(super) is_required: bool,
}

/// `model.gguf` and the files of the model directory.
fn others(model: &Model) -> impl Iterator<Item = Expected<'_>> {
    let tree = model.tree();
    tree.files().filter_map(|ino| {
        let path = tree.path(ino)?;
        let size = tree.size(ino)?;
        let header_bytes = if path == JOINED_PATH {
            model.layout().joined_header_bytes()
        } else if !Path::new(&path).starts_with(HF_DIRECTORY) {
            return None;
        } else if path.ends_with(".safetensors") {
            tree.extents(ino).first().map_or(size, |header| header.len)
        } else {
            size
        };
        Some(Expected {
            ino,
            file: None,
            header_bytes,
            is_required: true,
        })
    })
}

impl Comparison<'_> {
    /// Reads the documents, and compares them with those of a tree of the files that they list. If
    /// one cannot be parsed, the files that are there count as listed.
    pub(super) fn claims(&mut self, found: &HashSet<Ino>) -> Result<Claims, VerifyError> {
        let registry = self.document(REGISTRY_PATH, found)?;
        let metadata = self.document(METADATA_PATH, found)?;
        let listed = Listed::of(registry.as_deref(), metadata.as_deref());
        let (layout, tree) = (self.model.layout(), self.model.tree());
        let is_there = |path: &str| tree.find(path).is_some_and(|ino| found.contains(&ino));
        let is_claimed = |file: &TensorFile| {
            if !layout.shows(file.kind) {
                return false;
            }
            let names = match file.kind {
                FileKind::Expert { .. } => &listed.experts,
                FileKind::Base(_) => &listed.base,
            };
            match names {
                Some(names) => names.contains(&file.kind.stem()),
                None => is_there(&file.kind.path()),
            }
        };
        let mut rendered = [Vec::new(), Vec::new()];
        layout
            .render_registry(&is_claimed, &mut rendered[0])
            .and_then(|()| layout.render_metadata(&is_claimed, &mut rendered[1]))
            .expect("writing to memory cannot fail");
        for ((path, found), expected) in DOCUMENTS
            .into_iter()
            .zip([registry, metadata])
            .zip(rendered)
        {
            let Some(found) = found else {
                continue; // reported already
            };
            self.documents += 1;
            self.bytes.fetch_add(found.len() as u64, Ordering::Relaxed);
            if found != expected {
                let same = found.iter().zip(&expected).take_while(|(a, b)| a == b);
                self.add(
                    self.model.tree().find(path).unwrap_or_default(),
                    Some(same.count() as u64),
                    None,
                    DifferenceKind::Document,
                );
            }
        }
        Ok(Claims(layout.files().iter().map(is_claimed).collect()))
    }

    /// The bytes of a document of the tree, unless it is too long to be one of this model.
    fn document(&self, path: &str, found: &HashSet<Ino>) -> Result<Option<Vec<u8>>, VerifyError> {
        let Some(ino) = self.model.tree().find(path) else {
            return Ok(None); // the tree shows no such directory
        };
        if !found.contains(&ino) {
            self.add(ino, None, None, DifferenceKind::Missing);
            return Ok(None);
        }
        // The documents of a partial tree are shorter, never longer.
        let longest = self.model.tree().size(ino).unwrap_or(0);
        let kind = match self.tree.read(self.model.tree(), ino, longest) {
            Ok(Entry::There(Ok(bytes))) => return Ok(Some(bytes)),
            Ok(Entry::There(Err(found))) => DifferenceKind::Size {
                expected: longest,
                found,
            },
            Ok(Entry::Missing) => DifferenceKind::Missing,
            Ok(Entry::Other(_)) => NO_FILE,
            Err(cause) => self.unreadable(ino, cause)?,
        };
        self.add(ino, None, None, kind);
        Ok(None)
    }
}

/// The names that documents list, without `.safetensors`; `None` if one cannot be parsed.
struct Listed {
    experts: Option<HashSet<String>>,
    base: Option<HashSet<String>>,
}

impl Listed {
    fn of(registry: Option<&[u8]>, metadata: Option<&[u8]>) -> Self {
        let parse = |bytes: Option<&[u8]>| serde_json::from_slice::<Value>(bytes?).ok();
        let experts = match parse(registry) {
            Some(Value::Object(map)) => Some(map.into_iter().map(|(name, _)| name).collect()),
            _ => None,
        };
        let base = parse(metadata).and_then(|metadata| {
            let files = metadata.get("weight_map")?.as_object()?.values();
            let stem =
                |file: &Value| Some(Path::new(file.as_str()?).file_stem()?.to_str()?.to_owned());
            files.map(stem).collect()
        });
        Self { experts, base }
    }
}
