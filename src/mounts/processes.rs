//! The process table, as far as this user may look into it. Nothing here touches a mount.

use std::fs;
use std::path::PathBuf;

/// The ids of all processes.
pub(super) fn process_ids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The folder of a process in `/proc`.
pub(super) fn process_folder(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// The name of a process's program, as the kernel keeps it: 15 bytes at most.
pub(super) fn name_of(pid: u32) -> String {
    let name = fs::read(process_folder(pid).join("comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

/// The FUSE connections in a file of `/proc/PID/fdinfo`. Only recent kernels list them.
#[cfg(target_os = "linux")]
pub(super) fn connections(fdinfo: &str) -> impl Iterator<Item = &str> {
    let values = fdinfo
        .lines()
        .filter_map(|line| line.strip_prefix("fuse_connection:"));
    values.map(str::trim)
}

/// The values of a field of `/proc/PID/fdinfo`, such as `mnt_id:`, one for each descriptor that has
/// the field.
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
