//! `doctor`: whether mounts work on this machine, and what to do if not.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::AtomicBool;

use odmoe_fs::doctor::{Check, Verdict, examine};
use odmoe_fs::toy::Toy;
use serde::Serialize;

use super::demo::Mounted;
use super::failure::Result;
use super::screen::Screen;
use super::{print, print_json, text};

/// Check whether this machine can mount, and name the cure of what is missing
///
/// Looks at the device, the mount helper, containers, the kernel and limits, and at the end mounts a toy
/// model in a temporary folder. The exit status is 0 if a mount will work, and 3 if it will not.
#[derive(clap::Args)]
pub struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    /// Whether a mount will work.
    works: bool,
    checks: Vec<Check>,
}

/// Runs the command; says whether a mount will work.
pub fn run(args: &DoctorArgs) -> Result<bool> {
    let mut checks = examine();
    checks.push(trial());
    let works = checks.iter().all(|check| check.verdict != Verdict::Failure);
    let report = Report { works, checks };
    if args.json {
        print_json(&report)?;
    } else {
        print(&report.text(&Screen::of_stdout()))?;
    }
    Ok(works)
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

/// Mounts a toy model and reads of it: what no look at the machine can replace.
fn trial() -> Check {
    let (verdict, found, cure) = match mount_and_read() {
        Ok(()) => (
            Verdict::Good,
            "a toy model was mounted, read and unmounted".to_owned(),
            None,
        ),
        Err(e) => (Verdict::Failure, e.message, e.hint.map(Cow::into_owned)),
    };
    Check {
        name: "trial mount",
        verdict,
        found,
        cure,
    }
}

fn mount_and_read() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("odmoe-doctor-").tempdir()?;
    let model = folder.path().join("toy.gguf");
    let toy = Toy {
        layers: 1,
        experts: 2,
        dim: 64,
        ffn_dim: 64,
        vocab: 64,
        ..Toy::default()
    };
    toy.write(&model, &AtomicBool::new(false), &|_| {})?;
    let directory = folder.path().join("mnt");
    fs::create_dir(&directory)?;
    let mounted = Mounted::new(&model, &directory)?;
    fs::read(directory.join("experts/layer_00_expert_001.safetensors"))?;
    mounted.unmount()
}

impl Report {
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
        out += if self.works {
            "\nmounts work here\n"
        } else {
            "\nmounts do not work here\n"
        };
        out
    }
}
