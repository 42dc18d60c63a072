//! Scales and biases that were computed together with another array of their tensor.
//!
//! The problem: programs read the arrays of a tensor one after the other, or side by side in any
//! order, and all of them come from the same blocks. Blocks are too large to be kept until the last
//! array was read; scales and biases are a fifth of them and less.
//!
//! The plan: keep the small arrays of the tensors that are being read, in a bounded amount of
//! memory, and forget each of their bytes' owners once as much as all of an array was given out: the
//! kernel keeps what it was given. Where the memory is full, what does not fit is not kept and will
//! be computed from blocks that are read again.

use std::ops::Range;

use parking_lot::Mutex;

use super::{Job, Small};

/// Bytes of all arrays that are kept: with the buffers of `source::fetch`, three quarters of the 64
/// MiB that a daemon may use.
const STASH_BYTES: usize = 16 << 20;
/// Tensors that are known at a time; one that was forgotten counts as not read yet. As many as are
/// read at a time by many readers, three matrices for each.
const MAX_TENSORS: usize = 256;
/// How far beyond what is kept of an array a range may begin: requests of one reader arrive somewhat
/// out of order, but nobody reads on from a place far away.
const MAX_GAP_BYTES: usize = 1 << 20;
/// A tensor of which nothing was asked for during this many requests for others may lose its arrays.
const IDLE_REQUESTS: u64 = 4096;

/// What is kept of the tensors of a model.
#[derive(Debug, Default)]
pub struct Stash(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    tensors: Vec<Tensor>,
    /// Bytes of all arrays that are kept.
    bytes: usize,
    /// Requests so far.
    now: u64,
}

#[derive(Debug)]
struct Tensor {
    id: u32,
    last_used: u64,
    /// How many bytes of the first array were given to readers.
    given: u64,
    small: [Kept; 2],
}

/// What is kept of an array.
#[derive(Debug, Default)]
struct Kept {
    /// From the start of the array on.
    bytes: Vec<u8>,
    /// The ranges of it that were computed, in order and apart from each other.
    filled: Vec<Range<usize>>,
    /// How many bytes were given to readers.
    given: u64,
}

impl Stash {
    /// Gives out what is here of a range of an array; returns what is missing of it, as ranges of
    /// `out` in order.
    pub fn give(&self, job: &Job, offset: u64, out: &mut [u8]) -> Vec<Range<usize>> {
        let start = offset as usize;
        let range = start..start + out.len();
        let mut missing = vec![range.clone()];
        if let Some(n) = job.array.checked_sub(1)
            && let Some(kept) = self.0.lock().kept(job.tensor, n)
        {
            missing = kept.missing(&range);
            let mut at = range.start;
            for gap in missing.iter().chain([&(range.end..range.end)]) {
                if at < gap.start {
                    out[at - start..gap.start - start].copy_from_slice(&kept.bytes[at..gap.start]);
                }
                at = gap.end;
            }
        }
        let in_out = |gap: Range<usize>| gap.start - start..gap.end - start;
        missing.into_iter().map(in_out).collect()
    }

    /// What is missing here of a range of a small array.
    pub fn missing(&self, tensor: u32, n: usize, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut inner = self.0.lock();
        let Some(kept) = inner.kept(tensor, n) else {
            return vec![range.clone()];
        };
        let missing = kept.missing(&(range.start as usize..range.end as usize));
        let wide = |gap: Range<usize>| gap.start as u64..gap.end as u64;
        missing.into_iter().map(wide).collect()
    }

    /// Whether a range of a small array, whose length in bytes is `all`, is worth keeping: not if it
    /// is here, or if all of the array was given out.
    pub fn wants(&self, tensor: u32, n: usize, all: u64, range: &Range<u64>) -> bool {
        let mut inner = self.0.lock();
        let range = range.start as usize..range.end as usize;
        let kept = inner.kept(tensor, n);
        kept.is_none_or(|kept| kept.given < all && !kept.has(&range))
    }

    /// Keeps a range of a small array, if there is room for it; returns whether there is.
    pub fn put(&self, tensor: u32, n: usize, start: u64, computed: &[u8]) -> bool {
        let mut inner = self.0.lock();
        inner.add(tensor);
        let start = start as usize;
        let end = start + computed.len();
        let held = inner.kept(tensor, n).map_or(0, |kept| kept.bytes.len());
        let more = end.saturating_sub(held);
        if start > held + MAX_GAP_BYTES {
            return false;
        }
        if more > 0 && inner.bytes + more > STASH_BYTES {
            inner.forget_idle();
            if inner.bytes + more > STASH_BYTES {
                return false;
            }
        }
        inner.bytes += more;
        let Some(kept) = inner.kept(tensor, n) else {
            return false;
        };
        if more > 0 {
            kept.bytes.reserve(more);
            kept.bytes.resize(end, 0);
        }
        kept.bytes[start..end].copy_from_slice(computed);
        kept.fill(start..end);
        true
    }

