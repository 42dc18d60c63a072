//! What readers will ask for next, in ranges of files.
//!
//! The problem: the kernel asks for a file in small pieces, and for the next one only when the
//! reader is nearly there, so the disk idles while a piece is copied and passed on. Only the
//! requests show who reads what: several readers come through several threads, somewhat out of
//! order; many only look at a header; some map a file and touch it here and there.
//!
//! The plan: a table of the most recent readers. A reader whose second request follows its first
//! wants what comes next, and the more of it the more it has read. A small file with many scattered
//! requests is wanted whole. Numbers in, numbers out: whether a range is worth fetching, or was
//! fetched before, is decided elsewhere.

use std::ops::Range;

#[cfg(test)]
mod tests;

/// How much the kernel asks for at a time unless it is told otherwise: `VM_READAHEAD_PAGES` of
/// Linux's include/linux/mm.h.
const REQUEST_BYTES: u64 = 128 << 10;
/// A look at a header asks for no more than this: one request, or a small one and then a larger one
/// if a program reads a few bytes and then a few more (the kernel's window starts at 16 KiB).
const LOOK_BYTES: u64 = REQUEST_BYTES;
/// How far apart the requests of one reader may arrive. Two windows of the kernel are under way at
/// a time: the one being waited for and the one after it. This is twice as much.
const DISORDER_BYTES: u64 = 4 * REQUEST_BYTES;
/// The same for readers with larger requests, as a number of these.
const DISORDER_REQUESTS: u64 = 2;
/// How many times what it has read is fetched for a reader: one that stops early has cost at most
/// this many times what it wanted, unless it stops in the middle of a tensor that a server has.
const GROWTH: u64 = 4;
/// A look at a longer header takes several requests of the kernel, of which two may reach beyond it.
const LONG_HEADER_BYTES: u64 = 32 << 10;
/// After this many scattered requests a file is wanted whole: a program has mapped an expert and
/// computes with it. Looking at the header and at the start of each tensor takes fewer: most
/// experts have three tensors, and those with biases six.
const SCATTERED_REQUESTS: usize = 8;
/// With this many readers at different places a file is wanted whole whose places are made from the
/// same bytes: a program loads its arrays side by side.
const SHARING_READERS: usize = 2;
/// How many readers are known at a time; one that was forgotten counts as new. The table is
/// searched for every request: 64 entries of 64 bytes fill one page.
const MAX_STREAMS: usize = 64;
/// How many of them in one file: scattered reads of a large file would fill the table.
const MAX_STREAMS_OF_FILE: usize = MAX_STREAMS / 4;

/// How far to look ahead, in bytes of the model. Their source knows what is worth while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Bytes in front of a reader.
    pub ahead: u64,
    /// Bytes beyond those, so that a source that fetches in pieces need not cut the last one.
    pub beyond: u64,
    /// What is made from no more bytes than this may be wanted whole.
    pub whole: u64,
    /// Whether it is, as soon as a reader goes on after its first request; of a larger file, the rest
    /// of the slice that is being read.
    pub is_eager: bool,
}

/// What must be known about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File {
    /// Identifies the file.
    pub id: u64,
    /// Bytes of its header, which many programs read without wanting the rest.
    pub header: u64,
    /// Bytes of all of it.
    pub size: u64,
    /// Bytes of the model that it is made from, which are what is fetched.
    pub source: u64,
    /// Whether different places of it are made from the same bytes of the model.
    pub shares: bool,
}

impl File {
    /// About how many bytes of the model this many bytes of the file are made from.
    fn to_source(self, bytes: u64) -> u64 {
        self.scaled(bytes, self.source, self.size - self.header)
    }

    /// About how many bytes of the file are made from this many bytes of the model.
    fn of_source(self, bytes: u64) -> u64 {
        self.scaled(bytes, self.size - self.header, self.source)
    }

    fn scaled(self, bytes: u64, to: u64, from: u64) -> u64 {
        if to == from || from == 0 {
            return bytes;
        }
        let scaled = u128::from(bytes) * u128::from(to) / u128::from(from);
        scaled.try_into().unwrap_or(u64::MAX)
    }
}

/// The reader of a whole file: all who read some of it together. Far from the numbers of others,
/// which count from 0.
pub fn reader_of_whole(file: u64) -> u64 {
    u64::MAX - file
}

/// What a reader will ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Identifies the reader: a number that is never used again, or that of the [whole
    /// file](reader_of_whole).
    pub reader: u64,
    /// Empty if it wants nothing more.
    pub range: Range<u64>,
    /// How many bytes of the model are worth fetching now, from those of the start of the range on.
    pub near: u64,
    /// The same, of a source that is not eager.
    pub from_disk: u64,
}

