//! What is fetched shows in nothing but time: bytes, errors and memory are tested here.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use parking_lot::MutexGuard;
use tempfile::TempDir;

use super::super::part::{Identity, PartFile};
use super::super::place::Part;
use super::super::{PageCache, ReadError, Source};
use super::buffers::{BUFFERS, DISK_POOL};
use super::*;
use crate::sys;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Whoever holds this is alone with the buffers of the process.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock();
    // Threads of the test before may still give some back.
    wait_for(|| DISK_POOL.unused() == BUFFERS);
    alone
}

/// A folder on a disk, beside this program: files of a /tmp in memory are never read from one.
pub fn folder_on_disk() -> TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

/// Waits for what other threads are about to do.
pub fn wait_for(condition: impl Fn() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "nothing happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Parts on disk, none of them cached.
struct Sample {
    source: Source,
    bytes: Vec<u8>,
    paths: Vec<PathBuf>,
    _folder: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Sample {
    /// Parts of so many bytes, whose content counts up in words.
    fn new(parts: u32, size: u64) -> Self {
        let alone = alone();
        let folder = folder_on_disk();
        let words = (0..size.div_ceil(8)).flat_map(|n| (n * 0x9e37_79b9).to_le_bytes());
        let bytes: Vec<u8> = words.take(size as usize).collect();
        Self::of(parts, alone, folder, bytes, size)
    }

    /// One part that is a hole.
    fn sparse(size: u64) -> Self {
        Self::of(1, alone(), folder_on_disk(), Vec::new(), size)
    }

    fn of(
        parts: u32,
        alone: MutexGuard<'static, ()>,
        folder: TempDir,
        bytes: Vec<u8>,
        size: u64,
    ) -> Self {
        let paths: Vec<_> = (0..parts)
            .map(|n| folder.path().join(format!("part-{n}")))
            .collect();
        let open = |path: &PathBuf| {
            fs::write(path, &bytes).unwrap();
            let file = File::options().read(true).write(true).open(path).unwrap();
            file.set_len(size).unwrap();
            file.sync_all().unwrap();
            let identity = Identity::of(&file.metadata().unwrap());
            let file = File::open(path).unwrap();
            Part::File(PartFile::new(path.clone(), identity, Some(file)))
        };
        let mut source = Source::new(paths.iter().map(open).collect(), 0);
        source.set_page_cache(PageCache::Unchanged);
        let sample = Self {
            source,
            bytes,
            paths,
            _folder: folder,
            _alone: alone,
        };
        sample.evict();
        sample
    }

    fn evict(&self) {
        let files = self.paths.iter().map(|path| File::open(path).unwrap());
        files.for_each(|file| sys::read::forget(&file));
    }

    /// What is begun for a reader that wants a range of the first part, by no thread.
    fn begin(&self, reader: u64, range: Range<u64>) -> Vec<Range<u64>> {
        let shared = &self.source.shared;
        let near = range.end - range.start;
        let runs = if near == 0 {
            vec![]
        } else {
            vec![run(0, range)]
        };
        let fetch = &shared.fetch;
        let begun = fetch.want(&shared.parts, reader, &runs, near, &Pace::DISK);
        begun.iter().map(|chunk| chunk.range()).collect()
    }

    /// Has a range given out of the chunk that holds it.
    fn use_up(&self, range: Range<u64>) {
        let shared = &self.source.shared;
        let chunks = shared.fetch.holding(0, &range);
        assert_eq!(chunks.len(), 1);
        let held = chunks[0].clone().hold(&shared.parts, range).unwrap();
        held.give_up();
    }
}

fn run(part: u32, range: Range<u64>) -> Run {
    Run {
        part,
        offset: range.start,
        len: range.end - range.start,
    }
}

#[test]
fn chunks_grow_and_end_where_direct_reads_may() {
    let sample = Sample::sparse(16 * MIB);
    let wanted = 5000..6 * MIB + 77;
    let begun = sample.begin(1, wanted.clone());
    assert_eq!(begun[0], 5000..4096 + 256 * KIB);
    let sizes = begun.iter().map(|range| range.end - range.start);
    assert_eq!(sizes.max(), Some(MIB));
    assert_eq!(
        (begun[1].end - begun[1].start, begun[2].end - begun[2].start),
        (512 * KIB, MIB)
    );
    assert!(begun.windows(2).all(|w| w[0].end == w[1].start));
    assert_eq!(begun.last().unwrap().end, wanted.end);
    let (_, whole) = begun.split_last().unwrap();
    assert!(whole.iter().all(|range| range.end % DIRECT_ALIGNMENT == 0));
}

#[test]
fn a_window_that_moves_on_fetches_what_is_new_in_it_and_nothing_twice() {
    let sample = Sample::sparse(64 * MIB);
    let mut fetched = 0;
    for place in (0..60 * MIB).step_by(128 << 10) {
        let shared = &sample.source.shared;
        let runs = [run(0, place..(place + 5 * MIB).min(60 * MIB))];
        let fetch = &shared.fetch;
        for chunk in fetch.want(&shared.parts, 1, &runs, 4 * MIB, &Pace::DISK) {
            let range = chunk.range();
            assert_eq!(range.start, fetched);
            fetched = range.end;
        }
        let end = place + 128 * KIB;
        assert!(fetched >= end.min(60 * MIB));
        sample.use_up(place..end);
        assert!(BUFFERS - DISK_POOL.unused() <= 7);
    }
    assert_eq!(fetched, 60 * MIB);
    assert_eq!(sample.begin(1, 0..0), []);
    assert_eq!(DISK_POOL.unused(), BUFFERS);
}

#[test]
fn what_was_given_out_is_not_fetched_again_while_the_window_stays() {
    let sample = Sample::sparse(16 * MIB);
    let begun = sample.begin(1, 0..8 * MIB);
    for range in begun.iter().rev().step_by(2) {
        sample.use_up(range.clone());
    }
    for _ in 0..3 {
        assert_eq!(sample.begin(1, 0..8 * MIB), []);
    }
    assert_eq!(BUFFERS - DISK_POOL.unused(), begun.len() / 2);
    // Another reader has not had it.
    assert_ne!(sample.begin(2, 0..8 * MIB), []);
}

#[test]
fn two_readers_of_one_range_share_its_chunks() {
    let sample = Sample::sparse(16 * MIB);
    let first = sample.begin(1, 0..3 * MIB);
    assert_eq!(sample.begin(2, 0..3 * MIB), []);
    let beyond = sample.begin(2, MIB..4 * MIB);
    assert_eq!(beyond[0].start, first.last().unwrap().end);
    // When one of them is gone, the other's is fetched again.
    assert_eq!(sample.begin(1, 0..0), []);
    assert_eq!(sample.begin(2, MIB..4 * MIB)[0].start, MIB);
}

#[test]
fn a_reader_without_buffers_takes_those_that_nobody_wants() {
    let sample = Sample::sparse(128 * MIB);
    assert_eq!(sample.begin(1, 0..64 * MIB).len(), BUFFERS);
    assert!(DISK_POOL.are_all_taken());
    // It goes elsewhere, without having used them: they are its own to give up.
    let elsewhere = sample.begin(1, 70 * MIB..72 * MIB);
    assert_eq!(elsewhere[0].start, 70 * MIB);
    let other = sample.begin(2, 80 * MIB..84 * MIB);
    assert!(other.len() >= 4 && other[0].start == 80 * MIB);
    // A late request for what was given up may still find some of it.
    assert!(
        !sample
            .source
            .shared
            .fetch
            .holding(0, &(0..64 * MIB))
            .is_empty()
    );
}

#[test]
fn a_reader_without_buffers_takes_one_from_the_reader_with_the_most() {
    let sample = Sample::sparse(128 * MIB);
    assert_eq!(sample.begin(1, 0..64 * MIB).len(), BUFFERS);
    let other = sample.begin(2, 80 * MIB..84 * MIB);
    assert_eq!(other[0].start, 80 * MIB);
    let held = sample.source.shared.fetch.holding(0, &(0..64 * MIB));
    // The last ones it would have needed.
    assert_eq!(held.len() + other.len(), BUFFERS);
    assert!(held.windows(2).all(|w| w[0].range.end == w[1].range.start));
    assert_eq!(held[0].range.start, 0);
    drop(held);
    // What was taken is fetched when there are buffers again.
    assert_eq!(sample.begin(2, 0..0), []);
    assert_ne!(sample.begin(1, 0..64 * MIB), []);
}

#[test]
fn readers_that_stop_lose_their_buffers_to_others() {
    let sample = Sample::sparse(512 * MIB);
    for reader in 0..BUFFERS as u64 {
        let start = reader * 4 * MIB;
        sample.begin(reader, start..start + MIB);
    }
    assert!(DISK_POOL.are_all_taken());
    let mut most = 0;
    for n in 0..2 * (BUFFERS as u64 * MIB / (128 * KIB)) {
        let start = 256 * MIB + n * 128 * KIB;
        sample.begin(1000, start..start + 4 * MIB);
        most = most.max(
            sample
                .source
                .shared
                .fetch
                .holding(0, &(start..start + 4 * MIB))
                .len(),
        );
        let chunks = sample.source.shared.fetch.holding(0, &(start..start + 1));
        if !chunks.is_empty() {
            drop(chunks);
            sample.use_up(start..start + 128 * KIB);
        }
    }
    assert!(most >= 4, "{most}");
}

#[test]
fn what_is_in_the_page_cache_is_not_fetched() {
    let sample = Sample::sparse(16 * MIB);
    let part = File::open(&sample.paths[0]).unwrap();
    sys::read::only_what_is_read(&part);
    std::os::unix::fs::FileExt::read_exact_at(&part, &mut vec![0; 4 << 20], 0).unwrap();
    let begun = sample.begin(1, 0..8 * MIB);
    // A chunk that is cached only in part is read.
    assert!(begun[0].start >= 3 * MIB, "{begun:?}");
    assert_eq!(begun.last().unwrap().end, 8 * MIB);
}

#[test]
fn what_the_kernel_reads_ahead_itself_is_not_fetched() {
    let mut sample = Sample::sparse(16 * MIB);
    sample.source.set_page_cache(PageCache::Filled);
    assert_eq!(sample.begin(1, 0..8 * MIB), []);
    assert!(sample.source.pace().is_none());
    assert_eq!(DISK_POOL.unused(), BUFFERS);
}

#[test]
fn answers_do_not_depend_on_what_was_fetched() {
    let sample = Sample::new(2, 5 * MIB + 777);
    let size = sample.bytes.len() as u64;
    let mut state = 1_u64;
    let mut random = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    for n in 0..600 {
        if n % 3 == 0 {
            let runs: Vec<_> = (0..random(3))
                .map(|_| {
                    let start = random(size);
                    let end = (start + 1 + random(3 * MIB)).min(size);
                    run(random(2) as u32, start..end)
                })
                .collect();
            sample.source.fetch_ahead(random(4), &runs, random(4 * MIB));
        }
        let (part, start) = (random(2) as u32, random(size));
        let end = (start + random(2 * MIB)).min(size);
        let wanted = &sample.bytes[start as usize..end as usize];
        let mut buffer = vec![0; wanted.len()];
        sample.source.read_at(part, start, &mut buffer).unwrap();
        assert!(buffer == wanted, "{start}..{end} of part {part}");
        if let Some(held) = sample.source.held(run(part, start..end)) {
            assert!(&*held == wanted, "{start}..{end} of part {part}, held");
        }
    }
}

#[test]
fn what_one_chunk_holds_is_not_copied() {
    let sample = Sample::new(1, 4 * MIB);
    assert!(sample.source.held(run(0, 0..4096)).is_none());
    sample.source.fetch_ahead(1, &[run(0, 0..2 * MIB)], 2 * MIB);
    let first = sample.source.held(run(0, 1000..70_000)).unwrap();
    let again = sample.source.held(run(0, 1000..2000)).unwrap();
    assert_eq!(first.as_ptr(), again.as_ptr());
    assert!(*first == sample.bytes[1000..70_000]);
    // The first chunk ends there.
    let border = 256 * KIB;
    assert!(sample.source.held(run(0, border - 1..border + 1)).is_none());
    assert!(sample.source.held(run(0, 3 * MIB..3 * MIB + 1)).is_none());
}

#[test]
fn what_was_fetched_of_a_part_that_then_changed_is_never_given_out() {
    /// Changes a file; what it held before stays in it.
    type Change = fn(&File) -> std::io::Result<()>;
    let append: Change = |file| file.set_len(file.metadata()?.len() + 1);
    let cut: Change = |file| file.set_len(file.metadata()?.len() - 1);
    let touch: Change = |file| file.set_modified(SystemTime::UNIX_EPOCH);
    for change in [append, cut, touch] {
        let sample = Sample::new(2, 4 * MIB);
        let runs = [run(0, 0..2 * MIB), run(1, 0..2 * MIB)];
        sample.source.fetch_ahead(1, &runs, 4 * MIB);
        let all_read = |part| {
            let chunks = sample.source.shared.fetch.holding(part, &(0..2 * MIB));
            chunks.iter().all(|chunk| chunk.read.get().is_some())
        };
        wait_for(|| all_read(0) && all_read(1));
        let part = File::options().append(true).open(&sample.paths[0]);
        change(&part.unwrap()).unwrap();
        let border = 256 * KIB;
        // In a chunk, in two of them, and behind the last.
        for range in [0..4096, border - 1..border + 1, 2 * MIB - 1..2 * MIB + 1] {
            assert!(sample.source.held(run(0, range.clone())).is_none());
            let mut buffer = vec![0; (range.end - range.start) as usize];
            let error = sample
                .source
                .read_at(0, range.start, &mut buffer)
                .unwrap_err();
            assert!(matches!(error, ReadError::Changed { .. }), "{error}");
        }
        // The other part is as it was.
        assert!(sample.source.held(run(1, 0..4096)).is_some());
    }
}

#[test]
fn a_source_that_is_gone_leaves_no_buffer_and_no_thread_behind() {
    let sample = Sample::new(1, 4 * MIB);
    sample.source.fetch_ahead(1, &[run(0, 0..4 * MIB)], 4 * MIB);
    let shared = Arc::downgrade(&sample.source.shared);
    drop(sample.source);
    wait_for(|| DISK_POOL.unused() == BUFFERS && shared.strong_count() == 0);
}
