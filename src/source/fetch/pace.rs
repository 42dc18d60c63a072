//! How far and how fast the two kinds of sources are read ahead.

use std::sync::LazyLock;

use super::buffers::{BUFFER_BYTES, DISK_POOL, Pool, SERVER_BUFFER_BYTES, SERVER_POOL};

/// The largest file that a disk fetches whole, and what a server is asked for at a time.
const WHOLE_BYTES: u64 = 32 << 20;

/// How many bytes to fetch now of what a reader will ask for, by where they come from.
#[derive(Debug, Clone, Copy)]
pub struct Near {
    pub from_server: u64,
    pub from_disk: u64,
}

impl From<u64> for Near {
    fn from(bytes: u64) -> Self {
        Self {
            from_server: bytes,
            from_disk: bytes,
        }
    }
}

/// How far to read ahead of the readers of a source, and how much at the same time.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Bytes in front of each reader.
    pub ahead: u64,
    /// Bytes of the largest chunk. The last one may reach this far beyond.
    pub chunk: u64,
    /// Bytes of the largest file that is fetched whole.
    pub whole: u64,
    /// Chunks that are read at the same time.
    pub threads: usize,
    /// Whether a file that may be fetched whole is, from the second request past its header on, and of
    /// a larger one the rest of the slice of a tensor that is being read.
    pub is_eager: bool,
    /// The memory for it.
    pub pool: &'static LazyLock<Pool>,
}

impl Pace {
    /// The pace of disks. More than 4 threads did not make a disk faster that we measured, and with
    /// more than one chunk for each of them nothing was gained either (docs/performance.md).
    pub const DISK: Self = Self {
        ahead: 4 * BUFFER_BYTES as u64,
        chunk: BUFFER_BYTES as u64,
        whole: WHOLE_BYTES,
        threads: 4,
        is_eager: false,
        pool: &DISK_POOL,
    };

    /// The pace of servers: each is as far away as the others, so all that is known to be wanted
    /// is asked for at once.
    pub const LINK: Self = Self {
        ahead: 28 * SERVER_BUFFER_BYTES as u64,
        chunk: SERVER_BUFFER_BYTES as u64,
        whole: 2 * WHOLE_BYTES,
        threads: 32,
        is_eager: true,
        pool: &SERVER_POOL,
    };
}
