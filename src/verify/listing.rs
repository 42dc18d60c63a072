//! What lies in a tree's folders.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::{Difference, VerifyError, What};
use crate::model::Model;
use crate::tree::{Ino, ROOT};

/// What a tree's folders hold.
pub(super) struct Listing {
    /// Files whose names are known, by inode number in the model's tree.
    pub(super) known: HashSet<Ino>,
    /// Everything else.
    pub(super) strangers: Vec<Difference>,
}

impl Listing {
    pub(super) fn of(model: &Model, root: &Path) -> Result<Self, VerifyError> {
        let tree = model.tree();
        let mut listing = Self {
            known: HashSet::new(),
            strangers: Vec::new(),
        };
        match fs::metadata(root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(VerifyError::Missing(root.to_owned()));
            }
            Ok(metadata) if !metadata.is_dir() => {
                return Err(VerifyError::NotADirectory(root.to_owned()));
            }
            _ => {} // listing it says what is wrong
        }
        for entry in entries(root)? {
            let path = entry.path();
            let name = entry.file_name();
            let Some(directory) = tree.lookup(ROOT, name.as_bytes()) else {
                if !is_part(model, &path) {
                    listing.stranger(name.into(), What::Extra);
                }
                continue;
            };
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                listing.stranger(
                    name.into(),
                    What::Kind {
                        expected: "directory",
                    },
                );
                continue;
            }
            for entry in entries(&path)? {
                let file = entry.file_name();
                match tree.lookup(directory, file.as_bytes()) {
                    Some(ino) => {
                        listing.known.insert(ino);
                    }
                    None => listing.stranger(Path::new(&name).join(file), What::Extra),
                }
            }
        }
        Ok(listing)
    }

    fn stranger(&mut self, path: PathBuf, what: What) {
        self.strangers.push(Difference {
            path,
            offset: None,
            tensor: None,
            what,
        });
    }
}

fn entries(folder: &Path) -> Result<Vec<fs::DirEntry>, VerifyError> {
    fs::read_dir(folder)
        .and_then(|entries| entries.collect())
        .map_err(|cause| VerifyError::List {
            path: folder.to_owned(),
            cause,
        })
}

/// Whether a path is that of a part of the model, which may lie beside the tree.
fn is_part(model: &Model, path: &Path) -> bool {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    identity(path).is_some_and(|found| {
        model
            .source()
            .paths()
            .any(|part| identity(part) == Some(found))
    })
}
