//! The log file of a daemon. The daemon may be root's, and the file in a folder of another user.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};

use super::place::hold;
use super::table::{Links, resolved};

/// Opens a file for appending, and creates it if it is missing. No link that another user could
/// exchange is followed, and a pipe without a reader is not waited for.
///
/// # Errors
/// EPERM with a [`ForeignLink`](super::ForeignLink) for such a link, and every error of opening a
/// file.
pub fn open_log(path: &Path) -> io::Result<File> {
    let path = without_links(&std::path::absolute(path)?)?;
    let folder = hold(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().unwrap_or(OsStr::new("."));
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE;
    let flags = flags | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Only the owner may write to it, whatever the umask.
    let mode = Mode::from_raw_mode(0o644);
    Ok(File::from(openat(&folder, name, flags, mode)?))
}

/// The path without links. A file that does not exist yet stands where it would be created.
fn without_links(path: &Path) -> io::Result<PathBuf> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_symlink() => resolved(path, Links::Trusted),
        _ => match (path.parent(), path.file_name()) {
            (Some(folder), Some(name)) => Ok(resolved(folder, Links::Trusted)?.join(name)),
            _ => Ok(path.to_owned()),
        },
    }
}
