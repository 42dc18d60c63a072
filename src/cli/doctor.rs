//! `doctor`: whether mounts work on this machine, and what to do if not; and what a model would take.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use odmoe_fs::doctor::{Check, Verdict, examine};
use odmoe_fs::inspect::{FormsReport, Memory};
use odmoe_fs::model::Model;
#[cfg(feature = "remote")]
use odmoe_fs::source::remote::{Address, is_url};
use odmoe_fs::toy::Toy;
use serde::Serialize;

use super::demo::{Mounted, temporary_folder};
use super::failure::{Failure, Result};
use super::screen::Screen;
use super::{Stop, forms, print, print_json, text};

/// Check whether this machine can mount, or whether a model elsewhere can be read
///
/// Looks at the device, the mount helper, containers, the kernel and limits, and at the end mounts a
/// toy model in a temporary folder. The exit status is 0 if mounts work, 3 if they do not, and 1 if
/// that could not be found out.
#[derive(clap::Args)]
pub struct DoctorArgs {
    /// Also say what this model takes in each form (--as), beside the memory that is free. Of the address
    /// of a model, look at its server instead of this machine; that fetches at most 17 MiB
    #[arg(value_name = "MODEL.gguf")]
    model: Option<PathBuf>,
    /// Read the address from a file, as `mount` does
    #[cfg(feature = "remote")]
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    url_file: Option<PathBuf>,
    /// Allow plain http:// to other machines
    #[cfg(feature = "remote")]
    #[arg(long)]
    insecure_http: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    /// Whether mounts work; `null` if that could not be found out.
    works: Option<bool>,
    checks: Vec<Check>,
    /// That it works, and that it does not, in words.
    #[serde(skip)]
    words: (&'static str, &'static str),
    /// If a model was given.
    #[serde(flatten)]
    model: Option<ModelReport>,
}

/// What a model takes here.
#[derive(Serialize)]
struct ModelReport {
    #[serde(flatten)]
    forms: FormsReport,
    /// `None` where the system does not tell.
    memory: Option<Memory>,
}

impl ModelReport {
    fn new(path: &Path) -> Result<Self> {
        Ok(Self {
            forms: FormsReport::new(&Model::open(path)?),
            memory: Memory::of_this_machine(),
        })
    }
}

#[cfg(feature = "remote")]
impl DoctorArgs {
    /// The address to look at, if there is one.
    fn address(&self) -> Result<Option<Address>> {
        if let Some(file) = &self.url_file {
            let all = Address::of_file(file, self.insecure_http)?;
            return Ok(all.into_iter().next());
        }
        let url = self.model.as_deref().filter(|model| is_url(model));
        let parse = |url: &Path| Address::parse(&url.to_string_lossy(), self.insecure_http);
        Ok(url.map(parse).transpose()?)
    }
}

/// Runs the command; says whether mounts work.
pub fn run(args: &DoctorArgs) -> Result<bool> {
    #[cfg(feature = "remote")]
    if let Some(address) = args.address()? {
        let _stop = Stop::at_once(args.json)?;
        let checks = super::reach::checks(&address, args.insecure_http);
        let works = checks.iter().all(|check| check.verdict != Verdict::Failure);
        let report = Report {
            works: Some(works),
            checks,
            words: (
                "the model can be read from there",
                "the model cannot be read from there",
            ),
            model: None,
        };
        return report.print(args.json).map(|()| works);
    }
    let stop = Stop::on_signals()?;
    let model = args.model.as_deref().map(ModelReport::new).transpose()?;
    let mut checks = examine();
    let trial = trial(&stop);
    stop.check()?;
    let has_failure = checks.iter().any(|check| check.verdict == Verdict::Failure);
    let works = match trial.verdict {
        Verdict::Unknown if !has_failure => None,
        verdict => Some(verdict == Verdict::Good),
    };
    if works == Some(true) {
        // What should keep mounts from working does not.
        let failures = checks.iter_mut();
        let failures = failures.filter(|check| check.verdict == Verdict::Failure);
        failures.for_each(|check| check.verdict = Verdict::Note);
    }
    checks.push(trial);
    let words = ("mounts work here", "mounts do not work here");
    Report {
        works,
        checks,
        words,
        model,
    }
    .print(args.json)?;
    works.ok_or_else(|| {
        Failure::new("whether mounts work could not be tried")
            .hint("set TMPDIR to a folder that you can write to")
    })
}

