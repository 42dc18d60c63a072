//! The types with one scale for a block of 32 to 256 weights: Q1_0 to Q8_0, and the ternary ones.
//!
//! Structs and offsets: ggml-common.h of ggml-org/ggml; the numbers: `dequantize_row_*` of
//! ggml-quants.c.

use super::block::{Block, Minimum, field};
use super::float::f16;
use super::signs::NEGATIVE;

/// `block_q1_0`: `d` F16 at 0; `qs[16]` at 2, a bit for each weight: 1 is `d`, 0 is `-d`.
pub(super) struct Q1_0;

impl Block<18, 128, 1> for Q1_0 {
    #[inline(always)]
    fn codes(block: &[u8; 18]) -> [[i8; 128]; 1] {
        let mut codes = [[0; 128]; 1];
        let octets = codes.as_flattened_mut().as_chunks_mut::<8>().0;
        for (octet, bits) in octets.iter_mut().zip(&block[2..]) {
            // A bit that is set gives the byte -1.
            *octet = NEGATIVE[usize::from(*bits)].map(|set| (set & 2) - 1);
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 18]) -> f32 {
        f16(block, 0)
    }
}

/// `block_q2_0`: `d` F16 at 0; `qs[16]` at 2, four weights to a byte, the first in its low bits;
/// codes begin at -1.
pub(super) struct Q2_0;

impl Block<18, 64, 1> for Q2_0 {
    #[inline(always)]
    fn codes(block: &[u8; 18]) -> [[i8; 64]; 1] {
        let mut codes = [[0; 64]; 1];
        let fours = codes.as_flattened_mut().as_chunks_mut::<4>().0;
        for (four, q) in fours.iter_mut().zip(&block[2..]) {
            *four = [q & 3, (q >> 2) & 3, (q >> 4) & 3, q >> 6].map(|q| q as i8 - 1);
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 18]) -> f32 {
        f16(block, 0)
    }
}

/// The nibbles of `qs[16]` as 32 codes: the low ones first.
#[inline(always)]
pub(super) fn nibbles<const B: usize>(block: &[u8; B], at: usize) -> [u8; 32] {
    let qs: [u8; 16] = field(block, at);
    let mut codes = [0; 32];
    for i in 0..16 {
        codes[i] = qs[i] & 15;
        codes[16 + i] = qs[i] >> 4;
    }
    codes
}

/// Nibbles with a fifth bit each: bit i of `qh[4]` is that of code i.
#[inline(always)]
fn five_bits<const B: usize>(block: &[u8; B], qh: usize, qs: usize) -> [u8; 32] {
    let mut codes = nibbles(block, qs);
    let (octets, _) = codes.as_chunks_mut::<8>();
    for (octet, high) in octets.iter_mut().zip(&block[qh..]) {
        let high = &NEGATIVE[usize::from(*high)];
        for i in 0..8 {
            octet[i] |= high[i] as u8 & 16;
        }
    }
    codes
}

/// Codes that begin below zero.
#[inline(always)]
fn from(first: i8, codes: [u8; 32]) -> [[i8; 32]; 1] {
    let mut signed = [0; 32];
    for i in 0..32 {
        signed[i] = first.wrapping_add(codes[i] as i8);
    }
    [signed]
}

/// `block_q4_0`: `d` F16 at 0; `qs[16]` at 2; codes begin at -8.
pub(super) struct Q4_0;

impl Block<18, 32, 1> for Q4_0 {
    #[inline(always)]
    fn codes(block: &[u8; 18]) -> [[i8; 32]; 1] {
        from(-8, nibbles(block, 2))
    }

    #[inline(always)]
    fn d(block: &[u8; 18]) -> f32 {
        f16(block, 0)
    }
}

/// `block_q4_1`: `d` F16 at 0; `m` F16 at 2, added; `qs[16]` at 4.
pub(super) struct Q4_1;

impl Block<20, 32, 1> for Q4_1 {
    const MINIMUM: Minimum = Minimum::Added;

    #[inline(always)]
    fn codes(block: &[u8; 20]) -> [[i8; 32]; 1] {
        from(0, nibbles(block, 4))
    }

