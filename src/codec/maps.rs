//! How MLX sees each type: the maps that give exactly the numbers of the GGUF.

use super::Mode;
use super::block::{Block, Minimum};
use super::fp4::{Mxfp4, Nvfp4};
use super::iq::{Iq1M, Iq1S, Iq2Xxs, Iq3S, Iq3Xxs, Iq4Nl, Iq4Xs};
use super::k::{Q3K, Q4K, Q5K};
use super::mlx::{Affine, ByteScales, Quants};
use super::plain::{Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Tq1_0, Tq2_0};

/// `(code + zero) >> halvings` of all codes: unsigned.
#[inline(always)]
fn shifted<T, const B: usize, const G: usize, const S: usize>(
    block: &[u8; B],
    zero: u8,
    halvings: u32,
) -> [[u8; G]; S]
where
    T: Block<B, G, S>,
{
    let codes = T::codes(block);
    let mut quants = [[0; G]; S];
    for (quants, codes) in quants.iter_mut().zip(&codes) {
        for (q, code) in quants.iter_mut().zip(codes) {
            *q = (*code as u8).wrapping_add(zero) >> halvings;
        }
    }
    quants
}

/// Types without minima: `scale * code` is `(2^halvings * scale) * q + bias` for the `q` of
/// [`shifted`], since all of `code + zero` are multiples of `2^halvings`.
macro_rules! without_minimum {
    ($($type:ident: [$B:literal, $G:literal, $S:literal], $bits:literal bits,
       q = (code + $zero:literal) >> $halvings:literal;)*) => {$(
        impl Quants<$B, $G, $S> for $type {
            const BITS: usize = $bits;

            #[inline(always)]
            fn quants(block: &[u8; $B]) -> [[u8; $G]; $S] {
                shifted::<Self, $B, $G, $S>(block, $zero, $halvings)
            }
        }

        impl Affine<$B, $G, $S> for $type {
            const MULTIPLES: bool = true;

            #[inline(always)]
            fn scales(block: &[u8; $B]) -> [f32; $S] {
                let d = Self::d(block);
                Self::factors(block).map(|factor| d * factor * (1 << $halvings) as f32)
            }

            #[inline(always)]
            fn biases(_: &[u8; $B], scales: [f32; $S]) -> [f32; $S] {
                const ZERO: f32 = $zero as f32 / (1 << $halvings) as f32;
                scales.map(|scale| -ZERO * scale)
            }
        }
    )*};
}

without_minimum! {
    Q1_0: [18, 128, 1], 1 bits, q = (code + 1) >> 1;
    Q2_0: [18, 64, 1], 2 bits, q = (code + 1) >> 0;
    Tq1_0: [54, 128, 2], 2 bits, q = (code + 1) >> 0;
    Tq2_0: [66, 128, 2], 2 bits, q = (code + 1) >> 0;
    Q4_0: [18, 32, 1], 4 bits, q = (code + 8) >> 0;
    Q5_0: [22, 32, 1], 5 bits, q = (code + 16) >> 0;
    Q8_0: [34, 32, 1], 8 bits, q = (code + 128) >> 0;
    Iq2Xxs: [66, 32, 8], 8 bits, q = (code + 128) >> 0;
    Iq3Xxs: [98, 32, 8], 6 bits, q = (code + 64) >> 1;
    Iq3S: [110, 32, 8], 4 bits, q = (code + 15) >> 1;
    Iq4Nl: [18, 32, 1], 8 bits, q = (code + 128) >> 0;
    Iq4Xs: [136, 32, 8], 8 bits, q = (code + 128) >> 0;
}

/// Types with minima: codes are unsigned as they are, minima are biases.
macro_rules! with_minimum {
    ($($type:ident: [$B:literal, $G:literal, $S:literal], $bits:literal bits;)*) => {$(
        impl Quants<$B, $G, $S> for $type {
            const BITS: usize = $bits;

            #[inline(always)]
            fn quants(block: &[u8; $B]) -> [[u8; $G]; $S] {
                shifted::<Self, $B, $G, $S>(block, 0, 0)
            }
        }

        impl Affine<$B, $G, $S> for $type {
            const MULTIPLES: bool = false;

            #[inline(always)]
            fn scales(block: &[u8; $B]) -> [f32; $S] {
                let d = Self::d(block);
                Self::factors(block).map(|factor| d * factor)
            }

            #[inline(always)]
            fn biases(block: &[u8; $B], _: [f32; $S]) -> [f32; $S] {
                let dmin = match Self::MINIMUM {
                    Minimum::Subtracted => -Self::dmin(block),
                    _ => Self::dmin(block),
                };
                Self::min_factors(block).map(|factor| dmin * factor)
            }
        }
    )*};
}

with_minimum! {
    Q4_1: [20, 32, 1], 4 bits;
    Q5_1: [24, 32, 1], 5 bits;
    Q4K: [144, 32, 8], 4 bits;
    Q5K: [176, 32, 8], 5 bits;
}

/// The value of each group, for each of its `G` weights.
#[inline(always)]
fn spread<V: Copy, const G: usize, const S: usize>(groups: [V; S]) -> [[V; G]; S] {
    groups.map(|value| [value; G])
}

