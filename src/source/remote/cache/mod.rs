//! The cache on disk: for each remote part a sparse file with the model's own bytes at their own
//! places, and an [index] of what is in it.
//!
//! A cached part that is complete is the GGUF itself. Several mounts, of the same model or of
//! others, use one cache at the same time. Whatever goes wrong with it costs time: a piece that does
//! not match its checksum is absent, and what cannot be written is not kept.

pub mod index;
mod room;

use std::cell::RefCell;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crc_fast::{CrcAlgorithm, checksum};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};

use self::index::{Head, Index, Piece, Record};
use self::room::Room;
use super::pin::Pin;
use crate::sys::copy::write_all_uncached;
use crate::sys::read::{
    DIRECT_ALIGNMENT, is_cached, only_what_is_read, read_exact_direct, read_exact_uncached,
    reopen_direct,
};

/// The ending of an index's name.
const INDEX: &str = ".index";
/// Bytes of a longer name that are kept: file systems take 255, with the ending.
const NAME_BYTES: usize = 200;
/// How old the note of when a piece was read may be.
const USED_SECONDS: u64 = 10;

thread_local! {
    /// Memory for blocks of which only a part is wanted; it grows to those of the largest piece.
    static BLOCKS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A folder of cached parts.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    /// Held by the thread, and locked by the process, that creates files or makes room.
    lock: Mutex<File>,
    room: Mutex<Room>,
    /// Whether it was said that nothing can be written.
    complained: AtomicBool,
}

