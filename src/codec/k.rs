//! The K types: blocks of 256 weights in groups of 16 or 32, whose scales are small integers.
//!
//! Structs and offsets: ggml-common.h of ggml-org/ggml; the numbers: `dequantize_row_*` of
//! ggml-quants.c.

use super::block::{Block, Minimum, field};
use super::float::f16;

/// `block_q2_K`: `scales[16]` at 0, low nibbles scales, high ones minima; `qs[64]` at 16; `d` F16
/// at 80; `dmin` F16 at 82. Bits 2n and 2n + 1 of `qs[32j + m]` are weight 128j + 32n + m.
pub(super) struct Q2K;

impl Block<84, 16, 16> for Q2K {
    const MINIMUM: Minimum = Minimum::Subtracted;

    #[inline(always)]
    fn codes(block: &[u8; 84]) -> [[i8; 16]; 16] {
        let mut codes = [[0; 16]; 16];
        for (j, half) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let half = half.as_flattened_mut();
            for n in 0..4 {
                for m in 0..32 {
                    half[32 * n + m] = ((block[16 + 32 * j + m] >> (2 * n)) & 3) as i8;
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 84]) -> f32 {
        f16(block, 80)
    }

    #[inline(always)]
    fn factors(block: &[u8; 84]) -> [f32; 16] {
        field(block, 0).map(|scale: u8| f32::from(scale & 15))
    }

    #[inline(always)]
    fn dmin(block: &[u8; 84]) -> f32 {
        f16(block, 82)
    }

    #[inline(always)]
    fn min_factors(block: &[u8; 84]) -> [f32; 16] {
        field(block, 0).map(|scale: u8| f32::from(scale >> 4))
    }
}

/// `block_q3_K`: `hmask[32]` at 0; `qs[64]` at 32; `scales[12]` at 96; `d` F16 at 108. Bits 2n and
/// 2n + 1 of `qs[32j + m]` are those of weight 128j + 32n + m, bit 4j + n of `hmask[m]` is its
/// third; codes begin at -4.
pub(super) struct Q3K;

impl Q3K {
    /// The 16 scales, from -32 on: six bits each. The low four are the nibbles of the first eight
    /// bytes, low ones first; bits 2n and 2n + 1 of the last four are the high bits of scales
    /// 4n to 4n + 3.
    #[inline(always)]
    pub(super) fn scales(block: &[u8; 110]) -> [i8; 16] {
        let packed: [u8; 12] = field(block, 96);
        let mut scales = [0; 16];
        for i in 0..16 {
            let low = (packed[i % 8] >> (4 * (i / 8))) & 15;
            let high = (packed[8 + i % 4] >> (2 * (i / 4))) & 3;
            scales[i] = (low | high << 4) as i8 - 32;
        }
        scales
    }
}

impl Block<110, 16, 16> for Q3K {
    #[inline(always)]
    fn codes(block: &[u8; 110]) -> [[i8; 16]; 16] {
        let mut codes = [[0; 16]; 16];
        for (j, half) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let half = half.as_flattened_mut();
            for n in 0..4 {
                for m in 0..32 {
                    let low = (block[32 + 32 * j + m] >> (2 * n)) & 3;
                    let high = (block[m] >> (4 * j + n)) & 1;
                    half[32 * n + m] = (low | high << 2) as i8 - 4;
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 110]) -> f32 {
        f16(block, 108)
    }

    #[inline(always)]
    fn factors(block: &[u8; 110]) -> [f32; 16] {
        Self::scales(block).map(f32::from)
    }
}

/// The scales and minima of Q4_K and Q5_K, which begin at byte 4, as `get_scale_min_k4` of
/// ggml-quants.c takes them apart: six bits each, of groups 0 to 3 the low bits of bytes 0 to 3 and
/// of bytes 4 to 7; of groups 4 to 7 the nibbles of the last four bytes, and above them the two
/// bits that the first eight have left.
#[inline(always)]
fn scales_and_minima<const B: usize>(block: &[u8; B]) -> ([f32; 8], [f32; 8]) {
    // Four at a time.
    let [scales, minima, nibbles] = [4, 8, 12].map(|at| u32::from_le_bytes(field(block, at)));
    let eight = |six_and_two: u32, nibbles: u32| {
        let first = (six_and_two & 0x3F3F_3F3F).to_le_bytes();
        let last = (nibbles & 0x0F0F_0F0F | (six_and_two >> 2) & 0x3030_3030).to_le_bytes();
        let mut floats = [0.0; 8];
        for i in 0..4 {
            floats[i] = f32::from(first[i]);
            floats[4 + i] = f32::from(last[i]);
        }
        floats
    };
    (eight(scales, nibbles), eight(minima, nibbles >> 4))
}

/// `block_q4_K`: `d` F16 at 0; `dmin` F16 at 2; `scales[12]` at 4; `qs[128]` at 16. Of
/// `qs[32j + m]` the low nibble is weight 64j + m, the high one 64j + 32 + m.
pub(super) struct Q4K;

impl Block<144, 32, 8> for Q4K {
    const MINIMUM: Minimum = Minimum::Subtracted;

