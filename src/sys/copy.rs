//! Writing, and moving bytes between files by the kernel's cheapest means. On systems other than
//! Linux, these calls are refused or do the plain thing.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Whether an error means that this kernel or file system does not support the operation for these
/// files, rather than that it failed.
pub fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EOPNOTSUPP
                | libc::ENOSYS
                | libc::ENOTTY
                | libc::EXDEV
                | libc::EINVAL
                | libc::EPERM
        )
    ) || error.kind() == io::ErrorKind::Unsupported
}

/// Writes the buffer at `offset`. If the kernel supports it (`RWF_DONTCACHE`), writing to the disk
/// begins at once, and the pages leave the cache afterwards.
pub fn write_all_uncached(file: &File, mut buffer: &[u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match imp::write_uncached(file, buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                buffer = &buffer[written..];
                offset += written as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if is_refusal(&e) => return file.write_all_at(buffer, offset),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The first run of data at or after `offset`, in bytes; `None` if only a hole follows. Moves the
/// descriptor's position, which nothing here uses.
pub fn next_data(file: &File, offset: u64) -> io::Result<Option<Range<u64>>> {
    const NOTHING_FOLLOWS: Option<i32> = Some(libc::ENXIO);
    match imp::seek_data(file, offset) {
        Ok(start) => Ok(Some(start..imp::seek_hole(file, start)?)),
        Err(e) if e.raw_os_error() == NOTHING_FOLLOWS => Ok(None),
        Err(e) => Err(e),
    }
}

pub use imp::{
    allocate, clone_range, copy_range, flush_file_system, flushes_whole, takes_uncached_writes,
};

#[cfg(target_os = "linux")]
mod imp {
    use std::io::IoSlice;
    use std::os::fd::AsRawFd;

    use rustix::fs::{FallocateFlags, SeekFrom};
    use rustix::io::ReadWriteFlags;

    use super::*;
    use crate::sys::check;

    const DONTCACHE: ReadWriteFlags =
        ReadWriteFlags::from_bits_retain(libc::RWF_DONTCACHE.cast_unsigned());

    pub fn write_uncached(file: &File, buffer: &[u8], offset: u64) -> io::Result<usize> {
        let pieces = [IoSlice::new(buffer)];
        Ok(rustix::io::pwritev2(file, &pieces, offset, DONTCACHE)?)
    }

    /// Whether this file supports uncached writes. Writes one byte to it.
    pub fn takes_uncached_writes(file: &File) -> bool {
        write_uncached(file, &[0], 0).is_ok()
    }

    pub fn seek_data(file: &File, offset: u64) -> io::Result<u64> {
        Ok(rustix::fs::seek(file, SeekFrom::Data(offset))?)
    }

    pub fn seek_hole(file: &File, offset: u64) -> io::Result<u64> {
        Ok(rustix::fs::seek(file, SeekFrom::Hole(offset))?)
    }

    /// Makes a range of `to` share the blocks of a range of `from`. The range must consist of whole
    /// blocks, or end at the end of `from`.
    pub fn clone_range(
        from: &File,
        offset: u64,
        len: u64,
        to: &File,
        to_offset: u64,
    ) -> io::Result<()> {
        let range = libc::file_clone_range {
            src_fd: from.as_raw_fd().into(),
            src_offset: offset,
            src_length: len,
            dest_offset: to_offset,
        };
        // SAFETY: FICLONERANGE only reads the file_clone_range that it is given.
        check(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &range) })?;
        Ok(())
    }

    /// Copies up to `len` bytes inside the kernel, or on the server of a network file system, and
    /// returns how many. A file system that can share blocks may do so.
    pub fn copy_range(
        from: &File,
        mut offset: u64,
        to: &File,
        mut to_offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let (at, to_at) = (Some(&mut offset), Some(&mut to_offset));
        Ok(rustix::fs::copy_file_range(from, at, to, to_at, len)? as u64)
    }

    /// Reserves room for a range, which reads as zeros until it is written. Unlike glibc's
    /// `posix_fallocate`, it never writes those zeros.
    pub fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(
            file,
            FallocateFlags::empty(),
            offset,
            len,
        )?)
    }

    /// Whether [`flush_file_system`] works as described on the file system of a file. On overlayfs
    /// and FUSE, which are layers on top of another file system, it flushes or reports less.
    pub fn flushes_whole(file: &File) -> bool {
        const OVERLAYFS: u64 = 0x794c_7630;
        const FUSE: u64 = 0x6573_5546;
        rustix::fs::fstatfs(file)
            .is_ok_and(|stats| ![OVERLAYFS, FUSE].contains(&(stats.f_type as u64)))
    }

    /// Waits until everything written to the file system of `file` is on its disk. Since Linux 5.8
    /// this fails if anything was lost since the file was opened, or since the last call.
    pub fn flush_file_system(file: &File) -> io::Result<()> {
        Ok(rustix::fs::syncfs(file)?)
    }
}

#[cfg(not(target_os = "linux"))]
mod imp {
    use super::*;

    fn refused<T>() -> io::Result<T> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn write_uncached(_: &File, _: &[u8], _: u64) -> io::Result<usize> {
        refused()
    }

    pub fn takes_uncached_writes(_: &File) -> bool {
        false
    }

    pub fn seek_data(_: &File, _: u64) -> io::Result<u64> {
        refused()
    }

    pub fn seek_hole(_: &File, _: u64) -> io::Result<u64> {
        refused()
    }

    pub fn clone_range(_: &File, _: u64, _: u64, _: &File, _: u64) -> io::Result<()> {
        refused()
    }

    pub fn copy_range(_: &File, _: u64, _: &File, _: u64, _: u64) -> io::Result<u64> {
        refused()
    }

    pub fn allocate(_: &File, _: u64, _: u64) -> io::Result<()> {
        refused()
    }

    pub fn flushes_whole(_: &File) -> bool {
        false
    }

    /// There is no such call here; files are flushed one by one.
    pub fn flush_file_system(_: &File) -> io::Result<()> {
        Ok(())
    }
}
