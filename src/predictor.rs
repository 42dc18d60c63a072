//! What readers will ask for next, in ranges of files.
//!
//! The problem: the kernel asks for a file in small pieces, the next one when the reader is nearly
//! there, so that the disk idles while a piece is copied and passed on. Who reads what must be told
//! from the requests alone: several readers come through several threads, in some disorder; many
//! only look at a header; some map a file and touch it here and there.
//!
//! The plan: a table of the readers seen last. A reader whose second request follows its first one
//! wants what comes next, the farther the more it has read. A small file that many requests touch
//! here and there is wanted whole. Numbers in, numbers out: what of it is worth fetching, and is
//! fetched already, is for others to say.

use std::ops::Range;

#[cfg(test)]
mod tests;

/// How much the kernel asks for at a time unless it is told otherwise: `VM_READAHEAD_PAGES` of
/// Linux's include/linux/mm.h.
const REQUEST_BYTES: u64 = 128 << 10;
/// A look at a header asks for no more than this: one request, or a small one and then a larger one
/// if a program reads a few bytes and then a few more (the kernel's window starts at 16 KiB).
const LOOK_BYTES: u64 = REQUEST_BYTES;
/// How far apart requests of one reader may arrive. Two windows of the kernel are on their way at a
/// time, the one that is waited for and the one behind it; this is twice as much.
const DISORDER_BYTES: u64 = 4 * REQUEST_BYTES;
/// The same for readers whose requests are larger: so many of theirs.
const DISORDER_REQUESTS: u64 = 2;
/// How many times as much as it has read is fetched for a reader: one that stops has cost at most
/// this many times what it wanted.
const GROWTH: u64 = 4;
/// So many requests here and there, and a file will be wanted whole: a program has mapped an expert
/// and computes with it. A program that only looks at the header and at the start of each tensor
/// asks for less: most experts have three tensors, and those with biases six.
const SCATTERED_REQUESTS: usize = 8;
/// How many readers are known at a time; one that is forgotten is taken for a new one. The table is
/// searched for every request: 64 entries of 64 bytes fill one page.
const MAX_STREAMS: usize = 64;
/// How many of them in one file: whoever reads here and there in a large one would fill the table.
const MAX_STREAMS_OF_FILE: usize = MAX_STREAMS / 4;

/// How far it is worth to look ahead; for the source of the bytes to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Bytes in front of a reader.
    pub ahead: u64,
    /// Bytes beyond those, for a source that fetches in pieces and would rather not cut the last.
    pub beyond: u64,
    /// Bytes of the largest file that is wanted whole.
    pub whole: u64,
}

/// What must be known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File {
    /// What tells it from others.
    pub id: u64,
    /// Bytes of its header, which programs look at without wanting the rest.
    pub header: u64,
    /// Bytes of all of it.
    pub size: u64,
}

/// What a reader will ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What tells it from other readers; never used again.
    pub reader: u64,
    /// Nothing more if it is empty.
    pub range: Range<u64>,
    /// How many of its first bytes are worth fetching now.
    pub near: u64,
}

/// The readers that were seen last.
#[derive(Debug)]
pub struct Predictor {
    reach: Reach,
    streams: Vec<Stream>,
    /// Requests so far, the clock of this table.
    now: u64,
    /// Readers so far.
    readers: u64,
}

/// One reader of one file.
#[derive(Debug)]
struct Stream {
    reader: u64,
    file: u64,
    /// Where its first request began.
    start: u64,
    /// Where the next request would begin.
    next: u64,
    /// Requests that went beyond the header, each from where the one before had ended: that others
    /// are near may be chance.
    in_order: u32,
    last_used: u64,
    /// For a file that is wanted whole, to which all requests for it belong: the bytes that they asked
    /// for. The kernel asks for each byte once, unless it has forgotten it.
    whole: Option<u64>,
}

