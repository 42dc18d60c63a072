//! Differences: of what kind, where, and how they are said.

use std::fmt;
use std::path::PathBuf;

/// One thing that is not as the model has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// Below the root of the tree.
    pub path: PathBuf,
    /// The byte of the file that it starts at.
    pub offset: Option<u64>,
    /// The tensor it lies in.
    pub tensor: Option<TensorNames>,
    pub what: What,
}

/// A tensor by both of its names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TensorNames {
    /// In the safetensors file.
    pub name: String,
    /// In the model.
    pub gguf_name: String,
}

/// What is different.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// The tree claims to hold the file, or must, and does not.
    Missing,
    /// The model has no such file, or the tree does not claim to hold it.
    Extra,
    /// A link, device or folder where a file should be, or no folder where one should be.
    Kind {
        expected: &'static str,
    },
    Size {
        expected: u64,
        found: u64,
    },
    Header,
    Payload,
    Document,
    /// The tree cannot be read there; the reason.
    Unreadable(String),
}

impl What {
    /// One stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Kind { .. } => "kind",
            Self::Size { .. } => "size",
            Self::Header => "header",
            Self::Payload => "payload",
            Self::Document => "document",
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Missing => write!(f, "is missing")?,
            What::Extra => write!(f, "does not belong there")?,
            What::Kind { expected } => write!(f, "is not a {expected}")?,
            What::Size { expected, found } => {
                write!(f, "has {found} bytes instead of {expected}")?;
            }
            What::Header => write!(f, "has another header")?,
            What::Payload => write!(f, "holds other bytes")?,
            What::Document => write!(f, "says something else")?,
            What::Unreadable(reason) => write!(f, "cannot be read ({reason})")?,
        }
        if let Some(offset) = self.offset {
            write!(f, ", from byte {offset}")?;
        }
        if let Some(TensorNames { name, gguf_name }) = &self.tensor {
            write!(f, ", in tensor {name:?}")?;
            if name != gguf_name {
                write!(f, " ({gguf_name:?} of the model)")?;
            }
        }
        Ok(())
    }
}
