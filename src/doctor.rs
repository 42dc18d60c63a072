//! Whether this machine can mount, and the command that cures each thing that prevents it.
//!
//! The problem: FUSE fails with an errno, for reasons found in device nodes, set-user-id bits,
//! containers and the limits of a session.
//!
//! The plan: each [`Check`] examines one of them and changes nothing. A [`Verdict::Failure`]
//! prevents mounting; a [`Verdict::Note`] makes mounts slower or less capable. Only causes that
//! were examined are named.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::host::{self, DEVICE, DOCKER, HELPER_VARIABLE};
use crate::sys::process::{descriptor_limit, effective_ids};

/// The numbers of the FUSE device on Linux.
const DEVICE_NUMBERS: (u64, u64) = (10, 229);

/// The result of examining one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was examined, in a word or two.
    pub name: &'static str,
    pub verdict: Verdict,
    /// What was found, in a sentence.
    pub found: String,
    /// The command, or the change, that cures it; `None` if no cure is needed or known.
    pub cure: Option<String>,
}

/// What a finding means for mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Good,
    /// Mounts work, but could work better.
    Note,
    /// Mounts do not work.
    Failure,
    /// It could not be examined.
    Unknown,
}

impl Check {
    /// Nothing is wrong.
    pub fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Good,
            found: found.into(),
            cure: None,
        }
    }

    /// It works, but could be better.
    pub fn note(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Note,
            cure: Some(cure.into()),
            ..Self::good(name, found)
        }
    }

    /// It does not work.
    pub fn failure(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Failure,
            cure: Some(cure.into()),
            ..Self::good(name, found)
        }
    }

    /// Any verdict, with its cure if one is known.
    pub fn new(
        name: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        cure: Option<String>,
    ) -> Self {
        Self {
            verdict,
            cure,
            ..Self::good(name, found)
        }
    }
}

/// Examines everything that decides whether this user can mount here. Only Linux has such things.
pub fn examine() -> Vec<Check> {
    if !cfg!(target_os = "linux") {
        return Vec::new();
    }
    let who = Who::now();
    let mut checks = vec![device()];
    checks.extend(privileges(&who));
    checks.extend(helper(&who));
    checks.extend(user_name(&who));
    checks.push(allow_other(&who));
    checks.push(kernel());
    checks.extend(limits());
    checks
}

/// The user and the surroundings of this process.
struct Who {
    uid: u32,
    container: Option<&'static str>,
    /// Whether user ids are those of a user namespace rather than those of the machine.
    in_user_namespace: bool,
    /// Whether it has CAP_SYS_ADMIN; `None` if that is unknown.
    may_mount: Option<bool>,
    /// Whether set-user-id programs gain no privileges here.
    no_new_privileges: bool,
}

impl Who {
    fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mut lines = status.lines();
        let no_new_privileges = lines.find_map(|line| line.strip_prefix("NoNewPrivs:"));
        let uid_map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        Self {
            uid: effective_ids().0,
            container: host::container(),
            in_user_namespace: in_user_namespace(&uid_map),
            may_mount: host::may_mount(),
            no_new_privileges: no_new_privileges.is_some_and(|value| value.trim() == "1"),
        }
    }

    fn is_root(&self) -> bool {
        self.uid == 0
    }
}

/// Whether a map of user ids is not the machine's own, `0 0 4294967295`.
fn in_user_namespace(map: &str) -> bool {
    !map.is_empty() && map.split_whitespace().ne(["0", "0", "4294967295"])
}

fn device() -> Check {
    let Ok(metadata) = fs::metadata(DEVICE) else {
        let cure = host::container_cure().unwrap_or("sudo modprobe fuse");
        return Check::failure(DEVICE, "the device does not exist", cure);
    };
    let number = metadata.rdev();
    #[cfg(target_os = "linux")]
    let numbers = (
        u64::from(libc::major(number)),
        u64::from(libc::minor(number)),
    );
    #[cfg(not(target_os = "linux"))]
    let numbers = (number, 0);
    if !metadata.file_type().is_char_device() || numbers != DEVICE_NUMBERS {
        let cure = "sudo rm /dev/fuse && sudo mknod -m 0666 /dev/fuse c 10 229";
        return Check::failure(DEVICE, "it is not the FUSE device", cure);
    }
    let mode = metadata.permissions().mode() & 0o7777;
    match File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => Check::good(DEVICE, format!("can be opened (mode {mode:04o})")),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            Check::failure(DEVICE, "the kernel has no FUSE", "sudo modprobe fuse")
        }
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
            let cure = host::container_cure().unwrap_or(DOCKER);
            Check::failure(DEVICE, "the container does not allow opening it", cure)
        }
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Check::failure(
            DEVICE,
            format!("this user may not open it (mode {mode:04o})"),
            "sudo chmod 0666 /dev/fuse",
        ),
        Err(e) => Check::failure(
            DEVICE,
            format!("cannot be opened: {e}"),
            "sudo modprobe fuse",
        ),
    }
}

