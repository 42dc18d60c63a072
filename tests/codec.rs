//! The numbers of every type against a decoder that others wrote: the crate `anamnesis`, which
//! knows all of them, also the two that gguf-py does not.

use anamnesis::{F16Out, F32Out, GgufType, dequantize_gguf, dequantize_gguf_to_bf16};
use odmoe_fs::codec::{Codec, Float, Output};
use odmoe_fs::gguf::GgmlType;

const TYPES: [(&str, GgufType); 25] = [
    ("Q1_0", GgufType::Q1_0),
    ("Q2_0", GgufType::Q2_0),
    ("Q4_0", GgufType::Q4_0),
    ("Q4_1", GgufType::Q4_1),
    ("Q5_0", GgufType::Q5_0),
    ("Q5_1", GgufType::Q5_1),
    ("Q8_0", GgufType::Q8_0),
    ("Q2_K", GgufType::Q2_K),
    ("Q3_K", GgufType::Q3_K),
    ("Q4_K", GgufType::Q4_K),
    ("Q5_K", GgufType::Q5_K),
    ("Q6_K", GgufType::Q6_K),
    ("IQ1_S", GgufType::IQ1_S),
    ("IQ1_M", GgufType::IQ1_M),
    ("IQ2_XXS", GgufType::IQ2_XXS),
    ("IQ2_XS", GgufType::IQ2_XS),
    ("IQ2_S", GgufType::IQ2_S),
    ("IQ3_XXS", GgufType::IQ3_XXS),
    ("IQ3_S", GgufType::IQ3_S),
    ("IQ4_NL", GgufType::IQ4_NL),
    ("IQ4_XS", GgufType::IQ4_XS),
    ("TQ1_0", GgufType::TQ1_0),
    ("TQ2_0", GgufType::TQ2_0),
    ("MXFP4", GgufType::MXFP4),
    ("NVFP4", GgufType::NVFP4),
];

/// Blocks in which every byte takes every value: of these, one in a thousand has a scale that is
/// infinite or NaN.
fn blocks(ggml_type: &GgmlType) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let bytes = 512 * ggml_type.block_bytes as usize;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn computed(ggml_type: &GgmlType, float: Float, blocks: &[u8]) -> Vec<u8> {
    let codec = Codec::of(ggml_type, Output::Numbers(float)).unwrap();
    let unit = codec.unit();
    let mut out = vec![0; blocks.len() / unit.blocks * unit.out];
    codec.compute(blocks, &mut out);
    out
}

/// The numbers are the same, but for the bits of NaN.
fn assert_same<const W: usize>(
    name: &str,
    ours: &[u8],
    theirs: &[u8],
    is_nan: fn([u8; W]) -> bool,
) {
    assert_eq!(ours.len(), theirs.len(), "{name}");
    let pairs = ours
        .as_chunks::<W>()
        .0
        .iter()
        .zip(theirs.as_chunks::<W>().0);
    for (at, (ours, theirs)) in pairs.enumerate() {
        let same = ours == theirs || is_nan(*ours) && is_nan(*theirs);
        assert!(same, "{name}, weight {at}: {ours:x?}, not {theirs:x?}");
    }
}

#[test]
fn numbers_are_those_of_another_decoder() {
    for (name, theirs) in TYPES {
        let ggml_type = GgmlType::from_name(name).unwrap();
        let blocks = blocks(ggml_type);
        let weights = 512 * ggml_type.block_size as usize;

        let ours = computed(ggml_type, Float::F32, &blocks);
        let other = dequantize_gguf::<F32Out>(&blocks, theirs, weights).unwrap();
        assert_same(name, &ours, &other, |bytes| {
            f32::from_le_bytes(bytes).is_nan()
        });

        let ours = computed(ggml_type, Float::F16, &blocks);
        let other = dequantize_gguf::<F16Out>(&blocks, theirs, weights).unwrap();
        assert_same(name, &ours, &other, |bytes| {
            u16::from_le_bytes(bytes) & 0x7FFF > 0x7C00
        });

        let ours = computed(ggml_type, Float::Bf16, &blocks);
        let mut other = dequantize_gguf_to_bf16(&blocks, theirs, weights).unwrap();
        // Theirs makes zero of a NaN with many bits.
        for (other, ours) in other
            .as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip(ours.as_chunks().0)
        {
            if u16::from_le_bytes(*ours) & 0x7FFF > 0x7F80 {
                *other = *ours;
            }
        }
        assert_eq!(ours, other, "{name}");
    }
}
