//! How much the cache may take, and what leaves it first.
//!
//! What belongs to one file of the tree leaves together: an expert of which a third is missing is
//! not there. The file whose pieces were read least recently goes first, of whatever model. What
//! belongs to no file, the headers by which a model can be opened without its server, goes last.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use parking_lot::{Condvar, Mutex};
use rustix::fs::fstatvfs;

use super::index::{Index, Record};
use super::{Cache, INDEX, open_plain};

/// The unit of `st_blocks`, according to POSIX.
const STAT_BLOCK_BYTES: u64 = 512;
/// This share of the file system stays free: a twentieth.
const FREE_SHARE: u64 = 20;
/// Bytes that may be written before looking again at what others have written.
const TRUST_BYTES: u64 = 64 << 20;

/// What a piece may take beside its bytes: its ends may lie within blocks of the file system.
pub const EDGE_BYTES: u64 = 8 << 10;

/// The room of a cache.
#[derive(Debug)]
pub struct Room {
    folder: File,
    /// Bytes that the cache may take.
    limit: u64,
    state: Mutex<State>,
    /// Notified when something that was granted is written.
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that may be written before looking again.
    left: u64,
    /// Bytes that may be written, and may not be in the files yet.
    granted: u64,
}

/// Room for some bytes, which counts as taken until this is dropped; what was written by then is in
/// the files.
#[derive(Debug)]
pub struct Granted<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Drop for Granted<'_> {
    fn drop(&mut self) {
        self.room.state.lock().granted -= self.bytes;
        self.room.written.notify_all();
    }
}

impl Room {
    pub fn new(folder: &Path, limit: Option<u64>) -> io::Result<Self> {
        let file = File::open(folder)?;
        let free = free(&file)?.0;
        let limit = limit.unwrap_or_else(|| (free + used(folder)) / 2);
        Ok(Self {
            folder: file,
            limit,
            state: Mutex::default(),
            written: Condvar::new(),
        })
    }

    /// The path of the folder, wherever it was moved to, and whatever was mounted over it.
    fn path(&self, folder: &Path) -> io::Result<PathBuf> {
        let opened = PathBuf::from(format!("/proc/self/fd/{}", self.folder.as_raw_fd()));
        if opened.is_dir() {
            return Ok(opened);
        }
        // Without /proc, it must be where it was.
        let (ours, there) = (self.folder.metadata()?, folder.metadata()?);
        if (ours.dev(), ours.ino()) != (there.dev(), there.ino()) {
            return Err(io::Error::other("its folder was moved"));
        }
        Ok(folder.to_owned())
    }

    /// Bytes that a cache may take that takes some bytes now.
    fn allowed(&self, taken: u64) -> io::Result<u64> {
        let (free, all) = free(&self.folder)?;
        Ok(self
            .limit
            .min(taken + free.saturating_sub(all / FREE_SHARE)))
    }
}

/// Bytes of a file system that are free, and of all of it.
fn free(file: &File) -> io::Result<(u64, u64)> {
    let stats = fstatvfs(file)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stats.f_frsize);
    Ok((bytes(stats.f_bavail), bytes(stats.f_blocks)))
}

/// The files of all parts in a cache.
fn files(folder: &Path) -> Vec<PathBuf> {
    let list = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let is_folder = |path: &PathBuf| path.is_dir() && !path.is_symlink();
    let models = list(folder).into_iter().filter(is_folder);
    models.flat_map(|model| list(&model)).collect()
}

/// Bytes that a cache takes.
fn used(folder: &Path) -> u64 {
    let files = files(folder).into_iter();
    let blocks = files.filter_map(|path| Some(path.symlink_metadata().ok()?.blocks()));
    blocks.sum::<u64>() * STAT_BLOCK_BYTES
}

impl Cache {
    /// The most bytes that all of it may hold, with what is free on its disk now.
    pub(super) fn capacity(&self) -> u64 {
        let room = &self.room;
        let path = room.path(&self.folder);
        let allowed = path.and_then(|path| room.allowed(used(&path)));
        allowed.unwrap_or(room.limit)
    }

