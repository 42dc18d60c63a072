//! What is in a folder and in the folders below it, a bounded part of it: for advice only.

use std::fs::FileType;
use std::path::{Path, PathBuf};

/// Entries that are looked at, at most, and how deep.
const MOST_ENTRIES: usize = 10_000;
const MOST_DEPTH: usize = 4;

/// Entries below a folder by path, those of nearer folders first. Links are listed and never
/// followed; nothing is opened but folders; what cannot be listed is left out.
pub(super) fn entries(root: &Path) -> Vec<(PathBuf, FileType)> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    for _ in 0..MOST_DEPTH {
        let mut below = Vec::new();
        for folder in folders {
            let Ok(listing) = folder.read_dir() else {
                continue;
            };
            for entry in listing.flatten() {
                let Ok(kind) = entry.file_type() else {
                    continue;
                };
                if found.len() == MOST_ENTRIES {
                    return found;
                }
                if kind.is_dir() {
                    below.push(entry.path());
                }
                found.push((entry.path(), kind));
            }
        }
        below.sort();
        folders = below;
    }
    found
}
