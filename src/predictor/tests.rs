//! Requests of readers, and what is predicted after each.

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const REACH: Reach = Reach {
    ahead: 4 * MIB,
    beyond: MIB,
    whole: 32 * MIB,
    is_eager: false,
};
const EXPERT: File = File {
    id: 7,
    header: 1000,
    size: 24 * MIB + 1000,
    source: 24 * MIB,
    shares: false,
};
const LARGE: File = File {
    id: 8,
    header: 1000,
    size: 48 * MIB,
    source: 48 * MIB - 1000,
    shares: false,
};

struct Asked(Predictor);

impl Asked {
    fn new() -> Self {
        Self(Predictor::new(REACH))
    }

    /// Asks for a range; the reader that does, and what it wants next, near or not.
    fn by_whom(&mut self, file: File, offset: u64, len: u64) -> Option<(u64, Range<u64>)> {
        let range = offset..(offset + len).min(file.size);
        self.0.note(file, &range);
        let wanted = self.0.wanted(file, range.end, || range.clone())?;
        let range = wanted.range;
        let is_whole = range == (file.header..file.size);
        let beyond = (range.end - range.start).saturating_sub(wanted.near);
        assert!(beyond <= if is_whole { 0 } else { REACH.beyond });
        Some((wanted.reader, range))
    }

    fn ask(&mut self, file: File, offset: u64, len: u64) -> Option<Range<u64>> {
        self.by_whom(file, offset, len).map(|(_, range)| range)
    }

    /// Asks for the n-th piece of a file, as the kernel does.
    fn next(&mut self, file: File, n: u64) -> Option<Range<u64>> {
        self.ask(file, n * REQUEST_BYTES, REQUEST_BYTES)
    }
}

