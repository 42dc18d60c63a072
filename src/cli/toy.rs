//! `toy`: a small MoE model with made-up weights, to try things on.

use std::fs;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, RangedI64ValueParser, TypedValueParser};
use odmoe_fs::gguf::GgmlType;
use odmoe_fs::toy::{self, Toy};

use super::failure::Result;
use super::progress::Meter;
use super::{Stop, say, text};

/// Write a small Mixture-of-Experts GGUF with made-up weights
///
/// A model for trying things out: its tensors have the names, shapes and types of a real one, but
/// its numbers mean nothing. The same options always give the same bytes.
#[derive(Debug, Clone, clap::Args)]
pub struct ToyArgs {
    /// The file to write; the parts of a split set get its name and their number
    #[arg(value_name = "OUT.gguf")]
    out: PathBuf,
    /// The architecture
    #[arg(long, value_enum, default_value_t)]
    arch: Arch,
    /// Layers, each with experts
    #[arg(long, value_name = "N", default_value_t = Toy::default().layers)]
    #[arg(value_parser = within(toy::LAYERS))]
    layers: u32,
    /// Experts per layer
    #[arg(long, value_name = "N", default_value_t = Toy::default().experts)]
    #[arg(value_parser = within(toy::EXPERTS))]
    experts: u32,
    /// Width of the model (embedding length)
    #[arg(long, value_name = "N", default_value_t = Toy::default().dim)]
    #[arg(value_parser = within(toy::WIDTHS))]
    dim: u32,
    /// Width inside an expert (feed-forward length)
    #[arg(long, value_name = "N", default_value_t = Toy::default().ffn_dim)]
    #[arg(value_parser = within(toy::EXPERT_WIDTHS))]
    ffn_dim: u32,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = Toy::default().vocab)]
    #[arg(value_parser = within(toy::VOCABULARIES))]
    vocab: u32,
    /// GGML type of the matrices; norms and routers are always F32 [default: F32, or Q8_0 with --arch
    /// qwen3moe]
    #[arg(
        long = "type",
        value_name = "TYPE",
        value_parser = type_parser(),
        ignore_case = true
    )]
    ggml_type: Option<&'static GgmlType>,
    /// How the experts' tensors are named and cut
    #[arg(long, value_enum, default_value_t)]
    naming: Naming,
    /// Parts of about equal size to split the model into
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    split: u16,
    /// Other seeds give other weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// The architecture of a toy.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Arch {
    /// One that no program computes, with names and shapes that many models have
    #[default]
    Toy,
    /// Qwen3 with experts and a tokenizer, which programs load and generate tokens with
    #[value(name = "qwen3moe")]
    Qwen3Moe,
}

impl From<Arch> for toy::Arch {
    fn from(arch: Arch) -> Self {
        match arch {
            Arch::Toy => Self::Toy,
            Arch::Qwen3Moe => Self::Qwen3Moe,
        }
    }
}

/// How the tensors of experts are named.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Naming {
    /// One tensor per layer and matrix: blk.L.ffn_gate_exps, ffn_down_exps, ffn_up_exps
    #[default]
    Stacked,
    /// As stacked, with gate and up in one: blk.L.ffn_gate_up_exps, ffn_down_exps
    Fused,
    /// One tensor per expert and matrix: blk.L.ffn_gate.E, ffn_down.E, ffn_up.E
    PerExpert,
    /// The toy of mlx-od-moe's converter: blk.L.ffn.experts.E.w1, w2, w3, shapes reversed
    Reference,
}

impl From<Naming> for toy::Naming {
    fn from(naming: Naming) -> Self {
        match naming {
            Naming::Stacked => Self::Stacked,
            Naming::Fused => Self::Fused,
            Naming::PerExpert => Self::PerExpert,
            Naming::Reference => Self::Reference,
        }
    }
}

fn within(range: RangeInclusive<u32>) -> RangedI64ValueParser<u32> {
    RangedI64ValueParser::new().range(i64::from(*range.start())..=i64::from(*range.end()))
}

/// Takes the names of the types that a toy can be made of, in any case.
fn type_parser() -> impl TypedValueParser<Value = &'static GgmlType> {
    PossibleValuesParser::new(Toy::types().map(|t| t.name))
        .map(|name| GgmlType::from_name(&name).expect("the name is one of the table"))
}

impl ToyArgs {
    fn toy(&self) -> Toy {
        let usual = match self.arch {
            Arch::Toy => Toy::default().ggml_type,
            // MLX on a processor multiplies experts that are packed, or in F32, but no others.
            Arch::Qwen3Moe => GgmlType::from_name("Q8_0").expect("Q8_0 is a type"),
        };
        Toy {
            arch: self.arch.into(),
            layers: self.layers,
            experts: self.experts,
            dim: self.dim,
            ffn_dim: self.ffn_dim,
            vocab: self.vocab,
            ggml_type: self.ggml_type.unwrap_or(usual),
            naming: self.naming.into(),
            parts: self.split,
            seed: self.seed,
        }
    }
}

pub fn run(args: &ToyArgs, quiet: bool) -> Result<()> {
    let stop = Stop::on_signals()?;
    let toy = args.toy();
    let meter = Meter::new(toy.bytes()?, quiet);
    let result = toy.write(&args.out, &stop.flag, &|progress| meter.add(progress));
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
