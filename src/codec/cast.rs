//! Numbers of one dtype as those of another.

use std::marker::PhantomData;

use super::float::Number;
use crate::sys::simd::Kernel;

/// `N` in `W` bytes each to `M` in `V` bytes each: to the nearest, ties to even.
pub(super) struct Cast<N, M, const W: usize, const V: usize>(PhantomData<(N, M)>);

impl<N: Number<W>, M: Number<V>, const W: usize, const V: usize> Kernel for Cast<N, M, W, V> {
    const BLOCK: usize = W;
    const OUT: usize = V;

    #[inline(always)]
    fn run(blocks: &[u8], out: &mut [u8]) {
        let (blocks, _) = blocks.as_chunks::<W>();
        let (out, _) = out.as_chunks_mut::<V>();
        for (number, out) in blocks.iter().zip(out) {
            *out = M::cast(N::value(*number));
        }
    }
}
