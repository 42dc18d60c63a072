//! Writes the tree as real files.
//!
//! The problem: hundreds of gigabytes that must never look finished when they are not.
//!
//! The plan: [`Plan::new`] opens the target (`target`), compares sizes, times and headers with the
//! tree's (`compare`), and finds out which bytes can be shared or left out and which must be copied
//! (`methods`). What cannot work is refused then, before anything is written. [`Plan::run`] first
//! compares the bytes of files that look complete but have another time. Then it writes every
//! missing file (`copy`) under a temporary name, gives it the tree's time (`write`), flushes a
//! group of such files together, and only then gives them their names (`publish`). So a file that
//! has its name is complete, and the same command finishes an interrupted run. At the end the
//! documents are rendered again from the files that are there.

mod compare;
mod copy;
mod error;
mod methods;
mod plan;
mod publish;
mod selection;
mod target;
mod write;

use std::path::PathBuf;

pub use error::MaterializeError;
pub use methods::{Cost, Reflink};
pub use plan::Plan;
pub use selection::{NotNumbers, Numbers, Selection};

use self::error::io_error;
use crate::layout::{Doc, METADATA_PATH, REGISTRY_PATH};
pub use crate::work::Progress;

/// How to write a tree.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The files to write.
    pub selection: Selection,
    /// Whether to share blocks with the model.
    pub reflink: Reflink,
    /// Replace files that exist but are not what would be written.
    pub force: bool,
    /// Change nothing in the target, not even for a moment: the plan is for inspection, not for
    /// running.
    pub dry_run: bool,
}

/// The result of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Files that were written, not counting the two documents, and their bytes.
    pub files: usize,
    pub bytes: u64,
    /// Complete files whose time could not be set, so that the next run compares their bytes again.
    pub untimed: Vec<PathBuf>,
    /// Documents that had to be written.
    pub documents: usize,
    /// Entries of the target's folders that are not listed, such as files of another model.
    pub unlisted: Vec<PathBuf>,
}

/// The documents that describe a tree.
const DOCUMENTS: [(&str, Doc); 2] = [
    (REGISTRY_PATH, Doc::Registry),
    (METADATA_PATH, Doc::Metadata),
];
