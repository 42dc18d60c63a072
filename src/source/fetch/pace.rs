//! How far and how fast the two kinds of sources are read ahead.

use super::buffers::{BUFFER_BYTES, SERVER_BUFFER_BYTES};

/// The largest file that a disk fetches whole, and what a server is asked for at a time.
const WHOLE_BYTES: u64 = 32 << 20;

/// How far to read ahead of the readers of a source, and how much at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    };

    /// The pace of servers: each is as far away as the others, so all that is known to be wanted
    /// is asked for at once.
    pub const LINK: Self = Self {
        ahead: 28 * SERVER_BUFFER_BYTES as u64,
        chunk: SERVER_BUFFER_BYTES as u64,
        whole: 2 * WHOLE_BYTES,
        threads: 32,
        is_eager: true,
    };
}
