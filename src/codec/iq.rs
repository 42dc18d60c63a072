//! The IQ types: groups of weights from a codebook (`grids.rs`), with signs of their own.
//!
//! Structs and offsets: ggml-common.h of ggml-org/ggml; the numbers: `dequantize_row_*` of
//! ggml-quants.c. Integers of several bytes are little-endian.

use super::block::{Block, field};
use super::float::{F16, Number, f16};
use super::grids::{IQ1S_GRID, IQ2S_GRID, IQ2XS_GRID, IQ2XXS_GRID, IQ3S_GRID, IQ3XXS_GRID};
use super::plain::nibbles;
use super::signs::NEGATIVE;

/// The weights of a block, eight at a time, as the codebooks have them.
type Octets = [[u8; 8]; 32];

#[inline(always)]
fn u16_at<const B: usize>(block: &[u8; B], at: usize) -> u16 {
    u16::from_le_bytes(field(block, at))
}

#[inline(always)]
fn u32_at<const B: usize>(block: &[u8; B], at: usize) -> u32 {
    u32::from_le_bytes(field(block, at))
}

/// `ksigns_iq2xs` of ggml-common.h: of seven bits, the byte of even parity.
#[inline(always)]
fn even(seven: u32) -> u8 {
    let seven = (seven & 127) as u8;
    seven | (seven.count_ones() as u8 & 1) << 7
}

/// Magnitudes with the signs of those turned around whose bit is set.
#[inline(always)]
fn signed<const G: usize, const S: usize>(magnitudes: Octets, signs: [u8; 32]) -> [[i8; G]; S] {
    let mut negative = [[0; 8]; 32];
    for l in 0..32 {
        negative[l] = NEGATIVE[usize::from(signs[l])];
    }
    let (magnitudes, negative) = (magnitudes.as_flattened(), negative.as_flattened());
    let mut codes = [[0; G]; S];
    let flat = codes.as_flattened_mut();
    for i in 0..256 {
        flat[i] = (magnitudes[i] as i8 ^ negative[i]).wrapping_sub(negative[i]);
    }
    codes
}

/// IQ1's weights in eighths: -1, 0 or 1, which the codebook has as 0 to 2, and an eighth more, or
/// less where the octet's bit is set.
#[inline(always)]
fn eighths<const G: usize, const S: usize>(entries: Octets, less: u32) -> [[i8; G]; S] {
    let mut offsets = [[0; 8]; 32];
    for l in 0..32 {
        offsets[l] = [if (less >> l) & 1 == 0 { 7 } else { 9 }; 8];
    }
    let (entries, offsets) = (entries.as_flattened(), offsets.as_flattened());
    let mut codes = [[0; G]; S];
    let flat = codes.as_flattened_mut();
    for i in 0..256 {
        flat[i] = (8 * entries[i]) as i8 - offsets[i];
    }
    codes
}

/// `block_iq1_s`: `d` F16 at 0; `qs[32]` at 2; `qh[8]` U16 at 34. Of group g, `qh[g]` has in bits
/// 3l to 3l + 2 the high bits of the index whose low ones are `qs[4g + l]`, then three bits of
/// scale, and the sign of the eighth.
pub(super) struct Iq1S;

impl Iq1S {
    #[inline(always)]
    pub(super) fn entries(block: &[u8; 50]) -> Octets {
        let mut entries = [[0; 8]; 32];
        for l in 0..32 {
            let high = u16_at(block, 34 + 2 * (l / 4)) >> (3 * (l % 4));
            entries[l] = IQ1S_GRID[usize::from(block[2 + l]) | usize::from(high & 7) << 8];
        }
        entries
    }

    /// Whether an eighth is taken away from the weights of a group.
    #[inline(always)]
    pub(super) fn less(block: &[u8; 50], g: usize) -> bool {
        u16_at(block, 34 + 2 * g) & 0x8000 != 0
    }
}

impl Block<50, 32, 8> for Iq1S {
    #[inline(always)]
    fn codes(block: &[u8; 50]) -> [[i8; 32]; 8] {
        let mut less = 0;
        for g in 0..8 {
            less |= (u32::from(Self::less(block, g)) * 15) << (4 * g);
        }
        eighths(Self::entries(block), less)
    }

    #[inline(always)]
    fn d(block: &[u8; 50]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 50]) -> [f32; 8] {
        let mut factors = [0.0; 8];
        for g in 0..8 {
            let scale = (u16_at(block, 34 + 2 * g) >> 12) & 7;
            factors[g] = f32::from(2 * scale + 1) / 8.0;
        }
        factors
    }
}

/// `block_iq1_m`: `qs[32]` at 0; `qh[16]` at 32; `scales[4]` U16 at 48, whose upper nibbles are `d`
/// F16, the lowest first. Nibble l % 2 of `qh[l / 2]` has three more bits for the index of octet l,
/// `qs[l]`, and the sign of its eighth; bits 3(g % 4) to 3(g % 4) + 2 of `scales[g / 4]` are the
/// scale of group g.
pub(super) struct Iq1M;

