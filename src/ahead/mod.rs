//! Reading ahead of sequential readers of the tree.
//!
//! The problem: the kernel asks for a file in small pieces, the next one when the reader is nearly
//! there, so that the disk idles while a piece is copied and passed on. Asked to read ahead itself,
//! it would go on behind an expert's matrix, into bytes that nobody wants; and what it has read for
//! us stays in its cache, beside the same bytes in the cache of the mounted file.
//!
//! The plan: we know what comes next in a file, wherever in the model it lies. From the second
//! sequential request on (a look at a header is none), [`ReadAhead`] keeps up to
//! [`streams::DEPTH_BYTES`] in front of each reader in [`Chunk`]s; of an expert that is read here and
//! there, all. A chunk is a piece of the model that a thread of ours reads past the page
//! cache into a fixed number of buffers. A request that a chunk holds is answered from its
//! memory; all others are read as they come. So no answer ever depends on what was read ahead.
//!
//! What is in the page cache already, is not read from the disk again. Where the model's own page
//! cache shall keep what was read, the kernel reads ahead, and we do not.

mod buffers;
mod streams;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use self::buffers::Buffer;
use self::streams::Streams;
use crate::model::Model;
use crate::source::{PageCache, ReadError};
use crate::tree::Ino;

/// Threads that read ahead. They wait for the disk; more of them than this did not make one faster
/// that we measured.
const READERS: usize = 4;

/// Reads the files of a model, ahead of those who read them in order if nothing else does.
#[derive(Debug)]
pub struct ReadAhead {
    shared: Arc<Shared>,
    /// How many threads read what is queued.
    readers: OnceLock<usize>,
}

#[derive(Debug)]
struct Shared {
    model: Arc<Model>,
    streams: Mutex<Streams>,
    queue: Mutex<Queue>,
    queued: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    chunks: VecDeque<Arc<Chunk>>,
    closed: bool,
}

/// A piece of one extent of a file, to be read or read already.
#[derive(Debug)]
struct Chunk {
    file: Range<u64>,
    part: u32,
    /// Where in the part to start reading: a multiple of the alignment of direct reads, at or before
    /// the first byte of the piece.
    first: u64,
    /// Bytes in front of the piece.
    skip: usize,
    /// Taken by whoever reads the chunk.
    empty: Mutex<Option<Buffer>>,
    /// `None` if it could not be read; then each request for it finds out why.
    read: OnceLock<Option<Buffer>>,
    /// Bytes that were given out. The kernel asks for each once, unless it has forgotten it.
    used: AtomicU64,
}

impl Chunk {
    /// The bytes of a range of the file that lies in this chunk, read now unless they are there; waits
    /// for another thread that is reading them.
    fn bytes(&self, model: &Model, range: Range<u64>) -> Option<&[u8]> {
        let source = model.source();
        let read = self.read.get_or_init(|| {
            let mut buffer = self.empty.lock().take()?;
            buffer.populate();
            let bytes = self.skip as u64 + (self.file.end - self.file.start);
            let aligned = bytes.next_multiple_of(crate::source::DIRECT_ALIGNMENT) as usize;
            let read = source.read_aligned(self.part, self.first, &mut buffer[..aligned]);
            read.ok().map(|()| buffer)
        });
        // What was read before a part changed is right, but nobody shall see a mixture.
        source.check(self.part).ok()?;
        let len = range.end - range.start;
        self.used.fetch_add(len, Ordering::Relaxed);
        let start = self.skip + (range.start - self.file.start) as usize;
        let bytes = &read.as_deref()?[start..];
        Some(&bytes[..len as usize])
    }

    /// Whether all of it was given out.
    fn is_used_up(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.file.end - self.file.start
    }
}

impl ReadAhead {
    /// For the files of `model`. Threads start with the first sequential reader.
    pub fn new(model: Arc<Model>) -> Self {
        Self {
            shared: Arc::new(Shared {
                model,
                streams: Mutex::default(),
                queue: Mutex::default(),
                queued: Condvar::new(),
            }),
            readers: OnceLock::new(),
        }
    }

    /// Gives `len` bytes of a file from `offset`, fewer only at its end, to `reply`, and then looks
    /// ahead. `space` is memory for an answer that no chunk holds in one piece.
    pub fn read(
        &self,
        file: Ino,
        offset: u64,
        len: u64,
        space: &mut Vec<u8>,
        reply: impl FnOnce(Result<&[u8], ReadError>),
    ) {
        let shared = &*self.shared;
        let size = shared.model.tree().size(file).unwrap_or(0);
        let range = offset.min(size)..offset.saturating_add(len).min(size);
        if shared.model.source().page_cache() == PageCache::Filled {
            return reply(shared.assemble(file, range, &[], space));
        }
        let header = shared.model.tree().extents(file).first();
        let header = header.map_or(0, |extent| extent.len);
        let chunks = shared
            .streams
            .lock()
            .request(file, range.clone(), header, size);
        let whole = match &chunks[..] {
            [chunk] if chunk.file.start <= range.start && range.end <= chunk.file.end => {
                chunk.bytes(&shared.model, range.clone())
            }
            _ => None,
        };
        match whole {
            Some(bytes) => reply(Ok(bytes)),
            None => reply(shared.assemble(file, range.clone(), &chunks, space)),
        }
        drop(chunks);
        let wanted = shared
            .streams
            .lock()
            .look_ahead(&shared.model, file, range.end);
        if wanted.is_empty() {
            return;
        }
        let readers = self.readers.get_or_init(|| start_readers(&self.shared));
        // Without any, requests read their chunks themselves.
        if *readers > 0 {
            let count = wanted.len();
            shared.queue.lock().chunks.extend(wanted);
            (0..count).for_each(|_| {
                shared.queued.notify_one();
            });
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.queued.notify_all();
    }
}

impl Shared {
    /// Puts an answer together from chunks (in order, overlapping the range), and what lies between
    /// them from the model.
    fn assemble<'a>(
        &self,
        file: Ino,
        range: Range<u64>,
        chunks: &[Arc<Chunk>],
        space: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], ReadError> {
        let len = (range.end - range.start) as usize;
        if space.len() < len {
            space.resize(len, 0);
        }
        let mut rest = &mut space[..len];
        let mut at = range.start;
        for chunk in chunks {
            let piece = chunk.file.start.max(at)..chunk.file.end.min(range.end);
            if piece.is_empty() {
                continue;
            }
            let Some(bytes) = chunk.bytes(&self.model, piece.clone()) else {
                continue; // read below, or with what lies before the next chunk
            };
            let (before, after) = rest.split_at_mut((piece.start - at) as usize);
            self.model.read_at(file, at, before)?;
            let (here, after) = after.split_at_mut(bytes.len());
            here.copy_from_slice(bytes);
            rest = after;
            at = piece.end;
        }
        self.model.read_at(file, at, rest)?;
        Ok(&space[..len])
    }

    fn read_queued(&self) {
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
            // Of interest only if somebody else still holds it.
            if Arc::strong_count(&chunk) > 1 {
                let start = chunk.file.start;
                let _ = chunk.bytes(&self.model, start..start);
            }
        }
    }
}

/// Starts the threads that read what is queued; returns how many there are.
fn start_readers(shared: &Arc<Shared>) -> usize {
    let start = |n: &usize| {
        let shared = shared.clone();
        let started = std::thread::Builder::new()
            .name(format!("ahead-{n}"))
            .spawn(move || shared.read_queued());
        started
            .inspect_err(|e| {
                tracing::warn!("a thread for reading ahead cannot be started: {e}");
            })
            .is_ok()
    };
    (0..READERS).filter(start).count()
}
