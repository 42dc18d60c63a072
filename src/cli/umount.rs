//! `umount`: the end of a mount.

use std::path::PathBuf;

use odmoe_fs::mounts::unmount;

use super::failure::{Failure, Result};
use super::{say, text};

/// Unmount directories that odmoe-fs has mounted, also those whose process is dead
#[derive(clap::Args)]
#[command(visible_alias = "unmount")]
pub struct UmountArgs {
    /// The directories
    #[arg(value_name = "DIR", required = true)]
    directories: Vec<PathBuf>,
    /// Take the mount away now, and end it when the last open file is closed
    #[arg(long)]
    lazy: bool,
}

pub fn run(args: &UmountArgs) -> Result<()> {
    let mut failed = None;
    for directory in &args.directories {
        match unmount(directory, args.lazy) {
            Ok(directory) => say(&format!("unmounted {}\n", text::path(&directory))),
            // The others are tried all the same.
            Err(e) => {
                if let Some(earlier) = failed.replace(Failure::from(e)) {
                    earlier.report(false);
                }
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
