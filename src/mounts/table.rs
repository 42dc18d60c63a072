//! The mount table, `/proc/self/mountinfo`: read without touching any mount.

use std::ffi::OsString;
#[cfg(target_os = "linux")]
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
#[cfg(target_os = "linux")]
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use crate::explain::{Explain, Hint};
use crate::sys::process::effective_ids;

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's id. Ids are reused, but no two mounts have the same at the same time.
    pub id: u64,
    /// The id of the mount that it is mounted on.
    pub parent: u64,
    /// The file system's device, `major:minor`.
    pub device: String,
    /// Where it is mounted.
    pub directory: PathBuf,
    /// Such as `fuse.odmoe`.
    pub fs_type: String,
    /// The name that the file system gives its source.
    pub source: OsString,
}

impl MountEntry {
    /// Whether it is an odmoe-fs mount.
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
            parent: text(fields.get(1)?)?.parse().ok()?,
            device: text(fields.get(2)?)?,
            directory: unescaped(fields.get(4)?).into(),
            fs_type: text(fields.get(dash + 1)?)?,
            source: unescaped(fields.get(dash + 2)?),
        })
    }
}

/// Decodes the octal escapes, such as `\040`, of characters that would break the table.
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

/// Every mount that this process sees, in the order they were made. Empty on systems without such a
/// table.
pub fn mount_table() -> Vec<MountEntry> {
    parse_table(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// The mounts in a table, the content of `/proc/PID/mountinfo`.
pub(super) fn parse_table(table: &[u8]) -> Vec<MountEntry> {
    let lines = table.split(|b| *b == b'\n');
    lines.filter_map(MountEntry::parse).collect()
}

/// The mount on exactly this directory (absolute, without links); the topmost of several.
pub(super) fn mounted_on(directory: &Path) -> Option<MountEntry> {
    mount_of(directory).filter(|mount| mount.directory == directory)
}

/// The mount that a path (absolute, without links) is in.
pub fn mount_of(path: &Path) -> Option<MountEntry> {
    visible(&mount_table(), path).cloned()
}

/// The mount that a path leads to. Mounts can be moved, so the order of the table proves nothing:
/// this walks down the path as the kernel does, from each mount to the one on top of it.
pub(super) fn visible<'a>(table: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    let mut current: Option<&MountEntry> = None;
    let ancestors: Vec<_> = path.ancestors().collect();
    for ancestor in ancestors.into_iter().rev() {
        let lies_on = |mount: &MountEntry, below: Option<&MountEntry>| match below {
            Some(below) => mount.parent == below.id && mount.id != below.id,
            // The root of this process or, after a chroot, the first mount below it.
            None => !table
                .iter()
                .any(|m| m.id == mount.parent && m.id != mount.id),
        };
        while let Some(mount) = table
            .iter()
            .find(|mount| mount.directory == ancestor && lies_on(mount, current))
        {
            current = Some(mount);
        }
    }
    current
}

/// The odmoe-fs mount that a path is in, or would be in if it existed. The mount itself is not
/// asked.
pub fn odmoe_mount_of(path: &Path) -> Option<MountEntry> {
    let path = std::path::absolute(path).ok()?;
    let existing = path
        .ancestors()
        .find_map(|path| resolved(path, Links::Any).ok())?;
    mount_of(&existing).filter(MountEntry::is_odmoe)
}

/// As many links as the kernel follows.
const MOST_LINKS: usize = 40;

/// Which links a path may go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Links {
    Any,
    /// Only those that no other user, except root, can exchange.
    Trusted,
}

