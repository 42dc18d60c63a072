//! How much the cache may take, and what leaves it first.
//!
//! What belongs to one file of the tree leaves together: an expert of which a third is missing is
//! not there. The file whose pieces were read least recently goes first, of whatever model. What
//! belongs to no file, the headers by which a model can be opened without its server, goes last.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::fstatvfs;

use super::index::{Index, Record};
use super::{Cache, INDEX};

/// The unit of `st_blocks`, according to POSIX.
const STAT_BLOCK_BYTES: u64 = 512;
/// This share of the file system stays free: a twentieth.
const FREE_SHARE: u64 = 20;
/// Bytes that may be written before looking again at what others have written.
const TRUST_BYTES: u64 = 64 << 20;

/// The room of a cache.
#[derive(Debug)]
pub struct Room {
    folder: File,
    /// Bytes that the cache may take.
    limit: u64,
    /// Bytes that may be written before looking again.
    left: u64,
}

impl Room {
    pub fn new(folder: &Path, limit: Option<u64>) -> io::Result<Self> {
        let file = File::open(folder)?;
        let free = free(&file)?.0;
        let limit = limit.unwrap_or_else(|| (free + used(folder)) / 2);
        Ok(Self {
            folder: file,
            limit,
            left: 0,
        })
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
    let models = list(folder).into_iter().filter(|path| path.is_dir());
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
        let room = self.room.lock();
        room.allowed(used(&self.folder)).unwrap_or(room.limit)
    }

    /// Makes sure that some bytes may be written. `false` if they may not.
    pub(super) fn make_room(&self, bytes: u64) -> io::Result<bool> {
        let mut room = self.room.lock();
        if let Some(left) = room.left.checked_sub(bytes) {
            room.left = left;
            return Ok(true);
        }
        self.exclusive(|| {
            let mut taken = used(&self.folder);
            let mut most = room.allowed(taken)?;
            if bytes > most {
                return Ok(false);
            }
            if taken + bytes > most {
                // A little more, so that this is not done for each piece.
                let goal = most - bytes.max(most / 16).min(most);
                evict(&self.folder, taken.saturating_sub(goal));
                taken = used(&self.folder);
                most = room.allowed(taken)?;
            }
            if taken + bytes > most {
                return Ok(false);
            }
            let left = (most - taken - bytes).min(TRUST_BYTES).min(most / 16);
            Ok({
                room.left = left;
                true
            })
        })
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

/// Frees about as many bytes, if there are so many.
fn evict(folder: &Path, bytes: u64) {
    struct Unit {
        used: u64,
        pieces: Vec<(usize, u64, u64)>,
    }
    let mut parts = Vec::new();
    let mut units: HashMap<(PathBuf, u64), Unit> = HashMap::new();
    for path in files(folder) {
        let name = path.to_string_lossy();
        let Some(data) = name.strip_suffix(INDEX) else {
            continue;
        };
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let (Ok(data), Ok(index)) = (open(data.as_ref()), open(&path)) else {
            continue;
        };
        let Ok(Some(index)) = Index::open(index) else {
            continue;
        };
        let model = path.parent().unwrap_or(folder);
        for (start, piece) in &index.pieces {
            let key = (model.to_owned(), piece.unit);
            let unit = units.entry(key).or_insert_with(|| Unit {
                used: 0,
                pieces: Vec::new(),
            });
            unit.used = unit.used.max(piece.used);
            unit.pieces.push((parts.len(), *start, piece.len));
        }
        parts.push((data, index));
    }
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
