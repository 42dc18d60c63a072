//! Why a tree cannot be written, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;

use crate::source::ReadError;

/// Why a tree cannot be written. What is complete stays, and the same command goes on from there.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "materialize.")]
pub enum MaterializeError {
    #[error("cannot {action} {path:?}: {cause}")]
    Io {
        action: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error(
        "{path:?} exists, but {reason}; it was not made from this model as it is now. Remove it, replace such files with --force, or choose another directory"
    )]
    Foreign { path: PathBuf, reason: String },
    #[error(
        "{0:?} is a directory, where a file must be written; remove it, or choose another directory"
    )]
    FolderInTheWay(PathBuf),
    #[error(
        "{0:?} was not chosen, but the registry would list it, and it holds other bytes: those of another model of the same shape. Remove it, or choose another directory"
    )]
    OtherModel(PathBuf),
    #[error("{0:?} is not a directory; choose another place to write to")]
    NotADirectory(PathBuf),
    #[error(
        "{0:?} is a link, which is not written through; remove it, or choose another directory"
    )]
    Link(PathBuf),
    #[error(
        "{0:?} was moved or replaced while it was written to, so nothing more was put there; the same command writes what is missing"
    )]
    Replaced(PathBuf),
    #[error("another odmoe-fs is writing to {0:?}; wait until it has finished")]
    Locked(PathBuf),
    #[error(
        "{target:?} has room for {}, but {} are needed{}; free some, or choose fewer files with --layers, --experts, --base-only or --experts-only",
        HumanBytes(*available), HumanBytes(*needed),
        if *replacing { ", since with --force files that are replaced stay until the new ones are complete" } else { "" }
    )]
    NoRoom {
        target: PathBuf,
        needed: u64,
        available: u64,
        /// Whether files are to be replaced.
        replacing: bool,
    },
    #[error(
        "{target:?} cannot share disk blocks with the model: {reason}; with --reflink auto they are copied"
    )]
    CannotShare { target: PathBuf, reason: String },
    #[error("{option} {asked} asks for what the model does not have; its {what} are {existing}")]
    NotThere {
        option: &'static str,
        what: &'static str,
        asked: String,
        existing: String,
    },
    #[error("nothing to write: of the chosen layers, none has an expert of the chosen numbers")]
    NothingSelected,
    #[error(
        "stopped; files that have their names are complete, and the same command goes on from there"
    )]
    Stopped,
    #[error(transparent)]
    Source(#[from] ReadError),
}

pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> MaterializeError {
    move |cause| MaterializeError::Io {
        action,
        path: path.to_owned(),
        cause,
    }
}
