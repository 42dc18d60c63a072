//! Writing: temporary names, workers, groups that are flushed together, the documents at the end.
//!
//! The problem: a flush of each of 23,040 files costs minutes, and a name on bytes that are not on
//! the disk is a lie after the next power cut.
//!
//! The plan: workers complete files under temporary names. Once enough are complete, one call
//! flushes the whole file system, and then each of them gets its name. The flush is short: most of
//! the bytes went to the disk while they were written (`copy`).

use std::collections::HashSet;
use std::fs::{self, File, FileTimes, TryLockError};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;
use tempfile::{NamedTempFile, TempPath};

use super::compare::State;
use super::copy::{self, Copier, Target};
use super::{DIRECTORIES, DOCUMENTS, MaterializeError, Outcome, Plan, io_error};
use crate::layout::{Doc, METADATA_GGUF_PATH, METADATA_PATH, REGISTRY_PATH, TensorFile};
use crate::sys;
use crate::tree::Ino;
use crate::work::{Progress, in_parallel};

/// Complete files that are flushed together: so many, or so many bytes of them. What is killed
/// before its flush is written again by the next run.
const GROUP_FILES: usize = 256;
const GROUP_BYTES: u64 = 2 << 30;
/// Temporary files are named `.odmoe-RANDOM.tmp`: no loader takes them for a model.
const TEMPORARY_PREFIX: &str = ".odmoe-";
const TEMPORARY_SUFFIX: &str = ".tmp";

