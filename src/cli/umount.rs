//! `umount`: the end of a mount.

use std::path::PathBuf;

use odmoe_fs::mounts::unmount;

use super::{say, text};

/// Unmount a directory that odmoe-fs has mounted, also one whose process is dead
#[derive(clap::Args)]
#[command(visible_alias = "unmount")]
pub struct UmountArgs {
    /// The directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Take the mount away now, and end it when the last open file is closed
    #[arg(long)]
    lazy: bool,
}

pub fn run(args: &UmountArgs) -> anyhow::Result<()> {
    let directory = unmount(&args.directory, args.lazy)?;
    say(&format!("unmounted {}\n", text::path(&directory)));
    Ok(())
}
