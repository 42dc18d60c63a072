//! `mount`: the tree on a directory, from the background or the foreground.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use odmoe_fs::explain::Explain;
use odmoe_fs::form::Form;
use odmoe_fs::model::Model;
use odmoe_fs::mounts::{
    self, Cache, Caller, Launched, Mount, MountError, Options, answers, launch, set_read_ahead,
    unmount_stale,
};
use odmoe_fs::process::leave_caller;

use super::diagnostics::{self, LogFormat};
use super::doctor::complaints;
use super::failure::{Failure, Result};
use super::form::FormArgs;
use super::show::{ShowArgs, warn_of_directory};
use super::verify::warn_of_unfinished;
use super::{ModelArg, say, text};

/// Show a model as base_model/ and experts/ on a directory
///
/// Returns when the tree can be used; a background process serves it until it is unmounted.
#[derive(clap::Args)]
#[command(args_override_self = true)]
pub struct MountArgs {
    #[command(flatten)]
    model: ModelArg,
    /// The directory to mount on: it must exist and be empty
    #[cfg_attr(
        feature = "remote",
        arg(value_name = "DIR", required_unless_present = "url_file")
    )]
    #[cfg_attr(not(feature = "remote"), arg(value_name = "DIR", required = true))]
    directory: Option<PathBuf>,
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    show: ShowArgs,
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
    #[arg(long, value_name = "UID", value_parser = id)]
    uid: Option<u32>,
    /// Group of the files, instead of that of the user who mounts
    #[arg(long, value_name = "GID", value_parser = id)]
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
    /// How much the kernel reads ahead of programs, such as 512K or 1M
    ///
    /// Only root may change it, and auto does so for forms other than raw, which come faster in pieces of 256K;
    /// all else is left at the kernel's own 128K. Every look at a file's header may read as much.
    #[arg(long, value_name = "SIZE", default_value = "auto", value_parser = read_ahead, help_heading = "Reading")]
    readahead: ReadAheadArg,
    /// Count requests, bytes, latencies and the use of each expert, for `odmoe-fs top`
    ///
    /// Then every open of a file comes to us. What the kernel answers from its cache does not, and is not counted.
    #[arg(long, help_heading = "Reading")]
    stats: bool,
    /// Worker threads, 1 to 256 [default: four per processor, 8 to 16; 64 if the model is elsewhere]
    ///
    /// Each reserves 17 MiB of address space, and takes 3 MiB of memory once it has read.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Reading")]
    threads: Option<u16>,
    /// First unmount what odmoe-fs has mounted on the directory, if anything, whatever its state
    ///
    /// Programs that have files of it open keep the old mount until they close them. A mount whose process is
    /// dead is unmounted without it, too. What other file systems have mounted stays.
    #[arg(long)]
    replace: bool,
    /// Options as in /etc/fstab, such as allow_other,uid=1000,cache=direct
    ///
    /// Each long option of this command can be said so, with _ or -. Those of all file systems, such as
    /// ro, noauto, nofail, user and x-systemd.automount, are accepted; the mount is always
    /// ro,nosuid,nodev,noexec.
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Append the messages of the background process to a file (not with -f, which has stderr)
    ///
    /// Without it they go to the journal of systemd, or, where there is none, are lost.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "foreground",
        help_heading = "Messages"
    )]
    pub log_file: Option<PathBuf>,
    /// Labels of SELinux for the mount, such as context=...; `-o` has them without this name
    #[arg(long, value_name = "LABEL", hide = true)]
    security_label: Vec<String>,
    /// Look at the model, and change nothing: mount(8) was told to fake.
    #[arg(skip)]
    pub is_fake: bool,
    /// How messages are written, to stderr, a log file or the journal
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        default_value_t,
        help_heading = "Messages"
    )]
    pub log_format: LogFormat,
}

impl MountArgs {
    /// Whether the mount is served by a process that outlives this one.
    pub fn leaves_a_daemon(&self) -> bool {
        !self.foreground
    }

