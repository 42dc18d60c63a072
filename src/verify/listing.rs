//! Lists a tree's folders.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Difference, DifferenceKind, VerifyError};
use crate::folder::{Entry, Folder, Kind};
use crate::model::Model;
use crate::on_disk::OnDisk;
use crate::tree::{Ino, ROOT};

/// The entries of a tree's folders.
pub(super) struct Listing {
    /// The folders, held open.
    pub(super) tree: OnDisk,
    /// Files whose names are known, by inode number in the model's tree.
    pub(super) known: HashSet<Ino>,
    /// Everything else.
    pub(super) strangers: Vec<Difference>,
}

impl Listing {
    pub(super) fn of(model: &Model, path: &Path) -> Result<Self, VerifyError> {
        let tree = model.tree();
        let root = open_root(path)?;
        let mut listing = Self {
            tree: OnDisk::at(root.clone()),
            known: HashSet::new(),
            strangers: Vec::new(),
        };
        for (name, kind) in entries(&root)? {
            let Some(directory) = tree.lookup(ROOT, name.as_bytes()) else {
                let may_be_part = !matches!(kind, Some(Kind::Folder | Kind::Special));
                if !may_be_part || !is_part(model, &path.join(&name)) {
                    listing.stranger(name.into(), DifferenceKind::Extra);
                }
                continue;
            };
            let opened = root.folder(&name);
            let folder = match opened.map_err(|cause| list_error(&path.join(&name), cause))? {
                Entry::There(folder) => folder,
                Entry::Missing => continue, // removed in between
                Entry::Other(_) => {
                    listing.stranger(
                        name.into(),
                        DifferenceKind::Kind {
                            expected: "directory",
                        },
                    );
                    continue;
                }
            };
            for (file, _) in entries(&folder)? {
                match tree.lookup(directory, file.as_bytes()) {
                    Some(ino) => {
                        listing.known.insert(ino);
                    }
                    None => listing.stranger(Path::new(&name).join(file), DifferenceKind::Extra),
                }
            }
            listing.tree.add(directory, folder);
        }
        Ok(listing)
    }

    fn stranger(&mut self, path: PathBuf, kind: DifferenceKind) {
        self.strangers.push(Difference {
            path,
            offset: None,
            tensor: None,
            kind,
        });
    }
}

/// Opens the directory of a tree.
pub(super) fn open_root(path: &Path) -> Result<Folder, VerifyError> {
    Folder::open(path).map_err(|cause| match cause.raw_os_error() {
        Some(libc::ENOENT) => VerifyError::Missing(path.to_owned()),
        Some(libc::ENOTDIR) => VerifyError::NotADirectory(path.to_owned()),
        _ => list_error(path, cause),
    })
}

fn entries(folder: &Folder) -> Result<Vec<(OsString, Option<Kind>)>, VerifyError> {
    let entries = folder.entries();
    entries.map_err(|cause| list_error(folder.path(), cause))
}

fn list_error(path: &Path, cause: io::Error) -> VerifyError {
    VerifyError::List {
        path: path.to_owned(),
        cause,
    }
}

/// Whether a path is that of a part of the model, which may lie beside the tree.
fn is_part(model: &Model, path: &Path) -> bool {
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    path.metadata().is_ok_and(|found| {
        let found = identity(found);
        let mut parts = model.source().paths();
        parts.any(|part| part.metadata().is_ok_and(|part| identity(part) == found))
    })
}