impl Plan<'_> {
    /// Writes what the plan found missing with `jobs` workers, and the documents. `progress` is
    /// called from the workers. Once `stop` is set, it ends early, without leaving anything
    /// unfinished behind.
    pub fn run(
        &self,
        jobs: NonZeroUsize,
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Outcome, MaterializeError> {
        for directory in DIRECTORIES {
            let directory = self.target.join(directory);
            fs::create_dir_all(&directory).map_err(io_error("make", &directory))?;
        }
        let lock = self.lock()?;
        let folders = Folders::open(&self.target)?;
        for folder in &folders.0 {
            remove_leftovers(folder, &lock)?;
        }
        for &ino in &self.touch {
            let path = self.path(ino);
            File::options()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(folders.of(&path).place(&path))
                .and_then(|file| file.set_times(self.times()))
                .map_err(io_error("set the time of", &path))?;
        }
        self.write_files(&folders, jobs, stop, progress)?;
        let present = self.present()?;
        let mut outcome = Outcome {
            documents_written: false,
            unlisted: self.unlisted(&folders, &present)?,
        };
        for (path, bytes) in self.documents(&present) {
            outcome.documents_written |= self.write_document(&folders, path, &bytes)?;
        }
        folders.check()?;
        for (folder, path) in folders
            .0
            .iter()
            .map(|f| (&f.file, &f.path))
            .chain([(&lock, &self.target)])
        {
            folder.sync_all().map_err(io_error("flush", path))?;
        }
        Ok(outcome)
    }

    /// What lies in the target's folders and is not listed by the documents: files of another model, or
    /// of nobody.
    fn unlisted(
        &self,
        folders: &Folders,
        present: &[bool],
    ) -> Result<Vec<PathBuf>, MaterializeError> {
        let files = self.model.layout().files().iter().zip(present);
        let mut listed: HashSet<PathBuf> = files
            .filter(|(_, present)| **present)
            .map(|(file, _)| self.target.join(file.kind.path()))
            .collect();
        let documents = [REGISTRY_PATH, METADATA_PATH, METADATA_GGUF_PATH];
        listed.extend(documents.map(|path| self.target.join(path)));
        let mut unlisted = Vec::new();
        for Folder { path, held, .. } in &folders.0 {
            let entries = held.read_dir().map_err(io_error("list", path))?;
            let paths = entries.flatten().map(|entry| path.join(entry.file_name()));
            unlisted.extend(paths.filter(|path| !listed.contains(path)));
        }
        unlisted.sort();
        Ok(unlisted)
    }

    /// Removes what killed runs have left in the target, and returns the bytes that may then be
    /// written to its file system.
    pub(super) fn room_without_leftovers(&self) -> Result<u64, MaterializeError> {
        let lock = self.lock()?;
        for name in DIRECTORIES {
            // Not there before the first run; what else is wrong, that run says.
            if let Ok(folder) = Folder::open(self.target.join(name)) {
                remove_leftovers(&folder, &lock)?;
            }
        }
        // Some file systems free room only then.
        sys::copy::flush_file_system(&lock).map_err(io_error("flush", &self.target))?;
        let room = sys::room(&self.target).map_err(io_error("ask for room in", &self.target))?;
        Ok(room.available)
    }

    /// Two runs into one target would take each other's temporary files for leftovers.
    fn lock(&self) -> Result<File, MaterializeError> {
        let folder = File::open(&self.target).map_err(io_error("open", &self.target))?;
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => Err(MaterializeError::Locked(self.target.clone())),
            // Some network file systems lock nothing; then the user has to take care.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(folder),
        }
    }

    fn write_files(
        &self,
        folders: &Folders,
        jobs: NonZeroUsize,
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<(), MaterializeError> {
        let copier = Copier {
            model: self.model,
            ways: &self.ways,
            reflink: self.options.reflink,
            stop,
            progress,
            in_kernel: AtomicBool::new(self.ways.in_kernel),
        };
        let publisher = Publisher {
            plan: self,
            folders,
            progress,
            pending: Mutex::default(),
            failed: Mutex::new(false),
        };
        let buffer = || copy::buffer(jobs.get().min(self.missing.len()));
        let written = in_parallel(jobs, &self.missing, buffer, |ino, buffer| {
            let path = self.path(ino);
            let folder = folders.of(&path);
            let file = temporary_in(folder).map_err(io_error("make files in", &folder.path))?;
            let target = Target {
                ino,
                file: file.as_file(),
                path: &path,
            };
            copier.write(target, buffer)?;
            self.complete(file.as_file())
                .map_err(io_error("write", &path))?;
            publisher.take(ino, file.into_temp_path())
        });
        // What is complete stays, also if another file failed.
        publisher.finish().and(written)
    }

    /// The documents that describe what is there, and their paths in the tree.
    fn documents(&self, listed: &[bool]) -> [(&'static str, Vec<u8>); 2] {
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
        DOCUMENTS.map(render)
    }

    /// Writes a document, unless it is there already; says whether it did.
    fn write_document(
        &self,
        folders: &Folders,
        path: &str,
        bytes: &[u8],
    ) -> Result<bool, MaterializeError> {
        let path = self.target.join(path);
        let folder = folders.of(&path);
        let place = folder.place(&path);
        let modified = self.model.source().modified();
        let is_written = place
            .symlink_metadata()
            .is_ok_and(|m| m.is_file() && m.modified().is_ok_and(|time| time == modified));
        if is_written && fs::read(&place).is_ok_and(|found| found == bytes) {
            return Ok(false);
        }
        let file = temporary_in(folder).map_err(io_error("make files in", &folder.path))?;
        let mut to = file.as_file();
        to.write_all(bytes)
            .and_then(|()| self.complete(file.as_file()))
            .and_then(|()| file.as_file().sync_all())
            .map_err(io_error("write", &path))?;
        file.persist(place)
            .map_err(|e| io_error("name", &path)(e.error))?;
        Ok(true)
    }

    /// Gives a file the tree's time; once it has been flushed, it may have its name.
    fn complete(&self, file: &File) -> io::Result<()> {
        file.set_times(self.times())?;
        if !self.ways.flushes_whole {
            file.sync_all()?;
        }
        Ok(())
    }

    fn times(&self) -> FileTimes {
        let modified = self.model.source().modified();
        FileTimes::new()
            .set_modified(modified)
            .set_accessed(modified)
    }
}

/// Both folders of the target, held open: what is written there stays there, whoever moves them or
/// puts links in their places. And a flush reports what was lost since they were opened.
struct Folders([Folder; 2]);

struct Folder {
    path: PathBuf,
    file: File,
    /// The same folder by its descriptor.
    held: PathBuf,
}

impl Folders {
    fn open(target: &Path) -> Result<Self, MaterializeError> {
        let [first, second] = DIRECTORIES.map(|name| Folder::open(target.join(name)));
        Ok(Self([first?, second?]))
    }

    /// The folder that a path of the target lies in.
    fn of(&self, path: &Path) -> &Folder {
        let folder = self
            .0
            .iter()
            .find(|folder| path.parent() == Some(&folder.path));
        folder.expect("every file lies in one of both")
    }

    /// Fails if a name leads elsewhere by now.
    fn check(&self) -> Result<(), MaterializeError> {
        for Folder { path, file, .. } in &self.0 {
            let held = file.metadata().map_err(io_error("look at", path))?;
            let found = path.symlink_metadata().ok();
            if found.is_none_or(|found| (found.dev(), found.ino()) != (held.dev(), held.ino())) {
                return Err(MaterializeError::Replaced(path.clone()));
            }
        }
        Ok(())
    }
}

impl Folder {
    fn open(path: PathBuf) -> Result<Self, MaterializeError> {
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(&path);
        let file = opened.map_err(|e| match e.raw_os_error() {
            Some(libc::ELOOP | libc::ENOTDIR) => MaterializeError::Link(path.clone()),
            _ => io_error("open", &path)(e),
        })?;
        let held = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        // Elsewhere than on Linux, or without /proc, the name has to do.
        let held = if held.is_dir() { held } else { path.clone() };
        Ok(Self { path, file, held })
    }

    /// Where a file of the folder is reached.
    fn place(&self, path: &Path) -> PathBuf {
        self.held.join(path.file_name().unwrap_or_default())
    }
}

/// Gives complete files their names, in groups.
struct Publisher<'a> {
    plan: &'a Plan<'a>,
    folders: &'a Folders,
    progress: &'a (dyn Fn(Progress) + Sync),
    pending: Mutex<Group>,
    /// Held during a flush; set when one failed. Of whose bytes were lost then, nobody knows, so
    /// nothing gets a name any more.
    failed: Mutex<bool>,
}

