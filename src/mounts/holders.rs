//! Who keeps a mount busy: processes with a file of it open, mapped, or as their working directory.
//!
//! Nothing of the mount is touched, whose process may be stopped: `fdinfo` and `maps` name mounts and devices by
//! their numbers, and where a process works is a text.

use std::fmt;
use std::fs;
use std::path::Path;

use super::MountEntry;
use super::processes::{descriptor_fields, process_folder, process_ids};

/// A process that uses a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    /// The name of its program, as the kernel keeps it: 15 bytes at most.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.escape_debug();
        write!(f, "{name} (process {})", self.pid)
    }
}

/// Every process that uses a mount, as far as this user may look.
pub(super) fn holders(mount: &MountEntry) -> Vec<Holder> {
    let others = process_ids().filter(|&pid| pid != std::process::id());
    let mut holders: Vec<_> = others.filter_map(|pid| holder(pid, mount)).collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

fn holder(pid: u32, mount: &MountEntry) -> Option<Holder> {
    let process = process_folder(pid);
    if !(works_in(&process, mount) || has_open(pid, mount) || has_mapped(&process, mount)) {
        return None;
    }
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name).trim_end().to_owned();
    Some(Holder { pid, name })
}

fn works_in(process: &Path, mount: &MountEntry) -> bool {
    ["cwd", "root"].iter().any(|name| {
        let place = fs::read_link(process.join(name));
        place.is_ok_and(|place| place.starts_with(&mount.directory))
    })
}

fn has_open(pid: u32, mount: &MountEntry) -> bool {
    let ids = descriptor_fields(pid, "mnt_id:");
    ids.iter().any(|id| id.parse() == Ok(mount.id))
}

fn has_mapped(process: &Path, mount: &MountEntry) -> bool {
    let Some(device) = mount.device.split_once(':').and_then(|(major, minor)| {
        let number = |text: &str| text.parse::<u32>().ok();
        Some(format!("{:02x}:{:02x}", number(major)?, number(minor)?))
    }) else {
        return false;
    };
    // ADDRESSES PERMISSIONS OFFSET DEVICE INODE PATH, see proc_pid_maps(5); paths may be any bytes.
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    maps.split(|b| *b == b'\n').any(|line| {
        let field = line.split(|b| *b == b' ').nth(3);
        field == Some(device.as_bytes())
    })
}
