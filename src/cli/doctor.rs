//! `doctor`: whether mounts work on this machine, and what to do if not.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;
use odmoe_fs::doctor::{Check, Verdict, examine};
use serde::Serialize;

use super::demo::{Mounted, temporary_folder};
use super::toy::{ToyArgs, Watch, write_toy};
use super::{Stop, print, print_json, text};

/// Check whether this machine can mount, and name the cure of what is missing
///
/// Looks at the device, the mount helper, containers, the kernel and limits, and at the end mounts a
/// toy model in a temporary folder. The exit status is 0 if mounts work, 3 if they do not, and 1 if
/// that could not be found out.
#[derive(clap::Args)]
pub struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    /// Whether mounts work; `null` if that could not be found out.
    works: Option<bool>,
    checks: Vec<Check>,
}

/// Runs the command; says whether mounts work.
pub fn run(args: &DoctorArgs) -> anyhow::Result<bool> {
    let stop = Stop::on_signals()?;
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
    let report = Report { works, checks };
    if args.json {
        print_json(&report)?;
    } else {
        print(&report.text())?;
    }
    ensure!(
        works.is_some(),
        "whether mounts work could not be tried; set TMPDIR to a folder that you can write to"
    );
    Ok(works == Some(true))
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
            // As the command that failed has said it.
            let said = format!("{e:#}");
            let (found, hint) = match said.split_once("\nhint: ") {
                Some((found, hint)) => (found, Some(hint.to_owned())),
                None => (said.as_str(), None),
            };
            Check::new(name, Verdict::Failure, found, hint)
        }
        (None, Some(e)) => Check::new(name, Verdict::Unknown, format!("{e:#}"), None),
        (None, None) => Check::new(name, Verdict::Unknown, "it was not tried", None),
    }
}

/// A toy model and a directory to mount it on, in a folder that is removed again.
struct Prepared {
    folder: tempfile::TempDir,
    toy: PathBuf,
    directory: PathBuf,
}

impl Prepared {
    fn new(within: &Path, stop: &Stop) -> anyhow::Result<Self> {
        let folder = temporary_folder("odmoe-doctor-", within)?;
        let toy = ToyArgs {
            layers: 1,
            experts: 2,
            dim: 64,
            ffn_dim: 64,
            vocab: 64,
            ..ToyArgs::new(&folder.path().join("toy.gguf"))
        };
        write_toy(&toy, Watch::silent(&stop.flag))?;
        let directory = folder.path().join("mnt");
        fs::create_dir(&directory)?;
        Ok(Self {
            folder,
            toy: toy.out,
            directory,
        })
    }

    fn mount_and_read(self) -> anyhow::Result<()> {
        let mounted = Mounted::new(&self.toy, &self.directory)?;
        let file = "experts/layer_00_expert_001.safetensors";
        fs::read(self.directory.join(file))?;
        mounted.unmount()?;
        Ok(self.folder.close()?)
    }
}

impl Report {
    fn text(&self) -> String {
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
            // Writing to a String cannot fail.
            let found = text::name(&check.found);
            let _ = writeln!(out, "{mark}  {:width$}  {found}", check.name);
            if let Some(cure) = &check.cure {
                let _ = writeln!(out, "      {:width$}  cure: {cure}", "");
            }
        }
        out + match self.works {
            Some(true) => "\nmounts work here\n",
            Some(false) => "\nmounts do not work here\n",
            None => "\nwhether mounts work here could not be found out\n",
        }
    }
}
