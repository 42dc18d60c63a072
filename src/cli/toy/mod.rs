//! `toy`: a small MoE model with made-up weights, to try things on.
//!
//! The plan: [`plan`] lists keys and tensors as a converter would write them, with llama.cpp's
//! names or the reference converter's; [`write_toy`] deals the tensors out to the parts and
//! streams each tensor's data ([`weights`]) from a random sequence of its own. So the bytes of a tensor depend
//! on the seed, its name and its type, and on nothing else.

mod plan;
#[cfg(test)]
mod tests;
mod weights;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, FromArgMatches};
use odmoe_fs::gguf::{GGML_TYPES, GgmlType, MAX_TENSORS, PartName};
use odmoe_fs::materialize::ignore_file_size_signal;
use odmoe_fs::work::Progress;

use self::plan::Plan;
use self::weights::Elements;
use super::progress::Meter;
use super::{Stop, say, text};

/// Write a small Mixture-of-Experts GGUF with made-up weights
///
/// It is a model for trying things out: its tensors have the names, shapes and types of a real
/// one, its numbers mean nothing. The same options always give the same bytes.
#[derive(Debug, Clone, Args)]
pub struct ToyArgs {
    /// The file to write; the parts of a split set get its name and their number
    #[arg(value_name = "OUT.gguf")]
    pub out: PathBuf,
    // The most layers and experts are llama.cpp's own limits; the other limits only keep a slip
    // of the finger from filling a disk.
    /// Layers, each with experts
    #[arg(long, value_name = "N", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=512))]
    pub layers: u32,
    /// Experts per layer
    #[arg(long, value_name = "N", default_value_t = 4)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub experts: u32,
    /// Width of the model (embedding length)
    #[arg(long, value_name = "N", default_value_t = 512)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub dim: u32,
    /// Width inside an expert (feed-forward length)
    #[arg(long, value_name = "N", default_value_t = 1024)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub ffn_dim: u32,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 1000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub vocab: u32,
    /// GGML type of the matrices; norms and routers are always F32
    #[arg(
        long = "type",
        value_name = "TYPE",
        default_value = "F32",
        ignore_case = true
    )]
    #[arg(value_parser = type_parser())]
    pub ggml_type: &'static GgmlType,
    /// How the experts' tensors are named and cut
    #[arg(long, value_enum, default_value_t = Naming::Stacked)]
    pub naming: Naming,
    /// Parts of about equal size to split the model into
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub split: u16,
    /// Other seeds give other weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// How the tensors of experts are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Naming {
    /// One tensor per layer and matrix: blk.L.ffn_gate_exps, ffn_down_exps, ffn_up_exps
    Stacked,
    /// As stacked, with gate and up in one: blk.L.ffn_gate_up_exps, ffn_down_exps
    Fused,
    /// One tensor per expert and matrix: blk.L.ffn_gate.E, ffn_down.E, ffn_up.E
    PerExpert,
    /// The toy of mlx-od-moe's converter: blk.L.ffn.experts.E.w1, w2, w3, shapes reversed
    Reference,
}

impl ToyArgs {
    /// The arguments of `toy OUT.gguf`, without any option.
    pub fn new(out: &Path) -> Self {
        let command = Self::augment_args(clap::Command::new("toy").no_binary_name(true));
        command
            .try_get_matches_from([OsStr::new("--"), out.as_os_str()])
            .and_then(|matches| Self::from_arg_matches(&matches))
            .expect("no option is required")
    }
}

/// Takes the names of the types that a toy can be made of, in any case.
fn type_parser() -> impl TypedValueParser<Value = &'static GgmlType> {
    let types = GGML_TYPES.iter().filter(|t| Elements::of(t).is_some());
    PossibleValuesParser::new(types.map(|t| t.name))
        .map(|name| GgmlType::from_name(&name).expect("the name is one of the table"))
}

pub fn run(args: &ToyArgs, quiet: bool) -> anyhow::Result<()> {
    // Beyond `ulimit -f`, writing shall be an error and not the end.
    ignore_file_size_signal();
    let stop = Stop::on_signals()?;
    let meter = Meter::new(Plan::new(args)?.bytes(), quiet);
    let result = write_toy(
        args,
        Watch {
            stop: &stop.flag,
            progress: &|progress| meter.add(progress),
        },
    );
    meter.finish();
    let files = stop.explain(result)?;
    let mut bytes = 0;
    for file in &files {
        bytes += fs::metadata(file)?.len();
    }
    let first = text::path(&files[0]);
    let last = match &files[1..] {
        [] => String::new(),
        [.., last] => format!(" to {}", text::path(last)),
    };
    say(&format!(
        "wrote {first}{last}, {}\nmount it with: odmoe-fs mount {} DIR\n",
        text::size(bytes),
        text::shell(&files[0]),
    ));
    Ok(())
}

/// Who watches while a model is written.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Set when it shall end early.
    pub stop: &'a AtomicBool,
    pub progress: &'a dyn Fn(Progress),
}

impl<'a> Watch<'a> {
    /// Nobody wants to know how far it is.
    pub fn silent(stop: &'a AtomicBool) -> Self {
        Self {
            stop,
            progress: &|_| {},
        }
    }
}

/// Writes the model and returns its files, in the order of the parts.
///
/// Either all of them appear, or none; no existing file is overwritten. Once it is told to stop, it ends
/// early and leaves nothing behind.
pub fn write_toy(args: &ToyArgs, watch: Watch) -> anyhow::Result<Vec<PathBuf>> {
    let plan = Plan::new(args)?;
    let count = usize::from(args.split);
    let tensors = plan.tensors.len();
    ensure!(
        count <= tensors,
        "cannot split {tensors} tensors into {count} parts; use --split {tensors} or less"
    );
    ensure!(
        tensors as u64 <= MAX_TENSORS,
        "{tensors} tensors are more than a model may have ({MAX_TENSORS}); use fewer --layers or --experts"
    );
    let paths = part_paths(&args.out, args.split);
    for path in &paths {
        if path.symlink_metadata().is_ok() {
            return Err(already_exists(path));
        }
    }
    let mut written = Vec::with_capacity(count);
    for ((no, range), path) in (0..).zip(plan.parts(count)).zip(&paths) {
        let part = plan
            .write_part(no, args.split, range, args.seed, path, watch)
            .with_context(|| format!("cannot write {path:?}"))?;
        written.push(part);
        (watch.progress)(Progress { bytes: 0, files: 1 });
    }
    for (at, (file, path)) in written.into_iter().zip(&paths).enumerate() {
        if let Err(e) = file.persist_noclobber(path) {
            for path in &paths[..at] {
                let _ = fs::remove_file(path); // the error that matters is the first one
            }
            return Err(match e.error.kind() {
                io::ErrorKind::AlreadyExists => already_exists(path),
                _ => anyhow::Error::new(e.error).context(format!("cannot create {path:?}")),
            });
        }
    }
    Ok(paths)
}

fn already_exists(path: &Path) -> anyhow::Error {
    anyhow::anyhow!("{path:?} exists already; remove it, or write to another name")
}

/// The file itself, or the parts that are named after it.
fn part_paths(out: &Path, count: u16) -> Vec<PathBuf> {
    if count == 1 {
        return vec![out.to_owned()];
    }
    let prefix = match out.extension() {
        Some(extension) if extension == "gguf" => out.with_extension(""),
        _ => out.to_owned(),
    };
    let name = PartName {
        prefix: prefix.into_os_string(),
        number: 1,
        count: count.into(),
    };
    let path = |number| name.sibling(number).into();
    (1..=count.into()).map(path).collect()
}
