//! A run: workers compare files, write the missing ones under temporary names, and hand them to
//! `publish`. The documents, which describe the files that are there, come last.

use std::collections::HashSet;
use std::fs::{File, FileTimes, TryLockError};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use super::copy::{self, Copier, Target};
use super::error::FIND_ROOM;
use super::publish::{Publisher, flush};
use super::{DOCUMENTS, MaterializeError, Outcome, Plan, io_error};
use crate::folder::{Entry, Folder, Unnamed};
use crate::layout::{Doc, TensorFile};
use crate::on_disk::OnDisk;
use crate::sys;
use crate::tree::Ino;
use crate::work::{Progress, in_parallel};

impl Plan<'_> {
    /// Compares files that look complete but have another time, and writes the missing ones, with
    /// `jobs` workers; then writes the documents. `progress` is called from the workers. Once
    /// `stop` is set, the run ends early and leaves nothing unfinished behind.
    pub fn run(
        &self,
        jobs: NonZeroUsize,
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Outcome, MaterializeError> {
        let target = self.target.make(self.model.tree())?;
        let lock = self.lock(&target)?;
        for folder in target.folders().chain(target.root()) {
            remove_leftovers(folder, &lock)?;
        }
        let compared = self.compare_unsure(&target, jobs, stop, progress)?;
        if !compared.different.is_empty() {
            self.check_room_to_replace(&compared.different)?;
        }
        let same = compared.same.iter().copied();
        let untimed = same.filter(|&ino| !self.touch(&target, ino));
        let untimed = untimed.map(|ino| self.path(ino)).collect();
        let files = [&self.missing[..], &compared.different].concat();
        let replaced = self.replaced.iter().chain(&compared.different).copied();
        let publisher = Publisher::new(self, &target, replaced.collect(), progress);
        self.write_files(&files, publisher, jobs, stop)?;
        let present = self.present(&target, &compared.same)?;
        let sizes = files.iter().filter_map(|&ino| self.model.tree().size(ino));
        let mut outcome = Outcome {
            files: files.len(),
            bytes: sizes.sum(),
            untimed,
            documents: 0,
            unlisted: self.unlisted(&target, &present)?,
        };
        for (path, bytes) in self.rendered(&present) {
            outcome.documents += usize::from(self.write_document(&target, path, &bytes)?);
        }
        self.check_places(&target)?;
        for folder in target.folders().chain(target.root()) {
            flush(folder)?;
        }
        Ok(outcome)
    }

    /// Fails if there is not enough room for new versions of these files, in addition to the
    /// missing ones.
    fn check_room_to_replace(&self, files: &[Ino]) -> Result<(), MaterializeError> {
        let mut cost = self.cost;
        for &ino in files {
            self.methods.add_cost(self.model, ino, &mut cost)?;
        }
        let nearest = self.target.nearest();
        let room = sys::room(nearest.file());
        let room = room.map_err(io_error(FIND_ROOM, nearest.path()))?;
        self.compare_room(cost.room, room.available, true)
    }

    /// Gives a file with the right bytes the tree's time. Returns whether that worked: only its
    /// owner may do it, and the file is complete without.
    fn touch(&self, target: &OnDisk, ino: Ino) -> bool {
        let touched = target.open(self.model.tree(), ino).and_then(|entry| {
            match entry {
                Entry::There((file, _)) => file.set_times(self.times()),
                _ => Err(io::ErrorKind::NotFound.into()), // exchanged meanwhile
            }
        });
        if let Err(e) = &touched {
            tracing::info!("the time of {:?} cannot be set: {e}", self.path(ino));
        }
        touched.is_ok()
    }

    /// Fails if the path of the target, or of a folder in it, leads elsewhere by now.
    pub(super) fn check_places(&self, target: &OnDisk) -> Result<(), MaterializeError> {
        let root = target.root().expect("the target was made");
        if !root.is_in_place() {
            return Err(MaterializeError::Replaced(self.target.path().to_owned()));
        }
        match target.folders().find(|folder| !root.still_holds(folder)) {
            Some(folder) => Err(MaterializeError::Replaced(folder.path().to_owned())),
            None => Ok(()),
        }
    }

    /// Entries of the target's folders that the documents do not list, such as files of another
    /// model.
    fn unlisted(
        &self,
        target: &OnDisk,
        present: &[bool],
    ) -> Result<Vec<PathBuf>, MaterializeError> {
        let tree = self.model.tree();
        let files = self.model.layout().files().iter().zip(present);
        let absent: HashSet<Ino> = files
            .filter(|(file, present)| !**present && self.model.layout().shows(file.kind))
            .map(|(file, _)| self.find(&file.kind.path()))
            .collect();
        let mut unlisted = Vec::new();
        for (directory, folder) in target.folders_by_ino() {
            for name in folder.names().map_err(io_error("list", folder.path()))? {
                let ino = tree.lookup(directory, name.as_bytes());
                if ino.is_none_or(|ino| absent.contains(&ino)) {
                    unlisted.push(folder.path().join(name));
                }
            }
        }
        unlisted.sort();
        Ok(unlisted)
    }

    /// Removes what killed runs have left in the target, and returns the room on its file system
    /// afterwards. A dry run only counts.
    pub(super) fn room_without_leftovers(&self) -> Result<u64, MaterializeError> {
        let there = self.target.there();
        let Some(root) = there.root() else {
            return Ok(self.methods.available); // there are none before the first run
        };
        let lock = self.lock(there)?;
        if self.options.dry_run {
            let mut room = self.methods.available;
            for folder in there.folders().chain(there.root()) {
                let left = folder.temporaries();
                let left = left.map_err(io_error("list", folder.path()))?;
                room += left.iter().map(|(_, bytes)| bytes).sum::<u64>();
            }
            return Ok(room);
        }
        for folder in there.folders().chain(there.root()) {
            remove_leftovers(folder, &lock)?;
        }
        // Some file systems free the room only then.
        let flushed = sys::copy::flush_file_system(&lock);
        flushed.map_err(io_error("flush", self.target.path()))?;
        let room = sys::room(root.file());
        let room = room.map_err(io_error(FIND_ROOM, self.target.path()))?;
        Ok(room.available)
    }

    /// Locks the target: two runs would take each other's temporary files for leftovers.
    fn lock(&self, target: &OnDisk) -> Result<File, MaterializeError> {
        let path = self.target.path();
        let root = target
            .root()
            .expect("only a target that is there is locked");
        let lock = root.again().map_err(io_error("open", path))?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Err(MaterializeError::Locked(path.to_owned())),
            // Some network file systems have no locks; there, the user must take care.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(lock),
        }
    }

    fn write_files(
        &self,
        files: &[Ino],
        publisher: Publisher,
        jobs: NonZeroUsize,
        stop: &AtomicBool,
    ) -> Result<(), MaterializeError> {
        let target = publisher.target;
        let copier = Copier {
            model: self.model,
            methods: &self.methods,
            reflink: self.options.reflink,
            stop,
            progress: publisher.progress,
            in_kernel: AtomicBool::new(self.methods.in_kernel),
        };
        let buffer = || copy::buffer(jobs.get().min(files.len()));
        let written = in_parallel(jobs, files, buffer, |ino, buffer| {
            let path = self.path(ino);
            let (folder, _) = self.place(target, ino);
            let (file, unnamed) = temporary_in(folder)?;
            let file = &file;
            copier.write(
                Target {
                    ino,
                    file,
                    path: &path,
                },
                buffer,
            )?;
            self.complete(file).map_err(io_error("write", &path))?;
            publisher.take(ino, unnamed)
        });
        // Complete files stay, even if another one has failed.
        publisher.finish().and(written)
    }

    /// The documents that describe the listed files, and their paths in the tree.
    fn rendered(&self, listed: &[bool]) -> Vec<(&'static str, Vec<u8>)> {
        let layout = self.model.layout();
        let present = |file: &TensorFile| {
            let found = layout.files().binary_search_by_key(&file.kind, |f| f.kind);
            found.is_ok_and(|index| listed[index])
        };
        let render = |(path, doc)| {
            let mut bytes = Vec::new();
            match doc {
                Doc::Registry => layout.render_registry(&present, &mut bytes),
                _ => layout.render_metadata(&present, &mut bytes),
            }
            .expect("writing to memory cannot fail");
            (path, bytes)
        };
        let tree = self.model.tree();
        let shown = DOCUMENTS
            .into_iter()
            .filter(|(path, _)| tree.find(path).is_some());
        shown.map(render).collect()
    }

    /// Writes a document, unless it is there already. Returns whether it did.
    fn write_document(
        &self,
        target: &OnDisk,
        path: &str,
        bytes: &[u8],
    ) -> Result<bool, MaterializeError> {
        let ino = self.find(path);
        if self.is_written(target, ino, bytes) {
            return Ok(false);
        }
        let path = self.path(ino);
        let (folder, name) = self.place(target, ino);
        let (mut file, unnamed) = temporary_in(folder)?;
        file.write_all(bytes)
            .and_then(|()| self.complete(&file))
            .and_then(|()| file.sync_all())
            .map_err(io_error("write", &path))?;
        let named = unnamed.replace(name.as_ref());
        named.map_err(io_error("give its name to", &path))?;
        Ok(true)
    }

    /// Whether a document is there, with these bytes and the tree's time.
    fn is_written(&self, target: &OnDisk, ino: Ino, bytes: &[u8]) -> bool {
        let tree = self.model.tree();
        let has_time = target.open(tree, ino).is_ok_and(|entry| match entry {
            Entry::There((_, metadata)) => self.has_time(&metadata),
            _ => false,
        });
        let found = target.read(tree, ino, bytes.len() as u64);
        has_time && matches!(found, Ok(Entry::There(Ok(found))) if found == bytes)
    }

    /// The folder that a file of the tree is written into, and its name.
    pub(super) fn place<'t>(&self, target: &'t OnDisk, ino: Ino) -> (&'t Folder, &str) {
        let place = target.place(self.model.tree(), ino);
        place.expect("every folder of the target was made")
    }

    /// Gives a file the tree's time. Once the file has been flushed, it may get its name.
    fn complete(&self, file: &File) -> io::Result<()> {
        file.set_times(self.times())?;
        if !self.methods.flushes_whole {
            file.sync_all()?;
        }
        Ok(())
    }

    fn times(&self) -> FileTimes {
        file_times(self.methods.times[0])
    }
}

/// The times of a complete file. Both are set, since some file systems do not accept one alone.
pub(super) fn file_times(modified: SystemTime) -> FileTimes {
    FileTimes::new()
        .set_modified(modified)
        .set_accessed(modified)
}

fn temporary_in(folder: &Folder) -> Result<(File, Unnamed<'_>), MaterializeError> {
    let made = folder.temporary();
    made.map_err(io_error("create files in", folder.path()))
}

/// Removes the temporary files of killed runs. The lock must be held: a living run has such files,
/// too.
fn remove_leftovers(folder: &Folder, _lock: &File) -> Result<(), MaterializeError> {
    let found = folder.temporaries();
    let found = found.map_err(io_error("list", folder.path()))?;
    for (name, _) in found {
        let removed = folder.remove(&name);
        removed.map_err(io_error(
            "remove what a killed run has left in",
            folder.path(),
        ))?;
    }
    Ok(())
}
