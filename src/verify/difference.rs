//! Differences between a tree and its model: their kinds, their places, and their texts.

use std::fmt;
use std::path::PathBuf;

/// One difference from the model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// The file, below the root of the tree.
    pub path: PathBuf,
    /// The first byte of the file that differs.
    pub offset: Option<u64>,
    /// The tensor it lies in.
    pub tensor: Option<TensorNames>,
    pub kind: DifferenceKind,
}

impl Difference {
    /// Whether nothing is known but that the file cannot be read there.
    pub fn is_unreadable(&self) -> bool {
        matches!(self.kind, DifferenceKind::Unreadable(_))
    }
}

/// A tensor by both of its names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TensorNames {
    /// In the safetensors file.
    pub name: String,
    /// In the model; `None` if it has no such tensor.
    pub gguf_name: Option<String>,
}

/// The kind of a difference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum DifferenceKind {
    /// The tree must hold the file, or claims to, and does not.
    Missing,
    /// The model has no such file, or the tree does not claim to hold it.
    Extra,
    /// A link, device or folder in the place of a file, or something else in the place of a folder.
    Kind {
        expected: &'static str,
    },
    Size {
        expected: u64,
        found: u64,
    },
    Header,
    Payload,
    /// The file's own header has no tensor of that name.
    TensorMissing,
    /// The file's own header has a tensor that the model does not have there.
    TensorExtra,
    /// A tensor has another length in the file's own header.
    TensorSize {
        expected: u64,
        found: u64,
    },
    Document,
    /// The file cannot be read, for this reason.
    Unreadable(String),
}

impl DifferenceKind {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Kind { .. } => "kind",
            Self::Size { .. } => "size",
            Self::Header => "header",
            Self::Payload => "payload",
            Self::TensorMissing => "tensor_missing",
            Self::TensorExtra => "tensor_extra",
            Self::TensorSize { .. } => "tensor_size",
            Self::Document => "document",
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensor = Named(self.tensor.as_ref());
        match &self.kind {
            DifferenceKind::Missing => write!(f, "is missing")?,
            DifferenceKind::Extra => write!(f, "does not belong there")?,
            DifferenceKind::Kind { expected } => write!(f, "is not a {expected}")?,
            DifferenceKind::Size { expected, found } => {
                write!(f, "has {found} bytes instead of {expected}")?;
            }
            DifferenceKind::Header => write!(f, "has another header")?,
            DifferenceKind::Payload => write!(f, "holds other bytes")?,
            DifferenceKind::TensorMissing => return write!(f, "lacks {tensor}"),
            DifferenceKind::TensorExtra => {
                return write!(f, "holds {tensor}, which does not belong there");
            }
            DifferenceKind::TensorSize { expected, found } => {
                return write!(f, "holds {found} bytes instead of {expected} of {tensor}");
            }
            DifferenceKind::Document => write!(f, "has other contents")?,
            DifferenceKind::Unreadable(reason) => write!(f, "cannot be read ({reason})")?,
        }
        if let Some(offset) = self.offset {
            write!(f, ", from byte {offset}")?;
        }
        if self.tensor.is_some() {
            write!(f, ", in {tensor}")?;
        }
        Ok(())
    }
}

/// A tensor, as messages name it.
struct Named<'a>(Option<&'a TensorNames>);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(TensorNames { name, gguf_name }) = self.0 else {
            return Ok(());
        };
        write!(f, "tensor {name:?}")?;
        match gguf_name {
            Some(gguf_name) if gguf_name != name => write!(f, " ({gguf_name:?} of the model)"),
            _ => Ok(()),
        }
    }
}
