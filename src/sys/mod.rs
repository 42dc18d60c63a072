//! The few system calls that std lacks, each a small safe function. All `unsafe` of the crate is
//! here.
#![allow(unsafe_code)]

pub mod copy;
pub mod mount;
pub mod privileges;
pub mod process;
pub mod read;
pub mod simd;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use memmap2::Mmap;

/// Turns the -1 of a system call into its error.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Room on a file system.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Bytes that an unprivileged user may still write.
    pub available: u64,
    /// Bytes of the unit that it allocates, and shares, by.
    pub block: u64,
}

/// The room on the file system of `path`.
pub fn room(path: &Path) -> io::Result<Room> {
    let path = c_path(path)?;
    // SAFETY: statvfs is plain data, for which zeros are a value.
    let mut stats: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with NUL and the buffer is a statvfs.
    check(unsafe { libc::statvfs(path.as_ptr(), &mut stats) })?;
    // The widths of the fields differ between platforms.
    #[allow(clippy::unnecessary_cast)]
    let (block, blocks) = (stats.f_frsize as u64, stats.f_bavail as u64);
    Ok(Room {
        available: blocks.saturating_mul(block),
        block: block.max(1),
    })
}

/// Maps a whole file for reading.
///
/// # Safety
/// While the map lives, nobody may change the file: a truncated one raises SIGBUS, a rewritten
/// one changes bytes behind shared references.
pub unsafe fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the caller promises that the file does not change.
    unsafe { Mmap::map(file) }
}