fn privileges(who: &Who) -> Option<Check> {
    let lacks_right = who.is_root() && who.may_mount == Some(false);
    let (name, place) = match (who.container, who.in_user_namespace) {
        (Some(container), true) => ("container", format!("in {container}, in a user namespace")),
        (Some(container), false) => ("container", format!("in {container}")),
        (None, true) => ("container", "in a user namespace".to_owned()),
        (None, false) if lacks_right => ("root", "root without all capabilities".to_owned()),
        (None, false) => return None,
    };
    if lacks_right {
        let found = format!("{place}: CAP_SYS_ADMIN is missing, which mounting needs");
        let cure = host::container_cure().unwrap_or(DOCKER);
        return Some(Check::failure(name, found, cure));
    }
    let found = format!("{place}; its mounts are visible only inside of it");
    Some(Check::good(name, found))
}

fn helper(who: &Who) -> Option<Check> {
    const INSTALL: &str = "sudo apt install fuse3 # or: sudo dnf install fuse3";
    let name = "fusermount3";
    if who.is_root() {
        return None; // mounts by itself
    }
    let is_chosen = std::env::var_os(HELPER_VARIABLE);
    let unset = format!("unset {HELPER_VARIABLE}");
    let Some(path) = host::fusermount() else {
        return Some(match is_chosen {
            Some(path) => {
                let found = format!("{HELPER_VARIABLE} is {path:?}, which is not a program");
                Check::failure(name, found, unset)
            }
            None => Check::failure(name, "not installed; users need it to mount", INSTALL),
        });
    };
    if !is_mount_helper(&path) {
        let found = format!("{path:?} is a different program");
        let cure = if is_chosen.is_some() { &unset } else { INSTALL };
        return Some(Check::failure(name, found, cure));
    }
    let metadata = fs::metadata(&path).ok();
    let is_set_uid = metadata.is_some_and(|m| m.uid() == 0 && m.permissions().mode() & 0o4000 != 0);
    Some(if !is_set_uid {
        let cure = format!("sudo chown root {0} && sudo chmod u+s {0}", path.display());
        Check::failure(name, format!("{path:?} is not set-user-id root"), cure)
    } else if who.no_new_privileges {
        Check::failure(
            name,
            "set-user-id programs gain no privileges here (no_new_privs is set)",
            "start the container without --security-opt no-new-privileges, or the service without NoNewPrivileges=",
        )
    } else {
        Check::good(name, format!("{} is set-user-id root", path.display()))
    })
}

/// How long a program may take to print its version.
const VERSION_PATIENCE: Duration = Duration::from_secs(2);

/// Whether a program prints the version of fusermount3 or fusermount: `fusermount3 version:
/// 3.14.0`.
fn is_mount_helper(path: &Path) -> bool {
    let child = Command::new(path)
        .arg("-V")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        return false;
    };
    let give_up = Instant::now() + VERSION_PATIENCE;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < give_up {
        std::thread::sleep(Duration::from_millis(5));
    }
    // It has ended, or ends now, so its output ends as well.
    let _ = child.kill();
    let mut said = String::new();
    if let Some(output) = child.stdout.take() {
        let _ = output.take(100).read_to_string(&mut said);
    }
    let _ = child.wait();
    said.starts_with("fusermount")
}

/// Whether the user who mounts has a name, for which the helper asks.
fn user_name(who: &Who) -> Option<Check> {
    if who.is_root() {
        return None;
    }
    let known = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let uid = who.uid.to_string();
    if known
        .lines()
        .any(|line| line.split(':').nth(2) == Some(&uid))
    {
        return None;
    }
    // A directory service may know the user, but only a C library can ask it.
    let found = format!(
        "user {uid} is not in /etc/passwd; fusermount3 refuses unless another service knows its name"
    );
    Some(Check::note(
        "user",
        found,
        format!("sudo useradd --uid {uid} NAME"),
    ))
}

