//! Reading by range, with or without the page cache. On systems other than Linux, reads are plain.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::copy::is_refusal;
use crate::spare::Spare;

/// Direct reads start and end at multiples of this in the file, and go to multiples of it in
/// memory: the size of the largest sectors and of the smallest pages.
pub const DIRECT_ALIGNMENT: u64 = 4096;

/// Aligned memory for direct reads of any range; it grows to the largest of them.
static ALIGNED: Spare = Spare::new();

/// Fills the buffer from `offset`. Pages that the read brings into the cache leave it again, and
/// pages that were there stay (`RWF_DONTCACHE`, Linux 6.14). If the kernel or the file system does
/// not support that, `otherwise` fills the rest of the buffer.
pub fn read_exact_uncached(
    file: &File,
    mut buffer: &mut [u8],
    mut offset: u64,
    otherwise: impl FnOnce(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    while !buffer.is_empty() {
        match imp::read_uncached(file, buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if is_refusal(&e) => return otherwise(buffer, offset),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Fills the buffer from `offset` of a file that is [open for direct reads](reopen_direct).
pub fn read_exact_direct(direct: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let first = offset - offset % DIRECT_ALIGNMENT;
    let skip = (offset - first) as usize;
    let wanted = skip + buffer.len();
    let alignment = DIRECT_ALIGNMENT as usize;
    let aligned = wanted.next_multiple_of(alignment);
    ALIGNED.lend(|space| {
        if space.len() < aligned + alignment {
            space.resize(aligned + alignment, 0);
        }
        let start = space.as_ptr().align_offset(alignment);
        let space = &mut space[start..start + aligned];
        if direct.read_at(space, first)? < wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.copy_from_slice(&space[skip..wanted]);
        Ok(())
    })
}

/// Whether reads of a file can leave the page cache unchanged. Reads one byte, if there is one.
pub fn takes_uncached_reads(file: &File) -> bool {
    imp::read_uncached(file, &mut [0], 0).is_ok()
}

pub use imp::{forget, is_cached, only_what_is_read, reopen_direct};

#[cfg(target_os = "linux")]
mod imp {
    use std::io::IoSliceMut;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::{Advice, fadvise};
    use rustix::io::{ReadWriteFlags, preadv2};

    use super::*;

    pub fn read_uncached(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        // rustix does not define it.
        let flags = ReadWriteFlags::from_bits_retain(libc::RWF_DONTCACHE as u32);
        Ok(preadv2(
            file,
            &mut [IoSliceMut::new(buffer)],
            offset,
            flags,
        )?)
    }

    /// Opens an open file a second time, to read past the page cache.
    ///
    /// # Errors
    /// EINVAL if the file system does not support that.
    pub fn reopen_direct(file: &File) -> io::Result<File> {
        File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }

    /// Whether all pages of a range are in the page cache (`cachestat`). False if the kernel does
    /// not tell: before Linux 6.5, or for a file that this process neither owns nor may write to.
    pub fn is_cached(file: &File, offset: u64, len: u64) -> bool {
        /// The same on all architectures but Alpha. rustix does not have it, and libc not for all.
        const SYS_CACHESTAT: libc::c_long = 451;
        let range = [offset, len];
        // Pages: in the cache, dirty, under writeback, evicted, recently evicted.
        let mut counts = [0_u64; 5];
        let (fd, no_flags) = (file.as_raw_fd(), 0);
        // SAFETY: the kernel reads two u64 through the first pointer (struct cachestat_range) and
        // writes five through the second (struct cachestat); the arrays have these lengths and
        // outlive the call.
        let result = unsafe {
            let (range, counts) = (range.as_ptr(), counts.as_mut_ptr());
            libc::syscall(SYS_CACHESTAT, fd, range, counts, no_flags)
        };
        let page = rustix::param::page_size() as u64;
        result == 0 && counts[0] >= (offset + len).div_ceil(page) - offset / page
    }

    /// Advises the kernel not to read ahead in a file, so that only what is read is cached.
    pub fn only_what_is_read(file: &File) {
        let _ = fadvise(file, 0, None, Advice::Random);
    }

    /// Advises the kernel to drop a file from the page cache: the next read is from the disk.
    pub fn forget(file: &File) {
        let _ = fadvise(file, 0, None, Advice::DontNeed);
    }
}

#[cfg(not(target_os = "linux"))]
mod imp {
    use super::*;

    fn refused<T>() -> io::Result<T> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn read_uncached(_: &File, _: &mut [u8], _: u64) -> io::Result<usize> {
        refused()
    }

    pub fn reopen_direct(_: &File) -> io::Result<File> {
        refused()
    }

    pub fn is_cached(_: &File, _: u64, _: u64) -> bool {
        false
    }

    pub fn only_what_is_read(_: &File) {}

    pub fn forget(_: &File) {}
}
