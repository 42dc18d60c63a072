//! How much the kernel reads ahead of programs that read mounted files.
//!
//! A file system cannot ask for more than the kernel's 128 KiB. Only root can set more, in
//! `/sys/class/bdi`. By default we leave it alone for raw bytes: since we read the model ahead
//! ourselves, a larger value made nothing faster in our measurements (`docs/performance.md`), and
//! each look at a header reads that much. Computed bytes do come faster in larger pieces.

use std::io;
use std::path::{Path, PathBuf};

use super::table;
use crate::explain::{Explain, Hint};

/// The largest request of the kernel, in pages.
const MAX_PAGES: &str = "/proc/sys/fs/fuse/max_pages_limit";
const PAGE_BYTES: u64 = 4096;
/// The kernel's limit before there was a setting.
const OLD_MAX_PAGES: u64 = 256;

/// Why the kernel's read-ahead is not as requested.
#[derive(Debug, thiserror::Error, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case", prefix = "read_ahead.")]
pub enum ReadAheadError {
    #[error("the kernel's read-ahead cannot be set: {0:?} is in no table of mounts")]
    NoMount(PathBuf),
    #[error("the kernel's read-ahead was not changed ({cause})")]
    Refused {
        setting: String,
        kib: u64,
        cause: io::Error,
    },
    #[error("the kernel reads ahead as requested, but in pieces of {granted_kib} KiB")]
    SmallRequests { granted_kib: u64, pages: u64 },
}

impl Explain for ReadAheadError {
    fn code(&self) -> &'static str {
        self.into()
    }

    fn hint(&self) -> Option<Hint> {
        match self {
            Self::NoMount(_) => None,
            Self::Refused { setting, kib, .. } => {
                Some(format!("root can do it: echo {kib} | sudo tee {setting}").into())
            }
            Self::SmallRequests { pages, .. } => Some(
                format!(
                    "for larger pieces: sudo sysctl fs.fuse.max_pages_limit={pages}, and mount again"
                )
                .into(),
            ),
        }
    }
}

/// Sets the kernel's read-ahead of the mount on a directory, in bytes.
pub fn set_read_ahead(directory: &Path, bytes: u64) -> Result<(), ReadAheadError> {
    let entry = table::mounted_on(directory);
    let device = entry.ok_or_else(|| ReadAheadError::NoMount(directory.to_owned()))?;
    let setting = format!("/sys/class/bdi/{}/read_ahead_kb", device.device);
    let kib = bytes / 1024;
    std::fs::write(&setting, kib.to_string()).map_err(|cause| ReadAheadError::Refused {
        setting,
        kib,
        cause,
    })?;
    let limit = std::fs::read_to_string(MAX_PAGES);
    let limit = limit.ok().and_then(|text| text.trim().parse().ok());
    let limit: u64 = limit.unwrap_or(OLD_MAX_PAGES);
    if bytes > limit * PAGE_BYTES {
        return Err(ReadAheadError::SmallRequests {
            granted_kib: limit * PAGE_BYTES / 1024,
            pages: bytes.div_ceil(PAGE_BYTES),
        });
    }
    Ok(())
}
