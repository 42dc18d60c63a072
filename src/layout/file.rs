//! Files, and the pieces of tensors that they hold.

use std::ops::Range;

use super::{BASE_DIRECTORY, Component, EXPERTS_DIRECTORY};
use crate::codec::Codec;
use crate::form::Shown;
use crate::gguf::Tensor;
use crate::safetensors::Shape;

/// A run of a tensor under a name of its own; of a stack, one run per expert.
#[derive(Debug, Clone)]
pub struct View {
    /// Index into [`ModelHeader::tensors`](crate::gguf::ModelHeader::tensors).
    pub tensor: u32,
    /// The name in the file; `None` is the tensor's own.
    pub name: Option<Box<str>>,
    /// The logical shape of one run, row-major.
    pub shape: Shape,
    /// The start of the first run in the tensor, in bytes.
    pub first: u64,
    /// Bytes of one run.
    pub bytes: u64,
    /// Bytes from the start of one run to that of the next; 0 if there is only one run.
    pub stride: u64,
    /// What each run is shown as.
    pub shown: Shown,
}

impl View {
    pub(super) fn whole(index: u32, tensor: &Tensor, name: Option<Box<str>>) -> Self {
        Self {
            tensor: index,
            name,
            shape: Shape::of_dims(tensor.info.dims()),
            first: 0,
            bytes: tensor.info.bytes,
            stride: 0,
            shown: Shown::Stored,
        }
    }
}

/// How an array is computed: from which bytes of the model, and by what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// 0-based.
    pub part: u32,
    /// First byte of the blocks in the part's file.
    pub offset: u64,
    /// Bytes of blocks.
    pub len: u64,
    pub codec: Codec,
}

/// One run of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the view.
    pub(super) view: u32,
    /// The number of the run.
    pub(super) run: u32,
}

/// The purpose of a safetensors file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileKind {
    Base(Component),
    Expert { layer: u32, expert: u32 },
}

impl FileKind {
    /// The name without `.safetensors`.
    pub fn stem(self) -> String {
        match self {
            Self::Base(component) => component.name().to_owned(),
            Self::Expert { layer, expert } => format!("layer_{layer:02}_expert_{expert:03}"),
        }
    }

    /// The path below the root of the tree.
    pub fn path(self) -> String {
        let directory = match self {
            Self::Base(_) => BASE_DIRECTORY,
            Self::Expert { .. } => EXPERTS_DIRECTORY,
        };
        format!("{directory}/{}.safetensors", self.stem())
    }
}

/// One safetensors file of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorFile {
    pub kind: FileKind,
    pub(super) pieces: Range<u32>,
    /// Whether arrays lie in the order of their widths, so that each is aligned to its own. Else they
    /// lie in the order of the model.
    pub(super) widest_first: bool,
    /// Bytes before the payload: length word, JSON and padding.
    pub header_bytes: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
}

impl TensorFile {
    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        self.header_bytes + self.payload_bytes
    }
}
