//! Bytes of parts, fetched before anybody asks for them.
//!
//! The problem: a disk is fast only if it always has several large reads to work on. The kernel
//! cannot prepare them: it would read on past the end of an expert's matrix, into bytes that nobody
//! wants, and what it reads stays in its cache, beside the same bytes in the cache of the mounted
//! file.
//!
//! The plan: for each reader it is known which runs of which parts it will want, in which order.
//! They are cut into [`Chunk`]s, which threads read past the page cache into a fixed number of
//! buffers that all readers share. A read is answered from the chunks that hold some of it; the
//! rest is read when it is asked for. So no answer ever depends on what was fetched, and a reader
//! without a buffer only waits longer.
//!
//! Bytes that are in the page cache already are not read from the disk again.

pub mod buffers;
mod pace;
#[cfg(test)]
pub mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use self::buffers::{BUFFERS, Buffer, Pool};
pub use self::pace::{Near, Pace};
use super::place::Part;
use crate::sys::read::DIRECT_ALIGNMENT;

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

/// A range of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// 0-based.
    pub part: u32,
    /// First byte in the part's file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Run {
    /// Whether another run begins where this one ends.
    pub fn is_followed_by(&self, other: &Self) -> bool {
        self.part == other.part && self.offset + self.len == other.offset
    }

    /// Its bytes in the part's file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// What was fetched and will be, for which readers.
#[derive(Debug, Default)]
pub struct Fetch {
    table: Mutex<Table>,
    queue: Mutex<Queue>,
    queued: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    chunks: VecDeque<Arc<Chunk>>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Table {
    readers: Vec<Reader>,
    /// Whether what was fetched came from afar, and is not thrown away as long as somebody may
    /// still ask for it.
    is_costly: bool,
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
struct Piece {
    part: u32,
    range: Range<u64>,
    /// `None` if nothing need be fetched, or if all of it was given out.
    chunk: Option<Arc<Chunk>>,
    /// Whether it is in what the reader wanted last.
    is_wanted: bool,
}

impl Piece {
    fn touches(&self, part: u32, range: &Range<u64>) -> bool {
        self.part == part && self.range.start < range.end && range.start < self.range.end
    }
}

/// A piece of a part that was read or will be.
#[derive(Debug)]
pub struct Chunk {
    part: u32,
    range: Range<u64>,
    /// Memory for it, until somebody takes it to read the chunk.
    empty: Mutex<Option<Buffer>>,
    /// Whether a server is asked for all of it at once.
    is_streamed: bool,
    /// `None` if it could not be read; each request for it then finds out why.
    read: OnceLock<Option<Buffer>>,
    /// Bytes that are not needed any more. The kernel asks for each byte once, unless it has dropped
    /// the page.
    used: AtomicU64,
}

/// Bytes borrowed from a chunk, which is kept as long as they are.
#[derive(Debug)]
pub struct Held {
    chunk: Arc<Chunk>,
    /// Within the buffer.
    range: Range<usize>,
}

impl Held {
    /// Notes that the bytes are not needed again.
    pub fn give_up(&self) {
        let bytes = self.range.end - self.range.start;
        self.chunk.used.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl std::ops::Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let buffer = self.chunk.read.get().and_then(Option::as_deref);
        &buffer.expect("only what was read is held")[self.range.clone()]
    }
}

impl Chunk {
    fn new(part: u32, range: Range<u64>, buffer: Buffer, is_streamed: bool) -> Self {
        Self {
            part,
            range,
            is_streamed,
            empty: Mutex::new(Some(buffer)),
            read: OnceLock::new(),
            used: AtomicU64::new(0),
        }
    }

    /// Where a direct read of it starts.
    fn first(&self) -> u64 {
        self.range.start - self.range.start % DIRECT_ALIGNMENT
    }

    /// The memory of the chunk. It is read now unless it was read before; if another thread is
    /// reading it, this waits. `None` if it cannot be read, or if the part has changed.
    fn read(&self, part: &Part) -> Option<&Buffer> {
        let read = self.read.get_or_init(|| {
            let mut buffer = self.empty.lock().take()?;
            buffer.populate();
            let read = part.read_chunk(&self.range, &mut buffer, self.is_streamed);
            read.ok().map(|()| buffer)
        });
        // What was read before a change is right, but nobody must see a mixture of both states.
        part.is_unchanged().ok()?;
        read.as_ref()
    }

    /// Borrows a range that lies in this chunk.
    pub fn hold(self: Arc<Self>, parts: &[Part], range: Range<u64>) -> Option<Held> {
        self.read(&parts[self.part as usize])?;
        let first = self.first();
        let range = (range.start - first) as usize..(range.end - first) as usize;
        Some(Held { chunk: self, range })
    }

    /// Notes that a range of the part is not needed any more.
    pub fn give_up(&self, range: &Range<u64>) {
        let (start, end) = (
            range.start.max(self.range.start),
            range.end.min(self.range.end),
        );
        let bytes = end.saturating_sub(start);
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The range of the part that it holds or will hold.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Whether nothing of it is needed any more.
    fn is_used_up(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.range.end - self.range.start
    }
}

impl Fetch {
    /// For parts of which each byte should be fetched only once.
    pub fn costly() -> Self {
        let fetch = Self::default();
        fetch.table.lock().is_costly = true;
        fetch
    }

    /// The chunks that hold some of a range of a part, in order.
    pub fn holding(&self, part: u32, range: &Range<u64>) -> Vec<Arc<Chunk>> {
        let table = self.table.lock();
        let mut chunks: Vec<_> = table
            .pieces()
            .filter(|piece| piece.touches(part, range))
            .filter_map(|piece| piece.chunk.clone())
            .collect();
        drop(table);
        chunks.sort_by_key(|chunk| chunk.range.start);
        chunks
    }

    /// Replaces what a reader wants by these runs, in this order; without any, the reader is
    /// forgotten. Starts the chunks that begin in the first `near` bytes, as far as there are
    /// buffers, and returns them. They are read when they are asked for, or once they are
    /// [queued](Self::queue).
    pub fn want(
        &self,
        parts: &[Part],
        reader: u64,
        runs: &[Run],
        near: u64,
        pace: &Pace,
    ) -> Vec<Arc<Chunk>> {
        let mut table = self.table.lock();
        table.want(parts, reader, runs, near, pace)
    }

    /// Hands chunks to the threads that read them.
    pub fn queue(&self, chunks: Vec<Arc<Chunk>>) {
        let count = chunks.len();
        self.queue.lock().chunks.extend(chunks);
        (0..count).for_each(|_| {
            self.queued.notify_one();
        });
    }

    /// Reads what is queued until the queue is closed.
    pub fn read_queued(&self, parts: &[Part]) {
        loop {
            let chunk = {
                let mut queue = self.queue.lock();
                loop {
                    if queue.closed {
                        return;
                    }
                    if let Some(chunk) = queue.chunks.pop_front() {
                        break chunk;
                    }
                    self.queued.wait(&mut queue);
                }
            };
            // Unless it was given up meanwhile.
            if Arc::strong_count(&chunk) > 1 {
                chunk.read(&parts[chunk.part as usize]);
            }
        }
    }

    /// Ends the threads that read what is queued.
    pub fn close(&self) {
        self.queue.lock().closed = true;
        self.queued.notify_all();
    }
}

impl Table {
    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.readers.iter().flat_map(|reader| &reader.pieces)
    }

    /// As [`Fetch::want`]; returns the chunks that are to be read.
    fn want(
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
