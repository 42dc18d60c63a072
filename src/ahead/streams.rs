//! Who reads what in order, and what to read next for each.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::Chunk;
use super::buffers::{BUFFER_BYTES, BUFFERS, Buffer};
use crate::model::Model;
use crate::source::DIRECT_ALIGNMENT;
use crate::tree::{Ino, Origin, Slice};

/// How far to read in front of a reader.
pub const DEPTH_BYTES: u64 = 4 << 20;
/// The first chunk of a stream is small, so that its reader waits little; the next ones grow.
const FIRST_CHUNK_BYTES: u64 = 256 << 10;
/// A look at a header reads no more than this: at once, or a few bytes after a few bytes, for which
/// the kernel sends one request and then a larger one.
const LOOK_BYTES: u64 = 128 << 10;
/// How far apart requests of one reader may arrive, since several threads take them.
const DISORDER_BYTES: u64 = 512 << 10;
/// How many readers are known at a time. One that is forgotten is taken for a new one.
const MAX_STREAMS: usize = 64;
/// How many of them in one file: no more can have two buffers each. One who reads here and there
/// would fill the table.
const MAX_STREAMS_OF_FILE: usize = BUFFERS / 2;
/// So many requests here and there in a file, and it will be wanted whole: a program has mapped an
/// expert and computes with it.
const SCATTERED_REQUESTS: usize = 8;
/// The largest file that is read whole for that: all buffers hold it.
const WHOLE_FILE_BYTES: u64 = (BUFFERS * BUFFER_BYTES) as u64;
/// A stream that asked for nothing during so many requests of others may lose its chunks.
const IDLE_REQUESTS: u64 = 256;

/// The readers that were seen last.
#[derive(Debug, Default)]
pub struct Streams {
    streams: Vec<Stream>,
    /// Requests so far, the clock of this table.
    now: u64,
}

/// One reader of one file.
#[derive(Debug)]
struct Stream {
    file: Ino,
    /// Where its first request began.
    start: u64,
    /// Where the next request would begin.
    next: u64,
    /// Requests that went beyond the header, each from where the one before had ended: that others
    /// are near may be chance.
    in_order: u32,
    /// Up to here all was read or is being read.
    ahead: u64,
    chunks: VecDeque<Arc<Chunk>>,
    last_used: u64,
    /// Reads here and there: all requests for the file are its, and it never gets on.
    whole: bool,
}

impl Stream {
    /// Whether a request goes on with, or repeats, what this reader asked for last.
    fn goes_on(&self, file: Ino, range: &Range<u64>) -> bool {
        let disorder = DISORDER_BYTES.max(2 * (range.end - range.start));
        let near = range.start >= self.start
            && range.start <= self.next + disorder
            && range.end + disorder >= self.next;
        self.file == file && (near || self.whole)
    }

    /// Forgets chunks of which nothing more will be asked for.
    fn drop_used(&mut self) {
        let passed = self.next.saturating_sub(DISORDER_BYTES);
        self.chunks
            .retain(|chunk| chunk.file.end > passed && !chunk.is_used_up());
    }
}

impl Streams {
    /// Notes a request, and returns the chunks that hold some of it, in order. `header` and `size` are
    /// the bytes of the file's header and of all of it.
    pub fn request(
        &mut self,
        file: Ino,
        range: Range<u64>,
        header: u64,
        size: u64,
    ) -> Vec<Arc<Chunk>> {
        self.now += 1;
        let counts = u32::from(range.end > header);
        let Some(stream) = self.streams.iter_mut().find(|s| s.goes_on(file, &range)) else {
            self.add(Stream {
                file,
                start: range.start,
                next: range.end,
                in_order: counts,
                ahead: range.end,
                chunks: VecDeque::new(),
                last_used: self.now,
                whole: false,
            });
            self.note_stray(file, header, size);
            return Vec::new();
        };
        stream.last_used = self.now;
        if !stream.whole {
            if range.start == stream.next {
                stream.in_order = stream.in_order.saturating_add(counts);
            }
            stream.next = stream.next.max(range.end);
        }
        let holding = stream
            .chunks
            .iter()
            .filter(|chunk| chunk.file.start < range.end && range.start < chunk.file.end);
        let holding = holding.cloned().collect();
        stream.drop_used();
        holding
    }

    /// Takes those who ask here and there in a file for one reader that wants the whole of it, unless
    /// somebody reads it in order.
    fn note_stray(&mut self, file: Ino, header: u64, size: u64) {
        let of_file = || self.streams.iter().filter(|s| s.file == file);
        let strays = of_file().filter(|s| s.in_order == 1).count();
        let in_order = of_file().any(|s| s.in_order > 2);
        if strays < SCATTERED_REQUESTS || in_order || size > WHOLE_FILE_BYTES {
            return;
        }
        self.streams.retain(|s| s.file != file);
        self.add(Stream {
            file,
            start: header,
            next: header,
            in_order: 0,
            ahead: header,
            chunks: VecDeque::new(),
            last_used: self.now,
            whole: true,
        });
    }

