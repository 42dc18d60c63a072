//! The memory for what was read ahead: a fixed number of buffers, shared by the whole process.
//!
//! They lie in huge pages where the kernel gives them: a device then writes each in one piece,
//! which made direct reads of a virtual disk more than twice as fast (`docs/performance.md`).

use std::iter::Take;
use std::ops::{Deref, DerefMut};
use std::slice::ChunksExactMut;
use std::sync::LazyLock;

use memmap2::MmapMut;
use parking_lot::Mutex;

/// The size of a buffer, and so the largest read of the model.
pub const BUFFER_BYTES: usize = 1 << 20;
/// How many there are: half of the memory that a daemon may use.
pub const BUFFERS: usize = 32;
/// The size of a huge page on x86-64, and on AArch64 with pages of 4 KiB.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The size of the smallest page.
const PAGE_BYTES: usize = 4096;

/// The buffers that nobody uses. Never unmapped: they are the process's for as long as it lives.
static FREE: LazyLock<Mutex<Free>> = LazyLock::new(|| {
    // The kernel may place the map anywhere: one huge page more lets it start at one.
    let map = MmapMut::map_anon(BUFFERS * BUFFER_BYTES + HUGE_PAGE_BYTES);
    let Ok(map) = map else {
        tracing::warn!("no memory for reading ahead; sequential reads will be slower");
        return Mutex::new(Free::of(&mut []));
    };
    // Without huge pages it only is slower.
    let _ = advise_huge(&map);
    let map = Box::leak(Box::new(map));
    let start = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
    let aligned = map.get_mut(start..).unwrap_or_default();
    Mutex::new(Free::of(aligned))
});

struct Free {
    used_before: Vec<&'static mut [u8]>,
    /// Address space, without memory yet.
    fresh: Take<ChunksExactMut<'static, u8>>,
}

impl Free {
    fn of(memory: &'static mut [u8]) -> Self {
        Self {
            used_before: Vec::with_capacity(BUFFERS),
            fresh: memory.chunks_exact_mut(BUFFER_BYTES).take(BUFFERS),
        }
    }
}

#[cfg(target_os = "linux")]
fn advise_huge(map: &MmapMut) -> std::io::Result<()> {
    map.advise(memmap2::Advice::HugePage)
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_: &MmapMut) -> std::io::Result<()> {
    Ok(())
}

/// A buffer of [`BUFFER_BYTES`], given back when dropped. It starts at a multiple of its size, as
/// direct reads need.
#[derive(Debug)]
pub struct Buffer(&'static mut [u8]);

impl Buffer {
    /// Takes a buffer that nobody uses.
    pub fn take() -> Option<Self> {
        let mut free = FREE.lock();
        if let Some(buffer) = free.used_before.pop() {
            return Some(Self(buffer));
        }
        let buffer = free.fresh.next()?;
        // Where there is no memory yet, Btrfs reads through the page cache.
        buffer.chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 0);
        Some(Self(buffer))
    }

    /// Whether [`take`](Self::take) would have none to give.
    pub fn are_all_taken() -> bool {
        Self::unused() == 0
    }

    /// How many nobody uses.
    pub fn unused() -> usize {
        let free = FREE.lock();
        free.used_before.len() + free.fresh.len()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        FREE.lock().used_before.push(std::mem::take(&mut self.0));
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0
    }
}
