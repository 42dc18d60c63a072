//! Making a mount: from a directory that is held to a session that serves what lies on it.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod other;

#[cfg(target_os = "linux")]
use linux as system;
#[cfg(not(target_os = "linux"))]
use other as system;

pub(super) use system::{Made, make};

/// What the kernel is told of a mount.
#[derive(Debug)]
pub(super) struct Wishes {
    /// What is mounted, in mount tables.
    pub source: String,
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))] // the session's ACL says it there
    pub allow_other: bool,
    /// Options for SELinux.
    pub security_labels: Vec<String>,
}

impl Wishes {
    /// What is the same for the kernel and for the helper, each option after a comma.
    #[cfg(target_os = "linux")]
    fn options(&self) -> String {
        let allow_other = self.allow_other.then_some("allow_other");
        let labels = self.security_labels.iter().map(String::as_str);
        let options = allow_other.into_iter().chain(labels);
        options.map(|option| format!(",{option}")).collect()
    }
}
