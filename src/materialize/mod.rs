//! The same tree as real files.
//!
//! The problem: hundreds of gigabytes that must never look finished when they are not.
//!
//! The plan: [`Plan::new`] opens the target (`target`), compares sizes, times and headers with the
//! tree's (`compare`), finds out which bytes can be shared, skipped or must be copied (`methods`), and
//! refuses before anything is written. [`Plan::run`] first compares the bytes of files that look
//! complete but have another time. Then it writes every missing file (`copy`) under a temporary
//! name, gives it the tree's time (`write`), flushes a group of such files together, and only then
//! gives them their names (`publish`). So a file that has its name is complete, and the same command
//! finishes what was interrupted. At the end the documents are made anew from the files that are
//! there.

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
pub use crate::sys::process::ignore_file_size_signal;
pub use crate::work::Progress;

/// How a tree is to be written.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Which files.
    pub selection: Selection,
    /// Whether to share blocks with the model.
    pub reflink: Reflink,
    /// Replace files that are there but are not what would be written.
    pub force: bool,
    /// Change nothing in the target, not even for a moment: the plan is to be looked at, not run.
    pub dry_run: bool,
}

/// What a run has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Files that were written, without the two documents, and their bytes.
    pub files: usize,
    pub bytes: u64,
    /// Complete files whose time could not be set, so that the next run compares their bytes again.
    pub untimed: Vec<PathBuf>,
    /// Whether a document had to be made anew.
    pub documents_written: bool,
    /// What lies in the target's folders, but is not listed: files of another model, or of nobody.
    pub unlisted: Vec<PathBuf>,
}

/// The documents that describe what is there.
const DOCUMENTS: [(&str, Doc); 2] = [
    (REGISTRY_PATH, Doc::Registry),
    (METADATA_PATH, Doc::Metadata),
];
