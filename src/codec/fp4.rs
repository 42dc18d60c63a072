//! The types of 4-bit floating point, E2M1, which MLX has, too.
//!
//! Structs and offsets: ggml-common.h of ggml-org/ggml; the numbers: `dequantize_row_*` of
//! ggml-quants.c. As there, codes are doubled to be integers (`kvalues_mxfp4`), and scales halved.

use super::block::{Block, field};
use super::float::power_of_two;
use super::plain::nibbles;

/// Twice the E2M1 numbers of nibbles: 0 1 2 3 4 6 8 12, and from 8 on the same, negative.
#[inline(always)]
fn doubled<const G: usize, const S: usize>(nibbles: [[u8; G]; S]) -> [[i8; G]; S] {
    let mut numbers = [[0; G]; S];
    for (number, nibble) in numbers
        .as_flattened_mut()
        .iter_mut()
        .zip(nibbles.as_flattened())
    {
        let size = nibble & 7;
        // Steps of 1 up to 4, of 2 up to 8, of 4 up to 12.
        let size = size + size.saturating_sub(4) + 2 * size.saturating_sub(6);
        let negative = 0_u8.wrapping_sub(nibble >> 3);
        *number = (size ^ negative).wrapping_sub(negative) as i8;
    }
    numbers
}

/// Half of what an E8M0 byte means, 2^(e-128): `GGML_E8M0_TO_FP32_HALF` of ggml-impl.h. The codes
/// of MXFP4 are doubled. 255, NaN by the standard, is 2^127.
#[inline(always)]
fn e8m0_half(e: u8) -> f32 {
    let e = u32::from(e);
    f32::from_bits(if e < 2 {
        0x0020_0000 << e
    } else {
        (e - 1) << 23
    })
}

/// Half of what an unsigned E4M3 byte means: `ggml_ue4m3_to_fp32` of ggml-impl.h. The codes of
/// NVFP4 are doubled. 0x7F, NaN by the standard, is 0, and bit 7 is ignored.
#[inline(always)]
fn ue4m3_half(x: u8) -> f32 {
    if x == 0x7F {
        return 0.0;
    }
    // As an F32 its exponent is too small by 120, that of a subnormal, too.
    f32::from_bits(u32::from(x & 0x7F) << 20) * power_of_two(119)
}

/// `block_mxfp4`: `e` E8M0 at 0; `qs[16]` at 1, nibbles as in Q4_0.
pub(super) struct Mxfp4;

impl Mxfp4 {
    #[inline(always)]
    pub(super) fn nibbles(block: &[u8; 17]) -> [[u8; 32]; 1] {
        [nibbles(block, 1)]
    }
}

impl Block<17, 32, 1> for Mxfp4 {
    const SHORT: bool = true; // two of the code, one of the scale

    #[inline(always)]
    fn codes(block: &[u8; 17]) -> [[i8; 32]; 1] {
        doubled(Self::nibbles(block))
    }

    #[inline(always)]
    fn d(block: &[u8; 17]) -> f32 {
        e8m0_half(block[0])
    }
}

/// `block_nvfp4`: `d[4]` unsigned E4M3 at 0; `qs[32]` at 4. Of `qs[8g + m]` the low nibble is
/// weight 16g + m, the high one 16g + 8 + m.
pub(super) struct Nvfp4;

impl Nvfp4 {
    #[inline(always)]
    pub(super) fn nibbles(block: &[u8; 36]) -> [[u8; 16]; 4] {
        let mut nibbles = [[0; 16]; 4];
        for (g, group) in nibbles.iter_mut().enumerate() {
            for m in 0..8 {
                let q = block[4 + 8 * g + m];
                group[m] = q & 15;
                group[8 + m] = q >> 4;
            }
        }
        nibbles
    }

    #[inline(always)]
    pub(super) fn scales(block: &[u8; 36]) -> [u8; 4] {
        field(block, 0)
    }
}

impl Block<36, 16, 4> for Nvfp4 {
    const SHORT: bool = true; // two of the code, four of the scale

    #[inline(always)]
    fn codes(block: &[u8; 36]) -> [[i8; 16]; 4] {
        doubled(Self::nibbles(block))
    }

    #[inline(always)]
    fn d(_: &[u8; 36]) -> f32 {
        1.0
    }

    #[inline(always)]
    fn factors(block: &[u8; 36]) -> [f32; 4] {
        Self::scales(block).map(ue4m3_half)
    }
}
