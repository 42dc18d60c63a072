//! Unmounting with the system call, which needs root; and what `/dev/fuse` can do.

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

/// Whether a second descriptor of `/dev/fuse` can serve the same mount (Linux 4.5).
#[cfg(target_os = "linux")]
pub fn can_clone_fuse_device() -> bool {
    use std::os::fd::AsRawFd;
    /// `FUSE_DEV_IOC_CLONE`, `_IOR(229, 0, uint32_t)` of linux/fuse.h.
    const CLONE: libc::Ioctl = libc::_IOR::<u32>(229, 0);
    let open = || {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
    };
    let (Ok(one), Ok(other)) = (open(), open()) else {
        return false;
    };
    let descriptor = other.as_raw_fd() as u32;
    // SAFETY: the kernel reads one 32-bit number there.
    let result = check(unsafe { libc::ioctl(one.as_raw_fd(), CLONE, &descriptor) });
    // Neither serves a mount, which a kernel that knows the call calls invalid.
    result.is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL))
}

#[cfg(not(target_os = "linux"))]
pub fn can_clone_fuse_device() -> bool {
    false
}
