//! The few system calls that neither std nor rustix offers as needed, each as a small safe
//! function. All `unsafe` code of the crate is here.
#![allow(unsafe_code)]

pub mod copy;
pub mod file_system;
pub mod mount;
pub mod privileges;
pub mod probe;
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
    /// Bytes that a normal user can still write.
    pub available: u64,
    /// The unit, in bytes, in which it allocates and shares room.
    pub block: u64,
}

/// The room on the file system that holds a file or directory.
pub fn room(file: &File) -> io::Result<Room> {
    let stats = rustix::fs::fstatvfs(file)?;
    Ok(Room {
        available: stats.f_bavail.saturating_mul(stats.f_frsize),
        block: stats.f_frsize.max(1),
    })
}

/// Maps a whole file for reading.
///
/// # Safety
/// The file must not change while the map lives: reading beyond the end of a truncated file raises
/// SIGBUS, and writing to the file changes bytes behind shared references.
pub unsafe fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the caller promises that the file does not change.
    unsafe { Mmap::map(file) }
}
