//! The memory for what is fetched: pools of a fixed number of buffers, shared by the whole process.
//!
//! They lie in huge pages where the kernel has some: a device then writes each buffer in one piece,
//! which made direct reads of a virtual disk more than twice as fast (docs/performance.md).

use std::ops::{Deref, DerefMut};
use std::sync::LazyLock;

use memmap2::MmapMut;
use parking_lot::Mutex;

/// The size of a buffer for disks, and so of the largest read of one: that of the largest request of
/// FUSE (256 pages, `fs.fuse.max_pages_limit`), so that an answer comes from two buffers at most. A
/// disk that has several to work on was as fast with 128 KiB as with 4 MiB.
pub const BUFFER_BYTES: usize = 1 << 20;
/// How many there are for disks: for the largest file that is fetched whole, and some more, since the
/// first and last chunks of its tensors are not full. They are less than the 64 MiB that a daemon may
/// use (`memory` of benches/run.sh).
pub const BUFFERS: usize = 40;
/// The size of a buffer for servers, and so of the largest request to one.
pub const SERVER_BUFFER_BYTES: usize = 2 << 20;
/// How many there are for servers: one for each request that is under way.
pub const SERVER_BUFFERS: usize = 32;
/// The size of a huge page on x86-64, and on AArch64 with pages of 4 KiB.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// The size of the smallest page of Linux.
const PAGE_BYTES: usize = 4096;

/// Buffers for what comes from disks.
pub static DISK_POOL: LazyLock<Pool> = LazyLock::new(|| Pool::new(BUFFER_BYTES, BUFFERS));
/// Buffers for what comes from servers.
pub static SERVER_POOL: LazyLock<Pool> =
    LazyLock::new(|| Pool::new(SERVER_BUFFER_BYTES, SERVER_BUFFERS));

/// Buffers of one size. Never unmapped: they are the process's for as long as it lives.
#[derive(Debug)]
pub struct Pool {
    /// Bytes of each.
    pub bytes: usize,
    pub count: usize,
    /// The unused ones; the one that was given back last is taken next.
    free: Mutex<Vec<Memory>>,
}

#[derive(Debug, Default)]
struct Memory {
    bytes: &'static mut [u8],
    /// Whether it may be address space without memory.
    fresh: bool,
}

#[cfg(target_os = "linux")]
fn advise_huge(map: &MmapMut) -> std::io::Result<()> {
    map.advise(memmap2::Advice::HugePage)
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_: &MmapMut) -> std::io::Result<()> {
    Ok(())
}

/// A buffer of a pool, given back when dropped. It starts at a multiple of its size, as direct reads
/// need.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    pool: &'static Pool,
}

impl Pool {
    fn new(bytes: usize, count: usize) -> Self {
        Self {
            bytes,
            count,
            free: Mutex::new(memory(bytes, count)),
        }
    }

    /// Takes an unused buffer.
    pub fn take(&'static self) -> Option<Buffer> {
        let memory = self.free.lock().pop()?;
        Some(Buffer { memory, pool: self })
    }

    /// Whether [`take`](Self::take) would have none to give.
    pub fn are_all_taken(&self) -> bool {
        self.unused() == 0
    }

    /// How many are unused.
    pub fn unused(&self) -> usize {
        self.free.lock().len()
    }
}

/// The memory of some buffers, each at a multiple of its size.
fn memory(bytes: usize, count: usize) -> Vec<Memory> {
    // The kernel may place the map anywhere; with one huge page more, it can start at one.
    let Ok(map) = MmapMut::map_anon(count * bytes + HUGE_PAGE_BYTES) else {
        tracing::warn!("no memory for reading ahead; sequential reads will be slower");
        return Vec::new();
    };
    // Without huge pages it is only slower.
    let _ = advise_huge(&map);
    let map = Box::leak(Box::new(map));
    let start = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
    let aligned = map.get_mut(start..).unwrap_or_default();
    let buffers = aligned.chunks_exact_mut(bytes).take(count);
    let buffers = buffers.map(|bytes| Memory { bytes, fresh: true });
    buffers.collect()
}

impl Buffer {
    /// Makes sure that there is memory behind all of the buffer; without it, Btrfs reads through
    /// the page cache. The kernel may take milliseconds to find huge pages.
    pub fn populate(&mut self) {
        if self.memory.fresh {
            let pages = self.memory.bytes.chunks_mut(PAGE_BYTES);
            pages.for_each(|page| page[0] = 0);
        }
        self.memory.fresh = false;
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        self.pool.free.lock().push(memory);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.bytes
    }
}