    /// Notes that bytes of an array were given to a reader.
    pub fn gave(&self, job: &Job, bytes: u64) {
        if job.small.iter().all(Option::is_none) {
            return;
        }
        let mut inner = self.0.lock();
        inner.add(job.tensor);
        let inner = &mut *inner;
        let Some(at) = inner
            .tensors
            .iter()
            .position(|known| known.id == job.tensor)
        else {
            return;
        };
        let tensor = &mut inner.tensors[at];
        match job.array.checked_sub(1) {
            None => tensor.given += bytes,
            Some(n) => {
                let kept = &mut tensor.small[n];
                kept.given += bytes;
                if kept.is_given(job.small[n]) {
                    inner.bytes -= std::mem::take(&mut kept.bytes).len();
                    kept.filled.clear();
                }
            }
        }
        // Whoever reads it again is like the first reader.
        if tensor.is_given(job) {
            inner.bytes -= tensor.bytes();
            inner.tensors.swap_remove(at);
        }
    }
}

impl Inner {
    fn kept(&mut self, tensor: u32, n: usize) -> Option<&mut Kept> {
        self.now += 1;
        let found = self.tensors.iter_mut().find(|known| known.id == tensor)?;
        found.last_used = self.now;
        Some(&mut found.small[n])
    }

    /// Adds a tensor unless it is known. If there are too many, that forgets the one which was not
    /// asked for the longest.
    fn add(&mut self, tensor: u32) {
        if self.tensors.iter().any(|known| known.id == tensor) {
            return;
        }
        if self.tensors.len() >= MAX_TENSORS {
            let all = self.tensors.iter().enumerate();
            if let Some((oldest, _)) = all.min_by_key(|(_, known)| known.last_used) {
                let forgotten = self.tensors.swap_remove(oldest);
                self.bytes -= forgotten.bytes();
            }
        }
        self.tensors.push(Tensor {
            id: tensor,
            last_used: self.now,
            given: 0,
            small: Default::default(),
        });
    }

    /// Forgets the tensors of which nothing was asked for since long.
    fn forget_idle(&mut self) {
        let now = self.now;
        let bytes = &mut self.bytes;
        self.tensors.retain(|known| {
            let is_idle = known.last_used + IDLE_REQUESTS < now;
            if is_idle {
                *bytes -= known.bytes();
            }
            !is_idle
        });
    }
}

impl Tensor {
    /// Whether as much as all of its arrays was given to readers.
    fn is_given(&self, job: &Job) -> bool {
        let mut pairs = self.small.iter().zip(job.small);
        self.given >= job.largest && pairs.all(|(kept, small)| kept.is_given(small))
    }

    fn bytes(&self) -> usize {
        self.small.iter().map(|kept| kept.bytes.len()).sum()
    }
}

impl Kept {
    /// Whether as much as all of the array was given to readers.
    fn is_given(&self, small: Option<Small>) -> bool {
        small.is_none_or(|small| self.given >= small.bytes)
    }

    fn has(&self, range: &Range<usize>) -> bool {
        self.missing(range).is_empty()
    }

