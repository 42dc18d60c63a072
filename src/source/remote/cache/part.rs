//! A part in the cache: what is there of it is read, and what was fetched is kept.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::Cache;
use super::index::{Index, Piece, Record};
use crate::source::remote::pin::Pin;
use crate::spare::Spare;
use crate::sys::copy::write_all_uncached;
use crate::sys::read::{
    DIRECT_ALIGNMENT, is_cached, only_what_is_read, read_exact_direct, read_exact_uncached,
    reopen_direct,
};

/// How old the note of when a piece was read may be, in milliseconds.
const USED_MILLISECONDS: u64 = 10_000;

/// Memory for blocks of which only a part is wanted; it grows to those of the largest piece.
static BLOCKS: Spare = Spare::new();

/// A part in the cache.
#[derive(Debug)]
pub struct CachedPart {
    cache: Arc<Cache>,
    /// Locked, shared with other mounts, for as long as this lives.
    data: File,
    /// The same file opened for reads past the page cache, if that is possible.
    direct: Option<File>,
    pub(super) index: Mutex<Index>,
    /// Whether it may be written to.
    writable: bool,
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

impl CachedPart {
    pub(super) fn new(cache: Arc<Cache>, data: File, index: Index, writable: bool) -> Self {
        // Pages that the kernel reads ahead would be read a second time.
        only_what_is_read(&data);
        Self {
            cache,
            direct: reopen_direct(&data).ok(),
            data,
            index: Mutex::new(index),
            writable,
        }
    }

    /// Has nothing of the cache leave that is read or written from now on, and counts what there is of
    /// some ranges, and of the headers, as read now.
    pub fn spare(&self, ranges: impl Iterator<Item = Range<u64>>) {
        self.cache.spare_from_now();
        let mut index = self.index.lock();
        let _ = index.refresh();
        let at = now();
        let used = |start| Record::Used { start, at };
        let headers = index.pieces.iter().filter(|(_, piece)| piece.unit == 0);
        let mut uses: Vec<_> = headers.map(|(start, _)| used(*start)).collect();
        for range in ranges {
            uses.extend(index.touching(&range).map(|(start, _)| used(start)));
        }
        if self.writable && !uses.is_empty() {
            let _ = index.append(&uses);
        }
    }

    /// The most bytes that all of the cache may hold.
    pub fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    pub(super) fn is_of(&self, address: &str, pin: &Pin) -> bool {
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
        BLOCKS.lend(|space| {
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
        if self.writable && used + USED_MILLISECONDS < at {
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

    /// Keeps bytes of the file, which end at [`piece_end`](super::index::piece_end) or before, if
    /// there is room.
    pub fn keep(&self, place: u64, bytes: &[u8], unit: u64) {
        if !self.writable || bytes.is_empty() {
            return;
        }
        let len = bytes.len() as u64;
        // What nobody finds again would take room all the same.
        if self.data.metadata().is_ok_and(|data| data.nlink() == 0) {
            let cause = io::Error::other("its files were removed");
            return self.cache.complain(&cause);
        }
        // Whatever leaves the cache for this, it is not what was just read.
        let _ = self.index.lock().flush_uses();
        let _room = match self.cache.make_room(len) {
            Ok(Some(room)) => room,
            Ok(None) => {
                let cause = io::Error::other(
                    "it has no more room, since --cache-size or a twentieth of its disk that must stay free leaves none",
                );
                return self.cache.complain(&cause);
            }
            Err(e) => return self.cache.complain(&e),
        };
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
    held_bytes(&index, range)
}

/// Whether the cache has all of a range.
pub fn holds_all(part: &CachedPart, range: &Range<u64>) -> bool {
    let mut index = part.index.lock();
    let len = range.end - range.start;
    // Another mount may have it.
    held_bytes(&index, range) >= len
        || (index.refresh().is_ok() && held_bytes(&index, range) >= len)
}

fn held_bytes(index: &Index, range: &Range<u64>) -> u64 {
    let (mut bytes, mut counted) = (0, range.start);
    for (start, piece) in index.touching(range) {
        let end = (start + piece.len).min(range.end);
        bytes += end.saturating_sub(start.max(counted));
        counted = counted.max(end);
    }
    bytes
}
