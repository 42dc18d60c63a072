//! Unmounting with the system call, which needs root.

use std::io;
use std::path::Path;

use super::{c_path, check};

/// Unmounts what is mounted at `path`. A busy mount is refused, or with `lazy` taken out of the
/// tree now and dropped when its last user leaves.
pub fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    let path = c_path(path)?;
    #[cfg(target_os = "linux")]
    {
        let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
        // SAFETY: the path ends with NUL.
        check(unsafe { libc::umount2(path.as_ptr(), flags) })?;
    }
    #[cfg(not(target_os = "linux"))]
    {
        let flags = if lazy { libc::MNT_FORCE } else { 0 };
        // SAFETY: the path ends with NUL.
        check(unsafe { libc::unmount(path.as_ptr(), flags) })?;
    }
    Ok(())
}
