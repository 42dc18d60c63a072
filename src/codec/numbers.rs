//! The weights of blocks as numbers, one array of F32, F16 or BF16.

use std::marker::PhantomData;

use super::block::{Block, Minimum};
use super::float::{Number, minus, plus, times};
use crate::sys::simd::Kernel;

/// Weights per loop, whatever the groups of the type: the compiler unrolls shorter loops instead of
/// vectorising them.
const ROW: usize = 32;

/// Blocks of `T` to numbers `N`.
pub(super) struct Numbers<T, N, const B: usize, const G: usize, const S: usize, const W: usize>(
    PhantomData<(T, N)>,
);

impl<T, N, const B: usize, const G: usize, const S: usize, const W: usize> Kernel
    for Numbers<T, N, B, G, S, W>
where
    T: Block<B, G, S>,
    N: Number<W>,
{
    const BLOCK: usize = B;
    const OUT: usize = G * S * W;

    #[inline(always)]
    fn run(blocks: &[u8], out: &mut [u8]) {
        let (blocks, _) = blocks.as_chunks::<B>();
        let (out, _) = out.as_chunks_mut::<W>();
        for (block, out) in blocks.iter().zip(out.chunks_exact_mut(G * S)) {
            let (d, dmin) = (T::d(block), T::dmin(block));
            if d.is_finite() && dmin.is_finite() {
                finite::<T, N, B, G, S, W>(block, d, dmin, out);
            } else {
                any::<T, N, B, G, S, W>(block, out);
            }
        }
    }
}

/// The numbers of a block whose scales are finite, none of which is NaN.
#[inline(always)]
fn finite<T, N, const B: usize, const G: usize, const S: usize, const W: usize>(
    block: &[u8; B],
    d: f32,
    dmin: f32,
    out: &mut [[u8; W]],
) where
    T: Block<B, G, S>,
    N: Number<W>,
{
    let scales = T::factors(block).map(|factor| d * factor);
    let minima = T::min_factors(block).map(|factor| dmin * factor);
    let codes = T::codes(block);
    let (codes, _) = codes.as_flattened().as_chunks::<ROW>();
    let (out, _) = out.as_chunks_mut::<ROW>();
    for (row, (codes, out)) in codes.iter().zip(out).enumerate() {
        // For every weight, so that a row may span two groups.
        let group = |i| (ROW * row + i) / G;
        let scales: [f32; ROW] = std::array::from_fn(|i| scales[group(i)]);
        let minima: [f32; ROW] = std::array::from_fn(|i| minima[group(i)]);
        for i in 0..ROW {
            let product = scales[i] * f32::from(codes[i]);
            let weight = match T::MINIMUM {
                Minimum::None => product,
                Minimum::Added => product + minima[i],
                Minimum::Subtracted => product - minima[i],
            };
            out[i] = if T::SHORT {
                N::round_short(weight)
            } else {
                N::round(weight)
            };
        }
    }
}

/// The numbers of any block, one by one, with the bits of NaN spelled out. Only the blocks of
/// damaged models come here.
#[cold]
#[inline(never)]
fn any<T, N, const B: usize, const G: usize, const S: usize, const W: usize>(
    block: &[u8; B],
    out: &mut [[u8; W]],
) where
    T: Block<B, G, S>,
    N: Number<W>,
{
    let (d, dmin) = (T::d(block), T::dmin(block));
    let groups = T::factors(block).into_iter().zip(T::min_factors(block));
    let codes = T::codes(block);
    for ((codes, out), (factor, min_factor)) in
        codes.iter().zip(out.chunks_exact_mut(G)).zip(groups)
    {
        let (scale, minimum) = (times(d, factor), times(dmin, min_factor));
        for (code, out) in codes.iter().zip(out) {
            let product = times(scale, f32::from(*code));
            *out = N::cast(match T::MINIMUM {
                Minimum::None => product,
                Minimum::Added => plus(product, minimum),
                Minimum::Subtracted => minus(product, minimum),
            });
        }
    }
}
