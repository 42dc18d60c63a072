//! What is in a folder and in the folders below it, a bounded part of it: for advice only.

use std::fs::FileType;
use std::path::{Path, PathBuf};

/// Entries that are looked at, at most, and how deep.
const MOST_ENTRIES: usize = 10_000;
const MOST_DEPTH: usize = 4;

/// Entries below a folder by path, those of nearer folders first. Links are listed and never
/// followed; nothing is opened but folders of the same mount, since another may not answer; what
/// cannot be listed is left out.
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
                let path = entry.path();
                if kind.is_dir() && !is_mounted_on(&path) {
                    below.push(path.clone());
                }
                found.push((path, kind));
            }
        }
        below.sort();
        folders = below;
    }
    found
}

/// Whether something is mounted on a folder, as far as the kernel can tell without asking the
/// file system that is mounted.
#[cfg(target_os = "linux")]
fn is_mounted_on(folder: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let ask_nobody = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW;
    let found = statx(CWD, folder, ask_nobody, StatxFlags::TYPE);
    found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(not(target_os = "linux"))]
fn is_mounted_on(_: &Path) -> bool {
    false
}
