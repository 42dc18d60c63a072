//! What MLX computes with: packed codes, scales and biases, as `mx.quantized_matmul` takes them.
//!
//! In affine mode a weight is `scale * q + bias`, with an unsigned code `q`. In the modes mxfp4 and
//! nvfp4 codes are E2M1 and scales are bytes. In all of them a row of codes is a little-endian bit
//! stream, the first code in the lowest bits.

use std::marker::PhantomData;

use super::Mode;
use super::float::Number;
use crate::sys::simd::Kernel;

/// How a block of `B` bytes is `S` groups of `G` codes.
pub(super) trait Quants<const B: usize, const G: usize, const S: usize> {
    /// Bits of a code.
    const BITS: usize;

    /// The codes, in the order of the weights, below `2^BITS`.
    fn quants(block: &[u8; B]) -> [[u8; G]; S];
}

/// What its codes mean in affine mode.
pub(super) trait Affine<const B: usize, const G: usize, const S: usize>:
    Quants<B, G, S>
{
    /// Whether biases are multiples of the scales.
    const MULTIPLES: bool;

    /// The scale of each group.
    fn scales(block: &[u8; B]) -> [f32; S];

    /// The bias of each group. Where biases are multiples, they are computed from `scales`, the
    /// block's scales as rounded to their dtype, so that both stay in proportion.
    fn biases(block: &[u8; B], scales: [f32; S]) -> [f32; S];
}

/// What its codes mean in the modes mxfp4 and nvfp4.
pub(super) trait ByteScales<const B: usize, const G: usize, const S: usize>:
    Quants<B, G, S>
{
    const MODE: Mode;

    /// The scale of each group, E8M0 or E4M3.
    fn scales(block: &[u8; B]) -> [u8; S];
}

/// The codes of `T`, packed.
pub(super) struct Weight<T, const B: usize, const G: usize, const S: usize>(PhantomData<T>);

impl<T: Quants<B, G, S>, const B: usize, const G: usize, const S: usize> Kernel
    for Weight<T, B, G, S>
{
    const BLOCK: usize = B;
    const OUT: usize = G * S * T::BITS / 8;

    #[inline(always)]
    fn run(blocks: &[u8], out: &mut [u8]) {
        let (blocks, _) = blocks.as_chunks::<B>();
        if T::BITS == 8 || G * S == LONG {
            for (block, out) in blocks.iter().zip(out.chunks_exact_mut(Self::OUT)) {
                pack(T::BITS, T::quants(block).as_flattened(), out);
            }
            return;
        }
        // Several small blocks at a time make a long loop in `pack`.
        let several = LONG / (G * S);
        let outs = out.chunks_mut(several * Self::OUT);
        let mut codes = [0; LONG];
        for (blocks, out) in blocks.chunks(several).zip(outs) {
            for (block, codes) in blocks.iter().zip(codes.chunks_exact_mut(G * S)) {
                codes.copy_from_slice(T::quants(block).as_flattened());
            }
            pack(T::BITS, &codes[..blocks.len() * G * S], out);
        }
    }
}

/// Weights of the largest blocks.
const LONG: usize = 256;

/// Codes below `2^bits` as a stream of bits.
#[inline(always)]
fn pack(bits: usize, codes: &[u8], out: &mut [u8]) {
    if bits == 8 {
        out.copy_from_slice(codes);
        return;
    }
    let (octets, _) = codes.as_chunks::<8>();
    for (octet, out) in octets.iter().zip(out.chunks_exact_mut(bits)) {
        // Two become one of twice the bits, three times.
        let x = u64::from_le_bytes(*octet);
        let x = x & 0x00FF_00FF_00FF_00FF | (x & 0xFF00_FF00_FF00_FF00) >> (8 - bits);
        let x = x & 0x0000_FFFF_0000_FFFF | (x & 0xFFFF_0000_FFFF_0000) >> (16 - 2 * bits);
        let x = x & 0x0000_0000_FFFF_FFFF | (x & 0xFFFF_FFFF_0000_0000) >> (32 - 4 * bits);
        out.copy_from_slice(&x.to_le_bytes()[..bits]);
    }
}

/// The scales of `T` as numbers `N`.
pub(super) struct Scales<T, N, const B: usize, const G: usize, const S: usize, const W: usize>(
    PhantomData<(T, N)>,
);

impl<T, N, const B: usize, const G: usize, const S: usize, const W: usize> Kernel
    for Scales<T, N, B, G, S, W>
where
    T: Affine<B, G, S>,
    N: Number<W>,
{
    const BLOCK: usize = B;
    const OUT: usize = S * W;

    #[inline(always)]
    fn run(blocks: &[u8], out: &mut [u8]) {
        floats::<N, B, S, W>(blocks, out, |blocks, scales| {
            for (block, scales) in blocks.iter().zip(scales) {
                *scales = T::scales(block);
            }
        });
    }
}

/// The biases of `T` as numbers `N`.
pub(super) struct Biases<T, N, const B: usize, const G: usize, const S: usize, const W: usize>(
    PhantomData<(T, N)>,
);

impl<T, N, const B: usize, const G: usize, const S: usize, const W: usize> Kernel
    for Biases<T, N, B, G, S, W>
where
    T: Affine<B, G, S>,
    N: Number<W>,
{
    const BLOCK: usize = B;
    const OUT: usize = S * W;

    #[inline(always)]
    fn run(blocks: &[u8], out: &mut [u8]) {
        floats::<N, B, S, W>(blocks, out, |blocks, biases| {
            if T::MULTIPLES {
                for (block, scales) in blocks.iter().zip(&mut *biases) {
                    *scales = T::scales(block);
                }
                for scale in biases.as_flattened_mut() {
                    *scale = N::value(N::cast(*scale));
                }
            }
            for (block, biases) in blocks.iter().zip(biases) {
                *biases = T::biases(block, *biases);
            }
        });
    }
}

/// What `values` makes of the blocks, `S` of each, as numbers `N`.
#[inline(always)]
fn floats<N: Number<W>, const B: usize, const S: usize, const W: usize>(
    blocks: &[u8],
    out: &mut [u8],
    values: impl Fn(&[[u8; B]], &mut [[f32; S]]),
) {
    /// Blocks at a time, for long loops.
    const BLOCKS: usize = 32;
    let (blocks, _) = blocks.as_chunks::<B>();
    let (out, _) = out.as_chunks_mut::<W>();
    let mut buffer = [[0.0; S]; BLOCKS];
    for (blocks, out) in blocks.chunks(BLOCKS).zip(out.chunks_mut(BLOCKS * S)) {
        let buffer = &mut buffer[..blocks.len()];
        values(blocks, buffer);
        for (out, value) in out.iter_mut().zip(buffer.as_flattened()) {
            // One NaN for all: processors differ in the sign of infinity times zero.
            *out = N::cast(if value.is_nan() { f32::NAN } else { *value });
        }
    }
}

/// The scales of `T` as they are in MLX's modes of 4-bit floating point.
pub(super) struct Fp4Scales<T, const B: usize, const G: usize, const S: usize>(PhantomData<T>);

impl<T, const B: usize, const G: usize, const S: usize> Kernel for Fp4Scales<T, B, G, S>
where
    T: ByteScales<B, G, S>,
{
    const BLOCK: usize = B;
    const OUT: usize = S;

    #[inline(always)]
    fn run(blocks: &[u8], out: &mut [u8]) {
        let (blocks, _) = blocks.as_chunks::<B>();
        let (out, _) = out.as_chunks_mut::<S>();
        for (block, out) in blocks.iter().zip(out) {
            *out = T::scales(block);
        }
    }
}
