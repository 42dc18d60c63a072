//! A tree as files on disk, compared with its model.
//!
//! The problem: writing and verifying a tree both need to know which files are there and which of
//! their bytes differ, while other programs may change the tree.
//!
//! The plan: [`OnDisk`] holds the tree's folders open, so that every file is reached through them
//! ([`Folder`]). [`Comparer`] reads a run of a file and the same run of the model, piece by piece.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::folder::{Entry, Folder};
use crate::model::Model;
use crate::source::ReadError;
use crate::sys::read;
use crate::tree::{Ino, ROOT, Tree};

/// The folders of a tree that exist.
#[derive(Debug, Clone)]
pub(crate) struct OnDisk {
    /// By inode number in the model's tree.
    folders: Vec<(Ino, Folder)>,
}

impl OnDisk {
    /// A tree that does not exist.
    pub fn nothing() -> Self {
        Self {
            folders: Vec::new(),
        }
    }

    /// A tree of which only the root exists.
    pub fn at(root: Folder) -> Self {
        Self {
            folders: vec![(ROOT, root)],
        }
    }

    /// Adds a folder by its inode number in the model's tree.
    pub fn add(&mut self, ino: Ino, folder: Folder) {
        self.folders.push((ino, folder));
    }

    pub fn root(&self) -> Option<&Folder> {
        self.folder(ROOT)
    }

    /// Finds a folder by its inode number in the model's tree.
    pub fn folder(&self, ino: Ino) -> Option<&Folder> {
        let found = self.folders.iter().find(|(held, _)| *held == ino);
        found.map(|(_, folder)| folder)
    }

    /// The folders, without the root.
    pub fn folders(&self) -> impl Iterator<Item = &Folder> {
        self.folders_by_ino().map(|(_, folder)| folder)
    }

    /// The same with their inode numbers in the model's tree.
    pub fn folders_by_ino(&self) -> impl Iterator<Item = (Ino, &Folder)> {
        let below = self.folders.iter().filter(|(ino, _)| *ino != ROOT);
        below.map(|(ino, folder)| (*ino, folder))
    }

    /// The folder that a file of the tree lies in, and its name there.
    pub fn place<'a>(&self, tree: &'a Tree, ino: Ino) -> Option<(&Folder, &'a str)> {
        Some((self.folder(tree.parent(ino)?)?, tree.name(ino)?))
    }

    /// Opens a file of the tree if it is a regular file.
    pub fn open(&self, tree: &Tree, ino: Ino) -> io::Result<Entry<(File, Metadata)>> {
        match self.place(tree, ino) {
            Some((folder, name)) => folder.open_file(name.as_ref()),
            None => Ok(Entry::Missing),
        }
    }

    /// Reads a file of the tree into memory. If it is longer than `most` bytes, the result is its
    /// length instead.
    pub fn read(
        &self,
        tree: &Tree,
        ino: Ino,
        most: u64,
    ) -> io::Result<Entry<Result<Vec<u8>, u64>>> {
        let (file, metadata) = match self.open(tree, ino)? {
            Entry::There(opened) => opened,
            Entry::Missing => return Ok(Entry::Missing),
            Entry::Other(kind) => return Ok(Entry::Other(kind)),
        };
        let size = metadata.len();
        if size > most {
            return Ok(Entry::There(Err(size)));
        }
        let mut bytes = vec![0; size as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(Entry::There(Ok(bytes)))
    }
}

/// A run of bytes of a file, and the same run of the model's tree.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub ino: Ino,
    /// First byte in the tree's file.
    pub start: u64,
    pub len: u64,
    /// First byte in the file on disk.
    pub found_start: u64,
}

/// Why a run could not be compared.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The model cannot be read.
    Model(ReadError),
    /// The file cannot be read, from this byte on.
    File { offset: u64, cause: io::Error },
    /// The comparison was told to stop.
    Stopped,
}

/// Compares runs of files with the model's tree.
#[derive(Clone, Copy)]
pub(crate) struct Comparer<'a> {
    pub model: &'a Model,
    /// Set when the comparison must end early.
    pub stop: &'a AtomicBool,
    /// Called with the number of bytes compared since the last call.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

impl Comparer<'_> {
    /// The first byte of a run that is not the model's, as an offset in the file on disk. The
    /// buffer holds a piece of each side. Where the kernel can, reads bypass the page cache, so
    /// that they test the disk and not the memory.
    pub fn first_difference(
        &self,
        run: Run,
        file: &File,
        buffer: &mut [u8],
    ) -> Result<Option<u64>, Fault> {
        let (expected, found) = buffer.split_at_mut(buffer.len() / 2);
        let mut done = 0;
        while done < run.len {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Fault::Stopped);
            }
            let offset = run.found_start + done;
            // Pieces end where pages of the file do, so that no page is read twice.
            let piece = expected.len() as u64;
            let len = (piece - offset % piece).min(run.len - done);
            let (expected, found) = (&mut expected[..len as usize], &mut found[..len as usize]);
            self.model.will_read(run.ino, run.start + done);
            self.model
                .read_at(run.ino, run.start + done, expected)
                .map_err(Fault::Model)?;
            let plainly = |buffer: &mut [u8], offset| file.read_exact_at(buffer, offset);
            let read = read::read_exact_uncached(file, found, offset, plainly);
            let same = read.map(|()| {
                let same = expected.iter().zip(&*found).take_while(|(a, b)| a == b);
                (expected != found).then(|| offset + same.count() as u64)
            });
            match same {
                Ok(None) => (self.progress)(len),
                result => {
                    // The rest of the run is not read.
                    (self.progress)(run.len - done);
                    return result.map_err(|cause| Fault::File { offset, cause });
                }
            }
            done += len;
        }
        Ok(None)
    }
}