/// Numbers without a pattern.
fn scramble(n: u64) -> u64 {
    let z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (z ^ z >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 8
}

fn file(id: u64) -> File {
    File { id, ..EXPERT }
}

#[test]
fn looks_at_headers_predict_nothing() {
    let mut asked = Asked::new();
    for n in 0..100 {
        assert_eq!(asked.next(file(n), 0), None);
    }
    // As programs do that read a few bytes, then a few more, and so see the kernel's window grow.
    for n in 0..100 {
        assert_eq!(asked.ask(file(n), 0, 16 * KIB), None);
        assert_eq!(asked.ask(file(n), 16 * KIB, 32 * KIB), None);
    }
}

#[test]
fn the_second_request_in_order_predicts_four_times_what_was_read_up_to_the_reach() {
    let mut asked = Asked::new();
    assert_eq!(asked.next(EXPERT, 0), None);
    for n in 1..150 {
        let read = (n + 1) * REQUEST_BYTES;
        let near = REACH.ahead.min(4 * read);
        let wanted = read..(read + near + REACH.beyond).min(EXPERT.size);
        assert_eq!(asked.next(EXPERT, n), Some(wanted), "after request {n}");
    }
}

#[test]
fn a_reader_that_starts_in_the_middle_is_one_from_its_second_request_on() {
    let mut asked = Asked::new();
    let (start, len) = (5 * MIB + 77, 70_000);
    assert_eq!(asked.ask(EXPERT, start, len), None);
    let read = start + 2 * len;
    let wanted = Some(read..read + 4 * 2 * len + REACH.beyond);
    assert_eq!(asked.ask(EXPERT, start + len, len), wanted);
    // Asked for once more, it is what was predicted before.
    assert_eq!(asked.ask(EXPERT, start + len, len), wanted);
}

#[test]
fn requests_that_overtake_each_other_are_one_reader() {
    let mut asked = Asked::new();
    asked.next(EXPERT, 0);
    let (reader, _) = asked.by_whom(EXPERT, REQUEST_BYTES, REQUEST_BYTES).unwrap();
    let mut farthest = 0;
    for n in 2..100 {
        let place = (n ^ 1) * REQUEST_BYTES;
        let (other, range) = asked.by_whom(EXPERT, place, REQUEST_BYTES).unwrap();
        assert_eq!(other, reader);
        assert!(range.start >= farthest, "a window never goes back");
        farthest = range.start;
    }
    // Larger requests may be farther apart.
    let mut asked = Asked::new();
    for n in [0, 1, 3, 2, 5, 4] {
        asked.ask(EXPERT, n * MIB, MIB);
    }
    assert_eq!(asked.0.streams.len(), 1);
}

#[test]
fn readers_of_different_files_and_of_different_places_are_told_apart() {
    let mut asked = Asked::new();
    let readers = [(file(1), 0), (file(2), 0), (file(1), 12 * MIB)];
    let mut numbers = Vec::new();
    for (file, start) in readers {
        assert_eq!(asked.ask(file, start, REQUEST_BYTES), None);
    }
    for n in 1..40 {
        for (file, start) in readers {
            let place = start + n * REQUEST_BYTES;
            let (reader, range) = asked.by_whom(file, place, REQUEST_BYTES).unwrap();
            assert_eq!(range.start, place + REQUEST_BYTES);
            numbers.push(reader);
        }
    }
    assert!(numbers.chunks(3).all(|turn| turn == &numbers[..3]));
    assert!(numbers[0] != numbers[1] && numbers[1] != numbers[2] && numbers[0] != numbers[2]);
}

#[test]
fn predictions_end_with_the_file_and_then_nothing_is_wanted() {
    let mut asked = Asked::new();
    let requests = EXPERT.size.div_ceil(REQUEST_BYTES);
    for n in 0..requests {
        let wanted = asked.next(EXPERT, n);
        assert!(wanted.is_none_or(|range| range.end <= EXPERT.size));
    }
    let end = EXPERT.size;
    assert_eq!(asked.next(EXPERT, requests - 1), Some(end..end));
    // Shorter than the reach.
    let small = File {
        size: 3 * REQUEST_BYTES,
        source: 3 * REQUEST_BYTES - EXPERT.header,
        ..file(9)
    };
    asked.next(small, 0);
    assert_eq!(asked.next(small, 1), Some(2 * REQUEST_BYTES..small.size));
}

#[test]
fn predictions_end_where_another_reader_of_the_file_began() {
    let mut asked = Asked::new();
    let other = MIB + 4096;
    assert_eq!(asked.ask(EXPERT, other, REQUEST_BYTES), None);
    assert_eq!(asked.next(EXPERT, 0), None);
    assert_eq!(asked.next(EXPERT, 1), Some(2 * REQUEST_BYTES..other));
    let next = other + 2 * REQUEST_BYTES;
    let wanted = asked.ask(EXPERT, other + REQUEST_BYTES, REQUEST_BYTES);
    assert_eq!(wanted.unwrap().start, next);
}

#[test]
fn a_file_that_is_read_once_more_has_a_new_reader() {
    let mut asked = Asked::new();
    let mut readers = Vec::new();
    // All of it, then half of it, then all again.
    for end in [EXPERT.size, EXPERT.size / 2, EXPERT.size] {
        assert_eq!(asked.next(EXPERT, 0), None);
        let (reader, range) = asked.by_whom(EXPERT, REQUEST_BYTES, REQUEST_BYTES).unwrap();
        assert_eq!(range.start, 2 * REQUEST_BYTES);
        readers.push(reader);
        for n in 2..end / REQUEST_BYTES {
            asked.next(EXPERT, n);
        }
    }
    assert!(readers.is_sorted_by(|a, b| a < b), "{readers:?}");
}

#[test]
fn scattered_requests_in_a_large_file_predict_next_to_nothing() {
    let mut asked = Asked::new();
    let pages = LARGE.size / 4096 - 32;
    let by_chance = (0..1000).filter(|&n| {
        let offset = scramble(n) % pages * 4096;
        asked.ask(LARGE, offset, REQUEST_BYTES).is_some()
    });
    // Now and then one begins where another has ended.
    assert!(by_chance.count() <= 3);
}

#[test]
fn scattered_requests_in_an_expert_predict_all_of_it_until_all_was_asked_for() {
    let mut asked = Asked::new();
    let place = |n: u64| n * 2 * MIB;
    for n in [3, 7, 1, 5, 0, 6, 2] {
        assert_eq!(asked.ask(EXPERT, place(n), REQUEST_BYTES), None);
    }
    let whole = EXPERT.header..EXPERT.size;
    let (reader, range) = asked.by_whom(EXPERT, place(4), REQUEST_BYTES).unwrap();
    assert_eq!(range, whole);
    // Of the 24 MiB, eight requests asked for one.
    for n in 0..22 {
        let wanted = asked.by_whom(EXPERT, scramble(n) % 23 * MIB, MIB);
        assert_eq!(wanted, Some((reader, whole.clone())));
    }
    let last = asked.by_whom(EXPERT, 9 * MIB, MIB).unwrap();
    assert_eq!(last, (reader, EXPERT.size..EXPERT.size));
    // Then it begins anew.
    assert_eq!(asked.next(EXPERT, 0), None);
    assert_eq!(asked.next(EXPERT, 1).unwrap().start, 2 * REQUEST_BYTES);
}

#[test]
fn a_file_that_was_wanted_whole_and_then_left_is_forgotten() {
    let mut asked = Asked::new();
    for n in 0..8 {
        asked.ask(EXPERT, n * 2 * MIB, REQUEST_BYTES);
    }
    assert!(asked.ask(EXPERT, 9 * MIB, 4096).is_some());
    for n in 0..=REACH.whole / REQUEST_BYTES {
        asked.next(file(100 + n), 0);
    }
    assert_eq!(asked.ask(EXPERT, 11 * MIB, 4096), None);
}

#[test]
fn an_expert_that_somebody_reads_in_order_is_not_wanted_whole_by_others() {
    let mut asked = Asked::new();
    for n in 0..3 {
        asked.next(EXPERT, n);
    }
    for n in [8, 3, 7, 9, 5, 6, 2, 4, 10] {
        assert_eq!(asked.ask(EXPERT, n * 2 * MIB, REQUEST_BYTES), None);
    }
}

#[test]
fn looks_at_the_start_of_each_tensor_do_not_make_an_expert_wanted_whole() {
    let mut asked = Asked::new();
    // The header, and three matrices with their biases.
    for n in 0..7 {
        assert_eq!(asked.ask(EXPERT, n * 3 * MIB, REQUEST_BYTES), None);
    }
}

#[test]
fn a_scattered_reader_makes_no_other_reader_forgotten() {
    let mut asked = Asked::new();
    for id in 0..8 {
        for n in 0..3 {
            asked.next(file(id), n);
        }
    }
    for n in 0..1000 {
        asked.ask(LARGE, scramble(n) % (LARGE.size / 4096) * 4096, 4096);
        assert!(asked.0.streams.len() <= MAX_STREAMS);
    }
    for id in 0..8 {
        assert_eq!(asked.next(file(id), 3).unwrap().start, 4 * REQUEST_BYTES);
    }
}

#[test]
fn odd_requests_predict_nothing_odd() {
    let mut asked = Asked::new();
    let empty = File {
        id: 1,
        header: 0,
        size: 0,
        source: 0,
        shares: false,
    };
    for file in [empty, EXPERT, LARGE] {
        for n in 0..2000 {
            let offset = (scramble(n) % (file.size + 1)).min(file.size);
            let len = scramble(n + 7) % (3 * MIB);
            if let Some(range) = asked.ask(file, offset, len) {
                assert!(range.start <= range.end && range.end <= file.size);
                assert!(range.end - range.start <= REACH.whole);
            }
        }
    }
}

#[test]
fn what_is_fetched_counts_in_bytes_of_the_model() {
    // Numbers of two bytes, made from blocks that are a quarter of them.
    let numbers = File {
        size: 4 * EXPERT.source + EXPERT.header,
        ..EXPERT
    };
    let mut asked = Predictor::new(REACH);
    for n in 0..numbers.size.div_ceil(REQUEST_BYTES) {
        let range = n * REQUEST_BYTES..((n + 1) * REQUEST_BYTES).min(numbers.size);
        asked.note(numbers, &range);
        let Some(wanted) = asked.wanted(numbers, range.end, || range.clone()) else {
            assert!(n < 2);
            continue;
        };
        assert_eq!(wanted.range.start, range.end);
        let read = (n + 1) * REQUEST_BYTES / 4;
        assert!(wanted.near.abs_diff((GROWTH * read).min(REACH.ahead)) <= GROWTH);
        let ahead = wanted.range.end - wanted.range.start;
        let left = numbers.size - wanted.range.start;
        let all = 4 * (wanted.near + REACH.beyond);
        assert!(ahead <= all && all.min(left) <= ahead + 4, "{n}");
    }
    // A small part of the model, though a large file.
    let mut scattered = Predictor::new(REACH);
    for n in (0..20).rev() {
        let start = n * (4 * MIB);
        scattered.note(numbers, &(start..start + 4096));
    }
    let wanted = scattered.wanted(numbers, 4096, || 0..4096).unwrap();
    assert_eq!(wanted.range, numbers.header..numbers.size);
    assert!(wanted.near.abs_diff(numbers.source) < 4);
}

#[test]
fn arrays_of_the_same_blocks_that_are_read_side_by_side_are_wanted_whole() {
    let mlx = File {
        shares: true,
        ..EXPERT
    };
    let thirds = [0, 1, 2].map(|n| mlx.header + n * (8 * MIB));
    for file in [EXPERT, mlx] {
        let mut asked = Asked::new();
        assert_eq!(asked.ask(file, thirds[0], REQUEST_BYTES), None);
        let wanted = asked.ask(file, thirds[1], REQUEST_BYTES);
        assert_eq!(wanted, file.shares.then_some(file.header..file.size));
        // The first bytes again, and all others, from three sides.
        let mut asked_for = 2 * REQUEST_BYTES;
        for n in 0..8 * MIB / REQUEST_BYTES {
            for start in thirds {
                let wanted = asked.ask(file, start + n * REQUEST_BYTES, REQUEST_BYTES);
                asked_for += REQUEST_BYTES;
                if file.shares && asked_for < file.source {
                    assert_eq!(wanted, Some(file.header..file.size));
                }
            }
        }
    }
}

#[test]
fn from_a_server_the_rest_of_a_slice_is_wanted_once_it_is_read_in_order() {
    let link = Reach {
        ahead: 32 * MIB,
        is_eager: true,
        ..REACH
    };
    let ask_twice = |start: u64, slice: Range<u64>| {
        let mut asked = Predictor::new(link);
        let (middle, end) = (start + REQUEST_BYTES, start + 2 * REQUEST_BYTES);
        asked.note(LARGE, &(start..middle));
        assert_eq!(asked.wanted(LARGE, middle, || slice.clone()), None);
        asked.note(LARGE, &(middle..end));
        let wanted = asked.wanted(LARGE, end, || slice.clone()).unwrap();
        assert_eq!(wanted.range.start, end);
        (wanted.near, wanted.range.end)
    };
    let read = 2 * REQUEST_BYTES;
    let all = |near| (near, read + near + REACH.beyond);
    // From the header on: whoever goes on reads several tensors.
    assert_eq!(ask_twice(0, 1000..read), all(GROWTH * read));
    assert_eq!(ask_twice(0, 1000..10 * MIB), all(10 * MIB - read));
    assert_eq!(ask_twice(0, 1000..40 * MIB), all(32 * MIB));
    // From the start of a tensor, and from within it: it may be the only one.
    let (start, end) = (4 * MIB - 4096, 4 * MIB - 4096 + read);
    assert_eq!(
        ask_twice(start, 4 * MIB..10 * MIB),
        (10 * MIB - end, 10 * MIB)
    );
    assert_eq!(ask_twice(start, start..end), (GROWTH * read, end));
    // Within it, some of it may be all.
    let (start, end) = (6 * MIB, 6 * MIB + read);
    let some = end + GROWTH * read + REACH.beyond;
    assert_eq!(ask_twice(start, 4 * MIB..10 * MIB), (GROWTH * read, some));
    assert_eq!(ask_twice(start, 4 * MIB..7 * MIB), (GROWTH * read, 7 * MIB));
    // Past the end of a tensor as far as the kernel goes, and further.
    let mut asked = Predictor::new(link);
    let (start, end) = (4 * MIB, 6 * MIB);
    for next in (start + REQUEST_BYTES..)
        .step_by(REQUEST_BYTES as usize)
        .take(21)
    {
        let slice = if next <= end {
            start..end
        } else {
            end..20 * MIB
        };
        asked.note(LARGE, &(next - REQUEST_BYTES..next));
        let wanted = asked.wanted(LARGE, next, || slice.clone());
        let limit = wanted.map_or(0, |wanted| wanted.range.end);
        let expected = match next - start {
            REQUEST_BYTES => 0,
            _ if next <= end => end,
            _ if next <= end + DISORDER_BYTES => next,
            _ => LARGE
                .size
                .min(next + (20 * MIB - next).max(GROWTH * (next - start)) + REACH.beyond),
        };
        assert_eq!(limit, expected, "{}", next / REQUEST_BYTES);
    }
}

#[test]
fn a_look_at_a_long_header_on_a_server_brings_little_of_what_is_behind_it() {
    let file = File {
        header: 100 << 10,
        source: LARGE.size - (100 << 10),
        ..LARGE
    };
    let mut asked = Predictor::new(Reach {
        ahead: 32 * MIB,
        is_eager: true,
        ..REACH
    });
    // The windows of a kernel for two small reads, and then those of a reader who goes on.
    let ends = [16, 48, 112, 240, 368, 496].map(|kib| kib * KIB);
    let mut near = Vec::new();
    for (start, end) in std::iter::once(0).chain(ends).zip(ends) {
        asked.note(file, &(start..end));
        let wanted = asked.wanted(file, end, || file.header..file.size);
        near.push(wanted.map(|wanted| wanted.near));
    }
    assert_eq!(near[..3], [None; 3]);
    assert_eq!(
        near[3..5],
        [Some(GROWTH * 240 * KIB), Some(GROWTH * 368 * KIB)]
    );
    assert_eq!(near[5], Some(32 * MIB));
}
