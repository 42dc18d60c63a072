//! A small Mixture-of-Experts GGUF with made-up weights, to try things on.
//!
//! The plan: `plan` lists keys and tensors as a converter would write them, with llama.cpp's
//! names or the reference converter's; [`Toy::write`] deals the tensors out to the parts and
//! streams each tensor's data (`weights`) from a random sequence of its own. So the bytes of a
//! tensor depend on the seed, its name and its type, and on nothing else.

mod error;
mod plan;
mod qwen3moe;
#[cfg(test)]
mod tests;
mod weights;

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

pub use self::error::ToyError;
use self::plan::{Halt, Plan};
use self::weights::Elements;
use crate::gguf::{GGML_TYPES, GgmlType, MAX_TENSORS, PartName};
use crate::work::Progress;

/// What a toy is made of. The same values always give the same bytes.
#[derive(Debug, Clone)]
pub struct Toy {
    pub arch: Arch,
    /// Layers, each with experts: one of [`LAYERS`].
    pub layers: u32,
    /// Experts per layer: one of [`EXPERTS`].
    pub experts: u32,
    /// The width of the model (embedding length): one of [`WIDTHS`].
    pub dim: u32,
    /// The width inside an expert (feed-forward length): one of [`EXPERT_WIDTHS`].
    pub ffn_dim: u32,
    /// Tokens in the vocabulary: one of [`VOCABULARIES`].
    pub vocab: u32,
    /// The type of the matrices, one of [`Toy::types`]; norms and routers are always F32.
    pub ggml_type: &'static GgmlType,
    pub naming: Naming,
    /// Parts of about equal size, each with at least one tensor.
    pub parts: u16,
    /// Other seeds give other weights.
    pub seed: u64,
}

/// The architecture of a toy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arch {
    /// One that no program computes, `toy-moe`: names and shapes are those of many models.
    #[default]
    Toy,
    /// Qwen3's with experts, with a tokenizer of bytes: programs load it and generate tokens.
    Qwen3Moe,
}

impl Arch {
    /// `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Toy => "toy-moe",
            Self::Qwen3Moe => "qwen3moe",
        }
    }
}

/// How the tensors of experts are named and cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Naming {
    /// One tensor per layer and matrix: `blk.L.ffn_gate_exps`, `ffn_down_exps`, `ffn_up_exps`.
    #[default]
    Stacked,
    /// As stacked, with gate and up in one: `blk.L.ffn_gate_up_exps`, `ffn_down_exps`.
    Fused,
    /// One tensor per expert and matrix: `blk.L.ffn_gate.E`, `ffn_down.E`, `ffn_up.E`.
    PerExpert,
    /// The toy of mlx-od-moe's converter: `blk.L.ffn.experts.E.w1`, `w2`, `w3`, shapes reversed.
    Reference,
}

// The most layers and experts are llama.cpp's own limits; the other limits only keep a slip of the
// finger from filling a disk.
pub const LAYERS: RangeInclusive<u32> = 1..=512;
pub const EXPERTS: RangeInclusive<u32> = 1..=1024;
pub const WIDTHS: RangeInclusive<u32> = 1..=16_384;
pub const EXPERT_WIDTHS: RangeInclusive<u32> = 1..=65_536;
pub const VOCABULARIES: RangeInclusive<u32> = 1..=1_000_000;

impl Default for Toy {
    /// Two layers of four experts in F32, 62 MB.
    fn default() -> Self {
        Self {
            arch: Arch::default(),
            layers: 2,
            experts: 4,
            dim: 512,
            ffn_dim: 1024,
            vocab: 1000,
            ggml_type: GgmlType::from_name("F32").expect("F32 is a type"),
            naming: Naming::default(),
            parts: 1,
            seed: 0,
        }
    }
}

impl Toy {
    /// The types that the matrices of a toy can have: those that gguf-py knows and files hold.
    pub fn types() -> impl Iterator<Item = &'static GgmlType> {
        GGML_TYPES.iter().filter(|t| Elements::of(t).is_some())
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> Result<u64, ToyError> {
        Ok(self.plan()?.bytes())
    }

    /// Writes the model and returns its files, in the order of the parts: `out`, or of several
    /// parts the names of a split set that are made from it.
    ///
    /// Either all of them appear, or none; no existing file is overwritten. Once `stop` is set, it
    /// ends early and leaves nothing behind.
    pub fn write(
        &self,
        out: &Path,
        stop: &AtomicBool,
        progress: &dyn Fn(Progress),
    ) -> Result<Vec<PathBuf>, ToyError> {
        let plan = self.plan()?;
        let paths = part_paths(out, self.parts);
        for path in &paths {
            if path.symlink_metadata().is_ok() {
                return Err(ToyError::Exists(path.clone()));
            }
        }
        let mut written = Vec::with_capacity(paths.len());
        for ((no, range), path) in (0..).zip(plan.parts(paths.len())).zip(&paths) {
            let part = plan.part(no, self.parts, range);
            let part = part.write(self.seed, path, stop, progress);
            written.push(part.map_err(|halt| match halt {
                Halt::Io(cause) => ToyError::Io {
                    path: path.clone(),
                    cause,
                },
                Halt::Stopped => ToyError::Stopped,
            })?);
            progress(Progress { bytes: 0, files: 1 });
        }
        for (at, (file, path)) in written.into_iter().zip(&paths).enumerate() {
            if let Err(e) = file.persist_noclobber(path) {
                for path in &paths[..at] {
                    let _ = fs::remove_file(path); // the error that matters is the first one
                }
                return Err(match e.error.kind() {
                    io::ErrorKind::AlreadyExists => ToyError::Exists(path.clone()),
                    _ => ToyError::Io {
                        path: path.clone(),
                        cause: e.error,
                    },
                });
            }
        }
        Ok(paths)
    }

    /// What it holds, if it can be written.
    fn plan(&self) -> Result<Plan, ToyError> {
        for (option, value, range) in [
            ("--layers", self.layers, LAYERS),
            ("--experts", self.experts, EXPERTS),
            ("--dim", self.dim, WIDTHS),
            ("--ffn-dim", self.ffn_dim, EXPERT_WIDTHS),
            ("--vocab", self.vocab, VOCABULARIES),
            ("--split", self.parts.into(), 1..=u16::MAX.into()),
        ] {
            if !range.contains(&value) {
                return Err(ToyError::OutOfRange {
                    option,
                    value,
                    range,
                });
            }
        }
        if self.arch == Arch::Qwen3Moe {
            qwen3moe::check(self)?;
        }
        if Elements::of(self.ggml_type).is_none() {
            return Err(ToyError::Type(self.ggml_type));
        }
        let plan = Plan::new(self)?;
        let (tensors, parts) = (plan.tensors.len(), usize::from(self.parts));
        if parts > tensors {
            return Err(ToyError::TooManyParts { tensors, parts });
        }
        if tensors as u64 > MAX_TENSORS {
            return Err(ToyError::TooManyTensors(tensors));
        }
        Ok(plan)
    }
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