    #[inline(always)]
    fn d(block: &[u8; 20]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn dmin(block: &[u8; 20]) -> f32 {
        f16(block, 2)
    }
}

/// `block_q5_0`: `d` F16 at 0; `qh[4]` at 2; `qs[16]` at 6; codes begin at -16.
pub(super) struct Q5_0;

impl Block<22, 32, 1> for Q5_0 {
    #[inline(always)]
    fn codes(block: &[u8; 22]) -> [[i8; 32]; 1] {
        from(-16, five_bits(block, 2, 6))
    }

    #[inline(always)]
    fn d(block: &[u8; 22]) -> f32 {
        f16(block, 0)
    }
}

/// `block_q5_1`: `d` F16 at 0; `m` F16 at 2, added; `qh[4]` at 4; `qs[16]` at 8.
pub(super) struct Q5_1;

impl Block<24, 32, 1> for Q5_1 {
    const MINIMUM: Minimum = Minimum::Added;

    #[inline(always)]
    fn codes(block: &[u8; 24]) -> [[i8; 32]; 1] {
        from(0, five_bits(block, 4, 8))
    }

    #[inline(always)]
    fn d(block: &[u8; 24]) -> f32 {
        f16(block, 0)
    }

    #[inline(always)]
    fn dmin(block: &[u8; 24]) -> f32 {
        f16(block, 2)
    }
}

/// `block_q8_0`: `d` F16 at 0; `qs[32]` I8 at 2.
pub(super) struct Q8_0;

impl Block<34, 32, 1> for Q8_0 {
    #[inline(always)]
    fn codes(block: &[u8; 34]) -> [[i8; 32]; 1] {
        from(0, field(block, 2))
    }

    #[inline(always)]
    fn d(block: &[u8; 34]) -> f32 {
        f16(block, 0)
    }
}

/// `block_tq1_0`: `qs[48]` at 0; `qh[4]` at 48; `d` F16 at 52. A byte holds five ternary digits,
/// those of `qh` four, as a fraction of 256: times 3^n, its integer part modulo 3 is digit n.
/// Digit n of `qs[m]`, m < 32, is weight 32n + m; of the next 16 bytes 160 + 16n + m; of `qh[m]`
/// 240 + 4n + m. Codes begin at -1.
pub(super) struct Tq1_0;

impl Block<54, 128, 2> for Tq1_0 {
    #[inline(always)]
    fn codes(block: &[u8; 54]) -> [[i8; 128]; 2] {
        const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
        let digit = |byte: u8, n: usize| {
            let fraction = byte.wrapping_mul(POWERS[n]);
            ((u16::from(fraction) * 3) >> 8) as i8 - 1
        };
        let mut codes = [[0; 128]; 2];
        let flat = codes.as_flattened_mut();
        for n in 0..5 {
            for m in 0..32 {
                flat[32 * n + m] = digit(block[m], n);
            }
            for m in 0..16 {
                flat[160 + 16 * n + m] = digit(block[32 + m], n);
            }
        }
        for n in 0..4 {
            for m in 0..4 {
                flat[240 + 4 * n + m] = digit(block[48 + m], n);
            }
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 54]) -> f32 {
        f16(block, 52)
    }
}

/// `block_tq2_0`: `qs[64]` at 0; `d` F16 at 64. Bits 2n and 2n + 1 of `qs[32j + m]` are weight
/// 128j + 32n + m; codes begin at -1.
pub(super) struct Tq2_0;

impl Block<66, 128, 2> for Tq2_0 {
    #[inline(always)]
    fn codes(block: &[u8; 66]) -> [[i8; 128]; 2] {
        let mut codes = [[0; 128]; 2];
        for j in 0..2 {
            for n in 0..4 {
                for m in 0..32 {
                    codes[j][32 * n + m] = ((block[32 * j + m] >> (2 * n)) & 3) as i8 - 1;
                }
            }
        }
        codes
    }

    #[inline(always)]
    fn d(block: &[u8; 66]) -> f32 {
        f16(block, 64)
    }
}
