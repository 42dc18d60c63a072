//! Stores that name files by their content: download caches, Ollama's blobs, git-annex.
//!
//! The problem: the parts of a split set find each other by name, and such a store keeps the names
//! elsewhere, as links that lead into it. A path that was resolved is that of a nameless file.
//!
//! The plan: know a store by its folder `blobs` or `.git`, and look for the links beside it.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::folder;
use crate::gguf::PartName;

/// Files lie at most so deep in a folder of blobs.
const BLOBS_DEPTH: usize = 3;

/// The folder whose links lead into the store that a file lies in; `None` if it lies in none.
pub(super) fn of(path: &Path) -> Option<PathBuf> {
    let is_called = |folder: &Path, name: &str| folder.file_name() == Some(OsStr::new(name));
    let mut above = path.ancestors().skip(1);
    let store = (above.clone().take(BLOBS_DEPTH))
        .find(|folder| is_called(folder, "blobs"))
        .or_else(|| above.find(|folder| is_called(folder, ".git")))?;
    let root = store.parent()?;
    let snapshots = root.join("snapshots");
    let is_cache = is_called(store, "blobs") && snapshots.is_dir();
    Some(if is_cache { snapshots } else { root.to_owned() })
}

/// A link with the name of a part that leads to a file of a store.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) path: PathBuf,
    /// How many parts of the set are beside it, itself included.
    pub(super) parts: u64,
}

/// The link below `root` that leads to part `number` of `count` at `blob`: of several, the one that
/// has most of the other parts beside it.
pub(super) fn link_to(root: &Path, blob: &Path, number: u64, count: u64) -> Option<Link> {
    let target = fs::metadata(blob).ok()?;
    let leads_to_it = |link: &Path| {
        // By name first, so that no other link is followed.
        let to = fs::read_link(link).ok()?;
        let found = (to.file_name()? == blob.file_name()?).then(|| fs::metadata(link).ok())??;
        Some((found.dev(), found.ino()) == (target.dev(), target.ino()))
    };
    let mut sets: HashMap<(PathBuf, OsString), u64> = HashMap::new();
    let mut links = Vec::new();
    for (path, kind) in folder::entries(root) {
        let name = path.file_name().and_then(PartName::parse);
        let Some(name) = name.filter(|name| name.count == count) else {
            continue;
        };
        let set = (path.parent().unwrap_or(root).to_owned(), name.prefix);
        *sets.entry(set.clone()).or_default() += 1;
        if name.number == number && kind.is_symlink() && leads_to_it(&path) == Some(true) {
            links.push((path, set));
        }
    }
    let links = links.into_iter().map(|(path, set)| Link {
        parts: sets[&set],
        path,
    });
    links.max_by(|a, b| (a.parts, &b.path).cmp(&(b.parts, &a.path)))
}

/// The command that fetches what a snapshot of a cache of Hugging Face lacks of a set; `None` if
/// the folder is not one, or has names that a shell would take apart.
pub(super) fn download_command(folder: &Path, set: &PartName) -> Option<String> {
    let mut below = Vec::new();
    let mut snapshot = None;
    for folder in folder.ancestors() {
        let above = folder.parent()?;
        if above.file_name() == Some(OsStr::new("snapshots")) {
            snapshot = Some(above);
            break;
        }
        below.push(folder.file_name()?);
    }
    let repository = snapshot?.parent()?.file_name()?;
    let repository = repository.as_bytes().strip_prefix(b"models--")?;
    let repository = str::from_utf8(repository).ok()?.replace("--", "/");
    let mut files = PathBuf::new();
    files.extend(below.iter().rev());
    let mut name = set.prefix.clone();
    name.push("-*-of-");
    name.push(format!("{:05}.gguf", set.count));
    files.push(name);
    let files = files.to_str()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-/*".contains(c);
    let plain = files.chars().chain(repository.chars()).all(is_plain);
    plain.then(|| format!("hf download {repository} --include '{files}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(folder: &str) -> Option<String> {
        let set = PartName::parse(OsStr::new("m-00001-of-00002.gguf")).unwrap();
        download_command(Path::new(folder), &set)
    }

    #[test]
    fn the_command_that_completes_a_snapshot_names_repository_and_folder() {
        assert_eq!(
            command("/c/models--u--m-1/snapshots/5f2a").as_deref(),
            Some("hf download u/m-1 --include 'm-*-of-00002.gguf'")
        );
        assert_eq!(
            command("/c/models--u--m/snapshots/5f2a/Q4_K_M/x").as_deref(),
            Some("hf download u/m --include 'Q4_K_M/x/m-*-of-00002.gguf'")
        );
        for folder in [
            "/c/u/m",
            "/snapshots/5f2a",
            "/c/datasets--u--m/snapshots/5f2a",
            "/c/models--u--m/snapshots/5f2a/a'b",
            "/c/models--u--`x`/snapshots/5f2a",
        ] {
            assert_eq!(command(folder), None, "{folder}");
        }
    }
}