    /// Whether messages go to the journal, where there is one.
    pub fn logs_to_journal(&self) -> bool {
        !self.foreground && self.log_file.is_none()
    }
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

/// The number of a user or a group. The largest means no one: chown(2) takes it for "as it is".
fn id(text: &str) -> std::result::Result<u32, String> {
    let id = text.parse().ok().filter(|id| *id != u32::MAX);
    id.ok_or_else(|| "it must be a number; `id NAME` tells a user's and the groups'".to_owned())
}

fn read_ahead(text: &str) -> std::result::Result<ReadAheadArg, String> {
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

pub fn run(args: &MountArgs) -> Result<()> {
    // A wrong command line, which is known before anything is begun.
    args.form.form()?;
    let directory = args.model.directory(args.directory.as_ref())?;
    if args.is_fake {
        return open_model(args).map(drop);
    }
    if args.foreground {
        return serve(args, |made| {
            tell_systemd();
            say(&format!("{}unmount with Ctrl-C\n", made.summary));
            Ok(())
        });
    }
    let launched = launch(
        |caller| serve_in_background(args, caller),
        |_| answers(&directory),
        |said| say(&String::from_utf8_lossy(said)),
    );
    if !matches!(launched, Ok(Launched::Ready(_))) {
        // What a daemon that died has mounted, if it came so far, nobody serves.
        let _ = unmount_stale(&directory);
    }
    match launched? {
        Launched::Ready(_) => {}
        Launched::Failed(said) => return Err(Failure::from_json(&said)),
        Launched::Died(fate) => {
            complain();
            return Err(MountError::DaemonDied(fate).into());
        }
        Launched::Interrupted(signal) => return Err(Failure::interrupted(signal)),
    }
    Ok(())
}

/// Serves from a process of its own; returns its exit status.
fn serve_in_background(args: &MountArgs, caller: Caller) -> i32 {
    diagnostics::log_from_here();
    let mut caller = Some(caller);
    let served = serve(args, |made| {
        let directory = text::shell(made.directory);
        let said = format!(
            "{}unmount with: odmoe-fs umount {directory}\n",
            made.summary
        );
        diagnostics::leave_terminal();
        leave_caller(made.log)?;
        let caller = caller.take().expect("it is taken once");
        caller.ready(said.as_bytes())
    });
    let Err(error) = served else {
        return 0;
    };
    match caller {
        Some(caller) => caller.failed(&error.to_json()),
        None => tracing::error!("{}", error.message),
    }
    1
}

/// A mount that was just made.
struct Made<'a> {
    directory: &'a Path,
    /// What is in it, in a line.
    summary: &'a str,
    log: Option<&'a File>,
}

/// Opens the model, mounts, and serves; `ready` is called when the tree answers.
fn serve<T>(args: &MountArgs, ready: impl FnOnce(Made) -> io::Result<T>) -> Result<()> {
    let served = prepare(args).and_then(|mount| {
        let log = match &args.log_file {
            Some(path) => Some(open_log(path, &mount)?),
            None => None,
        };
        if let Some(log) = &log {
            diagnostics::log_to(log)?;
        }
        let (directory, summary) = (mount.directory().to_owned(), summary(&mount));
        let is_computed = mount.model().layout().form() != Form::Raw;
        let served = mount.serve(|| {
            tune(&directory, args.readahead, is_computed);
            ready(Made {
                directory: &directory,
                summary: &summary,
                log: log.as_ref(),
            })
        });
        served.map_err(|e| match e {
            MountError::Interrupted(signal) => Failure::interrupted(signal),
            e => e.into(),
        })
    });
    served.inspect_err(|e| {
        if e.code == "mount.refused" {
            complain();
        }
    })
}

/// What keeps a mount from working may not be what its error says.
fn complain() {
    let complaints = complaints();
    complaints.lines().for_each(|line| tracing::warn!("{line}"));
}

fn open_model(args: &MountArgs) -> Result<Model> {
    #[cfg(feature = "remote")]
    check_cache(args)?;
    let show = args.show.show();
    let model = args.model.open(args.form.form()?, show)?;
    warn_of_directory(&model);
    if show.experts && model.layout().experts().is_empty() {
        tracing::warn!(
            "{:?} has no routed experts: experts/ will hold an empty registry.json only",
            args.model.shown()
        );
    }
    warn_of_unfinished(&model)?;
    Ok(model)
}

fn prepare(args: &MountArgs) -> Result<Mount> {
    let options = Options {
        nonempty: args.nonempty,
        replace: args.replace,
        allow_other: args.allow_other,
        uid: args.uid,
        gid: args.gid,
        threads: args.threads.map(usize::from),
        cache: match args.cache {
            CacheArg::Page if args.keep_source_cache => Cache::Both,
            CacheArg::Page => Cache::Mount,
            CacheArg::Direct => Cache::Model,
        },
        stats: args.stats,
        security_labels: args.security_label.clone(),
    };
    Ok(Mount::prepare(
        open_model(args)?,
        &args.model.directory(args.directory.as_ref())?,
        &options,
    )?)
}

/// Tells a systemd unit with `Type=notify` that the tree answers; elsewhere it does nothing.
fn tell_systemd() {
    #[cfg(target_os = "linux")]
    if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!("systemd was not told that the mount is ready: {e}");
    }
}

