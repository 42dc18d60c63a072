//! How fast blocks become numbers and MLX's arrays: this crate beside the crate `anamnesis`, and
//! beside copying as many bytes. One thread, in memory, pieces of 1 MiB of output as a mount
//! computes them.
//!
//! `codec_bench TYPE` takes one sample of all outputs of a type and prints, as JSON, GB/s for each
//! side. `benches/run.sh --only codec` takes seven and makes a table of them.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use anamnesis::{Bf16Out, F16Out, F32Out, GgufType, dequantize_gguf_blocks};
use anyhow::Context;
use odmoe_fs::codec::{Codec, Float, Map, Output};
use odmoe_fs::gguf::GgmlType;

/// Bytes of output at a time.
const PIECE: usize = 1 << 20;
/// A sample is the mean of as many runs as take so long.
const SAMPLE: Duration = Duration::from_millis(20);

type Sides = BTreeMap<&'static str, f64>;

fn main() -> anyhow::Result<()> {
    let name = std::env::args().nth(1).context("usage: codec_bench TYPE")?;
    let ggml_type = GgmlType::from_name(&name).context("no such type")?;
    let mut found: BTreeMap<&str, Sides> = BTreeMap::new();
    for (key, float) in [
        ("f32", Float::F32),
        ("f16", Float::F16),
        ("bf16", Float::Bf16),
    ] {
        let codec = Codec::of(ggml_type, Output::Numbers(float)).context("no numbers")?;
        found.insert(key, numbers(ggml_type, codec, float)?);
    }
    let map = match Codec::of(ggml_type, Output::Weight(Map::Exact)) {
        Some(_) => Map::Exact,
        None => Map::Requantised,
    };
    found.insert("mlx", mlx(ggml_type, map));
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

/// GB/s of blocks.
fn numbers(ggml_type: &GgmlType, codec: Codec, float: Float) -> anyhow::Result<Sides> {
    let units = PIECE / codec.unit().out;
    let blocks = blocks(ggml_type, units);
    let mut out = vec![0; units * codec.unit().out];
    let ours = per_second(blocks.len(), || {
        codec.compute(black_box(&blocks), black_box(&mut out))
    });
    let weights = units * ggml_type.block_size as usize;
    let theirs = gguf_type(ggml_type.name).context("anamnesis does not know it")?;
    let anamnesis = per_second(blocks.len(), || {
        let blocks = black_box(&blocks);
        // Into memory that is there already: faster than its functions that return some.
        let mut rest = black_box(&mut out[..]);
        let sink = |bytes: &[u8]| {
            let (here, after) = std::mem::take(&mut rest).split_at_mut(bytes.len());
            here.copy_from_slice(bytes);
            rest = after;
            Ok(())
        };
        let done = match float {
            Float::F32 => dequantize_gguf_blocks::<F32Out, _>(blocks, theirs, weights, sink),
            Float::F16 => dequantize_gguf_blocks::<F16Out, _>(blocks, theirs, weights, sink),
            Float::Bf16 => dequantize_gguf_blocks::<Bf16Out, _>(blocks, theirs, weights, sink),
        };
        done.expect("blocks are whole");
    });
    Ok(Sides::from([("odmoe-fs", ours), ("anamnesis", anamnesis)]))
}

/// GB/s of output: all arrays of a type, one after the other, and each by itself.
fn mlx(ggml_type: &GgmlType, map: Map) -> Sides {
    let arrays = [
        ("weight", Output::Weight(map)),
        ("scales", Output::Scales(map, Float::F16)),
        ("biases", Output::Biases(map, Float::F16)),
    ];
    let codecs = arrays.map(|(key, output)| Some((key, Codec::of(ggml_type, output)?)));
    let codecs: Vec<_> = codecs.into_iter().flatten().collect();
    let bytes: usize = codecs.iter().map(|(_, codec)| codec.unit().out).sum();
    let units = PIECE / bytes;
    let blocks = blocks(ggml_type, units);
    let mut outs: Vec<Vec<u8>> = Vec::new();
    for (_, codec) in &codecs {
        outs.push(vec![0; units * codec.unit().out]);
    }
    let mut sides = Sides::new();
    let all = per_second(units * bytes, || {
        for ((_, codec), out) in codecs.iter().zip(&mut outs) {
            codec.compute(black_box(&blocks), black_box(out));
        }
    });
    sides.insert("odmoe-fs", all);
    for ((key, codec), out) in codecs.iter().zip(&mut outs) {
        let one = per_second(out.len(), || {
            codec.compute(black_box(&blocks), black_box(out))
        });
        sides.insert(key, one);
    }
    let (from, mut to) = (vec![1_u8; units * bytes], vec![0_u8; units * bytes]);
    let copy = per_second(from.len(), || {
        black_box(&mut to).copy_from_slice(black_box(&from));
    });
    sides.insert("memcpy", copy);
    sides
}

/// Bytes by the mean time of the work, in GB/s.
fn per_second(bytes: usize, mut work: impl FnMut()) -> f64 {
    work();
    let (start, mut runs) = (Instant::now(), 0_usize);
    while start.elapsed() < SAMPLE {
        work();
        runs += 1;
    }
    (runs * bytes) as f64 / start.elapsed().as_nanos() as f64
}

/// Blocks of random codes, with scales that are numbers: 0x2Cxx is about 1/16.
fn blocks(ggml_type: &GgmlType, count: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(0x5851_F42D_4C95_7F2D)
            .wrapping_add(0x1405_7B7E_F767_814F);
        (state >> 56) as u8
    };
    let bytes = ggml_type.block_bytes as usize;
    let mut blocks: Vec<u8> = (0..count * bytes).map(|_| next()).collect();
    let scales: &[usize] = match ggml_type.name {
        "Q4_1" | "Q5_1" | "Q4_K" | "Q5_K" => &[0, 2],
        "Q2_K" => &[80, 82],
        "Q3_K" => &[108],
        "Q6_K" => &[208],
        "TQ1_0" => &[52],
        "TQ2_0" => &[64],
        "IQ1_M" => &[54], // its highest nibble
        "MXFP4" | "NVFP4" => &[],
        _ => &[0],
    };
    for block in blocks.chunks_exact_mut(bytes) {
        for scale in scales {
            block[scale + 1] = 0x2C;
        }
    }
    blocks
}

