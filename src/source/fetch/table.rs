//! What each reader wants, what was decided about it, and who gets the buffers.

use std::ops::Range;
use std::sync::Arc;

use super::buffers::{BUFFERS, Buffer, Pool};
use super::{Chunk, Pace, Run};
use crate::source::place::Part;

/// The first chunk of a reader is small, so that the reader does not wait for long: two requests of
/// the kernel, the one it will wait for next and the one after that. Later chunks are larger.
const FIRST_CHUNK_BYTES: u64 = 256 << 10;
/// The kernel's usual request. A reader that asked for nothing while others asked for as much as all
/// buffers hold may lose its chunks.
const REQUEST_BYTES: usize = 128 << 10;
/// How many readers are known at a time: as many as can have a buffer, and as many that had one
/// before.
const MAX_READERS: usize = 2 * BUFFERS;
/// A reader for whom so much was fetched is asked more for at a time: what is sent takes longer then
/// than the answer to begin.
const STREAM_BYTES: u64 = 24 << 20;

#[derive(Debug, Default)]
pub struct Table {
    readers: Vec<Reader>,
    /// Whether what was fetched came from afar, and is not thrown away as long as somebody may
    /// still ask for it.
    pub is_costly: bool,
    /// Requests so far: the clock of this table.
    now: u64,
}

#[derive(Debug)]
struct Reader {
    id: u64,
    /// In the order in which they were started.
    pieces: Vec<Piece>,
    /// Bytes of all pieces so far.
    begun: u64,
    last_used: u64,
}

/// A piece of what a reader wants, once something was decided about it.
#[derive(Debug)]
pub struct Piece {
    part: u32,
    range: Range<u64>,
    /// `None` if nothing need be fetched, or if all of it was given out.
    pub chunk: Option<Arc<Chunk>>,
    /// Whether it is in what the reader wanted last.
    is_wanted: bool,
}

impl Piece {
    pub fn touches(&self, part: u32, range: &Range<u64>) -> bool {
        self.part == part && self.range.start < range.end && range.start < self.range.end
    }
}

