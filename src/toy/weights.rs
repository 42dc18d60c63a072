//! Made-up weights: random bits for every type, such that no number that comes out is infinite.

use crate::gguf::GgmlType;

/// What a block of a type is filled with.
pub(super) enum Elements {
    F32,
    F16,
    Bf16,
    F64,
    /// Integers from -8 to 7.
    Integer,
    /// Random bits, but for the scales of the block, each at its byte in the block. So all
    /// numbers that come out are finite, and none is above 0.2.
    Quantised(&'static [(usize, Scale)]),
}

/// A floating-point number in a block that multiplies (or, as a minimum, is added to) its integers.
#[derive(Clone, Copy)]
pub(super) enum Scale {
    /// An f16, from this number to its double.
    F16(f32),
    /// The same, but in the top four bits of four u16, lowest bits first (IQ1_M).
    F16InNibbles(f32),
    /// An exponent byte: this one or the next.
    E8m0(u8),
    /// Four unsigned floats of four exponent and three mantissa bits: these exponent bits.
    Ue4m3s(u8),
}

impl Elements {
    /// The types that gguf-py 0.19 knows and that are stored in files, with the places of their
    /// scales by the `block_*` structs of `ggml-common.h` (2026-08).
    pub(super) fn of(ggml_type: &GgmlType) -> Option<Self> {
        use Scale::*;
        Some(match ggml_type.name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "F64" => Self::F64,
            "I8" | "I16" | "I32" | "I64" => Self::Integer,
            "Q1_0" => Self::Quantised(&[(0, F16(0.02))]),
            "Q4_0" => Self::Quantised(&[(0, F16(0.005))]),
            "Q4_1" => Self::Quantised(&[(0, F16(0.005)), (2, F16(-0.04))]),
            "Q5_0" => Self::Quantised(&[(0, F16(0.002))]),
            "Q5_1" => Self::Quantised(&[(0, F16(0.002)), (2, F16(-0.03))]),
            "Q8_0" => Self::Quantised(&[(0, F16(0.0003))]),
            "Q2_K" => Self::Quantised(&[(80, F16(0.002)), (82, F16(0.003))]),
            "Q3_K" => Self::Quantised(&[(108, F16(0.0004))]),
            "Q4_K" => Self::Quantised(&[(0, F16(5e-5)), (2, F16(4e-4))]),
            "Q5_K" => Self::Quantised(&[(0, F16(3e-5)), (2, F16(5e-4))]),
            "Q6_K" => Self::Quantised(&[(208, F16(1e-5))]),
            "IQ1_S" => Self::Quantised(&[(0, F16(0.003))]),
            "IQ1_M" => Self::Quantised(&[(48, F16InNibbles(0.003))]),
            "IQ2_XXS" | "IQ2_XS" | "IQ2_S" => Self::Quantised(&[(0, F16(0.0003))]),
            "IQ3_XXS" | "IQ3_S" => Self::Quantised(&[(0, F16(0.0001))]),
            "IQ4_NL" => Self::Quantised(&[(0, F16(0.0003))]),
            "IQ4_XS" => Self::Quantised(&[(0, F16(1e-5))]),
            "TQ1_0" => Self::Quantised(&[(52, F16(0.02))]),
            "TQ2_0" => Self::Quantised(&[(64, F16(0.02))]),
            "MXFP4" => Self::Quantised(&[(0, E8m0(119))]),
            "NVFP4" => Self::Quantised(&[(0, Ue4m3s(1))]),
            _ => return None,
        })
    }

    pub(super) fn fill(&self, block: &mut [u8], mean: f64, random: &mut SplitMix64) {
        match self {
            Self::F32 => block.copy_from_slice(&((mean + random.weight()) as f32).to_le_bytes()),
            Self::F16 => {
                block.copy_from_slice(&f16_bits((mean + random.weight()) as f32).to_le_bytes());
            }
            Self::Bf16 => {
                // The upper half of an f32.
                block.copy_from_slice(&((mean + random.weight()) as f32).to_le_bytes()[2..]);
            }
            Self::F64 => block.copy_from_slice(&(mean + random.weight()).to_le_bytes()),
            Self::Integer => {
                let n = random.next() as i64 >> 60;
                block.copy_from_slice(&n.to_le_bytes()[..block.len()]);
            }
            Self::Quantised(scales) => {
                for bytes in block.chunks_mut(8) {
                    bytes.copy_from_slice(&random.next().to_le_bytes()[..bytes.len()]);
                }
                for &(at, scale) in *scales {
                    scale.put(&mut block[at..], random);
                }
            }
        }
    }
}

impl Scale {
    fn put(self, field: &mut [u8], random: &mut SplitMix64) {
        match self {
            Self::F16(least) => {
                let bits = f16_bits(least * (1.0 + random.fraction()));
                field[..2].copy_from_slice(&bits.to_le_bytes());
            }
            Self::F16InNibbles(least) => {
                let bits = f16_bits(least * (1.0 + random.fraction()));
                for (n, word) in field[..8].chunks_mut(2).enumerate() {
                    let nibble = (bits >> (4 * n)) as u8 & 0x0f;
                    word[1] = nibble << 4 | word[1] & 0x0f;
                }
            }
            Self::E8m0(exponent) => field[0] = exponent + (random.next() & 1) as u8,
            Self::Ue4m3s(exponent) => {
                for byte in &mut field[..4] {
                    *byte = exponent << 3 | *byte & 7;
                }
            }
        }
    }
}

/// The f16 next to `x`, on the side of zero. The magnitude must be below 65,536.
pub(super) fn f16_bits(x: f32) -> u16 {
    const LEAST_NORMAL: f32 = 1.0 / (1 << 14) as f32;
    const STEP_BELOW: f32 = 1.0 / (1 << 24) as f32;
    let magnitude = if x.abs() < LEAST_NORMAL {
        (x.abs() / STEP_BELOW) as u32
    } else {
        // The exponent is biased by 127 in an f32 and by 15 in an f16.
        (x.abs().to_bits() - ((127 - 15) << 23)) >> 13
    };
    let sign = x.to_bits() >> 31 << 15;
    (sign | magnitude) as u16
}

/// The random number generator SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
/// number generators", 2014): a counter in steps of the golden ratio, each value mixed.
pub(super) struct SplitMix64(pub(super) u64);

impl SplitMix64 {
    /// The sequence of one tensor: its start is the seed and the name, mixed byte by byte.
    pub(super) fn of_tensor(seed: u64, name: &str) -> Self {
        let mix = |state: u64, byte: u8| Self(state ^ u64::from(byte)).next();
        Self(name.bytes().fold(Self(seed).next(), mix))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.0;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    pub(super) fn fraction(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// Nearly normal: mean 0, deviation 0.02, never beyond 0.07. It is the sum of four uniform
    /// 16-bit numbers (deviation 37,837) and one product, hence the same on every machine.
    pub(super) fn weight(&mut self) -> f64 {
        let word = self.next();
        let sum: i32 = (0..4).map(|n| i32::from((word >> (16 * n)) as u16)).sum();
        f64::from(sum - 2 * 65_535) * (0.02 / 37_837.0)
    }
}
