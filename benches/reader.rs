//! The benchmarks' native client: reads files as loaders do, and says how long it took.
//!
//! The clock runs inside the process and around the reading alone, not around its start. Every
//! byte that is read goes into a sum, which is printed too: nothing can be left out, and both sides
//! of a comparison must come to the same one.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use memmap2::Mmap;

/// What a page of the kernel's cache holds.
const PAGE_BYTES: usize = 4096;

/// Read files, and print nanoseconds, bytes and their sum as JSON
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    way: Way,
}

#[derive(Subcommand)]
enum Way {
    /// Read files whole with pread
    Pread {
        /// Bytes asked for at a time
        #[arg(long, value_name = "BYTES", default_value_t = 1 << 20)]
        block: usize,
        /// Threads that read at the same time, each its own files
        #[arg(long, value_name = "N", default_value_t = 1)]
        readers: usize,
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Map files and read every byte of the maps
    Mmap {
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Open a file, read its first 4 KiB, close it; many times
    Open {
        #[arg(long, value_name = "N", default_value_t = 100_000)]
        times: u64,
        file: PathBuf,
    },
    /// Map a file and read a word of random pages of it, none twice
    Faults {
        #[arg(long, value_name = "N", default_value_t = 1000)]
        count: usize,
        #[arg(long, default_value_t = 0)]
        seed: u64,
        file: PathBuf,
    },
}

/// What was read.
#[derive(Clone, Copy, Default)]
struct Read {
    bytes: u64,
    sum: u64,
}

impl Read {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.sum = self.sum.wrapping_add(sum(bytes));
    }

    fn and(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            sum: self.sum.wrapping_add(other.sum),
        }
    }
}

/// The sum of all bytes taken as little-endian words, which keeps up with memory.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|&word| u64::from_le_bytes(word));
    let rest = rest.iter().map(|&byte| u64::from(byte));
    words.chain(rest).fold(0, u64::wrapping_add)
}

fn main() -> anyhow::Result<()> {
    let way = Cli::parse().way;
    let start = Instant::now();
    let read = match &way {
        Way::Pread {
            block,
            readers,
            files,
        } => in_parallel(files, *readers, |files| pread(files, *block)),
        Way::Mmap { files } => mmap(files),
        Way::Open { times, file } => open(file, *times),
        Way::Faults { count, seed, file } => faults(file, *count, *seed),
    }?;
    let nanoseconds = start.elapsed().as_nanos();
    let Read { bytes, sum } = read;
    println!(r#"{{"nanoseconds": {nanoseconds}, "bytes": {bytes}, "sum": {sum}}}"#);
    Ok(())
}

/// Deals the files out to threads, and adds up what they read.
fn in_parallel(
    files: &[PathBuf],
    readers: usize,
    read: impl Fn(&[PathBuf]) -> anyhow::Result<Read> + Sync,
) -> anyhow::Result<Read> {
    ensure!(
        (1..=files.len()).contains(&readers),
        "{readers} readers of {} files",
        files.len()
    );
    let share = files.len().div_ceil(readers);
    std::thread::scope(|scope| {
        let shares = files.chunks(share);
        let started: Vec<_> = shares.map(|files| scope.spawn(|| read(files))).collect();
        let mut ended = started.into_iter().map(|thread| thread.join());
        ended.try_fold(Read::default(), |all, one| {
            Ok(all.and(one.expect("no reader panics")?))
        })
    })
}

fn open_file(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("{path:?}"))
}

fn map(path: &Path) -> anyhow::Result<Mmap> {
    let file = open_file(path)?;
    // SAFETY: nobody writes to the files of a benchmark.
    unsafe { Mmap::map(&file) }.with_context(|| format!("{path:?}"))
}

fn pread(files: &[PathBuf], block: usize) -> anyhow::Result<Read> {
    let mut read = Read::default();
    let mut buffer = vec![0; block];
    for path in files {
        let file = open_file(path)?;
        let mut offset = 0;
        loop {
            // A short read is allowed to a file system; only 0 is the end.
            let count = file.read_at(&mut buffer, offset)?;
            if count == 0 {
                break;
            }
            read.add(&buffer[..count]);
            offset += count as u64;
        }
    }
    Ok(read)
}

fn mmap(files: &[PathBuf]) -> anyhow::Result<Read> {
    let mut read = Read::default();
    for path in files {
        read.add(&map(path)?);
    }
    Ok(read)
}

fn open(path: &Path, times: u64) -> anyhow::Result<Read> {
    let mut read = Read::default();
    let mut buffer = [0; PAGE_BYTES];
    for _ in 0..times {
        let count = open_file(path)?.read_at(&mut buffer, 0)?;
        read.bytes += count as u64;
        black_box(&buffer);
    }
    // Summing costs as much as the system calls that are measured, so it is done once.
    read.sum = sum(&buffer);
    Ok(read)
}

fn faults(path: &Path, count: usize, seed: u64) -> anyhow::Result<Read> {
    let map = map(path)?;
    let pages = map.len() / PAGE_BYTES;
    ensure!(count <= pages, "{path:?} has only {pages} whole pages");
    let mut order: Vec<usize> = (0..pages).collect();
    let mut state = seed;
    let mut read = Read::default();
    // Fisher and Yates, as far as it is needed.
    for n in 0..count {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        order.swap(n, n + splitmix64(state) as usize % (pages - n));
        read.add(&map[order[n] * PAGE_BYTES..][..8]);
    }
    Ok(read)
}

/// The output function of the generator SplitMix64.
fn splitmix64(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
