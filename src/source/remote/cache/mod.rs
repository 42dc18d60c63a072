//! The cache on disk: for each remote part a sparse file with the model's own bytes at their own
//! places, and an [index] of what is in it.
//!
//! A cached part that is complete is the GGUF itself. Several mounts, of the same model or of
//! others, use one cache at the same time. Whatever goes wrong with it costs time: a piece that does
//! not match its checksum is absent, and what cannot be written is not kept.

pub mod index;
mod part;
pub mod room;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crc_fast::{CrcAlgorithm, checksum};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};

use self::index::{Head, Index};
use self::part::now;
pub use self::part::{CachedPart, Found, cached_bytes, holds_all};
use self::room::Room;
use super::pin::Pin;

/// The ending of an index's name.
const INDEX: &str = ".index";
/// Bytes of a longer name that are kept: file systems take 255, with the ending.
const NAME_BYTES: usize = 200;

/// A folder of cached parts.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    /// Held by the thread, and locked by the process, that creates files or makes room.
    lock: Mutex<File>,
    room: Room,
    /// What was read or written since then does not leave for anything, in milliseconds since 1970.
    spared_since: AtomicU64,
    /// Whether it was said that nothing can be written.
    complained: AtomicBool,
}

/// Where caches are, unless something else is said.
pub fn usual_folder() -> Option<PathBuf> {
    let absolute = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")));
    Some(caches?.join("odmoe-fs"))
}

impl Cache {
    /// Opens the cache in a folder, which is made if it is missing. It may take `limit` bytes, or,
    /// without a limit, half of what is free.
    pub fn open(folder: &Path, limit: Option<u64>) -> io::Result<Arc<Self>> {
        // The process may go to another folder.
        let folder = &std::path::absolute(folder)?;
        private_folder(folder)?;
        let mut options = OpenOptions::new();
        let path = folder.join("lock");
        let lock = options.read(true).write(true).create(true).truncate(false);
        let lock = match lock.mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&path) {
            // Read-only media; what is there can be used.
            Err(_) if path.is_file() && !path.is_symlink() => File::open(&path)?,
            lock => lock?,
        };
        Ok(Arc::new(Self {
            room: Room::new(folder, limit)?,
            spared_since: AtomicU64::new(u64::MAX),
            folder: folder.to_owned(),
            lock: Mutex::new(lock),
            complained: AtomicBool::new(false),
        }))
    }

    /// From now on, or since this was said first, what is read or written does not leave the cache.
    pub fn spare_from_now(&self) {
        self.spared_since.fetch_min(now(), Ordering::Relaxed);
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn exclusive<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let lock = self.lock.lock();
        flock(&*lock, FlockOperation::LockExclusive)?;
        let done = work();
        let _ = flock(&*lock, FlockOperation::Unlock);
        done
    }

    /// Where a part would be: its data and its index. Parts of one folder share a folder here, too,
    /// so that a cached set is found like any other.
    fn places(&self, address: &str, name: &str) -> (PathBuf, PathBuf) {
        let is_plain = |c: char| !c.is_control() && c != '/';
        let plain: String = name.chars().filter(|c| is_plain(*c)).collect();
        let mut end = plain.len().min(NAME_BYTES);
        while !plain.is_char_boundary(end) {
            end -= 1;
        }
        let name_here = match &plain[..end] {
            "" | "." | ".." => "part",
            // Of another file, this may be the index.
            plain if plain.ends_with(INDEX) => &plain[..plain.len() - 1],
            plain => plain,
        };
        // The address may have the name in another form, with %20 for a space. Names that are not
        // the same on disk are kept apart by the whole address.
        let keyed = match address.rfind('/') {
            Some(end) if name_here == name => &address[..=end],
            _ => address,
        };
        let key = checksum(CrcAlgorithm::Crc64Nvme, keyed.as_bytes());
        let folder = self.folder.join(format!("{key:016x}"));
        let index = format!("{name_here}{INDEX}");
        (folder.join(name_here), folder.join(index))
    }

    /// What is in the cache of a part, in whatever state of the file; `None` if there is nothing.
    pub fn find(self: &Arc<Self>, address: &str, name: &str) -> io::Result<Option<CachedPart>> {
        let places = self.places(address, name);
        if !places.1.exists() {
            return Ok(None);
        }
        let found = self.exclusive(|| self.open_part(&places))?;
        Ok(found.filter(|part| part.index.lock().head.address == address))
    }

    /// An empty cache of a part in this state. What is there of another state goes.
    pub fn create(
        self: &Arc<Self>,
        address: &str,
        name: &str,
        pin: &Pin,
    ) -> io::Result<CachedPart> {
        let places = self.places(address, name);
        let head = Head {
            address: address.to_owned(),
            pin: pin.clone(),
            set: None,
        };
        self.exclusive(|| {
            // Another process may have been faster. What has the same size and nothing else that
            // tells it from other files may be another file.
            if pin.holds()
                && let Some(part) = self.open_part(&places)?
                && part.is_of(address, pin)
            {
                return Ok(part);
            }
            if let Some(folder) = places.0.parent() {
                private_folder(folder)?;
                if folder.is_symlink() {
                    return Err(io::Error::other("a folder in it is a link"));
                }
            }
            // Mounts that use the old files keep them until they end.
            for path in [&places.1, &places.0] {
                match fs::remove_file(path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create_new(true).mode(0o600);
            let data = options.open(&places.0)?;
            data.set_len(pin.size)?;
            flock(&data, FlockOperation::LockShared)?;
            let index = Index::create(options.open(&places.1)?, head.clone())?;
            Ok(CachedPart::new(self.clone(), data, index, true))
        })
    }

    fn open_part(
        self: &Arc<Self>,
        (data, index): &(PathBuf, PathBuf),
    ) -> io::Result<Option<CachedPart>> {
        if data.parent().is_some_and(Path::is_symlink) {
            return Ok(None);
        }
        let open = |path: &Path| {
            let absent = |e: &io::Error| {
                e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ELOOP)
            };
            match open_plain(path, true) {
                Ok(file) => Ok(Some((file, true))),
                Err(e) if absent(&e) => Ok(None),
                Err(_) => open_plain(path, false).map(|file| Some((file, false))),
            }
        };
        let (Some((data_file, writable)), Some((index_file, _))) = (open(data)?, open(index)?)
        else {
            return Ok(None);
        };
        let alone = flock(&data_file, FlockOperation::NonBlockingLockExclusive).is_ok();
        let Some(mut found) = Index::open(index_file)? else {
            return Ok(None);
        };
        if data_file.metadata()?.len() != found.head.pin.size {
            return Ok(None);
        }
        if alone && writable && found.is_sparse() {
            let folder = index.parent().unwrap_or(&self.folder);
            let new = tempfile::NamedTempFile::new_in(folder)?;
            let mut shorter = Index::create(new.as_file().try_clone()?, found.head.clone())?;
            shorter.append(&found.records())?;
            new.persist(index)?;
            found = shorter;
        }
        flock(&data_file, FlockOperation::LockShared)?;
        Ok(Some(CachedPart::new(
            self.clone(),
            data_file,
            found,
            writable,
        )))
    }

    fn complain(&self, cause: &io::Error) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            let folder = &self.folder;
            tracing::warn!(
                "the cache in {folder:?} cannot be written: {cause}; reads go on without it"
            );
        }
    }
}

/// Opens a file that is no link: another user may have put one into the folder.
fn open_plain(path: &Path, write: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(write);
    options.custom_flags(libc::O_NOFOLLOW).open(path)
}

fn private_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if folder.exists() {
        return Err(io::Error::other("it is not a folder"));
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}