    fn add(&mut self, stream: Stream) {
        let of_file = |s: &Stream| s.file == stream.file;
        let crowded = self.streams.iter().filter(|s| of_file(s)).count() >= MAX_STREAMS_OF_FILE;
        if !crowded && self.streams.len() < MAX_STREAMS {
            self.streams.push(stream);
            return;
        }
        let all = self.streams.iter_mut();
        let replaceable = all.filter(|s| !crowded || of_file(s));
        if let Some(oldest) = replaceable.min_by_key(|s| s.last_used) {
            *oldest = stream;
        }
    }

    /// What to read next for the reader whose request, just answered, ended at `end`.
    pub fn look_ahead(&mut self, model: &Model, file: Ino, end: u64) -> Vec<Arc<Chunk>> {
        let mut wanted = Vec::new();
        let found = |s: &Stream| s.file == file && (s.whole || s.start < end && end <= s.next);
        let found = self.streams.iter().enumerate().filter(|(_, s)| found(s));
        // Others have been here before.
        let Some((index, stream)) = found.min_by_key(|(_, s)| s.next) else {
            return wanted;
        };
        let only_looks = stream.in_order < 2 || stream.next - stream.start <= LOOK_BYTES;
        if only_looks && !stream.whole {
            return wanted;
        }
        // Another reader of the same file, such as another thread of one loader, reads the rest.
        let others = self
            .streams
            .iter()
            .filter(|s| s.file == file && s.start >= end);
        let size = model.tree().size(file).unwrap_or(0);
        let limit = others.map(|s| s.start).min().unwrap_or(size);
        let stream = &mut self.streams[index];
        stream.drop_used();
        if stream.next >= size {
            stream.chunks.clear();
        }
        if stream.whole && stream.ahead >= size && stream.chunks.is_empty() {
            // All was given out. Who comes now is a new reader.
            self.streams.swap_remove(index);
            return wanted;
        }
        let active = self.streams.iter().filter(|s| !s.chunks.is_empty()).count();
        let share = (BUFFERS / active.max(1)).max(2);
        let stream = &self.streams[index];
        // Farther the more was read, so that who stops soon costs little.
        let depth = match stream.whole {
            true => size,
            false => DEPTH_BYTES.min(4 * (stream.next - stream.start)),
        };
        let target = (stream.next + depth).min(limit);
        loop {
            let stream = &self.streams[index];
            let start = stream.ahead.max(stream.next);
            if start >= target || stream.chunks.len() >= share {
                return wanted;
            }
            let held = stream.chunks.len();
            let grown = (start - stream.start).max(FIRST_CHUNK_BYTES);
            let longest = limit - start;
            let Some(slice) = model.tree().slices(file, start, longest).next() else {
                return wanted;
            };
            let (end, chunk) = match slice.origin {
                Origin::Made(_) => (start + slice.len, None),
                Origin::Part(part) => {
                    if Buffer::are_all_taken() {
                        self.make_room(file, held);
                    }
                    let Some((end, chunk)) = chunk(model, part, start, slice, grown) else {
                        return wanted;
                    };
                    (end, chunk)
                }
            };
            let stream = &mut self.streams[index];
            stream.ahead = end;
            if let Some(chunk) = chunk {
                stream.chunks.push_back(chunk.clone());
                wanted.push(chunk);
            }
        }
    }

    /// Takes chunks from readers that seem to have stopped, else the one that is needed last from the
    /// reader with the most, if it has more than the one who needs it, which holds `held`.
    fn make_room(&mut self, file: Ino, held: usize) {
        let now = self.now;
        let is_idle = |s: &Stream| s.last_used + IDLE_REQUESTS < now;
        for stream in self.streams.iter_mut().filter(|s| is_idle(s)) {
            stream.ahead = stream.next;
            stream.chunks.clear();
        }
        let others = self.streams.iter_mut().filter(|s| s.file != file);
        if Buffer::are_all_taken()
            && let Some(richest) = others.max_by_key(|s| s.chunks.len())
            && richest.chunks.len() > held + 1
            && let Some(last) = richest.chunks.pop_back()
        {
            richest.ahead = last.file.start;
        }
    }
}

/// The chunk of a slice's first bytes, about `about` of them, and where in the file it ends; no chunk
/// if they are in the page cache or each read would open the part anew, and nothing if all buffers
/// are in use.
fn chunk(
    model: &Model,
    part: u32,
    start: u64,
    slice: Slice,
    about: u64,
) -> Option<(u64, Option<Arc<Chunk>>)> {
    let first = slice.offset - slice.offset % DIRECT_ALIGNMENT;
    let skip = slice.offset - first;
    let span = about.next_power_of_two().min(BUFFER_BYTES as u64);
    // Chunks end where a direct read may end, so that no page is read twice.
    let len = (span - skip).min(slice.len);
    let end = start + len;
    let source = model.source();
    if !source.is_kept_open(part) {
        return Some((end, None));
    }
    let buffer = Buffer::take()?;
    if source.is_cached(part, slice.offset, len) {
        return Some((end, None));
    }
    let chunk = Chunk {
        file: start..end,
        part,
        first,
        skip: skip as usize,
        empty: Mutex::new(Some(buffer)),
        read: OnceLock::new(),
        used: AtomicU64::new(0),
    };
    Some((end, Some(Arc::new(chunk))))
}
