//! The mount table, `/proc/self/mountinfo`: read without touching any mount.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's number, used by one mount at a time.
    pub id: u64,
    /// The file system's device, `major:minor`.
    pub device: String,
    /// Where it is mounted.
    pub directory: PathBuf,
    /// Such as `fuse.odmoe`.
    pub fs_type: String,
    /// What is mounted, in the file system's own words.
    pub source: OsString,
}

impl MountEntry {
    /// Whether the mount is one of ours.
    pub fn is_odmoe(&self) -> bool {
        self.fs_type == super::FS_TYPE
    }

    /// `ID PARENT MAJ:MIN ROOT DIRECTORY OPTIONS [FIELD…] - TYPE SOURCE SUPER_OPTIONS`, see
    /// proc(5).
    fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
        let dash = fields.iter().position(|field| *field == b"-")?;
        Some(Self {
            id: text(fields.first()?)?.parse().ok()?,
            device: text(fields.get(2)?)?,
            directory: unescaped(fields.get(4)?).into(),
            fs_type: text(fields.get(dash + 1)?)?,
            source: unescaped(fields.get(dash + 2)?),
        })
    }
}

/// Undoes the kernel's `\040` for characters that would break the table.
fn unescaped(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes)
}

/// Every mount that this process sees, in the order they were made; empty where there is no such
/// table.
pub fn mount_table() -> Vec<MountEntry> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    table
        .split(|b| *b == b'\n')
        .filter_map(MountEntry::parse)
        .collect()
}

/// What is mounted on exactly this directory (absolute, without links); the topmost of several.
pub(super) fn mounted_on(directory: &Path) -> Option<MountEntry> {
    topmost(&mount_table(), directory).cloned()
}

/// The mount that a path (absolute, without links) lies in.
pub fn mount_of(path: &Path) -> Option<MountEntry> {
    let table = mount_table();
    path.ancestors()
        .find_map(|ancestor| topmost(&table, ancestor))
        .cloned()
}

fn topmost<'a>(table: &'a [MountEntry], directory: &Path) -> Option<&'a MountEntry> {
    table.iter().rfind(|entry| entry.directory == directory)
}

/// A directory's absolute path without links, found without asking a file system that may be
/// mounted there: it may be dead or stopped.
pub(super) fn resolved(directory: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(directory)?;
    if let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name())
        && let Ok(parent) = parent.canonicalize()
    {
        let candidate = parent.join(name);
        if mounted_on(&candidate).is_some() {
            return Ok(candidate);
        }
    }
    absolute.canonicalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart_and_unescaped() {
        let line = br"120 29 0:45 / /mnt/a\040b\134c ro,nosuid shared:1 master:2 - fuse.odmoe /m\011/k.gguf ro,user_id=0";
        let entry = MountEntry::parse(line).unwrap();
        assert_eq!(entry.directory, Path::new("/mnt/a b\\c"));
        assert_eq!((entry.id, entry.device.as_str()), (120, "0:45"));
        assert_eq!(entry.source, "/m\t/k.gguf");
        assert!(entry.is_odmoe());
        assert_eq!(MountEntry::parse(b"120 29 0:45 / /mnt"), None);
    }
}
