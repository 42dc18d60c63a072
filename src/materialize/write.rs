//! Writing: temporary names, workers, the documents at the end.

use std::fs::{self, File, FileTimes, Permissions, TryLockError};
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use tempfile::NamedTempFile;

use super::{DIRECTORIES, DOCUMENTS, MaterializeError, Plan, State, io_error};
use crate::layout::{Doc, File as LayoutFile};
use crate::tree::Ino;

/// Model bytes are copied in pieces of this size.
pub(super) const BUFFER_BYTES: usize = 1 << 20;
/// Temporary files are named `.odmoe-RANDOM.tmp`: no loader takes them for a model.
const TEMPORARY_PREFIX: &str = ".odmoe-";
const TEMPORARY_SUFFIX: &str = ".tmp";

/// What was done since the last report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written.
    pub bytes: u64,
    /// Files that got their names.
    pub files: u64,
}

impl Plan<'_> {
    /// Writes what the plan found missing with `jobs` workers, and the documents. `progress` is
    /// called from the workers. Once `stop` is set, it ends early, without leaving anything
    /// unfinished behind.
    pub fn run(
        &self,
        jobs: NonZeroUsize,
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<(), MaterializeError> {
        for directory in DIRECTORIES {
            let directory = self.target.join(directory);
            fs::create_dir_all(&directory).map_err(io_error("make", &directory))?;
        }
        let _lock = self.lock()?;
        for directory in DIRECTORIES {
            let directory = self.target.join(directory);
            remove_leftovers(&directory).map_err(io_error("clean", &directory))?;
        }
        for &ino in &self.touch {
            let path = self.path(ino);
            File::open(&path)
                .and_then(|file| file.set_times(self.times()))
                .map_err(io_error("set the time of", &path))?;
        }
        self.write_files(jobs, stop, progress)?;
        let present = self.present()?;
        for (path, doc) in DOCUMENTS {
            self.write_document(path, doc, &present)?;
        }
        for directory in DIRECTORIES.into_iter().chain([""]) {
            let directory = self.target.join(directory);
            File::open(&directory)
                .and_then(|folder| folder.sync_all())
                .map_err(io_error("flush", &directory))?;
        }
        Ok(())
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
        jobs: NonZeroUsize,
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<(), MaterializeError> {
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let first_error = Mutex::new(None);
        let work = || {
            let mut buffer = vec![0; BUFFER_BYTES];
            while !failed.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&ino) = self.missing.get(index) else {
                    break;
                };
                if let Err(e) = self.write_file(ino, &mut buffer, stop, progress) {
                    failed.store(true, Ordering::Relaxed);
                    first_error.lock().get_or_insert(e);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..jobs.get().min(self.missing.len()) {
                scope.spawn(work);
            }
        });
        first_error.into_inner().map_or(Ok(()), Err)
    }

    fn write_file(
        &self,
        ino: Ino,
        buffer: &mut [u8],
        stop: &AtomicBool,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<(), MaterializeError> {
        let path = self.path(ino);
        let mut file = temporary_beside(&path).map_err(io_error("create a file beside", &path))?;
        let mut offset = 0;
        loop {
            let read = self.model.read_at(ino, offset, buffer)?;
            if read == 0 {
                break;
            }
            if stop.load(Ordering::Relaxed) {
                return Err(MaterializeError::Stopped);
            }
            file.write_all(&buffer[..read])
                .map_err(io_error("write", &path))?;
            offset += read as u64;
            progress(Progress {
                bytes: read as u64,
                files: 0,
            });
        }
        self.complete(&file).map_err(io_error("flush", &path))?;
        // Not over a file that has appeared since the plan was made; another run may have made it.
        match file.persist_noclobber(&path) {
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => match self.state(ino)? {
                State::Done => {}
                _ => return Err(self.foreign(ino, "was put there meanwhile")),
            },
            Err(e) => return Err(io_error("name", &path)(e.error)),
            Ok(_) => {}
        }
        progress(Progress { bytes: 0, files: 1 });
        Ok(())
    }

    /// Replaces a document by one that lists what is there.
    fn write_document(
        &self,
        path: &str,
        doc: Doc,
        present: &[bool],
    ) -> Result<(), MaterializeError> {
        let path = self.target.join(path);
        let layout = self.model.layout();
        let present = |file: &LayoutFile| {
            let found = layout.files().binary_search_by_key(&file.kind, |f| f.kind);
            found.is_ok_and(|index| present[index])
        };
        let mut bytes = Vec::new();
        match doc {
            Doc::Registry => layout.render_registry(&present, &mut bytes),
            _ => layout.render_metadata(&present, &mut bytes),
        }
        .expect("writing to memory cannot fail");
        let mut file = temporary_beside(&path).map_err(io_error("create a file beside", &path))?;
        file.write_all(&bytes)
            .and_then(|()| self.complete(&file))
            .map_err(io_error("write", &path))?;
        file.persist(&path)
            .map_err(|e| io_error("name", &path)(e.error))?;
        Ok(())
    }

    /// Gives a file the tree's time and flushes it: from now on it may have its name.
    fn complete(&self, file: &NamedTempFile) -> io::Result<()> {
        file.as_file().set_times(self.times())?;
        file.as_file().sync_all()
    }

    fn times(&self) -> FileTimes {
        let modified = self.model.source().modified();
        FileTimes::new()
            .set_modified(modified)
            .set_accessed(modified)
    }
}

fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(TEMPORARY_PREFIX)
        .suffix(TEMPORARY_SUFFIX)
        .permissions(Permissions::from_mode(0o666)) // the umask takes its part
        .tempfile_in(path.parent().unwrap_or(Path::new(".")))
}

/// Removes the temporary files of a run that was killed.
fn remove_leftovers(directory: &Path) -> io::Result<()> {
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
