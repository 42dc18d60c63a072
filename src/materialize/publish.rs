//! Gives complete files their names, in groups, once a whole group is on the disk.
//!
//! The problem: a flush of each of 23,040 files costs minutes, and a name on bytes that are not on
//! the disk is a lie after the next power cut.
//!
//! The plan: workers complete files under temporary names. Once enough are complete, one call
//! flushes the whole file system, and then each of them gets its name. The flush is short, since
//! most of the bytes go to the disk while they are written (`copy`).

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;

use parking_lot::Mutex;

use super::compare::State;
use super::{MaterializeError, Plan, io_error};
use crate::folder::{Folder, Unnamed};
use crate::on_disk::OnDisk;
use crate::sys;
use crate::tree::Ino;
use crate::work::Progress;

/// A group is flushed at this many files, or this many bytes. A killed run has to write its last
/// group again.
const GROUP_FILES: usize = 256;
const GROUP_BYTES: u64 = 2 << 30;

/// Gives complete files their names, in groups.
pub(super) struct Publisher<'a> {
    plan: &'a Plan<'a>,
    pub target: &'a OnDisk,
    /// Files that replace what has their name.
    replaced: HashSet<Ino>,
    pub progress: &'a (dyn Fn(Progress) + Sync),
    pending: Mutex<Group<'a>>,
    /// Held during a flush, and set when one has failed. Any file may have lost bytes then, so no
    /// file gets its name any more.
    failed: Mutex<bool>,
}

/// Files that are complete but not flushed.
#[derive(Default)]
struct Group<'a> {
    files: Vec<(Ino, Unnamed<'a>)>,
    bytes: u64,
}

impl<'a> Publisher<'a> {
    pub fn new(
        plan: &'a Plan<'a>,
        target: &'a OnDisk,
        replaced: HashSet<Ino>,
        progress: &'a (dyn Fn(Progress) + Sync),
    ) -> Self {
        Self {
            plan,
            target,
            replaced,
            progress,
            pending: Mutex::default(),
            failed: Mutex::new(false),
        }
    }

    /// Takes a complete file. Publishes the group if that is full now.
    pub fn take(&self, ino: Ino, file: Unnamed<'a>) -> Result<(), MaterializeError> {
        let full = {
            let mut group = self.pending.lock();
            group.files.push((ino, file));
            group.bytes += self.plan.model.tree().size(ino).unwrap_or(0);
            if group.files.len() < GROUP_FILES && group.bytes < GROUP_BYTES {
                return Ok(());
            }
            std::mem::take(&mut *group)
        };
        self.publish(full)
    }

    pub fn finish(self) -> Result<(), MaterializeError> {
        let rest = std::mem::take(&mut *self.pending.lock());
        self.publish(rest)
    }

    fn publish(&self, group: Group<'a>) -> Result<(), MaterializeError> {
        if group.files.is_empty() {
            return Ok(());
        }
        let mut failed = self.failed.lock();
        if *failed {
            return Ok(());
        }
        if let Err(e) = self.flush() {
            *failed = true;
            return Err(io_error(
                "flush what was written to",
                self.plan.target.path(),
            )(e));
        }
        self.plan.check_places(self.target)?;
        for (ino, file) in group.files {
            self.name(ino, file)?;
        }
        for folder in self.target.folders().chain(self.target.root()) {
            flush(folder)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut flushed = None;
        let folders = self.target.folders().chain(self.target.root());
        for file in folders.map(Folder::file) {
            let file_system = Some(file.metadata()?.dev());
            if flushed != file_system {
                sys::copy::flush_file_system(file)?;
                flushed = file_system;
            }
        }
        Ok(())
    }

    /// Gives a file its name, unless a file of that name has appeared since the plan was made;
    /// another run may have written it.
    fn name(&self, ino: Ino, file: Unnamed) -> Result<(), MaterializeError> {
        let (_, name) = self.plan.place(self.target, ino);
        let named = if self.replaced.contains(&ino) {
            file.replace(name.as_ref())
        } else {
            file.persist(name.as_ref())
        };
        match named {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                match self.plan.state(self.target, ino)? {
                    State::Done => {}
                    _ => return Err(MaterializeError::Appeared(self.plan.path(ino))),
                }
            }
            Err(e) => return Err(io_error("give its name to", &self.plan.path(ino))(e)),
            Ok(()) => {}
        }
        (self.progress)(Progress { bytes: 0, files: 1 });
        Ok(())
    }
}

pub(super) fn flush(folder: &Folder) -> Result<(), MaterializeError> {
    let flushed = folder.file().sync_all();
    flushed.map_err(io_error("flush", folder.path()))
}