/// For a program that waits for each answer to be computed, fewer and larger ones are faster
/// (docs/performance.md).
const COMPUTED_READ_AHEAD: u64 = 256 << 10;

/// What is not granted is no reason not to mount.
fn tune(directory: &Path, read_ahead: ReadAheadArg, is_computed: bool) {
    match read_ahead {
        ReadAheadArg::Bytes(bytes) => {
            if let Err(e) = set_read_ahead(directory, bytes) {
                tracing::warn!("{}", e.line());
            }
        }
        ReadAheadArg::Auto if is_computed => {
            // Nobody asked for it, and without it everything works.
            if let Err(e) = set_read_ahead(directory, COMPUTED_READ_AHEAD) {
                tracing::debug!("{}", e.line());
            }
        }
        ReadAheadArg::Auto => {}
    }
}

/// Fails if the cache would lie below the mount, before anything is made there.
#[cfg(feature = "remote")]
fn check_cache(args: &MountArgs) -> Result<()> {
    let Some(folder) = args.model.cache_folder() else {
        return Ok(());
    };
    let directory = args.model.directory(args.directory.as_ref())?;
    // If there is no such directory, this is told later.
    let directory = directory.canonicalize();
    if directory.is_ok_and(|directory| lies_below(&folder, &directory)) {
        let message = format!("the cache {folder:?} would lie below the mount");
        return Err(Failure::new(message).hint("choose another folder with --cache-dir"));
    }
    Ok(())
}

/// Whether a folder, which need not be there, lies below a directory, whose path is without links.
fn lies_below(folder: &Path, directory: &Path) -> bool {
    let absolute = std::path::absolute(folder).unwrap_or_default();
    let real = absolute.ancestors().find_map(|at| at.canonicalize().ok());
    real.is_some_and(|real| real.starts_with(directory))
}

/// Opens the log, unless it would be the model or lie below the mount.
fn open_log(path: &Path, mount: &Mount) -> Result<File> {
    let absolute = std::path::absolute(path)?;
    let refused = |why| Failure::new(format!("the log {path:?} {why}")).hint("choose another file");
    let folder = absolute.parent();
    if folder.is_some_and(|folder| lies_below(folder, mount.directory())) {
        return Err(refused(
            "would lie below the mount, where nobody could read it",
        ));
    }
    let irregular = || refused("is not a regular file");
    let log = mounts::open_log(path).map_err(|e| match e.raw_os_error() {
        Some(libc::ENXIO | libc::EISDIR) => irregular(),
        _ => Failure::from(e).context(&format!("cannot open the log {path:?}")),
    })?;
    let metadata = log.metadata()?;
    if !metadata.is_file() && !metadata.file_type().is_char_device() {
        return Err(irregular());
    }
    let is_part = |part: &Path| {
        part.metadata()
            .is_ok_and(|part| (part.dev(), part.ino()) == (metadata.dev(), metadata.ino()))
    };
    if mount.model().source().paths().any(is_part) {
        return Err(refused("is the model itself"));
    }
    Ok(log)
}

fn summary(mount: &Mount) -> String {
    let layout = mount.model().layout();
    let show = layout.show();
    let base = layout.files().len() - layout.experts().len();
    let parts = [
        show.experts.then(|| {
            let experts = text::counted(layout.experts().len(), "expert");
            let layers = text::counted(layout.moe_layers().count(), "layer");
            format!("{experts} in {layers}")
        }),
        show.base.then(|| text::counted(base, "base file")),
        show.joined.then(|| "model.gguf".to_owned()),
        show.hf.then(|| "hf/".to_owned()),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    let directory = text::path(mount.directory());
    format!("mounted on {directory}: {}\n", parts.join(", "))
}