/// What is wrong with this machine, for a mount that failed: a line for each, with its cure.
pub fn complaints() -> String {
    let failures = examine()
        .into_iter()
        .filter(|check| check.verdict == Verdict::Failure);
    let mut out = String::new();
    for check in failures {
        // Writing to a String cannot fail.
        let _ = write!(out, "{}: {}", check.name, check.found);
        if let Some(cure) = check.cure {
            let _ = write!(out, "; cure: {cure}");
        }
        out.push('\n');
    }
    out
}

/// Mounts a toy model and reads of it: what no look at the machine can replace. A folder in which
/// that cannot be prepared says nothing of mounts, so the next one is tried.
fn trial(stop: &Stop) -> Check {
    let name = "trial mount";
    let mut folders = vec![std::env::temp_dir()];
    let others = ["XDG_RUNTIME_DIR"].into_iter().filter_map(std::env::var_os);
    folders.extend(others.map(PathBuf::from));
    folders.extend(["/tmp", "/var/tmp"].map(PathBuf::from));
    let (mut refused, mut unprepared) = (None, None);
    for folder in folders {
        let prepared = match Prepared::new(&folder, stop) {
            Ok(prepared) => prepared,
            Err(e) => {
                unprepared.get_or_insert(e);
                continue;
            }
        };
        match prepared.mount_and_read() {
            Ok(()) => return Check::good(name, "a toy model was mounted, read and unmounted"),
            Err(e) => drop(refused.get_or_insert(e)),
        }
        if stop.check().is_err() {
            break;
        }
    }
    match (refused, unprepared) {
        (Some(e), _) => {
            // What a mount advises in doubt is to run this.
            let cure = e.hint.filter(|hint| !hint.contains("odmoe-fs doctor"));
            let cure = cure.map(Cow::into_owned);
            Check::new(name, Verdict::Failure, e.message, cure)
        }
        (None, Some(e)) => Check::new(name, Verdict::Unknown, e.message, None),
        (None, None) => Check::new(name, Verdict::Unknown, "it was not tried", None),
    }
}

/// A toy model and a directory to mount it on, in a folder that is removed again.
struct Prepared {
    folder: tempfile::TempDir,
    model: PathBuf,
    directory: PathBuf,
}

impl Prepared {
    fn new(within: &Path, stop: &Stop) -> Result<Self> {
        let folder = temporary_folder("odmoe-doctor-", within)?;
        let model = folder.path().join("toy.gguf");
        let toy = Toy {
            layers: 1,
            experts: 2,
            dim: 64,
            ffn_dim: 64,
            vocab: 64,
            ..Toy::default()
        };
        toy.write(&model, &stop.flag, &|_| {})?;
        let directory = folder.path().join("mnt");
        fs::create_dir(&directory)?;
        Ok(Self {
            folder,
            model,
            directory,
        })
    }

    fn mount_and_read(self) -> Result<()> {
        let mounted = Mounted::new(&self.model, &self.directory)?;
        let file = "experts/layer_00_expert_001.safetensors";
        fs::read(self.directory.join(file))?;
        mounted.unmount()?;
        Ok(self.folder.close()?)
    }
}

impl Report {
    fn print(&self, json: bool) -> Result<()> {
        match json {
            true => print_json(self),
            false => print(&self.text(&Screen::of_stdout())),
        }
    }

    fn text(&self, screen: &Screen) -> String {
        let width = self
            .checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or(0);
        let mut out = String::new();
        for check in &self.checks {
            let mark = match check.verdict {
                Verdict::Good => "ok  ",
                Verdict::Note => "note",
                Verdict::Failure => "FAIL",
                Verdict::Unknown => "?   ",
            };
            let label = format!("{mark}  {:width$}  ", check.name);
            out += &screen.beside(&label, &text::name(&check.found));
            out += "\n";
            if let Some(cure) = &check.cure {
                // A command, which can be copied only if nothing breaks it.
                // Writing to a String cannot fail.
                let _ = writeln!(out, "      cure: {cure}");
            }
        }
        let (yes, no) = self.words;
        let end = match self.works {
            Some(true) => yes.to_owned(),
            Some(false) => no.to_owned(),
            None => format!("whether {yes} could not be found out"),
        };
        out += &format!("\n{end}\n");
        if let Some(model) = &self.model {
            out += "\n";
            out += &forms::table(&model.forms, model.memory, screen);
        }
        out
    }
}