fn gguf_type(name: &str) -> Option<GgufType> {
    Some(match name {
        "Q1_0" => GgufType::Q1_0,
        "Q2_0" => GgufType::Q2_0,
        "Q4_0" => GgufType::Q4_0,
        "Q4_1" => GgufType::Q4_1,
        "Q5_0" => GgufType::Q5_0,
        "Q5_1" => GgufType::Q5_1,
        "Q8_0" => GgufType::Q8_0,
        "Q2_K" => GgufType::Q2_K,
        "Q3_K" => GgufType::Q3_K,
        "Q4_K" => GgufType::Q4_K,
        "Q5_K" => GgufType::Q5_K,
        "Q6_K" => GgufType::Q6_K,
        "IQ1_S" => GgufType::IQ1_S,
        "IQ1_M" => GgufType::IQ1_M,
        "IQ2_XXS" => GgufType::IQ2_XXS,
        "IQ2_XS" => GgufType::IQ2_XS,
        "IQ2_S" => GgufType::IQ2_S,
        "IQ3_XXS" => GgufType::IQ3_XXS,
        "IQ3_S" => GgufType::IQ3_S,
        "IQ4_NL" => GgufType::IQ4_NL,
        "IQ4_XS" => GgufType::IQ4_XS,
        "TQ1_0" => GgufType::TQ1_0,
        "TQ2_0" => GgufType::TQ2_0,
        "MXFP4" => GgufType::MXFP4,
        "NVFP4" => GgufType::NVFP4,
        _ => return None,
    })
}
