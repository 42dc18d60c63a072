//! GGML blocks as numbers, and as the arrays that MLX computes with.
//!
//! The problem: loaders do not know GGML's blocks. Every output of a tensor (its numbers, or one of
//! MLX's arrays) has a fixed size for each block, so that any range of an output can be computed
//! from the blocks beneath it alone.
//!
//! The plan, from the bytes of a block to those of an output:
//!
//! ```text
//! plain, k, iq, fp4   what the blocks of each type hold: codes and scales   (block, signs, grids)
//!   numbers           scale * code as F32, F16 or BF16                      (float)
//!   cast              the same of types that are not quantised
//!   maps, requant     the same for MLX: unsigned codes, scales, biases
//!     mlx             these as packed arrays
//! kinds               the functions for each type and output
//! sys::simd           each function twice: for every processor, and for AVX2
//! ```
//!
//! All of this is pure: nothing is allocated, and no bytes make it panic. Loops run over arrays of
//! fixed length without branches, so that the compiler turns them into vector instructions.
//!
//! ```
//! use odmoe_fs::codec::{Codec, Float, Output};
//! use odmoe_fs::gguf::GgmlType;
//!
//! let q8_0 = GgmlType::from_name("Q8_0").unwrap();
//! let codec = Codec::of(q8_0, Output::Numbers(Float::Bf16)).unwrap();
//! let unit = codec.unit();
//! assert_eq!((unit.blocks, unit.out), (34, 64));
//!
//! let blocks = vec![0; 10 * unit.blocks];
//! let mut out = vec![0; 10 * unit.out];
//! codec.compute(&blocks, &mut out);
//! ```
// One index into several arrays reads best, and vectorises best.
#![allow(clippy::needless_range_loop)]

mod block;
mod cast;
mod float;
mod fp4;
mod grids;
mod iq;
mod k;
mod kinds;
mod maps;
mod mlx;
mod numbers;
mod plain;
mod requant;
mod signs;
#[cfg(test)]
mod tests;

use self::kinds::{Functions, Kind};
use crate::gguf::GgmlType;
use crate::sys::simd::Avx2;

/// A dtype of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Float {
    F32,
    F16,
    Bf16,
}

/// How MLX sees the weights of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Map {
    /// With the numbers of the GGUF, as far as the dtype of the scales has room for them.
    Exact,
    /// In 8 bits and groups of 32, with numbers near those of the GGUF: for the types that have no
    /// exact map.
    Requantised,
}

/// One of the arrays that can be made of a quantised tensor.
///
/// MLX's are those that `mx.quantized_matmul` takes. A row of the tensor must be a multiple of
/// [`Mlx::group_size`], which rows of whole blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Output {
    /// The weights, in order: bit for bit what `gguf.quants.dequantize` of gguf-py gives, and of
    /// that the cast of numpy to F16 or of ml_dtypes to BF16: to the nearest number, ties to even,
    /// overflow to infinity.
    ///
    /// This includes the bits of NaN, for which gguf-py on an x86 processor is the measure. Where
    /// both the scale and the minimum of Q4_1 or Q5_1 are NaN it gives now one and now the other;
    /// here it is always the scale's.
    Numbers(Float),
    /// The codes: a little-endian bit stream, whose elements are U32.
    Weight(Map),
    /// The scale of each group. In the modes mxfp4 and nvfp4 they are U8, whatever the float.
    Scales(Map, Float),
    /// The bias of each group, in affine mode. A bias can be 128 times its scale, so that in F16 it
    /// is infinite for scales above 511; no real model has such scales.
    Biases(Map, Float),
}

/// MLX's modes of quantisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// `scale * code + bias`.
    Affine,
    /// `scale * code` with E2M1 codes and E8M0 scales of 32 weights. The scale 255 is infinity to
    /// MLX and 2^128 to ggml.
    Mxfp4,
    /// The same with E4M3 scales of 16 weights. Scales that MLX would read differently from ggml
    /// are rewritten: without a sign, and 0 for NaN.
    Nvfp4,
}

impl Mode {
    /// The `mode` of `mx.quantized_matmul`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
        }
    }
}

/// How MLX sees the weights of a type: the arguments of `mx.quantized_matmul`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mlx {
    pub mode: Mode,
    /// Bits of a code.
    pub bits: u32,
    /// Weights with one scale.
    pub group_size: u32,
    /// The narrowest dtype that holds scales and biases exactly; `None` if the codes are not exact.
    exact_in: Option<Float>,
}

impl Mlx {
    /// `None` for types without such a map.
    pub fn of(ggml_type: &GgmlType, map: Map) -> Option<Self> {
        Kind::of(ggml_type)?.mlx(map)
    }

    /// Whether MLX computes exactly the GGUF's F32 numbers when scales and biases have this dtype.
    /// (Overflow aside: see [`Output::Biases`].)
    pub fn is_exact(&self, scales: Float) -> bool {
        self.exact_in.is_some_and(|least| {
            self.mode != Mode::Affine || scales == Float::F32 || scales == least
        })
    }
}

/// The smallest step of a [`Codec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Unit {
    /// Bytes of blocks.
    pub blocks: usize,
    /// Bytes of the output: whole elements of its dtype.
    pub out: usize,
}

/// One output of the blocks of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Codec {
    kind: Kind,
    output: Output,
}

impl Codec {
    /// `None` for types that have no such output.
    pub fn of(ggml_type: &GgmlType, output: Output) -> Option<Self> {
        let kind = Kind::of(ggml_type)?;
        kind.functions(output)?;
        Some(Self { kind, output })
    }

    /// Unit n of the blocks becomes unit n of the output, and depends on nothing else.
    pub fn unit(&self) -> Unit {
        self.functions().unit
    }

    /// Computes the output of whole units of blocks.
    ///
    /// # Panics
    /// If `blocks` and `out` are not the same whole number of units.
    pub fn compute(&self, blocks: &[u8], out: &mut [u8]) {
        let functions = self.functions();
        functions.unit.check(blocks, out);
        match Avx2::detect() {
            Some(avx2) => (functions.avx2)(avx2, blocks, out),
            None => (functions.portable)(blocks, out),
        }
    }

    /// As [`compute`](Self::compute), without AVX2, for tests that compare the two.
    #[doc(hidden)]
    pub fn compute_portably(&self, blocks: &[u8], out: &mut [u8]) {
        let functions = self.functions();
        functions.unit.check(blocks, out);
        (functions.portable)(blocks, out);
    }

    fn functions(&self) -> Functions {
        let functions = self.kind.functions(self.output);
        functions.expect("`of` makes none without")
    }
}

impl Unit {
    fn check(&self, blocks: &[u8], out: &[u8]) {
        let units = blocks.len() / self.blocks;
        assert!(
            units * self.blocks == blocks.len() && units * self.out == out.len(),
            "{} bytes of blocks and {} of output are not the same number of {self:?}",
            blocks.len(),
            out.len(),
        );
    }
}
