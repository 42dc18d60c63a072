//! The index of a cached part: which pieces of it are there, and their checksums.
//!
//! The problem: a daemon may be killed between any two system calls, the machine may lose power
//! with pages unwritten, another mount may write at the same time, and the disk may be full.
//!
//! The plan: a head that names the file and its pin, then records of a fixed size, only ever
//! appended. A record has its own checksum and those of the bytes that it describes, and is written
//! after them. So whatever is lost or torn, a record either is not there, or does not match and the
//! piece counts as absent. Nothing need be flushed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crc_fast::{CrcAlgorithm, checksum};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::super::pin::Pin;

#[cfg(test)]
mod tests;

/// Begins an index; the number changes when the rest of the format does.
const MAGIC: &[u8] = b"odmoe-fs cache 2\n";
/// Bytes of the head.
const HEAD_BYTES: usize = 8 << 10;
/// Bytes of a record.
pub const RECORD_BYTES: usize = 128;
/// Bytes that one checksum is of: what a small read must read and check. Blocks begin at multiples of
/// this in the file, wherever pieces do, so that large reads of any pieces end between blocks.
pub const BLOCK_BYTES: u64 = 64 << 10;
/// Checksums of a record.
const SUMS: u64 = 16;
/// Bytes of the largest piece.
pub const PIECE_BYTES: u64 = BLOCK_BYTES * SUMS;

/// Notes of reads that are written together, and how old the first may become meanwhile.
const USES: usize = 256;
const USES_MILLISECONDS: u64 = 10_000;

/// What an index is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The address of the file, without anything secret.
    pub address: String,
    pub pin: Pin,
    /// Of the pins of all parts when they were last opened together, this one among them.
    #[serde(default)]
    pub set: Option<u64>,
}

impl Head {
    fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let json = serde_json::to_vec(self)?;
        let mut bytes = [MAGIC, &json, b"\n"].concat();
        if bytes.len() > HEAD_BYTES {
            return Err(io::Error::other("the address is too long"));
        }
        bytes.resize(HEAD_BYTES, 0);
        Ok(bytes)
    }
}

/// A piece of the file that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub len: u64,
    /// The file of the tree that it belongs to, by number; 0 if that is not known.
    pub unit: u64,
    /// When it was last read, in milliseconds since 1970; in seconds if that was long ago.
    pub used: u64,
    pub(super) sums: [u32; SUMS as usize],
}

/// Where the longest piece ends that begins at a place.
pub fn piece_end(place: u64) -> u64 {
    (place / BLOCK_BYTES + SUMS).saturating_mul(BLOCK_BYTES)
}

/// Bytes of a file that begin at a place, block by block.
fn blocks_of(place: u64, bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let first = BLOCK_BYTES - place % BLOCK_BYTES;
    let (first, rest) = bytes.split_at(bytes.len().min(first as usize));
    let blocks = std::iter::once(first).chain(rest.chunks(BLOCK_BYTES as usize));
    blocks.filter(|block| !block.is_empty())
}

/// An entry of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A piece was written.
    Written(u64, Piece),
    /// A piece was read.
    Used { start: u64, at: u64 },
    /// A piece is no longer there.
    Gone { start: u64 },
}

impl Piece {
    /// What describes bytes that begin at a place, and end at [`piece_end`] or before.
    pub fn of(start: u64, bytes: &[u8], unit: u64, used: u64) -> Self {
        let mut sums = [0; SUMS as usize];
        for (sum, block) in sums.iter_mut().zip(blocks_of(start, bytes)) {
            *sum = sum_of(block);
        }
        Self {
            len: bytes.len() as u64,
            unit,
            used,
            sums,
        }
    }

    /// The whole blocks that hold a range of the piece that begins at `start`; of those at its edges,
    /// what is in the piece.
    pub fn blocks(&self, start: u64, range: &Range<u64>) -> Range<u64> {
        let first = range.start / BLOCK_BYTES * BLOCK_BYTES;
        let last = range.end.next_multiple_of(BLOCK_BYTES);
        first.max(start)..last.min(start + self.len)
    }