/// A directory's absolute path without links. An odmoe-fs mount on the way is not asked, since it
/// may be dead or stopped; it contains no links, so the names behind it are taken as they are.
///
/// # Errors
/// ELOOP for too many links; EPERM with a [`ForeignLink`] for a link that is not trusted.
pub(super) fn resolved(directory: &Path, links: Links) -> io::Result<PathBuf> {
    let table = mount_table();
    let mut done = PathBuf::from("/");
    let mut rest: Vec<OsString> = reversed(&std::path::absolute(directory)?);
    let mut followed = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            done.pop();
            continue;
        }
        let next = done.join(&name);
        let mount = visible(&table, &next);
        let is_ours = mount.is_some_and(MountEntry::is_odmoe);
        let is_last_mount = rest.is_empty() && mount.is_some_and(|mount| mount.directory == next);
        if is_ours || is_last_mount {
            done = next;
            continue;
        }
        if !next.symlink_metadata()?.is_symlink() {
            done = next;
            continue;
        }
        followed += 1;
        if followed > MOST_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let target = match links {
            Links::Any => next.read_link()?,
            Links::Trusted => trusted_target(&next)?,
        };
        if target.is_absolute() {
            done = PathBuf::from("/");
        }
        rest.extend(reversed(&target));
    }
    Ok(done)
}

/// The target of a link, unless another user, except root, can exchange the link: it belongs to that
/// user, and so does its folder, or others may write to the folder.
fn trusted_target(link: &Path) -> io::Result<PathBuf> {
    let ours = [0, effective_ids().0];
    let folder = link.parent().unwrap_or(link).metadata()?;
    let is_closed = ours.contains(&folder.uid()) && folder.mode() & 0o022 == 0;
    // Through one descriptor, so that owner and target are those of the same link.
    #[cfg(target_os = "linux")]
    let (owner, target) = {
        let held = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(link)?;
        let target = rustix::fs::readlinkat(&held, "", Vec::new())?;
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        (held.metadata()?.uid(), target)
    };
    #[cfg(not(target_os = "linux"))]
    let (owner, target) = (link.symlink_metadata()?.uid(), link.read_link()?);
    if is_closed || ours.contains(&owner) {
        return Ok(target);
    }
    let problem = ForeignLink {
        link: link.to_owned(),
        owner,
    };
    Err(io::Error::new(io::ErrorKind::PermissionDenied, problem))
}

/// A link that is not followed, since another user could exchange it meanwhile. It comes inside an
/// [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("{link:?} is a link of user {owner}, who can exchange it")]
pub struct ForeignLink {
    link: PathBuf,
    owner: u32,
}

impl Explain for ForeignLink {
    fn code(&self) -> &'static str {
        "mount.foreign_link"
    }

    fn hint(&self) -> Option<Hint> {
        Some("give the path that it leads to".into())
    }
}

/// The components of a path, the last one first.
fn reversed(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    let mut names: Vec<_> = names.collect();
    names.reverse();
    names
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
        assert_eq!((entry.parent, entry.source), (29, "/m\t/k.gguf".into()));
        assert_eq!(entry.fs_type, crate::mounts::FS_TYPE);
        assert_eq!(MountEntry::parse(b"120 29 0:45 / /mnt"), None);
    }

    fn id_of(table: &[&str], path: &str) -> Option<u64> {
        let parse = |line: &&str| {
            MountEntry::parse(format!("{line} rw - tmpfs none rw").as_bytes()).unwrap()
        };
        let table: Vec<_> = table.iter().map(parse).collect();
        visible(&table, Path::new(path)).map(|mount| mount.id)
    }

    #[test]
    fn a_path_leads_to_what_lies_on_top_whatever_the_order_of_the_table() {
        // 5 was moved onto 7; 8 lies below a directory that 9 has hidden.
        let table = [
            "1 1 0:1 / /",
            "5 7 0:5 / /a",
            "7 1 0:7 / /a",
            "8 1 0:8 / /h/i",
            "9 1 0:9 / /h",
        ];
        assert_eq!(id_of(&table, "/a"), Some(5));
        assert_eq!(id_of(&table, "/a/b"), Some(5));
        assert_eq!(id_of(&table, "/h/i"), Some(9));
        assert_eq!(id_of(&table, "/b"), Some(1));
        // After a chroot the root is not in the table.
        assert_eq!(id_of(&table[1..], "/a"), Some(5));
        assert_eq!(id_of(&table[1..], "/b"), None);
    }
}