impl Stream {
    /// Whether a request goes on with, or repeats, what this reader asked for last.
    fn goes_on(&self, file: u64, range: &Range<u64>) -> bool {
        let disorder = DISORDER_BYTES.max(DISORDER_REQUESTS * (range.end - range.start));
        let near = range.start >= self.start
            && range.start <= self.next + disorder
            && range.end + disorder >= self.next;
        self.file == file && (near || self.whole.is_some())
    }
}

impl Predictor {
    /// A predictor that knows no reader yet.
    pub fn new(reach: Reach) -> Self {
        Self {
            reach,
            streams: Vec::new(),
            now: 0,
            readers: 0,
        }
    }

    /// Notes a request.
    pub fn note(&mut self, file: File, range: &Range<u64>) {
        self.now += 1;
        let now = self.now;
        // A file that was wanted whole is so no more when others were asked for as much meanwhile.
        let idle = self.reach.whole / REQUEST_BYTES;
        self.streams
            .retain(|s| s.whole.is_none() || s.last_used + idle >= now);
        let counts = u32::from(range.end > file.header);
        let Some(stream) = self.streams.iter_mut().find(|s| s.goes_on(file.id, range)) else {
            self.add(file.id, range.clone(), counts, None);
            self.note_stray(file);
            return;
        };
        stream.last_used = now;
        if let Some(asked) = &mut stream.whole {
            *asked += range.end - range.start;
            return;
        }
        if range.start == stream.next {
            stream.in_order = stream.in_order.saturating_add(counts);
        }
        stream.next = stream.next.max(range.end);
    }

    /// Takes those who ask here and there in a file for one reader that wants the whole of it, unless
    /// somebody reads it in order.
    fn note_stray(&mut self, file: File) {
        let of_file = || self.streams.iter().filter(|s| s.file == file.id);
        let strays = of_file().filter(|s| s.in_order == 1).count();
        let in_order = of_file().any(|s| s.in_order > 2);
        if strays < SCATTERED_REQUESTS || in_order || file.size > self.reach.whole {
            return;
        }
        let asked = of_file().map(|s| s.next - s.start).sum();
        self.streams.retain(|s| s.file != file.id);
        self.add(file.id, file.header..file.header, 0, Some(asked));
    }

    fn add(&mut self, file: u64, range: Range<u64>, in_order: u32, whole: Option<u64>) {
        let stream = Stream {
            reader: self.readers,
            file,
            start: range.start,
            next: range.end,
            in_order,
            last_used: self.now,
            whole,
        };
        self.readers += 1;
        let of_file = |s: &Stream| s.file == file;
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

    /// What the reader wants next whose request, noted before, ended at `end`; `None` if nothing can
    /// be said.
    pub fn wanted(&mut self, file: File, end: u64) -> Option<Wanted> {
        let found =
            |s: &Stream| s.file == file.id && (s.whole.is_some() || s.start < end && end <= s.next);
        let found = self.streams.iter().enumerate().filter(|(_, s)| found(s));
        // Others have been here before.
        let (index, stream) = found.min_by_key(|(_, s)| s.next)?;
        let reader = stream.reader;
        if let Some(asked) = stream.whole {
            let mut range = file.header..file.size;
            if asked >= file.size - file.header {
                // All was asked for. Who comes now is a new reader.
                self.streams.swap_remove(index);
                range.start = range.end;
            }
            let near = range.end - range.start;
            return Some(Wanted {
                reader,
                range,
                near,
            });
        }
        let read = stream.next - stream.start;
        if stream.in_order < 2 || read <= LOOK_BYTES {
            return None;
        }
        // Another reader of the same file, such as another thread of one loader, reads the rest.
        let others = self.streams.iter().filter(|s| s.file == file.id);
        let others = others.filter(|s| s.start >= end).map(|s| s.start);
        let limit = others.min().unwrap_or(file.size);
        let near = self.reach.ahead.min(GROWTH * read);
        let end = limit.min(stream.next + near + self.reach.beyond);
        Some(Wanted {
            reader,
            range: stream.next..end.max(stream.next),
            near,
        })
    }
}