/// Files that are complete, but not flushed.
#[derive(Default)]
struct Group {
    files: Vec<(Ino, TempPath)>,
    bytes: u64,
}

impl Publisher<'_> {
    /// Takes a complete file; publishes the group that it fills.
    fn take(&self, ino: Ino, file: TempPath) -> Result<(), MaterializeError> {
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

    fn finish(self) -> Result<(), MaterializeError> {
        let rest = std::mem::take(&mut *self.pending.lock());
        self.publish(rest)
    }

    fn publish(&self, group: Group) -> Result<(), MaterializeError> {
        if group.files.is_empty() {
            return Ok(());
        }
        let mut failed = self.failed.lock();
        if *failed {
            return Ok(());
        }
        if let Err(e) = self.flush() {
            *failed = true;
            return Err(io_error("flush what was written to", &self.plan.target)(e));
        }
        self.folders.check()?;
        for (ino, file) in group.files {
            self.name(ino, file)?;
        }
        for Folder { path, file, .. } in &self.folders.0 {
            file.sync_all().map_err(io_error("flush", path))?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut flushed = None;
        for Folder { file, .. } in &self.folders.0 {
            let file_system = Some(file.metadata()?.dev());
            if flushed != file_system {
                sys::copy::flush_file_system(file)?;
                flushed = file_system;
            }
        }
        Ok(())
    }

    /// Gives a file its name, but not over a file that has appeared since the plan was made; another
    /// run may have made it.
    fn name(&self, ino: Ino, file: TempPath) -> Result<(), MaterializeError> {
        let path = self.plan.path(ino);
        let place = self.folders.of(&path).place(&path);
        let named = if self.plan.replaced.contains(&ino) {
            file.persist(place)
        } else {
            file.persist_noclobber(place)
        };
        match named {
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => {
                match self.plan.state(ino)? {
                    State::Done => {}
                    _ => return Err(self.plan.foreign(ino, "was put there meanwhile")),
                }
            }
            Err(e) => return Err(io_error("name", &path)(e.error)),
            Ok(()) => {}
        }
        (self.progress)(Progress { bytes: 0, files: 1 });
        Ok(())
    }
}

/// With the rights that any new file gets, and errors that do not tell its name.
fn temporary_in(folder: &Folder) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .suffix(TEMPORARY_SUFFIX)
        .make_in(&folder.held, |path| File::create_new(path))
}

/// Removes the temporary files of runs that were killed. Only with the lock: a run that lives has such
/// files, too.
fn remove_leftovers(folder: &Folder, _lock: &File) -> Result<(), MaterializeError> {
    remove_temporaries(&folder.held).map_err(io_error("clean", &folder.path))
}

fn remove_temporaries(directory: &Path) -> io::Result<()> {
    for entry in directory.read_dir()? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(TEMPORARY_PREFIX) && name.ends_with(TEMPORARY_SUFFIX) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
