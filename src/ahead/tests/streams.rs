//! What is read ahead after which requests, though nobody reads it.

use super::*;
use crate::ahead::streams::{DEPTH_BYTES, Streams};

/// Requests, and what is to be read ahead after each.
struct Asked {
    streams: Streams,
    sample: Sample,
}

impl Asked {
    fn of(kind: Kind) -> Self {
        Self {
            sample: kind.make(),
            streams: Streams::default(),
        }
    }

    fn ask(&mut self, file: Ino, offset: u64, len: u64) -> Vec<Range<u64>> {
        let model = &self.sample.model;
        let header = self.sample.header(file);
        let size = self.sample.size(file);
        let end = (offset + len).min(size);
        self.streams.request(file, offset..end, header, size);
        let wanted = self.streams.look_ahead(model, file, end);
        wanted.iter().map(|chunk| chunk.file.clone()).collect()
    }
}

/// The range that is made up of ranges, which must meet.
fn joined(ranges: &[Range<u64>]) -> Range<u64> {
    assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
    ranges[0].start..ranges.last().unwrap().end
}

#[test]
fn looks_at_headers_read_nothing_ahead() {
    let mut asked = Asked::of(Kind::sparse(100, 1000));
    for file in asked.sample.experts() {
        assert_eq!(asked.ask(file, 0, REQUEST_BYTES), []);
    }
    // As programs do that read a few bytes, then a few more, and so see the kernel's window grow.
    for file in asked.sample.experts() {
        assert_eq!(asked.ask(file, 0, 16 * KIB), []);
        assert_eq!(asked.ask(file, 16 * KIB, 32 * KIB), []);
    }
}

#[test]
fn the_second_request_in_order_reads_ahead_and_the_next_ones_keep_the_distance() {
    let mut asked = Asked::of(Kind::sparse(1, 3000));
    let file = asked.sample.experts()[0];
    assert_eq!(asked.ask(file, 0, REQUEST_BYTES), []);
    let first = asked.ask(file, REQUEST_BYTES, REQUEST_BYTES);
    let mut ahead = joined(&first);
    assert_eq!(ahead.start, 2 * REQUEST_BYTES);
    for n in 2..100 {
        let next = (n + 1) * REQUEST_BYTES;
        let wanted = asked.ask(file, n * REQUEST_BYTES, REQUEST_BYTES);
        if !wanted.is_empty() {
            ahead = joined(&[ahead, joined(&wanted)]);
        }
        let depth = DEPTH_BYTES.min(4 * next);
        assert!(ahead.end >= next + depth, "after request {n}");
        assert!(ahead.end < next + depth + MIB, "after request {n}");
    }
}

#[test]
fn scattered_requests_in_a_large_file_read_next_to_nothing_ahead() {
    let mut asked = Asked::of(Kind::sparse(1, 12_000));
    let file = asked.sample.experts()[0];
    let pages = asked.sample.size(file) / 4096 - 32;
    let by_chance = (0..1000).filter(|&n| {
        let offset = scramble(0, n) % pages * 4096;
        !asked.ask(file, offset, REQUEST_BYTES).is_empty()
    });
    // Now and then one begins where another has ended.
    assert!(by_chance.count() <= 3);
}

#[test]
fn scattered_requests_in_an_expert_read_all_of_it_ahead_and_none_of_it_twice() {
    let mut asked = Asked::of(Kind::sparse(1, 600));
    let file = asked.sample.experts()[0];
    let (size, header) = (asked.sample.size(file), asked.sample.header(file));
    for n in [3, 7, 1, 5, 0, 6, 2] {
        assert_eq!(asked.ask(file, n * 700 * KIB, REQUEST_BYTES), []);
    }
    let wanted = asked.ask(file, 4 * 700 * KIB, REQUEST_BYTES);
    assert_eq!(joined(&wanted), header..size);
    for n in 0..size / MIB {
        assert_eq!(asked.ask(file, n * MIB, REQUEST_BYTES), []);
    }
}

#[test]
fn an_expert_that_somebody_reads_in_order_is_not_read_whole_for_others() {
    let mut asked = Asked::of(Kind::sparse(1, 1000));
    let file = asked.sample.experts()[0];
    for n in 0..3 {
        asked.ask(file, n * REQUEST_BYTES, REQUEST_BYTES);
    }
    for n in [8, 3, 7, 9, 5, 6, 2, 4, 10] {
        assert_eq!(asked.ask(file, n * MIB, REQUEST_BYTES), []);
    }
}