    /// Makes sure that a piece of some bytes may be written. `None` if it may not.
    pub(super) fn make_room(&self, bytes: u64) -> io::Result<Option<Granted<'_>>> {
        let bytes = bytes + EDGE_BYTES;
        let room = &self.room;
        let mut state = room.state.lock();
        loop {
            let left = match state.left.checked_sub(bytes) {
                None => self.exclusive(|| self.look_for_room(bytes, state.granted))?,
                left => left,
            };
            if let Some(left) = left {
                state.left = left;
                state.granted += bytes;
                return Ok(Some(Granted { room, bytes }));
            }
            if state.granted == 0 {
                return Ok(None);
            }
            // What others are writing can leave again once it is there.
            room.written.wait(&mut state);
        }
    }

    /// What is left when there is room for some bytes beside those that were granted, for which
    /// others may have to leave. `None` if there is not.
    fn look_for_room(&self, bytes: u64, granted: u64) -> io::Result<Option<u64>> {
        let folder = &self.room.path(&self.folder)?;
        let mut taken = used(folder);
        let mut most = self.room.allowed(taken)?;
        if bytes > most {
            return Ok(None);
        }
        if taken + granted + bytes > most {
            // A little more, so that this is not done for each piece.
            let goal = most - bytes.max(most / 16).min(most);
            let spared_since = self.spared_since.load(Ordering::Relaxed);
            evict(folder, (taken + granted).saturating_sub(goal), spared_since);
            taken = used(folder);
            most = self.room.allowed(taken)?;
        }
        let left = most.checked_sub(taken + granted + bytes);
        Ok(left.map(|left| left.min(TRUST_BYTES).min(most / 16)))
    }
}

/// Gives back the room of a range, which reads as zeros from then on.
#[cfg(target_os = "linux")]
fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(file, flags, offset, len)?)
}

#[cfg(not(target_os = "linux"))]
fn punch_hole(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Frees about as many bytes, if there are so many that were last used before a time.
fn evict(folder: &Path, bytes: u64, spared_since: u64) {
    struct Unit {
        used: u64,
        pieces: Vec<(usize, u64, u64)>,
    }
    let mut parts = Vec::new();
    // Files of the tree are numbered within their model, whose parts know each other by a number.
    let mut units: HashMap<((PathBuf, Option<u64>), u64), Unit> = HashMap::new();
    for path in files(folder) {
        let name = path.to_string_lossy();
        let Some(data) = name.strip_suffix(INDEX) else {
            continue;
        };
        let (data, index) = (open_plain(data.as_ref(), true), open_plain(&path, true));
        let (Ok(data), Ok(index)) = (data, index) else {
            continue;
        };
        let Ok(Some(index)) = Index::open(index) else {
            continue;
        };
        let beside = path.parent().unwrap_or(folder);
        let of_model = if index.head.set.is_some() {
            beside
        } else {
            &path
        };
        for (start, piece) in &index.pieces {
            let key = ((of_model.to_owned(), index.head.set), piece.unit);
            let unit = units.entry(key).or_insert_with(|| Unit {
                used: 0,
                pieces: Vec::new(),
            });
            unit.used = unit.used.max(piece.used);
            unit.pieces.push((parts.len(), *start, piece.len));
        }
        parts.push((data, index));
    }
    units.retain(|_, unit| unit.used < spared_since);
    let mut units: Vec<_> = units.into_iter().collect();
    units.sort_by_key(|((_, number), unit)| (*number == 0, unit.used, *number));
    let mut freed = 0;
    for (_, unit) in units {
        if freed >= bytes {
            return;
        }
        for (part, start, len) in unit.pieces {
            let (data, index) = &mut parts[part];
            // First, so that nobody relies on what is about to go.
            if index.append(&[Record::Gone { start }]).is_err() {
                continue;
            }
            if punch_hole(data, start, len).is_ok() {
                freed += len;
            }
        }
    }
}
