//! The target, held open from the first look at it.
//!
//! The problem: between the first look and the first write, somebody may put a link or another
//! folder in its place.
//!
//! The plan: the folders of the target that exist are opened once, and everything is read and
//! written through those descriptors. Missing folders are created below the nearest one that
//! exists, name by name, and never through a link.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use super::{MaterializeError, io_error};
use crate::folder::{Entry, Folder, Kind};
use crate::on_disk::OnDisk;
use crate::tree::{self, Ino, ROOT, Tree};

#[derive(Debug)]
pub(super) struct Target {
    path: PathBuf,
    /// The target, or the nearest folder above it that exists.
    nearest: Folder,
    /// The names that lead from there to the target.
    missing: Vec<OsString>,
    there: OnDisk,
}

impl Target {
    /// Opens the folders of a target that exist. The path that the user names may be a link. The
    /// folders in it may not: somebody else may have put a link there.
    pub fn open(path: &Path, tree: &Tree) -> Result<Self, MaterializeError> {
        let names: Vec<Component> = path.components().collect();
        for there in (0..=names.len()).rev() {
            let nearest: PathBuf = names[..there].iter().collect();
            match Folder::open(&nearest) {
                Ok(folder) => return Self::below(path, folder, &names[there..], tree),
                Err(e) => match e.raw_os_error() {
                    Some(libc::ENOTDIR) if nearest.symlink_metadata().is_ok() => {
                        return Err(MaterializeError::NotADirectory(nearest));
                    }
                    Some(libc::ENOENT) if nearest.symlink_metadata().is_ok() => {
                        return Err(MaterializeError::Link(nearest)); // to nothing
                    }
                    Some(libc::ENOENT | libc::ENOTDIR) if there > 0 => {}
                    _ => return Err(io_error("open", &nearest)(e)),
                },
            }
        }
        unreachable!("the last of them is returned, or an error")
    }

    fn below(
        path: &Path,
        nearest: Folder,
        missing: &[Component],
        tree: &Tree,
    ) -> Result<Self, MaterializeError> {
        let mut there = OnDisk::nothing();
        if missing.is_empty() {
            there = OnDisk::at(nearest.clone());
            for (ino, name) in directories(tree) {
                let path = path.join(name);
                let found = nearest.folder(name.as_ref());
                match found.map_err(io_error("open", &path))? {
                    Entry::There(folder) => there.add(ino, folder),
                    Entry::Missing => {}
                    Entry::Other(kind) => return Err(in_the_way(path, kind)),
                }
            }
        }
        Ok(Self {
            path: path.to_owned(),
            nearest,
            missing: missing.iter().map(|name| name.into()).collect(),
            there,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The target, or the nearest folder above it, which lies on the file system to write to.
    pub fn nearest(&self) -> &Folder {
        &self.nearest
    }

    /// The folders that existed when it was opened.
    pub fn there(&self) -> &OnDisk {
        &self.there
    }

    /// Creates the folders that are missing.
    pub fn make(&self, tree: &Tree) -> Result<OnDisk, MaterializeError> {
        let mut root = self.nearest.clone();
        for name in &self.missing {
            root = make_folder(&root, name.as_ref())?;
        }
        let mut made = self.there.clone();
        if made.root().is_none() {
            made = OnDisk::at(root.clone());
        }
        for (ino, name) in directories(tree) {
            if made.folder(ino).is_none() {
                made.add(ino, make_folder(&root, name.as_ref())?);
            }
        }
        Ok(made)
    }
}

fn make_folder(folder: &Folder, name: &Path) -> Result<Folder, MaterializeError> {
    let path = folder.path().join(name);
    let made = folder.make_folder(name.as_os_str());
    match made.map_err(io_error("create", &path))? {
        Entry::There(folder) => Ok(folder),
        Entry::Missing => Err(MaterializeError::Replaced(path)),
        Entry::Other(kind) => Err(in_the_way(path, kind)),
    }
}

fn in_the_way(path: PathBuf, kind: Kind) -> MaterializeError {
    match kind {
        Kind::Link => MaterializeError::Link(path),
        _ => MaterializeError::NotADirectory(path),
    }
}

/// The directories of a tree below its root.
fn directories(tree: &Tree) -> impl Iterator<Item = (Ino, &str)> {
    let nodes = tree.children(ROOT).unwrap_or(0..0);
    nodes
        .filter(|&ino| tree.kind(ino) == Some(tree::Kind::Directory))
        .filter_map(|ino| Some((ino, tree.name(ino)?)))
}
