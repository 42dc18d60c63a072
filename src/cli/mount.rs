//! `mount`: the tree on a directory, from the background or the foreground.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use odmoe_fs::model::Model;
use odmoe_fs::mounts::{Cache, Mount, Options, close_inherited_descriptors, set_read_ahead};

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
    /// Whose page cache keeps what was read
    #[arg(long, value_enum, value_name = "WHOSE", default_value_t = CacheArg::Page, help_heading = "Reading")]
    cache: CacheArg,
    /// Leave the model's pages in the page cache, too, where other programs find them
    ///
    /// Without it, what is read through the mount is in memory once, as pages of the mounted files. With
    /// it, files that are read for the first time come slower.
    #[arg(long, help_heading = "Reading")]
    keep_source_cache: bool,
    /// How much the kernel reads ahead of programs, such as 512K or 1M; auto leaves its own 128K
    ///
    /// More of it also makes every look at a file's header read as much. Only root may change it.
    #[arg(long, value_name = "SIZE", default_value = "auto", value_parser = read_ahead, help_heading = "Reading")]
    readahead: ReadAheadArg,
    /// Worker threads [default: four per processor, 8 to 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Reading")]
    threads: Option<u16>,
    /// Append the messages of the background process to a file; without it they are lost
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    pub log_file: Option<PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum CacheArg {
    /// That of the mounted files: repeated reads come from memory, without us
    Page,
    /// That of the model: for loaders that read each byte once with pread, such as MLX
    Direct,
}

/// Bytes, or what the kernel has.
#[derive(Clone, Copy)]
enum ReadAheadArg {
    Auto,
    Bytes(u64),
}

fn read_ahead(text: &str) -> Result<ReadAheadArg, String> {
    const SMALLEST: u64 = 4 << 10;
    const LARGEST: u64 = 16 << 20;
    if text == "auto" {
        return Ok(ReadAheadArg::Auto);
    }
    text::parse_size(text)
        .filter(|bytes| (SMALLEST..=LARGEST).contains(bytes))
        .map(ReadAheadArg::Bytes)
        .ok_or_else(|| "it must be auto, or a size from 4K to 16M".to_owned())
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
        cache: match args.cache {
            CacheArg::Page => Cache::Page,
            CacheArg::Direct => Cache::Direct,
        },
        keep_source_cache: args.keep_source_cache,
    };
    let mount = Mount::prepare(model, &args.directory, &options)?;
    let log = match &args.log_file {
        Some(path) => Some(open_log(path, mount.directory())?),
        None => None,
    };
    let summary = summary(&mount);
    let directory = mount.directory().to_owned();
    if args.foreground {
        mount.serve(|| {
            tune(&directory, args.readahead);
            say(&format!("{summary}unmount with Ctrl-C\n"));
        })?;
    } else {
        mount.serve_in_background(log.as_ref())?;
        tune(&directory, args.readahead);
        let directory = text::shell(&directory);
        say(&format!(
            "{summary}unmount with: odmoe-fs umount {directory}\n"
        ));
    }
    Ok(())
}

/// What is not granted is no reason not to mount.
fn tune(directory: &Path, read_ahead: ReadAheadArg) {
    if let ReadAheadArg::Bytes(bytes) = read_ahead
        && let Err(e) = set_read_ahead(directory, bytes)
    {
        tracing::warn!("{e}");
    }
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
