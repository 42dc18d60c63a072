//! `verify`: checks a model, or compares a tree with its model.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use odmoe_fs::form::Form;
use odmoe_fs::layout::{Layout, LayoutError};
use odmoe_fs::model::{Model, ModelError};
use odmoe_fs::mounts::{State, odmoe_mount_of, state_of};
use odmoe_fs::show::Show;
use odmoe_fs::source::PageCache;
use odmoe_fs::verify::{
    Comparison, Depth, Difference, Report, Unfinished, VerifyError, form_of, shown_in,
};
use odmoe_fs::work::default_jobs;
use serde::Serialize;

use super::failure::{Failure, Result};
use super::progress::Meter;
use super::screen::Screen;
use super::{ModelArg, Stop, print, print_json, text};

/// Check a model, or compare a mounted or materialized tree with it, byte for byte
///
/// Without DIR, it checks the model alone: every part must be there, whole and well-formed, every
/// byte of every tensor must be in exactly one file of the tree, and none may look as if it had
/// never been written, as in an incomplete download. With DIR, it compares that tree with the
/// model: exactly the files that its documents list must be there, with the model's bytes. The exit
/// status is 3 if the model alone may be incomplete, or if the tree differs from it.
#[derive(clap::Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    model: ModelArg,
    /// A tree that was mounted or materialized, whole or in part
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Compare names, sizes, headers and documents, but not the tensors' bytes
    #[arg(long)]
    quick: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Files to compare at the same time, 1 to 256 [default: the processors, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
}

/// Runs the command. Returns whether everything is as it should be.
pub fn run(args: &VerifyArgs, quiet: bool) -> Result<bool> {
    let directory = args.model.take_directory(args.directory.as_ref())?;
    let stop = Stop::at_once(args.json)?;
    let Some(directory) = &directory else {
        let needs = [("--quick", args.quick), ("--jobs", args.jobs.is_some())];
        if let Some((option, _)) = needs.into_iter().find(|(_, is_given)| *is_given) {
            return Err(Failure::usage(format!(
                "{option} is of a comparison with a tree, and none was given"
            ))
            .hint("name its directory behind the model"));
        }
        let model = args.model.open(Form::Raw, Show::default())?;
        let unfinished = Unfinished::of(&model)?;
        let report = ModelReport::of(&model, &unfinished);
        if args.json {
            print_json(&report)?;
        } else {
            let text = report.text(args.model.shown(), &unfinished);
            print(&Screen::of_stdout().fit(&text))?;
        }
        return Ok(report.sound);
    };
    let depth = if args.quick {
        Depth::Quick
    } else {
        Depth::Whole
    };
    let jobs = args.jobs.and_then(|n| NonZeroUsize::new(n.into()));
    let jobs = jobs.unwrap_or_else(default_jobs);
    let mount = odmoe_mount_of(directory);
    if let Some(mount) = &mount {
        ask(&mount.directory)?;
    }
    let form = form_of(directory)?;
    let show = shown_in(directory, args.model.shown())?;
    let opened = args.model.open(form, show);
    let mut model = opened.map_err(|e| refused(e, directory, form))?;
    // Each byte is read once, and must not push out what other programs have cached.
    model.set_page_cache(PageCache::Unchanged);
    stop.begin();
    let comparison = Comparison::new(&model, directory, depth)?;
    let meter = Meter::new(comparison.bytes(), quiet);
    let result = comparison.run(jobs, &stop.flag, &|progress| meter.add(progress));
    meter.finish();
    let report = stop.explain(result)?;
    if let Some(mount) = mount {
        // A mount that is held open stays readable after a lazy unmount.
        let is_faulty = !report.differences.is_empty();
        let state = is_faulty.then(|| state_of(&mount.directory));
        if odmoe_mount_of(directory).as_ref() != Some(&mount) || state == Some(State::Stale) {
            return Err(VerifyError::Ended(mount.directory).into());
        }
        if state == Some(State::Changed) {
            return Err(VerifyError::Changed(mount.directory).into());
        }
    }
    if args.json {
        print_json(&TreeReport::of(&report, depth, model.layout()))?;
    } else {
        let text = in_words(&report, depth, model.layout(), directory);
        print(&Screen::of_stdout().fit(&text))?;
    }
    Ok(report.differences.is_empty())
}

/// Why the model cannot be compared with a tree in a form.
fn refused(error: ModelError, directory: &Path, form: Form) -> Failure {
    match error {
        ModelError::Layout {
            cause: cause @ LayoutError::UnknownTypes(_),
            path,
        } => Failure::new(format!(
            "{directory:?} holds {form}, which {path:?} cannot be shown as: {cause}"
        ))
        .hint("name the model that the tree was made from"),
        other => other.into(),
    }
}

/// Fails if the mount on a directory does not answer. A call into it could not even be interrupted.
fn ask(directory: &Path) -> Result<()> {
    let fail = |error: fn(PathBuf) -> VerifyError| Err(error(directory.to_owned()).into());
    match state_of(directory) {
        // Opening an unreadable one fails with the reason.
        State::Alive | State::NotReadable | State::Hidden => Ok(()),
        State::Changed => fail(VerifyError::Changed),
        State::NotAnswering => fail(VerifyError::NotAnswering),
        State::Stale => fail(VerifyError::Stale),
    }
}

/// Warns of a model that may be incomplete, as far as that shows at a glance.
pub fn warn_of_unfinished(model: &Model) -> Result<()> {
    let unfinished = Unfinished::at_a_glance(model)?;
    if !unfinished.is_nothing() {
        tracing::warn!(
            "{:?} may be incomplete, since {}; `odmoe-fs verify MODEL.gguf` tells more",
            model.source().given_path(),
            unfinished.reasons().join(", and ")
        );
    }
    Ok(())
}