fn allow_other(who: &Who) -> Check {
    let name = "--allow-other";
    if who.is_root() || host::user_allow_other() {
        return Check::good(name, "allowed");
    }
    let cure = "echo user_allow_other | sudo tee -a /etc/fuse.conf";
    Check::note(name, "not allowed: mounts are for this user alone", cure)
}

/// The kernel versions that added something mounts use, newest first, and what is lost before.
const KERNEL_FEATURES: [((u32, u32), &str); 4] = [
    (
        (6, 14),
        "on ext4 and XFS, only O_DIRECT reads leave the page cache unchanged",
    ),
    (
        (6, 6),
        "np.memmap and candle cannot read with --cache direct",
    ),
    (
        (6, 5),
        "cached pages of the model cannot be detected, so they are read from the disk again",
    ),
    (
        (5, 1),
        "every listing of a directory takes two more requests",
    ),
];

fn kernel() -> Check {
    let name = "kernel";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let Some(version) = version(release) else {
        return Check::good(name, format!("Linux {release}"));
    };
    let lost: Vec<_> = KERNEL_FEATURES
        .iter()
        .filter(|(since, _)| version < *since)
        .map(|(since, lost)| format!("before {}.{}: {lost}", since.0, since.1))
        .collect();
    if lost.is_empty() {
        return Check::good(
            name,
            format!("Linux {release} supports everything that mounts use"),
        );
    }
    let found = format!("Linux {release}; {}", lost.join("; "));
    Check::note(name, found, "install a newer kernel")
}

/// `6.18` of `6.18.44-generic`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A loader that maps every file of Kimi-K2.5 needs 23,044 maps, and more for itself. This is the
/// kernel's default.
const MAPS_WANTED: u64 = 65_530;
/// MLX keeps the file of every array open until the array is evaluated.
const DESCRIPTORS_WANTED: u64 = 4096;
/// The limit of all kernels before there was a setting.
const PAGES_WANTED: u64 = 256;

fn limits() -> Vec<Check> {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut checks = Vec::new();
    // Already raised to the hard limit, to which loaders can raise theirs as well.
    let descriptors = descriptor_limit();
    checks.push(limit(
        "ulimit -n",
        descriptors >= DESCRIPTORS_WANTED,
        format!("{descriptors} files may be open"),
        format!("{descriptors} files may be open; a model in many parts, or a loader of many experts, needs more"),
        "ulimit -n 4096 # for good: LimitNOFILE= or /etc/security/limits.conf",
    ));
    if let Some(maps) = number("/proc/sys/vm/max_map_count") {
        checks.push(limit(
            "vm.max_map_count",
            maps >= MAPS_WANTED,
            format!("{maps} maps: a loader can map that many experts at once"),
            format!("{maps} maps; a loader that maps all experts at once needs more"),
            "sudo sysctl vm.max_map_count=262144",
        ));
    }
    if let Some(pages) = number("/proc/sys/fs/fuse/max_pages_limit") {
        checks.push(limit(
            "fs.fuse.max_pages_limit",
            pages >= PAGES_WANTED,
            format!("requests of up to {} KiB", pages * 4),
            format!("{pages} pages: requests are smaller than they could be"),
            "sudo sysctl fs.fuse.max_pages_limit=256",
        ));
    }
    checks.push(Check::good(
        "read-ahead",
        "128 KiB by the kernel, whole experts by odmoe-fs; more with --readahead is seldom faster",
    ));
    checks
}

/// A limit that is high enough, or could be higher.
fn limit(name: &'static str, is_enough: bool, good: String, low: String, cure: &str) -> Check {
    if is_enough {
        Check::good(name, good)
    } else {
        Check::note(name, low, cure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_names_of_releases() {
        assert_eq!(version("6.18.44-generic"), Some((6, 18)));
        assert_eq!(version("5.4-rc1"), Some((5, 4)));
        assert_eq!(version("what"), None);
        assert!((6, 6) < (6, 14));
    }

    #[test]
    fn a_map_of_user_ids_tells_a_namespace() {
        assert!(!in_user_namespace("         0          0 4294967295\n"));
        assert!(in_user_namespace("         0       1000          1\n"));
    }
}
