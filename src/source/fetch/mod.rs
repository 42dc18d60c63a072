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
mod table;
#[cfg(test)]
pub mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use self::buffers::Buffer;
pub use self::pace::{Near, Pace};
use self::table::Table;
use super::place::Part;
use crate::sys::read::DIRECT_ALIGNMENT;

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