/// A well-formed model; any other has caused an error before.
#[derive(Serialize)]
struct ModelReport<'a> {
    /// Whether nothing suggests that it is incomplete.
    sound: bool,
    parts: usize,
    tensors: usize,
    /// Payload bytes of all tensors.
    tensor_bytes: u64,
    /// Files of the tree.
    files: usize,
    /// Payload bytes that are holes, and how many tensors have some.
    unwritten_bytes: u64,
    unwritten_tensors: usize,
    first_unwritten_tensor: Option<&'a str>,
    /// Bytes of all parts, and how many of them take room, if suspiciously few.
    part_bytes: u64,
    stored_bytes: Option<u64>,
    /// Files with names of incomplete downloads.
    download_files: Vec<std::borrow::Cow<'a, str>>,
}

impl<'a> ModelReport<'a> {
    fn of(model: &Model, unfinished: &'a Unfinished) -> Self {
        let marks = unfinished.marks.iter();
        Self {
            sound: unfinished.is_nothing(),
            parts: model.source().paths().len(),
            tensors: unfinished.tensors,
            tensor_bytes: unfinished.tensor_bytes,
            files: model.tree().files().count(),
            unwritten_bytes: unfinished.unwritten_bytes,
            unwritten_tensors: unfinished.unwritten_tensors,
            first_unwritten_tensor: unfinished.first_tensor.as_deref(),
            part_bytes: unfinished.part_bytes,
            stored_bytes: unfinished.stored_bytes,
            download_files: marks.map(|path| path.to_string_lossy()).collect(),
        }
    }

    fn text(&self, path: &Path, unfinished: &Unfinished) -> String {
        let path = text::path(path);
        let tensors = text::counted(self.tensors, "tensor");
        let parts = text::counted(self.parts, "part");
        if self.sound {
            return format!(
                "{path} is sound: {tensors} in {parts}; each of their {} is in exactly one of {}\n",
                text::size(self.tensor_bytes),
                text::counted(self.files, "file"),
            );
        }
        let reasons = unfinished.reasons().into_iter();
        let reasons: String = reasons.map(|reason| format!("  {reason}\n")).collect();
        format!(
            "{path} is well-formed, with {tensors} in {parts}, but it may be incomplete:\n{reasons}\
             Most often a download was interrupted: finish it, or compare the checksum with the published one.\n"
        )
    }
}

#[derive(Serialize)]
struct TreeReport<'a> {
    identical: bool,
    /// Whether payloads were left out.
    quick: bool,
    /// Whether the tree lists all files of the model.
    whole: bool,
    /// Files and bytes that were compared.
    files: usize,
    bytes: u64,
    differences: Vec<DifferenceReport<'a>>,
}

#[derive(Serialize)]
struct DifferenceReport<'a> {
    path: std::borrow::Cow<'a, str>,
    kind: &'static str,
    offset: Option<u64>,
    tensor: Option<&'a str>,
    gguf_name: Option<&'a str>,
    message: String,
}

impl<'a> TreeReport<'a> {
    fn of(report: &'a Report, depth: Depth, layout: &Layout) -> Self {
        let difference = |difference: &'a Difference| DifferenceReport {
            path: difference.path.to_string_lossy(),
            kind: difference.kind.code(),
            offset: difference.offset,
            tensor: difference.tensor.as_ref().map(|t| t.name.as_str()),
            gguf_name: difference
                .tensor
                .as_ref()
                .and_then(|t| t.gguf_name.as_deref()),
            message: difference.to_string(),
        };
        Self {
            identical: report.differences.is_empty(),
            quick: depth == Depth::Quick,
            whole: report.experts + report.base_files == shown_files(layout),
            files: report.files,
            bytes: report.bytes,
            differences: report.differences.iter().map(difference).collect(),
        }
    }
}

/// How many of the files that the documents list the tree shows.
fn shown_files(layout: &Layout) -> usize {
    let files = layout.files().iter();
    files.filter(|file| layout.shows(file.kind)).count()
}

fn in_words(report: &Report, depth: Depth, layout: &Layout, directory: &Path) -> String {
    let lines = report.differences.iter();
    let mut said: String = lines
        .map(|difference| format!("{} {difference}\n", text::path(&difference.path)))
        .collect();
    let directory = text::path(directory);
    let places = text::counted(report.differences.len(), "place");
    let is_unreadable = report.differences.iter().all(Difference::is_unreadable);
    said += &match report.differences.len() {
        0 => format!("{directory} is identical to the model"),
        _ if is_unreadable => format!("{directory} cannot be read in {places}"),
        _ => format!("{directory} differs from the model in {places}"),
    };
    said += &format!(
        ": {} compared, {}",
        text::counted(report.files, "file"),
        text::size(report.bytes)
    );
    if depth == Depth::Quick {
        said += ", tensors left out";
    }
    let shown = |is_shown, files| if is_shown { files } else { 0 };
    let all_base = layout.files().len() - layout.experts().len();
    let all_base = shown(layout.show().base, all_base);
    let all_experts = shown(layout.show().experts, layout.experts().len());
    if (report.experts, report.base_files) != (all_experts, all_base) {
        said += &format!(
            "; it lists {} of {}, {} of {}",
            text::count(report.experts),
            text::counted(all_experts, "expert"),
            text::count(report.base_files),
            text::counted(all_base, "base file"),
        );
    }
    said + "\n"
}
