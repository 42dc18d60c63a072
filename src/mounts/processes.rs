//! The process table, as far as this user may look; without touching any mount.

use std::fs;
use std::path::PathBuf;

/// The numbers of all processes.
pub(super) fn process_ids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The folder of a process.
pub(super) fn process_folder(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// The name of a process's program, as the kernel keeps it: 15 bytes at most.
pub(super) fn name_of(pid: u32) -> String {
    let name = fs::read(process_folder(pid).join("comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

/// The FUSE connections that a file of `/proc/PID/fdinfo` names. Only recent kernels tell.
#[cfg(target_os = "linux")]
pub(super) fn connections(fdinfo: &str) -> impl Iterator<Item = &str> {
    let values = fdinfo
        .lines()
        .filter_map(|line| line.strip_prefix("fuse_connection:"));
    values.map(str::trim)
}

/// What `fdinfo` says under a name, such as `mnt_id:`, of each descriptor of a process of which it
/// says that.
pub(super) fn descriptor_fields(pid: u32, name: &str) -> Vec<String> {
    let infos = fs::read_dir(process_folder(pid).join("fdinfo"));
    let infos = infos.into_iter().flatten().flatten();
    let field = |info: fs::DirEntry| {
        let info = fs::read_to_string(info.path()).ok()?;
        let value = info.lines().find_map(|line| line.strip_prefix(name))?;
        Some(value.trim().to_owned())
    };
    infos.filter_map(field).collect()
}
