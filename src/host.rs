//! What this machine offers for FUSE: the device, the mount helper, its settings, and the right to
//! mount. [`mounts`](crate::mounts) and [`doctor`](crate::doctor) share it, so they judge alike.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The FUSE device.
pub(crate) const DEVICE: &str = "/dev/fuse";
/// The settings of the mount helper.
const FUSE_CONF: &str = "/etc/fuse.conf";

/// How to start a container in which root can mount.
pub const DOCKER: &str =
    "docker run --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined IMAGE";
/// The same for podman, with root or without.
pub const PODMAN: &str =
    "podman run --device /dev/fuse --cap-add SYS_ADMIN --security-opt label=disable IMAGE";

/// Whether this process may mount without the helper, which takes CAP_SYS_ADMIN. `None` if that is
/// unknown.
pub(crate) fn may_mount() -> Option<bool> {
    #[cfg(target_os = "linux")]
    {
        use rustix::thread::{CapabilitySet, capabilities};
        let sets = capabilities(None).ok()?;
        Some(sets.effective.contains(CapabilitySet::SYS_ADMIN))
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// The kind of container that this process runs in, if it can be recognised.
pub(crate) fn container() -> Option<&'static str> {
    if Path::new("/run/.containerenv").exists() {
        return Some("podman");
    }
    if Path::new("/.dockerenv").exists() {
        return Some("docker");
    }
    std::env::var_os("container").map(|_| "a container")
}

/// How to start the container so that this process gets the device and the right to mount.
pub(crate) fn container_cure() -> Option<&'static str> {
    match container()? {
        "podman" => Some(PODMAN),
        _ => Some(DOCKER),
    }
}

/// Whether `fuse.conf` lets users pass `allow_other`. It must be alone on its line, but for a
/// comment.
pub(crate) fn user_allow_other() -> bool {
    fs::read_to_string(FUSE_CONF)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split('#').next())
        .any(|line| line.trim() == "user_allow_other")
}

/// The environment variable that names the mount helper.
pub(crate) const HELPER_VARIABLE: &str = "FUSERMOUNT_PATH";

/// The set-user-id program that mounts and unmounts for users: `FUSERMOUNT_PATH`, or the first one
/// in `PATH`.
pub(crate) fn fusermount() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(HELPER_VARIABLE) {
        return Some(PathBuf::from(path)).filter(|path| is_program(path));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/bin".into(), "/sbin".into()])
        .collect();
    ["fusermount3", "fusermount"]
        .into_iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|candidate| is_program(candidate))
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