    /// Whether whole [blocks](Self::blocks) from a place on are what was written.
    pub fn matches(&self, start: u64, place: u64, bytes: &[u8]) -> bool {
        let skip = (place / BLOCK_BYTES - start / BLOCK_BYTES) as usize;
        let mut pairs = blocks_of(place, bytes).zip(&self.sums[skip..]);
        pairs.all(|(block, sum)| sum_of(block) == *sum)
    }
}

fn sum_of(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

impl Record {
    fn to_bytes(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        let (kind, start) = match self {
            Self::Written(start, piece) => {
                put(16, &piece.len.to_le_bytes());
                put(24, &piece.unit.to_le_bytes());
                put(32, &piece.used.to_le_bytes());
                for (n, sum) in piece.sums.iter().enumerate() {
                    put(40 + 4 * n, &sum.to_le_bytes());
                }
                (1_u32, *start)
            }
            Self::Used { start, at } => {
                put(32, &at.to_le_bytes());
                (2, *start)
            }
            Self::Gone { start } => (3, *start),
        };
        put(4, &kind.to_le_bytes());
        put(8, &start.to_le_bytes());
        let sum = sum_of(&bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None` if it was never completely written.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if u32_at(0)? != sum_of(bytes.get(4..RECORD_BYTES)?) {
            return None;
        }
        let start = u64_at(8)?;
        match u32_at(4)? {
            1 => {
                let mut sums = [0; SUMS as usize];
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = u32_at(40 + 4 * n)?;
                }
                let len = u64_at(16)?;
                let piece = Piece {
                    len,
                    unit: u64_at(24)?,
                    used: u64_at(32)?,
                    sums,
                };
                let end = start.checked_add(len);
                let fits = len > 0 && end.is_some_and(|end| end <= piece_end(start));
                fits.then_some(Self::Written(start, piece))
            }
            2 => Some(Self::Used {
                start,
                at: u64_at(32)?,
            }),
            3 => Some(Self::Gone { start }),
            _ => None,
        }
    }
}

/// The pieces that are there, by where they start.
pub type Pieces = BTreeMap<u64, Piece>;

/// An open index.
#[derive(Debug)]
pub struct Index {
    file: File,
    pub head: Head,
    /// How far it was read.
    read: u64,
    /// Records that were read, those without effect included.
    records: usize,
    pub pieces: Pieces,
    /// Notes of what was read that are not in the file yet.
    uses: Vec<Record>,
}

impl Index {
    /// Writes the head of a new one.
    pub fn create(file: File, head: Head) -> io::Result<Self> {
        file.write_all_at(&head.to_bytes()?, 0)?;
        Ok(Self {
            file,
            head,
            read: HEAD_BYTES as u64,
            records: 0,
            pieces: Pieces::new(),
            uses: Vec::new(),
        })
    }

    /// Reads one; `None` if it is not an index of this version.
    pub fn open(file: File) -> io::Result<Option<Self>> {
        let mut bytes = vec![0; HEAD_BYTES];
        match file.read_exact_at(&mut bytes, 0) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let head = bytes.strip_prefix(MAGIC).and_then(|rest| {
            let end = rest.iter().position(|b| *b == b'\n')?;
            serde_json::from_slice(&rest[..end]).ok()
        });
        let Some(head) = head else { return Ok(None) };
        let mut index = Self {
            file,
            head,
            read: HEAD_BYTES as u64,
            records: 0,
            pieces: Pieces::new(),
            uses: Vec::new(),
        };
        index.refresh()?;
        Ok(Some(index))
    }

    /// Notes which state of the whole model the part belongs to.
    pub fn note_set(&mut self, set: u64) -> io::Result<()> {
        if self.head.set != Some(set) {
            self.head.set = Some(set);
            self.file.write_all_at(&self.head.to_bytes()?, 0)?;
        }
        Ok(())
    }

    /// Reads what was appended since, by this or another process.
    pub fn refresh(&mut self) -> io::Result<()> {
        const AT_ONCE: usize = RECORD_BYTES << 10;
        let end = self.file.metadata()?.len();
        let mut space = Vec::new();
        while self.read + RECORD_BYTES as u64 <= end {
            let left = (end - self.read) / RECORD_BYTES as u64 * RECORD_BYTES as u64;
            space.resize((left as usize).min(AT_ONCE), 0);
            self.file.read_exact_at(&mut space, self.read)?;
            self.read += space.len() as u64;
            for bytes in space.chunks(RECORD_BYTES) {
                self.records += 1;
                if let Some(record) = Record::from_bytes(bytes) {
                    self.apply(record);
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, record: Record) {
        match record {
            Record::Written(start, piece) => {
                // Mounts that write at the same time may cut pieces differently.
                let known = self.pieces.get(&start);
                if known.is_none_or(|known| known.len <= piece.len) {
                    self.pieces.insert(start, piece);
                }
            }
            Record::Gone { start } => drop(self.pieces.remove(&start)),
            Record::Used { start, at } => {
                if let Some(piece) = self.pieces.get_mut(&start) {
                    piece.used = piece.used.max(at);
                }
            }
        }
    }

    /// Appends records, and takes in what others have appended before.
    pub fn append(&mut self, records: &[Record]) -> io::Result<()> {
        let bytes: Vec<u8> = records.iter().flat_map(Record::to_bytes).collect();
        flock(&self.file, FlockOperation::LockExclusive)?;
        let written = self.refresh().and_then(|()| {
            // A record that the disk had no room for may be there in part.
            let end = self.file.metadata()?.len().max(HEAD_BYTES as u64);
            let past = end - HEAD_BYTES as u64;
            let at = HEAD_BYTES as u64 + past.next_multiple_of(RECORD_BYTES as u64);
            self.file.write_all_at(&bytes, at)
        });
        flock(&self.file, FlockOperation::Unlock)?;
        written?;
        self.refresh()
    }

    /// Notes that a piece was read, in the file when there are some more: a reader must not wait for
    /// the disk of the index for each piece.
    pub fn note_use(&mut self, start: u64, at: u64) -> io::Result<()> {
        self.apply(Record::Used { start, at });
        self.uses.push(Record::Used { start, at });
        let is_old = |record: &Record| matches!(record, Record::Used { at: then, .. } if then + USES_MILLISECONDS < at);
        if self.uses.len() >= USES || self.uses.first().is_some_and(is_old) {
            self.flush_uses()?;
        }
        Ok(())
    }

    /// Writes down what was read.
    pub fn flush_uses(&mut self) -> io::Result<()> {
        let uses = std::mem::take(&mut self.uses);
        match uses.is_empty() {
            true => Ok(()),
            false => self.append(&uses),
        }
    }

    /// Whether most records say nothing any more.
    pub fn is_sparse(&self) -> bool {
        self.records > 1024 && self.records > 2 * self.pieces.len()
    }

    /// The records of all pieces, for a new index.
    pub fn records(&self) -> Vec<Record> {
        let pieces = self.pieces.iter();
        let records = pieces.map(|(start, piece)| Record::Written(*start, piece.clone()));
        records.collect()
    }

    /// The piece that holds a place: where it starts, and the piece.
    pub fn holding(&self, place: u64) -> Option<(u64, &Piece)> {
        // Pieces may overlap, and none is longer than this.
        let first = (place + 1).saturating_sub(PIECE_BYTES);
        let mut before = self.pieces.range(first..=place).rev();
        let (start, piece) = before.find(|(start, piece)| place < *start + piece.len)?;
        Some((*start, piece))
    }

    /// The pieces that hold some of a range, in order: where each starts, and the piece.
    pub fn touching(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, &Piece)> {
        // No piece before this reaches into the range.
        let (first, start) = (range.start.saturating_sub(PIECE_BYTES), range.start);
        let pieces = self.pieces.range(first..range.end);
        let pieces = pieces.map(|(place, piece)| (*place, piece));
        pieces.filter(move |(place, piece)| place + piece.len > start)
    }

    /// Where the first piece behind a place starts.
    pub fn next_after(&self, place: u64) -> Option<u64> {
        self.pieces
            .range(place + 1..)
            .next()
            .map(|(start, _)| *start)
    }
}