impl Iq1M {
    /// What a group multiplies `d` and the eighths by, 1 to 15 and odd.
    #[inline(always)]
    pub(super) fn scales(block: &[u8; 56]) -> [i8; 16] {
        let mut scales = [0; 16];
        for g in 0..16 {
            let bits = u16_at(block, 48 + 2 * (g / 4)) >> (3 * (g % 4));
            scales[g] = 2 * (bits & 7) as i8 + 1;
        }
        scales
    }
}

impl Block<56, 16, 16> for Iq1M {
    #[inline(always)]
    fn codes(block: &[u8; 56]) -> [[i8; 16]; 16] {
        let (mut entries, mut less) = ([[0; 8]; 32], 0);
        for l in 0..32 {
            let nibble = usize::from(block[32 + l / 2] >> (4 * (l % 2))) & 15;
            entries[l] = IQ1S_GRID[usize::from(block[l]) | (nibble & 7) << 8];
            less |= (nibble as u32 >> 3) << l;
        }
        eighths(entries, less)
    }

    #[inline(always)]
    fn d(block: &[u8; 56]) -> f32 {
        let mut d = 0;
        for i in 0..4 {
            d |= u16_at(block, 48 + 2 * i) >> 12 << (4 * i);
        }
        F16::value(d.to_le_bytes())
    }

    #[inline(always)]
    fn factors(block: &[u8; 56]) -> [f32; 16] {
        Self::scales(block).map(|scale| f32::from(scale) / 8.0)
    }
}

/// `block_iq2_xxs`: `d` F16 at 0; `qs[32]` U16 at 2, eight bytes for a group of 32: four indices,
/// then a U32 of four times seven bits of sign and four of scale.
pub(super) struct Iq2Xxs;

impl Block<66, 32, 8> for Iq2Xxs {
    #[inline(always)]
    fn codes(block: &[u8; 66]) -> [[i8; 32]; 8] {
        let (mut magnitudes, mut signs) = ([[0; 8]; 32], [0; 32]);
        for l in 0..32 {
            let group = 2 + 8 * (l / 4);
            magnitudes[l] = IQ2XXS_GRID[usize::from(block[group + l % 4])];
            signs[l] = even(u32_at(block, group + 4) >> (7 * (l % 4)));
        }
        signed(magnitudes, signs)
    }

    #[inline(always)]
    fn d(block: &[u8; 66]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 66]) -> [f32; 8] {
        let mut factors = [0.0; 8];
        for g in 0..8 {
            factors[g] = (0.5 + f32::from(block[9 + 8 * g] >> 4)) * 0.25;
        }
        factors
    }
}

/// The factors of IQ2_XS and IQ2_S: two groups of 16 to a byte, the low nibble first.
#[inline(always)]
fn quarters(scales: [u8; 8]) -> [f32; 16] {
    let mut factors = [0.0; 16];
    for g in 0..16 {
        let nibble = (scales[g / 2] >> (4 * (g % 2))) & 15;
        factors[g] = (0.5 + f32::from(nibble)) * 0.25;
    }
    factors
}

/// `block_iq2_xs`: `d` F16 at 0; `qs[32]` U16 at 2, nine bits of index and seven of sign;
/// `scales[8]` at 66.
pub(super) struct Iq2Xs;

impl Block<74, 16, 16> for Iq2Xs {
    #[inline(always)]
    fn codes(block: &[u8; 74]) -> [[i8; 16]; 16] {
        let (mut magnitudes, mut signs) = ([[0; 8]; 32], [0; 32]);
        for l in 0..32 {
            let q = u16_at(block, 2 + 2 * l);
            magnitudes[l] = IQ2XS_GRID[usize::from(q & 511)];
            signs[l] = even(u32::from(q >> 9));
        }
        signed(magnitudes, signs)
    }

    #[inline(always)]
    fn d(block: &[u8; 74]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 74]) -> [f32; 16] {
        quarters(field(block, 66))
    }
}

/// `block_iq2_s`: `d` F16 at 0; `qs[64]` at 2, 32 low bytes of indices and 32 bytes of signs;
/// `qh[8]` at 66, two more bits for each index; `scales[8]` at 74.
pub(super) struct Iq2S;

impl Block<82, 16, 16> for Iq2S {
    #[inline(always)]
    fn codes(block: &[u8; 82]) -> [[i8; 16]; 16] {
        let mut magnitudes = [[0; 8]; 32];
        for l in 0..32 {
            let high = usize::from(block[66 + l / 4] >> (2 * (l % 4))) & 3;
            magnitudes[l] = IQ2S_GRID[usize::from(block[2 + l]) | high << 8];
        }
        signed(magnitudes, field(block, 34))
    }