#[test]
fn reading_ahead_goes_on_through_all_matrices_and_stops_at_the_end_of_the_file() {
    // The file is shorter than what the second request reads ahead.
    let mut asked = Asked::of(Kind::sparse(2, 100));
    for file in asked.sample.experts() {
        assert_eq!(asked.ask(file, 0, REQUEST_BYTES), []);
        let wanted = asked.ask(file, REQUEST_BYTES, REQUEST_BYTES);
        assert_eq!(joined(&wanted), 2 * REQUEST_BYTES..asked.sample.size(file));
    }
}

#[test]
fn reading_ahead_stops_where_another_reader_of_the_file_began() {
    let mut asked = Asked::of(Kind::sparse(1, 1000));
    let file = asked.sample.experts()[0];
    let other = MIB + 4096;
    assert_eq!(asked.ask(file, other, REQUEST_BYTES), []);
    assert_eq!(asked.ask(file, 0, REQUEST_BYTES), []);
    let wanted = asked.ask(file, REQUEST_BYTES, REQUEST_BYTES);
    assert_eq!(joined(&wanted), 2 * REQUEST_BYTES..other);
    let wanted = asked.ask(file, other + REQUEST_BYTES, REQUEST_BYTES);
    assert_eq!(joined(&wanted).start, other + 2 * REQUEST_BYTES);
}

#[test]
fn a_file_that_is_read_once_more_is_read_ahead_once_more() {
    let mut asked = Asked::of(Kind::sparse(1, 1000));
    let file = asked.sample.experts()[0];
    let size = asked.sample.size(file);
    // All of it, then half of it, then all again.
    for end in [size, size / 2, size] {
        assert_eq!(asked.ask(file, 0, REQUEST_BYTES), []);
        let wanted = asked.ask(file, REQUEST_BYTES, REQUEST_BYTES);
        assert_eq!(joined(&wanted).start, 2 * REQUEST_BYTES);
        for offset in (2 * REQUEST_BYTES..end).step_by(REQUEST_BYTES as usize) {
            asked.ask(file, offset, REQUEST_BYTES);
        }
    }
}

#[test]
fn one_who_reads_here_and_there_takes_nothing_from_others() {
    let mut asked = Asked::of(Kind::sparse(2, 12_000));
    let files = asked.sample.experts();
    let in_order = |n| n * REQUEST_BYTES;
    for n in 0..2 {
        asked.ask(files[0], in_order(n), REQUEST_BYTES);
    }
    for n in 0..100 {
        asked.ask(files[1], (99 - n) * 300 * KIB, 4096);
    }
    let range = in_order(2)..in_order(3);
    let held = asked.streams.request(files[0], range, 0, u64::MAX);
    assert_eq!(held.len(), 1);
}

#[test]
fn a_reader_without_buffers_gets_one_of_the_reader_who_has_the_most() {
    let mut asked = Asked::of(Kind::sparse(2, 2600));
    let files = asked.sample.experts();
    for n in 0..8 {
        asked.ask(files[0], n * 3 * MIB, REQUEST_BYTES);
    }
    assert!(Buffer::are_all_taken());
    assert_eq!(asked.ask(files[1], 0, REQUEST_BYTES), []);
    let wanted = asked.ask(files[1], REQUEST_BYTES, REQUEST_BYTES);
    assert_eq!(wanted[0].start, 2 * REQUEST_BYTES);
}

#[test]
fn what_is_in_the_page_cache_is_not_read_ahead() {
    let mut asked = Asked::of(Kind::sparse(1, 1000));
    let file = asked.sample.experts()[0];
    let part = File::open(&asked.sample.paths[0]).unwrap();
    sys::read::only_what_is_read(&part);
    std::os::unix::fs::FileExt::read_exact_at(&part, &mut vec![0; 4 << 20], 0).unwrap();
    let mut requests = (0..).map(|n| asked.ask(file, n * REQUEST_BYTES, REQUEST_BYTES));
    let wanted = requests.find(|wanted| !wanted.is_empty()).unwrap();
    // A chunk that is cached only in part is read.
    assert!(joined(&wanted).start >= 3 * MIB, "{wanted:?}");
}
