//! The log of a daemon, which may be root's and lie in a folder of somebody else.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};

use super::place::hold;
use super::table::{Links, resolved};

/// Opens a file for appending, and makes it if it is not there, through no link that another user
/// could exchange. A pipe that nobody reads is not waited for.
///
/// # Errors
/// EPERM, with words of ours, for such a link; and whatever opening a file meets.
pub fn open_log(path: &Path) -> io::Result<File> {
    let path = without_links(&std::path::absolute(path)?)?;
    let folder = hold(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().unwrap_or(OsStr::new("."));
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE;
    let flags = flags | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Whatever the umask, nobody but the owner may write to it.
    let mode = Mode::from_raw_mode(0o644);
    Ok(File::from(openat(&folder, name, flags, mode)?))
}

/// The path without links; what does not exist yet is where it would be made.
fn without_links(path: &Path) -> io::Result<PathBuf> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_symlink() => resolved(path, Links::Trusted),
        _ => match (path.parent(), path.file_name()) {
            (Some(folder), Some(name)) => Ok(resolved(folder, Links::Trusted)?.join(name)),
            _ => Ok(path.to_owned()),
        },
    }
}
