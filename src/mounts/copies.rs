//! Where else a file system is mounted: elsewhere in our mount namespace, or in another one. That
//! of a container may hold a copy of every mount that existed when the container was started.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::PathBuf;

use super::processes::{name_of, process_folder, process_ids};
use super::status;
use super::table::{MountEntry, mount_table, parse_table};

/// Another mount of the same file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountCopy {
    pub directory: PathBuf,
    /// A process of the other mount namespace and its name; `None` for our own.
    pub namespace_of: Option<(u32, String)>,
}

impl fmt::Display for MountCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "on {:?}", self.directory)?;
        if let Some((pid, name)) = &self.namespace_of {
            let name = name.escape_debug();
            write!(f, " in the mount namespace of {name} (process {pid})")?;
        }
        Ok(())
    }
}

/// The odmoe-fs mounts of one device in a table.
pub(super) fn of_device(table: Vec<MountEntry>, device: Option<&str>) -> Vec<MountEntry> {
    let is_it = |mount: &MountEntry| mount.is_odmoe() && Some(mount.device.as_str()) == device;
    table.into_iter().filter(is_it).collect()
}

/// Every mount of a device that a process serves, in our mount namespace and in those of all
/// processes that this user may look into. The number of a device is soon reused: what another
/// process serves is no mount of it.
pub(super) fn elsewhere(device: Option<&str>, daemon: u32) -> Vec<MountCopy> {
    let is_another_s = |mounts: &[MountEntry]| {
        let serving = mounts.first().and_then(status::pid_of);
        serving.is_some_and(|pid| pid != daemon)
    };
    let here = of_device(mount_table(), device);
    if is_another_s(&here) {
        return Vec::new();
    }
    let mut found: Vec<MountCopy> = here
        .into_iter()
        .map(|mount| MountCopy {
            directory: mount.directory,
            namespace_of: None,
        })
        .collect();
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut seen = HashSet::from([namespace("self")]);
    for pid in process_ids() {
        let other = namespace(&pid.to_string());
        if other.is_none() || !seen.insert(other) {
            continue;
        }
        let table = fs::read(process_folder(pid).join("mountinfo")).unwrap_or_default();
        let copies = of_device(parse_table(&table), device);
        if is_another_s(&copies) {
            return Vec::new();
        }
        found.extend(copies.into_iter().map(|mount| MountCopy {
            directory: mount.directory,
            namespace_of: Some((pid, name_of(pid))),
        }));
    }
    found
}
