//! Unmounting with the system call, which needs CAP_SYS_ADMIN.

use std::io;
use std::path::Path;

/// Unmounts the mount on `path`. A busy one is refused or, with `lazy`, detached now and dropped
/// when its last user leaves.
#[cfg(target_os = "linux")]
pub fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    use rustix::mount::UnmountFlags;

    let lazily = if lazy {
        UnmountFlags::DETACH
    } else {
        UnmountFlags::empty()
    };
    Ok(rustix::mount::unmount(
        path,
        UnmountFlags::NOFOLLOW | lazily,
    )?)
}

/// The same; macOS has no lazy unmount, only a forced one.
#[cfg(not(target_os = "linux"))]
pub fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    let path = super::c_path(path)?;
    let flags = if lazy { libc::MNT_FORCE } else { 0 };
    // SAFETY: the path ends with NUL.
    super::check(unsafe { libc::unmount(path.as_ptr(), flags) })?;
    Ok(())
}