/// The most recent readers.
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
    /// Bytes of the last request.
    asked: u64,
    /// Where the slice of a tensor ends that the first request ended in, once that matters.
    first_slice_end: Option<u64>,
    /// Requests beyond the header that began where the one before had ended. That others are merely
    /// near may be chance.
    in_order: u32,
    last_used: u64,
    /// `Some` if the file is wanted whole; then this stream gets all requests for the file, and
    /// this is how many bytes they asked for. The kernel asks for each byte once, unless it has
    /// dropped the page.
    whole: Option<u64>,
}

impl Stream {
    /// Whether a request continues or repeats what this reader asked for last.
    fn goes_on(&self, file: u64, range: &Range<u64>) -> bool {
        let disorder = DISORDER_BYTES.max(DISORDER_REQUESTS * (range.end - range.start));
        let near = range.start >= self.start
            && range.start <= self.next + disorder
            && range.end + disorder >= self.next;
        self.file == file && (near || self.whole.is_some())
    }
}

impl Predictor {
    /// Knows no reader yet.
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
        // A whole file is no longer wanted once as much was asked of other files meanwhile.
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
        stream.asked = range.end - range.start;
    }

    /// Turns the readers of scattered pieces of a file into one that wants the whole file, unless
    /// somebody reads it in order.
    fn note_stray(&mut self, file: File) {
        let of_file = || self.streams.iter().filter(|s| s.file == file.id);
        let strays = of_file().filter(|s| s.in_order == 1).count();
        let in_order = of_file().any(|s| s.in_order > 2);
        let is_scattered = strays >= SCATTERED_REQUESTS && !in_order;
        let in_payload = of_file().filter(|s| s.in_order > 0).count();
        let is_shared = file.shares && in_payload >= SHARING_READERS;
        if !(is_scattered || is_shared) || file.source > self.reach.whole {
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
            asked: range.end - range.start,
            first_slice_end: None,
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

    /// What a reader wants next after its request that ended at `end`, which must have been noted.
    /// `slice` tells where the slice of a tensor lies that the request ended in. `None` if nothing can
    /// be predicted.
    pub fn wanted(
        &mut self,
        file: File,
        end: u64,
        slice: impl FnOnce() -> Range<u64>,
    ) -> Option<Wanted> {
        let found =
            |s: &Stream| s.file == file.id && (s.whole.is_some() || s.start < end && end <= s.next);
        let found = self.streams.iter().enumerate().filter(|(_, s)| found(s));
        // Of several, the one that is here now; the others have passed.
        let (index, _) = found.min_by_key(|(_, s)| s.next)?;
        let by_slices = self.reach.is_eager && file.source > self.reach.whole;
        let slice = by_slices.then(slice);
        if let Some(slice) = &slice {
            let first_end = &mut self.streams[index].first_slice_end;
            first_end.get_or_insert(slice.end);
        }
        let stream = &self.streams[index];
        let reader = stream.reader;
        if let Some(asked) = stream.whole {
            let mut range = file.header..file.size;
            if asked >= file.size - file.header {
                // All of it was asked for. Further requests are a new reader's.
                self.streams.swap_remove(index);
                range.start = range.end;
            }
            let near = file.to_source(range.end - range.start);
            return Some(Wanted {
                reader: reader_of_whole(file.id),
                range,
                near,
                from_disk: near,
            });
        }
        let read = stream.next - stream.start;
        if stream.in_order < 2 || read <= LOOK_BYTES {
            return None;
        }
        // Another reader of the same file, perhaps another thread of one loader, reads the rest.
        let others = self.streams.iter().filter(|s| s.file == file.id);
        let others = others.filter(|s| s.start >= end).map(|s| s.start);
        let mut limit = others.min().unwrap_or(file.size);
        let from_disk = GROWTH * file.to_source(read);
        let mut near = from_disk;
        if let Some(slice) = slice {
            // Programs read tensor by tensor. One that began with the header, or has gone on from one
            // tensor to another, will go on; the kernel reads a little before and behind each.
            let first_end = stream.first_slice_end.unwrap_or(slice.end);
            let window = DISORDER_BYTES.max(DISORDER_REQUESTS * stream.asked);
            let goes_on = stream.start < file.header || stream.next > first_end + window;
            if !goes_on {
                limit = limit.min(first_end.max(stream.next));
            }
            // Whoever began within a tensor may want only some of it, or of its header only that.
            let is_look = stream.start < file.header
                && file.header > LONG_HEADER_BYTES
                && stream.next <= file.header + 3 * REQUEST_BYTES;
            let is_first = slice.end == first_end;
            let is_all = !is_first || stream.start < slice.start + REQUEST_BYTES;
            if is_all && !is_look {
                near = near.max(file.to_source(slice.end.saturating_sub(stream.next)));
            }
        } else if self.reach.is_eager {
            near = self.reach.ahead;
        }
        let near = near.min(self.reach.ahead);
        let ahead = file.of_source(near + self.reach.beyond);
        let end = limit.min(stream.next.saturating_add(ahead));
        Some(Wanted {
            reader,
            range: stream.next..end.max(stream.next),
            near,
            from_disk: from_disk.min(near),
        })
    }
}
