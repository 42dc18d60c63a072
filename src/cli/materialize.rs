//! `materialize`: writes the tree as real files.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use odmoe_fs::materialize::{Numbers, Options, Plan, Reflink, Selection};
use odmoe_fs::model::Model;
use odmoe_fs::mounts::odmoe_mount_of;
use odmoe_fs::show::Show;
use odmoe_fs::source::PageCache;
use odmoe_fs::verify::{Comparison, Depth, DifferenceKind};
use odmoe_fs::work::default_jobs;

use super::failure::{Failure, Result};
use super::form::FormArgs;
use super::progress::Meter;
use super::screen::Screen;
use super::show::{ShowArgs, warn_of_directory};
use super::verify::warn_of_unfinished;
use super::{Diagnostics, ModelArg, Stop, print, say, text};

/// Write the tree of a model as real files
///
/// A file gets its name when it is complete and on the disk. After an interruption, the same
/// command continues: complete files are not written again.
#[derive(clap::Args)]
pub struct MaterializeArgs {
    #[command(flatten)]
    model: ModelArg,
    /// The directory to write base_model/ and experts/ into; created if missing
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
    /// Write only base_model/
    #[arg(long, conflicts_with_all = ["experts_only", "layers", "experts"])]
    base_only: bool,
    /// Write only the experts (and metadata.json)
    #[arg(long)]
    experts_only: bool,
    /// Write only the experts of these layers, such as 0-3,7
    #[arg(long, value_name = "LIST")]
    layers: Option<Numbers>,
    /// Write only the experts with these numbers, such as 0,5
    #[arg(long, value_name = "LIST")]
    experts: Option<Numbers>,
    /// Show what would be compared and written, and change nothing
    #[arg(long, conflicts_with = "verify")]
    dry_run: bool,
    /// Share disk blocks with the model instead of copying them (on XFS and btrfs)
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    reflink: When,
    /// Replace files that exist but are not what would be written
    #[arg(long)]
    force: bool,
    /// Afterwards, read every file back and compare it with the model
    #[arg(long)]
    verify: bool,
    /// Files to write at the same time [default: the processors, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum When {
    /// Where it is possible
    #[default]
    Auto,
    /// Fail where the file system cannot; what no block of the model holds is written all the same
    Always,
    /// Copy, so that the files do not depend on the model's blocks
    Never,
}

impl From<When> for Reflink {
    fn from(when: When) -> Self {
        match when {
            When::Auto => Self::Auto,
            When::Always => Self::Always,
            When::Never => Self::Never,
        }
    }
}

/// Fails if files are chosen that are not shown.
fn check_choice(args: &MaterializeArgs, show: Show) -> Result<()> {
    let choices = [
        ("--base-only", args.base_only && !show.base, "base"),
        (
            "--experts-only",
            args.experts_only && !show.experts,
            "experts",
        ),
        (
            "--layers",
            args.layers.is_some() && !show.experts,
            "experts",
        ),
        (
            "--experts",
            args.experts.is_some() && !show.experts,
            "experts",
        ),
    ];
    match choices.into_iter().find(|(_, is_wrong, _)| *is_wrong) {
        None => Ok(()),
        Some((option, _, view)) => {
            let message = format!("{option} chooses files of {view}, which --show leaves out");
            Err(Failure::usage(message)
                .hint(format!("leave {option} out, or add {view} to --show")))
        }
    }
}