/// A part in the cache.
#[derive(Debug)]
pub struct CachedPart {
    cache: Arc<Cache>,
    /// Locked, shared with other mounts, for as long as this lives.
    data: File,
    /// The same file opened for reads past the page cache, if that is possible.
    direct: Option<File>,
    index: Mutex<Index>,
    /// Whether it may be written to.
    writable: bool,
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
        private_folder(folder)?;
        let mut options = OpenOptions::new();
        let path = folder.join("lock");
        let lock = options.read(true).write(true).create(true).truncate(false);
        let lock = match lock.mode(0o600).open(&path) {
            // Read-only media; what is there can be used.
            Err(_) if path.exists() => File::open(&path)?,
            lock => lock?,
        };
        Ok(Arc::new(Self {
            room: Mutex::new(Room::new(folder, limit)?),
            folder: folder.to_owned(),
            lock: Mutex::new(lock),
            complained: AtomicBool::new(false),
        }))
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
            Ok(self.part(data, index, true))
        })
    }

    fn part(self: &Arc<Self>, data: File, index: Index, writable: bool) -> CachedPart {
        // Pages that the kernel reads ahead would be read a second time.
        only_what_is_read(&data);
        CachedPart {
            cache: self.clone(),
            direct: reopen_direct(&data).ok(),
            data,
            index: Mutex::new(index),
            writable,
        }
    }

    fn open_part(
        self: &Arc<Self>,
        (data, index): &(PathBuf, PathBuf),
    ) -> io::Result<Option<CachedPart>> {
        let open = |path: &Path| {
            let both = OpenOptions::new().read(true).write(true).open(path);
            match both {
                Ok(file) => Ok(Some((file, true))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(_) => File::open(path).map(|file| Some((file, false))),
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
        Ok(Some(self.part(data_file, found, writable)))
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

fn private_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if folder.exists() {
        return Err(io::Error::other("it is not a folder"));
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl CachedPart {
    /// The most bytes that all of the cache may hold.
    pub fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    fn is_of(&self, address: &str, pin: &Pin) -> bool {
        let head = &self.index.lock().head;
        head.address == address && head.pin == *pin
    }

    /// Notes that this part was opened together with the others of its model, all of whose states
    /// make this number.
    pub fn note_set(&self, set: u64) {
        if self.writable {
            let cache = &self.cache;
            // Without the note, the server must be asked again.
            let _ = cache.exclusive(|| self.index.lock().note_set(set));
        }
    }

    /// The number of the model that this part was opened with the last time.
    pub fn set(&self) -> Option<u64> {
        self.index.lock().head.set
    }

    /// The state of the file that the bytes are from.
    pub fn pin(&self) -> Pin {
        self.index.lock().head.pin.clone()
    }

    /// How far the cache holds what begins at a place, or else where what it holds begins again.
    pub fn look(&self, place: u64) -> Found {
        let mut index = self.index.lock();
        if index.holding(place).is_none() {
            // Another mount may have it.
            let _ = index.refresh();
        }
        match index.holding(place) {
            Some((start, piece)) => Found::Until(start + piece.len),
            None => Found::From(index.next_after(place)),
        }
    }

    /// Fills the buffer with what begins at a place that one piece holds. `false` if that piece is
    /// not what was written; it then counts as absent.
    pub fn read(&self, place: u64, buffer: &mut [u8]) -> bool {
        let found = {
            let index = self.index.lock();
            index
                .holding(place)
                .map(|(start, piece)| (start, piece.clone()))
        };
        let Some((start, piece)) = found else {
            return false;
        };
        let range = place..place + buffer.len() as u64;
        let is_right = range.end <= start + piece.len
            && self
                .read_blocks(start, &piece, &range, buffer)
                .unwrap_or(false);
        if is_right {
            self.note_use(start, piece.used);
        } else {
            self.forget(start, &piece);
        }
        is_right
    }

    /// Fills the buffer with a range of a piece. `false` if it is not what was written.
    fn read_blocks(
        &self,
        start: u64,
        piece: &Piece,
        range: &Range<u64>,
        buffer: &mut [u8],
    ) -> io::Result<bool> {
        let blocks = piece.blocks(start, range);
        if blocks == *range {
            self.read_data(range.start, buffer)?;
            return Ok(piece.matches(start, range.start, buffer));
        }
        BLOCKS.with_borrow_mut(|space| {
            let bytes = (blocks.end - blocks.start) as usize;
            if space.len() < bytes {
                space.resize(bytes, 0);
            }
            let space = &mut space[..bytes];
            self.read_data(blocks.start, space)?;
            let skip = (range.start - blocks.start) as usize;
            buffer.copy_from_slice(&space[skip..skip + buffer.len()]);
            Ok(piece.matches(start, blocks.start, space))
        })
    }

    /// Reads past the page cache, as parts on a disk are read.
    fn read_data(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let direct = self.direct.as_ref();
        if let Some(direct) = direct.filter(|_| !is_cached(&self.data, offset, buffer.len() as u64))
            && read_exact_direct(direct, buffer, offset).is_ok()
        {
            return Ok(());
        }
        read_exact_uncached(&self.data, buffer, offset, |buffer, offset| {
            self.data.read_exact_at(buffer, offset)
        })
    }

    /// Reads a range into a buffer that begins where a direct read of it does, in one piece. `false`
    /// unless the cache has all of it, and its ends are ends of blocks.
    pub fn read_chunk(&self, range: &Range<u64>, buffer: &mut [u8]) -> bool {
        let Some(pieces) = self.whole_blocks(range) else {
            return false;
        };
        let first = range.start - range.start % DIRECT_ALIGNMENT;
        let place = |at: u64| (at - first) as usize;
        let (skip, end) = (place(range.start), place(range.end));
        let aligned = end.next_multiple_of(DIRECT_ALIGNMENT as usize);
        let is_read = if let Some(direct) = &self.direct
            && !is_cached(&self.data, range.start, range.end - range.start)
        {
            matches!(direct.read_at(&mut buffer[..aligned], first), Ok(read) if read >= end)
        } else {
            false
        };
        if !is_read && self.read_data(range.start, &mut buffer[skip..end]).is_err() {
            return false;
        }
        let mut are_right = true;
        for (start, piece) in &pieces {
            let from = range.start.max(*start);
            let bytes = &buffer[place(from)..place(range.end.min(start + piece.len))];
            if piece.matches(*start, from, bytes) {
                self.note_use(*start, piece.used);
            } else {
                self.forget(*start, piece);
                are_right = false;
            }
        }
        are_right
    }

    /// The pieces that hold a range, in order, if all of it is there in whole blocks.
    fn whole_blocks(&self, range: &Range<u64>) -> Option<Vec<(u64, Piece)>> {
        let index = self.index.lock();
        let (mut pieces, mut place) = (Vec::new(), range.start);
        while place < range.end {
            let (start, piece) = index.holding(place)?;
            let end = range.end.min(start + piece.len);
            if piece.blocks(start, &(place..end)) != (place..end) {
                return None;
            }
            pieces.push((start, piece.clone()));
            place = end;
        }
        Some(pieces)
    }

    /// Notes that a piece was read, by which it stays longer than others.
    fn note_use(&self, start: u64, used: u64) {
        let at = now();
        if self.writable && used + USED_SECONDS < at {
            let mut index = self.index.lock();
            // That it could not be noted costs nothing but an early eviction.
            let _ = index.note_use(start, at);
        }
    }

    fn forget(&self, start: u64, piece: &Piece) {
        let mut index = self.index.lock();
        let _ = index.refresh();
        // Gone if another mount has evicted it, and other if it was fetched again.
        if index
            .pieces
            .get(&start)
            .is_none_or(|now| !now.is_same_as(piece))
        {
            return;
        }
        tracing::warn!("a piece of the cache, from byte {start} on, is damaged and not used");
        index.pieces.remove(&start);
        if self.writable {
            let _ = index.append(&[Record::Gone { start }]);
        }
    }

    /// Keeps bytes of the file, which end at [`index::piece_end`] or before, if there is room.
    pub fn keep(&self, place: u64, bytes: &[u8], unit: u64) {
        if !self.writable || bytes.is_empty() {
            return;
        }
        let len = bytes.len() as u64;
        // Whatever leaves the cache for this, it is not what was just read.
        let _ = self.index.lock().flush_uses();
        match self.cache.make_room(len) {
            Ok(true) => {}
            Ok(false) => {
                let cause = io::Error::other(
                    "it has no more room, since --cache-size or a twentieth of its disk that must stay free leaves none",
                );
                return self.cache.complain(&cause);
            }
            Err(e) => return self.cache.complain(&e),
        }
        let kept = write_all_uncached(&self.data, bytes, place).and_then(|()| {
            let piece = Piece::of(place, bytes, unit, now());
            self.index.lock().append(&[Record::Written(place, piece)])
        });
        if let Err(e) = kept {
            self.cache.complain(&e);
        }
    }
}

impl Drop for CachedPart {
    fn drop(&mut self) {
        let _ = self.index.lock().flush_uses();
    }
}

/// What a cache has of the bytes from a place on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// All up to here, in one piece.
    Until(u64),
    /// Nothing before this place, or nothing at all.
    From(Option<u64>),
}

impl Piece {
    fn is_same_as(&self, other: &Self) -> bool {
        Self {
            used: other.used,
            ..self.clone()
        } == *other
    }
}

/// The bytes of a part that the cache has.
pub fn cached_bytes(part: &CachedPart, range: &Range<u64>) -> u64 {
    let mut index = part.index.lock();
    let _ = index.refresh();
    // No piece before this reaches into the range.
    let first = range.start.saturating_sub(index::PIECE_BYTES);
    let pieces = index.pieces.range(first..range.end);
    let (mut bytes, mut counted) = (0, range.start);
    for (start, piece) in pieces {
        let end = (start + piece.len).min(range.end);
        bytes += end.saturating_sub((*start).max(counted));
        counted = counted.max(end);
    }
    bytes
}