    #[inline(always)]
    fn codes(block: &[u8; 144]) -> [[i8; 32]; 8] {
        let mut codes = [[0; 32]; 8];
        for (j, [low, high]) in codes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for m in 0..32 {
                let q = block[16 + 32 * j + m];
                low[m] = (q & 15) as i8;
                high[m] = (q >> 4) as i8;
            }
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 144]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 144]) -> [f32; 8] {
        scales_and_minima(block).0
    }

    #[inline(always)]
    fn dmin(block: &[u8; 144]) -> f32 {
        f16(block, 2)
    }

    #[inline(always)]
    fn min_factors(block: &[u8; 144]) -> [f32; 8] {
        scales_and_minima(block).1
    }
}

/// `block_q5_K`: `d` F16 at 0; `dmin` F16 at 2; `scales[12]` at 4; `qh[32]` at 16; `qs[128]` at
/// 48. Nibbles as in Q4_K; bit g of `qh[m]` is the fifth of weight 32g + m.
pub(super) struct Q5K;

impl Block<176, 32, 8> for Q5K {
    const MINIMUM: Minimum = Minimum::Subtracted;

    #[inline(always)]
    fn codes(block: &[u8; 176]) -> [[i8; 32]; 8] {
        let mut codes = [[0; 32]; 8];
        for (j, [low, high]) in codes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for m in 0..32 {
                let (q, h) = (block[48 + 32 * j + m], block[16 + m] >> (2 * j));
                low[m] = (q & 15 | (h & 1) << 4) as i8;
                high[m] = (q >> 4 | (h & 2) << 3) as i8;
            }
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 176]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn factors(block: &[u8; 176]) -> [f32; 8] {
        scales_and_minima(block).0
    }

    #[inline(always)]
    fn dmin(block: &[u8; 176]) -> f32 {
        f16(block, 2)
    }

    #[inline(always)]
    fn min_factors(block: &[u8; 176]) -> [f32; 8] {
        scales_and_minima(block).1
    }
}

/// `block_q6_K`: `ql[128]` at 0; `qh[64]` at 128; `scales[16]` I8 at 192; `d` F16 at 208. Weight
/// 128j + 32n + m has the low nibble (n < 2) or the high one of `ql[64j + 32(n % 2) + m]`, and
/// above it bits 2n and 2n + 1 of `qh[32j + m]`; codes begin at -32.
pub(super) struct Q6K;

impl Block<210, 16, 16> for Q6K {
    #[inline(always)]
    fn codes(block: &[u8; 210]) -> [[i8; 16]; 16] {
        let mut codes = [[0; 16]; 16];
        for (j, half) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let half = half.as_flattened_mut();
            for n in 0..4 {
                for m in 0..32 {
                    let low = (block[64 * j + 32 * (n % 2) + m] >> (4 * (n / 2))) & 15;
                    let high = (block[128 + 32 * j + m] >> (2 * n)) & 3;
                    half[32 * n + m] = (low | high << 4) as i8 - 32;
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 210]) -> f32 {
        f16(block, 208)
    }

    #[inline(always)]
    fn factors(block: &[u8; 210]) -> [f32; 16] {
        field(block, 192).map(|scale: u8| f32::from(scale as i8))
    }
}
