//! Making a mount: from a directory that is held open to a session that serves the file system.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod other;

#[cfg(target_os = "linux")]
use linux as system;
#[cfg(not(target_os = "linux"))]
use other as system;

pub(super) use system::{NewMount, make};

/// The parameters of a mount that the kernel gets.
#[derive(Debug)]
pub(super) struct MountParameters {
    /// The name of the model in mount tables.
    pub source: String,
    #[cfg_attr(not(target_os = "linux"), allow(dead_code))] // there it is in the session's ACL
    pub allow_other: bool,
    /// Options for SELinux.
    pub security_labels: Vec<String>,
}

impl MountParameters {
    /// The options that the kernel and the mount helper share, each after a comma.
    #[cfg(target_os = "linux")]
    fn options(&self) -> String {
        let allow_other = self.allow_other.then_some("allow_other");
        let labels = self.security_labels.iter().map(String::as_str);
        let options = allow_other.into_iter().chain(labels);
        options.map(|option| format!(",{option}")).collect()
    }
}