    #[inline(always)]
    fn d(block: &[u8; 82]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 82]) -> [f32; 16] {
        quarters(field(block, 74))
    }
}

/// `block_iq3_xxs`: `d` F16 at 0; `qs[96]` at 2: 64 indices, then for each group of 32 a U32 of
/// four times seven bits of sign and four of scale.
pub(super) struct Iq3Xxs;

impl Block<98, 32, 8> for Iq3Xxs {
    #[inline(always)]
    fn codes(block: &[u8; 98]) -> [[i8; 32]; 8] {
        let (mut magnitudes, mut signs) = ([[0; 8]; 32], [0; 32]);
        let fours = magnitudes.as_flattened_mut().as_chunks_mut::<4>().0;
        for l in 0..64 {
            fours[l] = IQ3XXS_GRID[usize::from(block[2 + l])];
        }
        for l in 0..32 {
            signs[l] = even(u32_at(block, 66 + 4 * (l / 4)) >> (7 * (l % 4)));
        }
        signed(magnitudes, signs)
    }

    #[inline(always)]
    fn d(block: &[u8; 98]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 98]) -> [f32; 8] {
        let mut factors = [0.0; 8];
        for g in 0..8 {
            factors[g] = (0.5 + f32::from(block[69 + 4 * g] >> 4)) * 0.5;
        }
        factors
    }
}

/// `block_iq3_s`: `d` F16 at 0; `qs[64]` at 2; `qh[8]` at 66, a ninth bit for each index;
/// `signs[32]` at 74; `scales[4]` at 106, two groups of 32 to a byte, the low nibble first.
pub(super) struct Iq3S;

impl Block<110, 32, 8> for Iq3S {
    #[inline(always)]
    fn codes(block: &[u8; 110]) -> [[i8; 32]; 8] {
        let mut magnitudes = [[0; 8]; 32];
        let fours = magnitudes.as_flattened_mut().as_chunks_mut::<4>().0;
        for l in 0..64 {
            let ninth = usize::from(block[66 + l / 8] >> (l % 8)) & 1;
            fours[l] = IQ3S_GRID[usize::from(block[2 + l]) | ninth << 8];
        }
        signed(magnitudes, field(block, 74))
    }

    #[inline(always)]
    fn d(block: &[u8; 110]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 110]) -> [f32; 8] {
        let mut factors = [0.0; 8];
        for g in 0..8 {
            let scale = (block[106 + g / 2] >> (4 * (g % 2))) & 15;
            factors[g] = f32::from(2 * scale + 1);
        }
        factors
    }
}

/// `kvalues_iq4nl` of ggml-common.h.
const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// The values of nibbles: by comparisons, which are vectorised where a table is not.
#[inline(always)]
fn iq4_values(nibbles: [u8; 32]) -> [i8; 32] {
    let mut values = [0; 32];
    for i in 0..32 {
        let mut value = 0;
        for (nibble, candidate) in (0..).zip(IQ4_VALUES) {
            value |= if nibbles[i] == nibble { candidate } else { 0 };
        }
        values[i] = value;
    }
    values
}

/// `block_iq4_nl`: `d` F16 at 0; `qs[16]` at 2, nibbles as in Q4_0.
pub(super) struct Iq4Nl;

impl Block<18, 32, 1> for Iq4Nl {
    #[inline(always)]
    fn codes(block: &[u8; 18]) -> [[i8; 32]; 1] {
        [iq4_values(nibbles(block, 2))]
    }

    #[inline(always)]
    fn d(block: &[u8; 18]) -> f32 {
        f16(block, 0)
    }
}

/// `block_iq4_xs`: `d` F16 at 0; `scales_h` U16 at 2; `scales_l[4]` at 4; `qs[128]` at 8, 16 bytes
/// for a group of 32, nibbles as in Q4_0. Scale g, from -32 on, has the low bits in nibble g % 2 of
/// `scales_l[g / 2]` and two high ones from bit 2g of `scales_h` on.
pub(super) struct Iq4Xs;

impl Block<136, 32, 8> for Iq4Xs {
    #[inline(always)]
    fn codes(block: &[u8; 136]) -> [[i8; 32]; 8] {
        let mut codes = [[0; 32]; 8];
        for (g, group) in codes.iter_mut().enumerate() {
            *group = iq4_values(nibbles(block, 8 + 16 * g));
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 136]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 136]) -> [f32; 8] {
        let high = u16_at(block, 2);
        let mut factors = [0.0; 8];
        for g in 0..8 {
            let low = (block[4 + g / 2] >> (4 * (g % 2))) & 15;
            let scale = low | (((high >> (2 * g)) & 3) as u8) << 4;
            factors[g] = f32::from(scale as i8 - 32);
        }
        factors
    }
}