    /// What of a range was not computed, in order.
    fn missing(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        for filled in &self.filled {
            let gap = at..filled.start.min(range.end);
            if !gap.is_empty() {
                missing.push(gap);
            }
            at = at.max(filled.end);
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }

    /// Adds a range to those that were computed, and joins it with those that it touches.
    fn fill(&mut self, range: Range<usize>) {
        let mut whole = range;
        self.filled.retain(|filled| {
            let touches = filled.start <= whole.end && whole.start <= filled.end;
            if touches {
                whole = filled.start.min(whole.start)..filled.end.max(whole.end);
            }
            !touches
        });
        let place = self
            .filled
            .partition_point(|filled| filled.start < whole.start);
        self.filled.insert(place, whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Codec, Float, Map, Output};
    use crate::gguf::GgmlType;

    fn job(tensor: u32, array: usize, bytes: u64) -> Job {
        let q4_k = GgmlType::from_name("Q4_K").unwrap();
        let codec = |output| Codec::of(q4_k, output).unwrap();
        let small = |output| {
            Some(Small {
                codec: codec(output),
                bytes,
            })
        };
        Job {
            tensor,
            array,
            codec: codec(Output::Weight(Map::Exact)),
            largest: 8 * bytes,
            small: [
                small(Output::Scales(Map::Exact, Float::F16)),
                small(Output::Biases(Map::Exact, Float::F16)),
            ],
        }
    }

    fn has(stash: &Stash, tensor: u32, n: usize, range: &Range<u64>) -> bool {
        stash.missing(tensor, n, range).is_empty()
    }

    /// One gap; an array of one range would look like a mistake.
    fn gap(range: Range<usize>) -> Vec<Range<usize>> {
        vec![range; 1]
    }

    #[test]
    fn what_was_computed_is_given_out_and_forgotten_once_all_of_it_was() {
        let stash = Stash::default();
        let scales = job(7, 1, 100);
        let mut out = [0; 40];
        assert_eq!(stash.give(&scales, 0, &mut out), gap(0..40));
        assert!(stash.wants(7, 0, 100, &(0..60)));
        assert!(stash.put(7, 0, 40, &[2; 60]));
        assert_eq!(stash.give(&scales, 0, &mut out), gap(0..40));
        assert_eq!(stash.give(&scales, 20, &mut out), gap(0..20));
        assert_eq!(out[20..], [2; 20]);
        assert_eq!(stash.missing(7, 0, &(10..110)), [10..40, 100..110]);
        assert_eq!(stash.give(&scales, 90, &mut out), gap(10..40));
        assert_eq!(stash.give(&scales, 120, &mut out), gap(0..40));
        assert!(stash.put(7, 0, 0, &[1; 50]));
        assert!(!stash.wants(7, 0, 100, &(0..100)));
        assert_eq!(stash.give(&scales, 20, &mut out), []);
        stash.gave(&scales, 40);
        assert_eq!((&out[..30], &out[30..]), (&[1; 30][..], &[2; 10][..]));
        assert_eq!(stash.give(&scales, 60, &mut out), []);
        stash.gave(&scales, 40);
        assert_eq!(stash.0.lock().bytes, 100);
        stash.gave(&scales, 20);
        assert_eq!(stash.0.lock().bytes, 0);
        assert!(!has(&stash, 7, 0, &(0..1)));
        // It was given out, so it need not be computed beside another array again.
        assert!(!stash.wants(7, 0, 100, &(0..100)));
        assert!(stash.wants(7, 1, 100, &(0..100)));
        // Once all arrays were, the next reader is like the first one.
        stash.gave(&job(7, 0, 100), 800);
        assert!(!stash.wants(7, 0, 100, &(0..100)));
        stash.gave(&job(7, 2, 100), 100);
        assert!(stash.wants(7, 0, 100, &(0..100)));
        assert_eq!(stash.0.lock().bytes, 0);
    }

    #[test]
    fn memory_is_bounded_and_what_does_not_fit_is_not_kept() {
        let stash = Stash::default();
        let piece = vec![0; STASH_BYTES / 4];
        assert!(!stash.put(8, 0, 2 * MAX_GAP_BYTES as u64, &[1]));
        for n in 0..4 {
            assert!(stash.put(n, 0, 0, &piece));
        }
        assert!(!stash.put(9, 0, 0, &piece));
        assert!(!has(&stash, 9, 0, &(0..1)));
        assert!(has(&stash, 0, 0, &(0..1)));
        // What nobody has asked for since long makes room.
        for _ in 0..IDLE_REQUESTS {
            assert!(has(&stash, 3, 0, &(0..1)));
        }
        assert!(stash.put(9, 0, 0, &piece));
        assert!(has(&stash, 9, 0, &(0..1)) && has(&stash, 3, 0, &(0..1)));
        assert!(!has(&stash, 0, 0, &(0..1)));
        assert!(stash.0.lock().bytes <= STASH_BYTES);
    }

    #[test]
    fn of_many_tensors_the_latest_are_known() {
        let stash = Stash::default();
        for n in 0..3 * MAX_TENSORS as u32 {
            assert!(stash.put(n, 1, 0, &[1; 10]));
            assert_eq!(stash.0.lock().bytes, 10 * (n as usize + 1).min(MAX_TENSORS));
        }
        assert!(!has(&stash, 0, 1, &(0..1)));
    }

    #[test]
    fn ranges_that_touch_become_one() {
        let mut kept = Kept::default();
        for range in [10..20, 40..50, 20..30, 0..5, 5..10] {
            kept.fill(range);
        }
        assert_eq!(kept.filled, [0..30, 40..50]);
        kept.fill(25..45);
        assert_eq!((kept.filled.len(), &kept.filled[0]), (1, &(0..50)));
    }
}
