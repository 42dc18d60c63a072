//! Blocks of a type from stdin to one output of them on stdout.
//!
//! ```text
//! codec TYPE numbers FLOAT
//! codec TYPE weight [--requant]
//! codec TYPE scales FLOAT [--requant]
//! codec TYPE biases FLOAT [--requant]
//! ```
//!
//! With `--portable` it is computed without AVX2.
//!
//! The exit status is 3 where the type has no such output.

use std::io::{Read, Write};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use odmoe_fs::codec::{Codec, Float, Map, Output};
use odmoe_fs::gguf::GgmlType;

/// Compute one output of the blocks on stdin
#[derive(Parser)]
struct Cli {
    /// A GGML type, such as Q4_K
    ggml_type: String,
    output: Array,
    #[arg(default_value = "f32")]
    float: Dtype,
    /// The map of MLX that is not exact
    #[arg(long)]
    requant: bool,
    /// Without AVX2
    #[arg(long)]
    portable: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Array {
    Numbers,
    Weight,
    Scales,
    Biases,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let float = match cli.float {
        Dtype::F32 => Float::F32,
        Dtype::F16 => Float::F16,
        Dtype::Bf16 => Float::Bf16,
    };
    let map = if cli.requant {
        Map::Requantised
    } else {
        Map::Exact
    };
    let output = match cli.output {
        Array::Numbers => Output::Numbers(float),
        Array::Weight => Output::Weight(map),
        Array::Scales => Output::Scales(map, float),
        Array::Biases => Output::Biases(map, float),
    };
    let codec = GgmlType::from_name(&cli.ggml_type).and_then(|t| Codec::of(t, output));
    let Some(codec) = codec else {
        return Ok(ExitCode::from(3));
    };
    let mut blocks = Vec::new();
    std::io::stdin().read_to_end(&mut blocks)?;
    let unit = codec.unit();
    anyhow::ensure!(blocks.len().is_multiple_of(unit.blocks), "no whole units");
    let mut out = vec![0; blocks.len() / unit.blocks * unit.out];
    if cli.portable {
        codec.compute_portably(&blocks, &mut out);
    } else {
        codec.compute(&blocks, &mut out);
    }
    std::io::stdout().write_all(&out)?;
    Ok(ExitCode::SUCCESS)
}
