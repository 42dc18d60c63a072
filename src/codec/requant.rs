//! Maps to MLX that are not exact: types with groups of 16, in 8 bits and groups of 32.
//!
//! Two groups share one scale. In types without minima, the group with the greater scale keeps its
//! numbers, or nearly so: its codes are multiplied by a factor that leaves them near integers. The
//! codes of the other group are rounded to the same steps. In Q2_K both are rounded, to 256 steps
//! from the least number that their codes can mean to the greatest.
//!
//! Measured on normally distributed weights that ggml quantised, the error added is 3.8e-3 of their
//! norm for Q6_K, whose own error is 1.8e-2, and 3.6e-3 to 3.7e-3 for the others, whose own is 0.25
//! to 0.3.

use std::marker::PhantomData;

use super::block::Block;
use super::iq::{Iq2S, Iq2Xs};
use super::k::{Q2K, Q6K};
use super::mlx::{Affine, Quants};

/// The type, requantised.
pub(super) struct Requantised<T>(PhantomData<T>);

/// The integer nearest to a number of at most 2^22, ties to even, modulo 256.
#[inline(always)]
fn nearest(value: f32) -> u8 {
    // The last bit of a number of this size, 1.5 * 2^23, counts ones.
    (value + 12_582_912.0).to_bits() as u8
}

/// The factor of the greater size.
#[inline(always)]
fn greater([a, b]: [f32; 2]) -> f32 {
    if a.abs() < b.abs() { b } else { a }
}

/// A value of two groups of 16, for each of their weights.
#[inline(always)]
fn of_weights(groups: [f32; 2]) -> [f32; 32] {
    std::array::from_fn(|i| groups[i / 16])
}

/// Types without minima. The codes of the group with the greater scale are multiplied by `times`.
macro_rules! without_minimum {
    ($($type:ident: [$B:literal], times $times:literal;)*) => {$(
        impl Quants<$B, 32, 8> for Requantised<$type> {
            const BITS: usize = 8;

            #[inline(always)]
            fn quants(block: &[u8; $B]) -> [[u8; 32]; 8] {
                let codes = $type::codes(block);
                let (codes, _) = codes.as_flattened().as_chunks::<32>();
                let factors = $type::factors(block);
                let (factors, _) = factors.as_chunks::<2>();
                let mut quants = [[0; 32]; 8];
                for g in 0..8 {
                    let greater = greater(factors[g]);
                    let times = if greater == 0.0 { 0.0 } else { $times / greater };
                    let times = of_weights(factors[g].map(|factor| times * factor));
                    for i in 0..32 {
                        let q = times[i] * f32::from(codes[g][i]);
                        quants[g][i] = nearest(if q < 127.0 { q } else { 127.0 }).wrapping_add(128);
                    }
                }
                quants
            }
        }

        impl Affine<$B, 32, 8> for Requantised<$type> {
            const MULTIPLES: bool = true;

            #[inline(always)]
            fn scales(block: &[u8; $B]) -> [f32; 8] {
                let d = $type::d(block);
                let factors = $type::factors(block);
                let (factors, _) = factors.as_chunks::<2>();
                let mut scales = [0.0; 8];
                for g in 0..8 {
                    scales[g] = d * greater(factors[g]) / $times;
                }
                scales
            }

            #[inline(always)]
            fn biases(_: &[u8; $B], scales: [f32; 8]) -> [f32; 8] {
                scales.map(|scale| -128.0 * scale)
            }
        }
    )*};
}

without_minimum! {
    Q6K: [210], times 4.0; // codes from -32 to 31, which become -128 to 124
    Iq2Xs: [74], times 2.88; // codes 8, 25 and 43, either sign, which become 23.04, 72 and 123.84
    Iq2S: [82], times 2.88;
}

/// Codes from 0, the least number, to 255, the greatest.
impl Quants<84, 32, 8> for Requantised<Q2K> {
    const BITS: usize = 8;

    #[inline(always)]
    fn quants(block: &[u8; 84]) -> [[u8; 32]; 8] {
        let codes = Q2K::codes(block);
        let (codes, _) = codes.as_flattened().as_chunks::<32>();
        let (scales, minima) = scales_and_minima(block);
        let mut quants = [[0; 32]; 8];
        for g in 0..8 {
            let (low, high) = range(scales[g], minima[g]);
            let steps = if high > low {
                255.0 / (high - low)
            } else {
                0.0
            };
            let (scales, minima) = (of_weights(scales[g]), of_weights(minima[g]));
            for i in 0..32 {
                let weight = scales[i] * f32::from(codes[g][i]) - minima[i];
                let q = (weight - low) * steps;
                quants[g][i] = nearest(if q < 255.0 { q } else { 255.0 });
            }
        }
        quants
    }
}

impl Affine<84, 32, 8> for Requantised<Q2K> {
    const MULTIPLES: bool = false;

    #[inline(always)]
    fn scales(block: &[u8; 84]) -> [f32; 8] {
        let (scales, minima) = scales_and_minima(block);
        let mut steps = [0.0; 8];
        for g in 0..8 {
            let (low, high) = range(scales[g], minima[g]);
            steps[g] = (high - low) / 255.0;
        }
        steps
    }

    #[inline(always)]
    fn biases(block: &[u8; 84], _: [f32; 8]) -> [f32; 8] {
        let (scales, minima) = scales_and_minima(block);
        let mut lows = [0.0; 8];
        for g in 0..8 {
            lows[g] = range(scales[g], minima[g]).0;
        }
        lows
    }
}

/// Scales and minima of the groups, by twos.
#[inline(always)]
fn scales_and_minima(block: &[u8; 84]) -> ([[f32; 2]; 8], [[f32; 2]; 8]) {
    let (d, dmin) = (Q2K::d(block), Q2K::dmin(block));
    let (factors, min_factors) = (Q2K::factors(block), Q2K::min_factors(block));
    let (mut scales, mut minima) = ([[0.0; 2]; 8], [[0.0; 2]; 8]);
    for g in 0..16 {
        scales.as_flattened_mut()[g] = d * factors[g];
        minima.as_flattened_mut()[g] = dmin * min_factors[g];
    }
    (scales, minima)
}

/// The least and the greatest number that codes from 0 to 3 can mean in two groups.
#[inline(always)]
fn range([s, t]: [f32; 2], [m, n]: [f32; 2]) -> (f32, f32) {
    let less = |a: f32, b: f32| if a < b { a } else { b };
    let more = |a: f32, b: f32| if a > b { a } else { b };
    let (a, b, c, d) = (-m, 3.0 * s - m, -n, 3.0 * t - n);
    (less(less(a, b), less(c, d)), more(more(a, b), more(c, d)))
}
