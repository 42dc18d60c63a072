//! `mount`: the tree on a directory, from the background or the foreground.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use odmoe_fs::model::Model;
use odmoe_fs::mounts::{Mount, Options, close_inherited_descriptors};

use super::{ModelArg, say, text};

/// Show a model as base_model/ and experts/ on a directory
///
/// Returns when the tree can be used; a background process serves it until it is unmounted.
#[derive(clap::Args)]
pub struct MountArgs {
    #[command(flatten)]
    model: ModelArg,
    /// The directory to mount on: it must exist and be empty
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Stay in the foreground; Ctrl-C (SIGINT) or SIGTERM unmounts
    #[arg(short, long)]
    foreground: bool,
    /// Mount even if the directory is not empty, which hides what is in it
    #[arg(long)]
    nonempty: bool,
    /// Let other users in, too, by the permissions of the files
    #[arg(long)]
    allow_other: bool,
    /// Owner of the files, instead of the user who mounts
    #[arg(long, value_name = "UID")]
    uid: Option<u32>,
    /// Group of the files, instead of that of the user who mounts
    #[arg(long, value_name = "GID")]
    gid: Option<u32>,
    /// Worker threads [default: twice the processors, 4 to 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Append the messages of the background process to a file; without it they are lost
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    pub log_file: Option<PathBuf>,
}

pub fn run(args: &MountArgs) -> anyhow::Result<()> {
    if !args.foreground {
        close_inherited_descriptors().context("cannot close inherited descriptors")?;
    }
    let model = Model::open(&args.model.model)?;
    if model.layout().experts().is_empty() {
        tracing::warn!(
            "{:?} has no routed experts: experts/ will hold an empty registry.json only",
            args.model.model
        );
    }
    let options = Options {
        nonempty: args.nonempty,
        allow_other: args.allow_other,
        uid: args.uid,
        gid: args.gid,
        threads: args.threads.map(usize::from),
    };
    let mount = Mount::prepare(model, &args.directory, &options)?;
    let log = match &args.log_file {
        Some(path) => Some(open_log(path, mount.directory())?),
        None => None,
    };
    let summary = summary(&mount);
    if args.foreground {
        mount.serve(|| say(&format!("{summary}unmount with Ctrl-C\n")))?;
    } else {
        let directory = text::shell(mount.directory());
        mount.serve_in_background(log.as_ref())?;
        say(&format!(
            "{summary}unmount with: odmoe-fs umount {directory}\n"
        ));
    }
    Ok(())
}

fn open_log(path: &Path, directory: &Path) -> anyhow::Result<File> {
    let folder = std::path::absolute(path)?;
    let folder = folder
        .parent()
        .and_then(|folder| folder.canonicalize().ok());
    ensure!(
        !folder.is_some_and(|folder| folder.starts_with(directory)),
        "the log {path:?} would lie below the mount, where nobody could read it; choose another place"
    );
    File::options()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("cannot open the log {path:?}"))
}

fn summary(mount: &Mount) -> String {
    let layout = mount.model().layout();
    let base = layout.files().len() - layout.experts().len();
    format!(
        "mounted on {}: {} in {}, {}\n",
        text::path(mount.directory()),
        text::counted(layout.experts().len(), "expert"),
        text::counted(layout.moe_layers().count(), "layer"),
        text::counted(base, "base file"),
    )
}