/// MLX has no groups of 16, but scale times code is an integer from -124 to 128: taken from 128, it
/// has eight bits.
impl Quants<110, 128, 2> for Q3K {
    const BITS: usize = 8;

    #[inline(always)]
    fn quants(block: &[u8; 110]) -> [[u8; 128]; 2] {
        let (codes, scales) = (Self::codes(block), spread::<_, 16, 16>(Self::scales(block)));
        let (codes, scales) = (codes.as_flattened(), scales.as_flattened());
        let mut quants = [[0; 128]; 2];
        let flat = quants.as_flattened_mut();
        for i in 0..256 {
            flat[i] = (128 - i16::from(scales[i]) * i16::from(codes[i])) as u8;
        }
        quants
    }
}

impl Affine<110, 128, 2> for Q3K {
    const MULTIPLES: bool = true;

    #[inline(always)]
    fn scales(block: &[u8; 110]) -> [f32; 2] {
        [-Self::d(block); 2]
    }

    #[inline(always)]
    fn biases(_: &[u8; 110], scales: [f32; 2]) -> [f32; 2] {
        scales.map(|scale| -128.0 * scale)
    }
}

/// The codes are the entries of the codebook, 0 to 2; the eighth goes into the bias.
impl Quants<50, 32, 8> for Iq1S {
    const BITS: usize = 2;

    #[inline(always)]
    fn quants(block: &[u8; 50]) -> [[u8; 32]; 8] {
        let entries = Self::entries(block);
        let mut quants = [[0; 32]; 8];
        quants
            .as_flattened_mut()
            .copy_from_slice(entries.as_flattened());
        quants
    }
}

impl Affine<50, 32, 8> for Iq1S {
    const MULTIPLES: bool = true;

    #[inline(always)]
    fn scales(block: &[u8; 50]) -> [f32; 8] {
        let d = Self::d(block);
        Self::factors(block).map(|factor| d * (8.0 * factor))
    }

    #[inline(always)]
    fn biases(block: &[u8; 50], scales: [f32; 8]) -> [f32; 8] {
        let mut biases = scales;
        for (g, bias) in biases.iter_mut().enumerate() {
            *bias *= if Self::less(block, g) { -1.125 } else { -0.875 };
        }
        biases
    }
}

/// MLX has no groups of 16, let alone of 8, but scale times eighths is an odd integer from -135 to
/// 135: half of it has eight bits.
impl Quants<56, 128, 2> for Iq1M {
    const BITS: usize = 8;

    #[inline(always)]
    fn quants(block: &[u8; 56]) -> [[u8; 128]; 2] {
        let (codes, scales) = (Self::codes(block), spread::<_, 16, 16>(Self::scales(block)));
        let (codes, scales) = (codes.as_flattened(), scales.as_flattened());
        let mut quants = [[0; 128]; 2];
        let flat = quants.as_flattened_mut();
        for i in 0..256 {
            flat[i] = ((i16::from(scales[i]) * i16::from(codes[i]) + 135) >> 1) as u8;
        }
        quants
    }
}

impl Affine<56, 128, 2> for Iq1M {
    const MULTIPLES: bool = true;

    #[inline(always)]
    fn scales(block: &[u8; 56]) -> [f32; 2] {
        [Self::d(block) / 4.0; 2]
    }

    #[inline(always)]
    fn biases(_: &[u8; 56], scales: [f32; 2]) -> [f32; 2] {
        scales.map(|scale| -67.5 * scale)
    }
}

/// Codes and scales as they are. (MLX takes the scale 255 for infinity, ggml for 2^128.)
impl Quants<17, 32, 1> for Mxfp4 {
    const BITS: usize = 4;

    #[inline(always)]
    fn quants(block: &[u8; 17]) -> [[u8; 32]; 1] {
        Self::nibbles(block)
    }
}

impl ByteScales<17, 32, 1> for Mxfp4 {
    const MODE: Mode = Mode::Mxfp4;

    #[inline(always)]
    fn scales(block: &[u8; 17]) -> [u8; 1] {
        [block[0]]
    }
}

/// Codes as they are, and scales that mean the same: MLX takes bit 7, which ggml ignores, for a
/// sign, and 0x7F, which is 0 in ggml, for NaN. (0xFF is 0 in ggml's CUDA code, and here. Its other
/// code and gguf-py have 480, which no E4M3 means.)
impl Quants<36, 16, 4> for Nvfp4 {
    const BITS: usize = 4;

    #[inline(always)]
    fn quants(block: &[u8; 36]) -> [[u8; 16]; 4] {
        Self::nibbles(block)
    }
}

impl ByteScales<36, 16, 4> for Nvfp4 {
    const MODE: Mode = Mode::Nvfp4;

    #[inline(always)]
    fn scales(block: &[u8; 36]) -> [u8; 4] {
        Self::scales(block).map(|scale| {
            if scale & 0x7F == 0x7F {
                0
            } else {
                scale & 0x7F
            }
        })
    }
}
