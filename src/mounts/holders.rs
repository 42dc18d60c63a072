//! What keeps a mount busy: processes that have a file of it open or mapped, or their working
//! directory in it; other mounts on it; loop devices made of its files.
//!
//! The mount itself is never touched, since its process may be stopped. `fdinfo` and `maps` give
//! the numbers of mounts and devices, and working directories can be read as text.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::processes::{descriptor_fields, name_of, process_folder, process_ids};
use super::table::{MountEntry, mount_table};
use crate::sys::process::effective_ids;

/// A process that uses a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    /// The name of its program, of which the kernel keeps 15 bytes.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.escape_debug();
        write!(f, "{name} (process {})", self.pid)
    }
}

/// The known users of a mount. Its text continues "is in use".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users {
    pub processes: Vec<Holder>,
    /// Directories of the mount on which other file systems are mounted.
    pub mounts_on_it: Vec<PathBuf>,
    /// Block devices made of files of the mount, such as `/dev/loop3`.
    pub devices: Vec<PathBuf>,
    /// Whether there are processes that this user may not look into.
    pub some_are_hidden: bool,
}

impl Users {
    /// What to do about them.
    pub(super) fn advice(&self) -> &'static str {
        let is_known = !(self.processes.is_empty() && self.devices.is_empty());
        match (is_known, self.mounts_on_it.is_empty()) {
            (_, false) => "unmount what is mounted on it",
            (true, true) => "end that",
            (false, true) if self.some_are_hidden => "root can see more: `sudo odmoe-fs umount`",
            (false, true) => {
                "look for a swap file, an NFS export, or a process in another PID namespace"
            }
        }
    }
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        let processes = self.processes.iter().map(Holder::to_string);
        let mounts = self.mounts_on_it.iter();
        let mounts = mounts.map(|directory| format!("what is mounted on {directory:?}"));
        let devices = self.devices.iter().map(|device| format!("{device:?}"));
        let users: Vec<String> = processes.chain(mounts).chain(devices).collect();
        match users.len().saturating_sub(SHOWN) {
            _ if users.is_empty() && self.some_are_hidden => {
                write!(f, ", but not by a process that you may look into")
            }
            _ if users.is_empty() => write!(f, ", but not by a process that can be seen"),
            0 => write!(f, " by {}", users.join(", ")),
            more => write!(f, " by {} and {more} more", users[..SHOWN].join(", ")),
        }
    }
}

/// The users of a mount that this user may see.
pub(super) fn users_of(mount: &MountEntry) -> Users {
    let others = process_ids().filter(|&pid| pid != std::process::id());
    let mut users = Users {
        processes: Vec::new(),
        mounts_on_it: mount_table()
            .into_iter()
            .filter(|other| other.parent == mount.id && other.id != mount.id)
            .map(|other| other.directory)
            .collect(),
        devices: loop_devices(&mount.directory),
        some_are_hidden: false,
    };
    for pid in others {
        let process = process_folder(pid);
        if works_in(&process, mount) || has_open(pid, mount) || has_mapped(&process, mount) {
            let name = name_of(pid);
            users.processes.push(Holder { pid, name });
        }
        let looked = fs::read_dir(process.join("fd"));
        let is_denied = |e: io::Error| e.kind() == io::ErrorKind::PermissionDenied;
        users.some_are_hidden |= looked.err().is_some_and(is_denied) && effective_ids().0 != 0;
    }
    users.processes.sort_by_key(|holder| holder.pid);
    users
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

/// The loop devices whose files are in a directory, by the paths that the kernel shows.
fn loop_devices(directory: &Path) -> Vec<PathBuf> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let made_of = |device: &fs::DirEntry| {
        let file = fs::read(device.path().join("loop/backing_file")).unwrap_or_default();
        let file = file.strip_suffix(b"\n").unwrap_or(&file);
        Path::new(std::ffi::OsStr::from_bytes(file)).starts_with(directory)
    };
    let devices = devices.filter(made_of);
    devices
        .map(|device| Path::new("/dev").join(device.file_name()))
        .collect()
}