impl Table {
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.readers.iter().flat_map(|reader| &reader.pieces)
    }

    /// As [`Fetch::want`]; returns the chunks that are to be read.
    pub fn want(
        &mut self,
        parts: &[Part],
        id: u64,
        runs: &[Run],
        near: u64,
        pace: &Pace,
    ) -> Vec<Arc<Chunk>> {
        self.now += 1;
        for piece in self.readers.iter_mut().flat_map(|r| &mut r.pieces) {
            piece.chunk.take_if(|chunk| chunk.is_used_up());
        }
        if runs.is_empty() && self.is_costly {
            // Requests that were overtaken will ask for what is left. It is given up when they
            // have, or when others need the room.
            return Vec::new();
        }
        if runs.is_empty() {
            self.readers.retain(|reader| reader.id != id);
            return Vec::new();
        }
        let index = self.find_or_add(id, pace.pool);
        let reader = &mut self.readers[index];
        reader.last_used = self.now;
        for piece in &mut reader.pieces {
            let is_in = |run: &Run| piece.touches(run.part, &run.range());
            piece.is_wanted = runs.iter().any(is_in);
        }
        // Chunks that are not wanted any more are given up when their buffers are needed.
        reader.pieces.retain(|p| p.is_wanted || p.chunk.is_some());
        let mut begun = Vec::new();
        let mut passed = 0;
        for run in runs {
            let mut place = run.offset;
            while place < run.offset + run.len {
                if passed + (place - run.offset) >= near {
                    return begun;
                }
                let rest = place..run.offset + run.len;
                match self.next_gap(index, run.part, rest) {
                    Ok(gap) => {
                        let Some(piece) = self.begin(parts, index, run.part, gap, pace) else {
                            return begun;
                        };
                        place = piece.range.end;
                        begun.extend(piece.chunk.clone());
                        let reader = &mut self.readers[index];
                        reader.begun += piece.range.end - piece.range.start;
                        reader.pieces.push(piece);
                    }
                    Err(end) => place = end,
                }
            }
            passed += run.len;
        }
        begun
    }

    /// Readers that have asked for nothing since then seem to have stopped.
    fn idle_since(&self, pool: &Pool) -> u64 {
        let requests = pool.count * pool.bytes / REQUEST_BYTES;
        self.now.saturating_sub(requests as u64)
    }

    fn find_or_add(&mut self, id: u64, pool: &Pool) -> usize {
        if let Some(index) = self.readers.iter().position(|reader| reader.id == id) {
            if self.readers[index].is_idle(self.idle_since(pool)) {
                // Whoever reads it again wants again what was given out.
                self.readers[index].pieces.retain(|p| p.chunk.is_some());
            }
            return index;
        }
        if self.readers.len() >= MAX_READERS {
            let all = self.readers.iter().enumerate();
            let oldest = all.min_by_key(|(_, reader)| reader.last_used);
            if let Some((oldest, _)) = oldest {
                self.readers.swap_remove(oldest);
            }
        }
        self.readers.push(Reader {
            id,
            pieces: Vec::new(),
            begun: 0,
            last_used: self.now,
        });
        self.readers.len() - 1
    }

    /// The range from the start of `range` that is neither in a piece of this reader nor in a chunk
    /// of another. If its start is in one, the end of that one as an error.
    fn next_gap(&self, index: usize, part: u32, range: Range<u64>) -> Result<Range<u64>, u64> {
        let mut end = range.end;
        for (owner, reader) in self.readers.iter().enumerate() {
            for piece in &reader.pieces {
                if !piece.touches(part, &range) || (owner != index && piece.chunk.is_none()) {
                    continue;
                }
                if piece.range.start <= range.start {
                    return Err(piece.range.end);
                }
                end = end.min(piece.range.start);
            }
        }
        Ok(range.start..end)
    }

    /// Makes the first piece of a gap; `None` if there is no buffer for it.
    fn begin(
        &mut self,
        parts: &[Part],
        index: usize,
        part: u32,
        gap: Range<u64>,
        pace: &Pace,
    ) -> Option<Piece> {
        let begun = self.readers[index].begun;
        let piece = |end: u64, buffer: Option<Buffer>| {
            let range = gap.start..end;
            let chunk = |buffer| Chunk::new(part, range.clone(), buffer, begun >= STREAM_BYTES);
            Piece {
                part,
                chunk: buffer.map(|buffer| Arc::new(chunk(buffer))),
                range,
                is_wanted: true,
            }
        };
        let file = &parts[part as usize];
        if !file.is_fetchable() {
            return Some(piece(gap.end, None));
        }
        let idle_since = self.idle_since(pace.pool);
        let is_active = |r: &&Reader| r.chunks() > 0 && !r.is_idle(idle_since);
        let active = self.readers.iter().filter(is_active).count();
        let share = (pace.pool.count / active.max(1)).max(2);
        let reader = &mut self.readers[index];
        // While there are free buffers, nobody needs to give up any.
        if pace.pool.are_all_taken() {
            if reader.chunks() >= share && !reader.give_up_unwanted() {
                return None;
            }
            if pace.pool.are_all_taken() {
                self.make_room(index, pace.pool);
            }
        }
        let buffer = pace.pool.take()?;
        // Chunks end where a read should end, so that no page or block is read twice.
        let about = (begun + FIRST_CHUNK_BYTES).next_power_of_two();
        let span = about.min(pace.chunk);
        let end = gap.end.min(gap.start - gap.start % file.alignment() + span);
        let is_cached = file.is_cached(gap.start, end - gap.start);
        Some(piece(end, Some(buffer).filter(|_| !is_cached)))
    }

    /// Has a buffer given up: one that is not wanted any more, or those of readers that seem to
    /// have stopped, or one of the reader with the most, if that has more than the one in need. The
    /// latter loses what it would need last.
    fn make_room(&mut self, index: usize, pool: &Pool) {
        if self.readers.iter_mut().any(Reader::give_up_unwanted) {
            return;
        }
        let idle_since = self.idle_since(pool);
        for reader in &mut self.readers {
            if reader.is_idle(idle_since) {
                reader.pieces.clear();
            }
        }
        if !pool.are_all_taken() || self.is_costly {
            return;
        }
        let held = self.readers[index].chunks();
        let others = self.readers.iter_mut().enumerate();
        let others = others.filter(|(other, _)| *other != index).map(|(_, r)| r);
        if let Some(richest) = others.max_by_key(|r| r.chunks())
            && richest.chunks() > held + 1
            && let Some(last) = richest.pieces.iter().rposition(|p| p.chunk.is_some())
        {
            richest.pieces.remove(last);
        }
    }
}

impl Reader {
    fn chunks(&self) -> usize {
        self.pieces.iter().filter(|p| p.chunk.is_some()).count()
    }

    /// Whether it seems to have stopped reading.
    fn is_idle(&self, since: u64) -> bool {
        self.last_used < since
    }

    /// Gives up the oldest chunk that is not wanted any more; `false` if there is none.
    /// The last one stays: requests that were overtaken will ask for it.
    fn give_up_unwanted(&mut self) -> bool {
        let unwanted = |p: &&Piece| !p.is_wanted && p.chunk.is_some();
        if self.pieces.iter().filter(unwanted).count() < 2 {
            return false;
        }
        let place = self.pieces.iter().position(|p| unwanted(&p));
        place.map(|place| self.pieces.remove(place)).is_some()
    }
}