pub fn run(args: &MaterializeArgs, quiet: bool) -> Result<()> {
    let directory = args.model.directory(args.directory.as_ref())?;
    let show = args.show.show();
    check_choice(args, show)?;
    let stop = Stop::at_once(false)?;
    let mut model = args.model.open(args.form.form()?, show)?;
    warn_of_directory(&model);
    warn_of_unfinished(&model)?;
    // Each byte is read once, and 578 GiB must not push out what other programs have cached.
    model.set_page_cache(PageCache::Unchanged);
    let selection = Selection {
        without_base: args.experts_only,
        without_experts: args.base_only,
        layers: args.layers.clone(),
        experts: args.experts.clone(),
    };
    refuse_mounts(&directory)?;
    let options = Options {
        selection,
        reflink: args.reflink.into(),
        force: args.force,
        dry_run: args.dry_run,
    };
    let plan = Plan::new(&model, &directory, &options)?;
    let done = match plan.files_done() {
        0 => String::new(),
        done => format!(" ({} complete already)", text::count(done as u64)),
    };
    let amount = |files, bytes| format!("{}, {}", text::counted(files, "file"), text::size(bytes));
    let with_documents = |documents| match documents {
        0 => String::new(),
        n => format!(", and {}", text::counted(n, "document")),
    };
    let to_write = format!(
        "to write: {}{}{done}",
        amount(plan.files(), plan.bytes()),
        with_documents(plan.documents())
    );
    let to_compare = match plan.files_to_compare() {
        0 => String::new(),
        files => format!(
            "to compare: {}, that look complete but have another time\n",
            amount(files, plan.bytes_to_compare())
        ),
    };
    if args.dry_run {
        let text = format!("{to_compare}{to_write}\n{}", costs(&plan));
        print(&Screen::of_stdout().fit(&text))?;
        return Ok(plan.check_room()?);
    }
    plan.check_room()?;
    let lost = plan.lost()?;
    if let [first, ..] = &lost[..] {
        tracing::warn!(
            "the registry lists {} that cannot be found and that this run does not write, such as {first}: it will no longer list them",
            text::counted(lost.len(), "expert")
        );
    }
    if !quiet {
        let mut announced = to_compare;
        if plan.files() > 0 {
            let taken = text::size(plan.cost().room);
            announced += &format!("{to_write}, taking {taken} of room\n");
        }
        let _ = Diagnostics.write_all(announced.as_bytes());
    }
    let meter = Meter::new(plan.bytes_to_compare() + plan.bytes(), quiet);
    let jobs = args.jobs.and_then(|n| NonZeroUsize::new(n.into()));
    let jobs = jobs.unwrap_or_else(default_jobs);
    stop.begin();
    let result = plan.run(jobs, &stop.flag, &|progress| meter.add(progress));
    meter.finish();
    let outcome = stop.explain(result)?;
    let named = text::path(&directory);
    say(&match outcome.files {
        0 if outcome.documents > 0 => {
            format!("nothing to write but the documents: all other files are complete in {named}\n")
        }
        0 => format!("nothing to write: all files are complete in {named}\n"),
        files => {
            let written = amount(files, outcome.bytes) + &with_documents(outcome.documents);
            format!("wrote {written}{done} into {named}\n")
        }
    });
    if let [first, ..] = &outcome.untimed[..] {
        tracing::warn!(
            "the time of {}, such as {first:?}, cannot be set, so that every run compares their bytes",
            text::counted(outcome.untimed.len(), "file")
        );
    }
    if let [first, ..] = &outcome.unlisted[..] {
        tracing::warn!(
            "{named} also holds {} that do not belong to this tree, such as {first:?}; remove those that loaders must not find",
            text::counted(outcome.unlisted.len(), "file")
        );
    }
    if args.verify {
        read_back(&model, &directory, jobs, &stop, quiet)?;
    }
    Ok(())
}

/// Compares the files of the tree with the model. Other files in the directory do not matter.
fn read_back(
    model: &Model,
    directory: &Path,
    jobs: NonZeroUsize,
    stop: &Stop,
    quiet: bool,
) -> Result<()> {
    let comparison = Comparison::new(model, directory, Depth::Whole)?;
    let meter = Meter::new(comparison.bytes(), quiet);
    let result = comparison.run(jobs, &stop.flag, &|progress| meter.add(progress));
    meter.finish();
    let report = stop.explain(result)?;
    let differences = report
        .differences
        .iter()
        .filter(|d| d.kind != DifferenceKind::Extra);
    let lines: Vec<String> = differences
        .map(|d| format!("{} {d}\n", text::path(&directory.join(&d.path))))
        .collect();
    if !lines.is_empty() {
        let _ = Diagnostics.write_all(lines.concat().as_bytes());
        let message = format!("{directory:?} differs from the model where this says so");
        return Err(
            Failure::new(message).hint("remove these files, and run the same command again")
        );
    }
    let bytes = text::size(report.bytes);
    say(&format!("verified: {bytes} match the model\n"));
    Ok(())
}

/// The cost of a plan, line by line.
fn costs(plan: &Plan) -> String {
    let cost = plan.cost();
    let shared = match plan.refusal() {
        Some(reason) => format!("share disk blocks with the model: {reason}"),
        None => "share disk blocks with the model".to_owned(),
    };
    let lines = [
        (cost.shared, shared),
        (cost.copied, "are copied".to_owned()),
        (cost.holes, "are holes, and stay so".to_owned()),
        (
            plan.incongruent_bytes(),
            "could be shared on no file system (not page-congruent)".to_owned(),
        ),
        (cost.room, "of room are needed".to_owned()),
        (plan.available_bytes(), "of room are available".to_owned()),
    ];
    let line = |(bytes, what): (u64, String)| format!("{:>12} {what}\n", text::size(bytes));
    lines.into_iter().map(line).collect()
}

/// A mounted tree exists already, and is read-only.
fn refuse_mounts(directory: &Path) -> Result<()> {
    if let Some(mount) = odmoe_mount_of(directory) {
        let message = format!(
            "{directory:?} lies in the odmoe-fs mount on {:?}, which is read-only",
            mount.directory
        );
        return Err(Failure::new(message).hint("choose another directory"));
    }
    Ok(())
}
