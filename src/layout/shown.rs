//! What a tree shows beside base files and experts.

use super::arranged::Arranged;
use super::directory::Directory;
use super::{Doc, FileKind, Layout, LayoutError};
use crate::gguf::merged::{Merged, Origin};
use crate::show::Show;
use crate::tree::{Content, NewFile, RecipeId};

/// All parts of the model in one file, below the root.
pub const JOINED_PATH: &str = "model.gguf";
/// With larger gaps between tensors, several parts are not shown as one file: no program writes
/// such files.
pub(super) const MAX_JOINED_ALIGNMENT: u32 = 1 << 20;

impl Layout {
    /// What the tree shows.
    pub fn show(&self) -> Show {
        self.show
    }

    /// Whether the tree shows files of this kind.
    pub fn shows(&self, kind: FileKind) -> bool {
        match kind {
            FileKind::Base(_) => self.show.base,
            FileKind::Expert { .. } => self.show.experts,
        }
    }

    /// The plan of the model directory, if one is shown.
    pub fn hf(&self) -> Option<&crate::hf::Directory> {
        self.directory.as_ref().map(Directory::plan)
    }

    pub(super) fn directory(&self) -> &Directory {
        let directory = self.directory.as_ref();
        directory.expect("only a directory that is shown has documents")
    }

    /// How an array is made that does not have the order of the model.
    pub(crate) fn arranged(&self, id: RecipeId) -> Option<Arranged> {
        self.directory.as_ref()?.arranged(id, &self.model)
    }

    /// Bytes in front of the first tensor of `model.gguf`.
    pub fn joined_header_bytes(&self) -> u64 {
        Merged::new(&self.model).header_bytes
    }

    /// All parts as one file.
    pub(super) fn joined(&self) -> Result<NewFile, LayoutError> {
        let alignment = self.model.parts[0].alignment;
        if self.model.parts.len() > 1 && alignment > MAX_JOINED_ALIGNMENT {
            return Err(LayoutError::JoinedAlignment(alignment));
        }
        let runs = Merged::new(&self.model).runs.into_iter();
        let runs = runs.map(|(bytes, origin)| {
            let content = match origin {
                Origin::Made(made) => Content::Made(Doc::Joined(made).id()),
                Origin::Part { part, offset } => Content::Model { part, offset },
            };
            (bytes, content)
        });
        Ok(NewFile {
            name: JOINED_PATH.to_owned(),
            runs: runs.collect(),
        })
    }
}
