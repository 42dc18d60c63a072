//! `umount`: the end of a mount.

use std::path::PathBuf;

use odmoe_fs::mounts::{Unmounted, unmount};

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
    let directories = args.directories.iter().map(std::path::absolute);
    let directories: Vec<PathBuf> = directories.collect::<std::io::Result<_>>()?;
    // Where this command stands must not keep a mount busy.
    std::env::set_current_dir("/")?;
    let mut failed = None;
    for directory in &directories {
        match unmount(directory, args.lazy) {
            Ok(unmounted) => say(&in_words(&unmounted)),
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

fn in_words(unmounted: &Unmounted) -> String {
    let directory = text::path(&unmounted.directory);
    let Some(served) = &unmounted.still_served else {
        return format!("unmounted {directory}\n");
    };
    let because = match &served.copies[..] {
        [] => "and has not ended within a second".to_owned(),
        copies => {
            let copies: Vec<String> = copies.iter().map(ToString::to_string).collect();
            format!("since it is still mounted {}", copies.join(", "))
        }
    };
    format!(
        "unmounted {directory}, but process {} goes on serving the model, {because}; it keeps the model open until it ends\n",
        served.pid
    )
}
