//! The table of types, and the functions of each for each output.

use std::fmt;

use super::block::Block;
use super::cast::Cast;
use super::float::{Bf16, F16, F32, Number};
use super::fp4::{Mxfp4, Nvfp4};
use super::iq::{Iq1M, Iq1S, Iq2S, Iq2Xs, Iq2Xxs, Iq3S, Iq3Xxs, Iq4Nl, Iq4Xs};
use super::k::{Q2K, Q3K, Q4K, Q5K, Q6K};
use super::mlx::{Affine, Biases, ByteScales, Fp4Scales, Quants, Scales, Weight};
use super::numbers::Numbers;
use super::plain::{Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Tq1_0, Tq2_0};
use super::requant::Requantised;
use super::{Float, Map, Mlx, Mode, Output, Unit};
use crate::gguf::GgmlType;
use crate::sys::simd::{Avx2, Kernel};

/// A type whose numbers are known.
struct Type {
    name: &'static str,
    /// `None` if it is not quantised.
    mlx: Option<(Map, Mlx)>,
    functions: fn(Output) -> Option<Functions>,
}

/// An affine map names the narrowest dtype that holds its scales and biases exactly.
static TYPES: [Type; 28] = [
    float::<F32, _>("F32"),
    float::<F16, _>("F16"),
    float::<Bf16, _>("BF16"),
    affine::<Q1_0, _, _, _, _, _>("Q1_0", Float::F16),
    affine::<Q2_0, _, _, _, _, _>("Q2_0", Float::F16),
    affine::<Q4_0, _, _, _, _, _>("Q4_0", Float::F16),
    affine::<Q4_1, _, _, _, _, _>("Q4_1", Float::F16),
    affine::<Q5_0, _, _, _, _, _>("Q5_0", Float::F16),
    affine::<Q5_1, _, _, _, _, _>("Q5_1", Float::F16),
    affine::<Q8_0, _, _, _, _, _>("Q8_0", Float::F16),
    requantised::<Q2K, _, _, _, _, _>("Q2_K"),
    affine::<Q3K, _, _, _, _, _>("Q3_K", Float::F16),
    affine::<Q4K, _, _, _, _, _>("Q4_K", Float::F32),
    affine::<Q5K, _, _, _, _, _>("Q5_K", Float::F32),
    requantised::<Q6K, _, _, _, _, _>("Q6_K"),
    affine::<Iq1S, _, _, _, _, _>("IQ1_S", Float::F32),
    affine::<Iq1M, _, _, _, _, _>("IQ1_M", Float::F32),
    affine::<Iq2Xxs, _, _, _, _, _>("IQ2_XXS", Float::F32),
    requantised::<Iq2Xs, _, _, _, _, _>("IQ2_XS"),
    requantised::<Iq2S, _, _, _, _, _>("IQ2_S"),
    affine::<Iq3Xxs, _, _, _, _, _>("IQ3_XXS", Float::F32),
    affine::<Iq3S, _, _, _, _, _>("IQ3_S", Float::F32),
    affine::<Iq4Nl, _, _, _, _, _>("IQ4_NL", Float::F16),
    affine::<Iq4Xs, _, _, _, _, _>("IQ4_XS", Float::F32),
    affine::<Tq1_0, _, _, _, _, _>("TQ1_0", Float::F16),
    affine::<Tq2_0, _, _, _, _, _>("TQ2_0", Float::F16),
    fp4::<Mxfp4, _, _, _>("MXFP4"),
    fp4::<Nvfp4, _, _, _>("NVFP4"),
];

/// A place in the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kind(u8);

impl Kind {
    pub(super) fn of(ggml_type: &GgmlType) -> Option<Self> {
        let place = TYPES.iter().position(|t| t.name == ggml_type.name)?;
        Some(Self(place as u8))
    }

    pub(super) fn functions(self, output: Output) -> Option<Functions> {
        (self.entry().functions)(output)
    }

    pub(super) fn mlx(self, map: Map) -> Option<Mlx> {
        let (known, mlx) = self.entry().mlx?;
        (known == map).then_some(mlx)
    }

    fn entry(self) -> &'static Type {
        &TYPES[usize::from(self.0)]
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.entry().name)
    }
}

/// A kernel in both of its copies.
pub(super) struct Functions {
    pub(super) unit: Unit,
    pub(super) portable: fn(&[u8], &mut [u8]),
    pub(super) avx2: fn(Avx2, &[u8], &mut [u8]),
}

fn functions<K: Kernel>() -> Functions {
    Functions {
        unit: Unit {
            blocks: K::BLOCK,
            out: K::OUT,
        },
        portable: K::run,
        avx2: Avx2::run::<K>,
    }
}

/// The kernel for each dtype of numbers.
macro_rules! for_float {
    ($float:expr, $kernel:ident<$type:ty>) => {
        match $float {
            Float::F32 => functions::<$kernel<$type, F32, _, _, _, _>>(),
            Float::F16 => functions::<$kernel<$type, F16, _, _, _, _>>(),
            Float::Bf16 => functions::<$kernel<$type, Bf16, _, _, _, _>>(),
        }
    };
}

/// Numbers that are not quantised, `W` bytes each.
const fn float<N: Number<W>, const W: usize>(name: &'static str) -> Type {
    Type {
        name,
        mlx: None,
        functions: |output| match output {
            Output::Numbers(Float::F32) => Some(functions::<Cast<N, F32, W, 4>>()),
            Output::Numbers(Float::F16) => Some(functions::<Cast<N, F16, W, 2>>()),
            Output::Numbers(Float::Bf16) => Some(functions::<Cast<N, Bf16, W, 2>>()),
            _ => None,
        },
    }
}

/// Blocks of `S` groups of `G` weights, which are `R` groups of `H` in affine mode.
const fn affine<T, const B: usize, const G: usize, const S: usize, const H: usize, const R: usize>(
    name: &'static str,
    exact_in: Float,
) -> Type
where
    T: Block<B, G, S> + Affine<B, H, R>,
{
    Type {
        name,
        mlx: Some((
            Map::Exact,
            Mlx {
                mode: Mode::Affine,
                bits: T::BITS as u32,
                group_size: H as u32,
                exact_in: Some(exact_in),
            },
        )),
        functions: |output| {
            Some(match output {
                Output::Numbers(float) => for_float!(float, Numbers<T>),
                Output::Weight(Map::Exact) => functions::<Weight<T, _, _, _>>(),
                Output::Scales(Map::Exact, float) => for_float!(float, Scales<T>),
                Output::Biases(Map::Exact, float) => for_float!(float, Biases<T>),
                _ => return None,
            })
        },
    }
}

/// Blocks whose codes are floating point in MLX, too.
const fn fp4<T, const B: usize, const G: usize, const S: usize>(name: &'static str) -> Type
where
    T: Block<B, G, S> + ByteScales<B, G, S>,
{
    Type {
        name,
        mlx: Some((
            Map::Exact,
            Mlx {
                mode: T::MODE,
                bits: T::BITS as u32,
                group_size: G as u32,
                exact_in: Some(Float::F32),
            },
        )),
        functions: |output| {
            Some(match output {
                Output::Numbers(float) => for_float!(float, Numbers<T>),
                Output::Weight(Map::Exact) => functions::<Weight<T, _, _, _>>(),
                Output::Scales(Map::Exact, _) => functions::<Fp4Scales<T, _, _, _>>(),
                _ => return None,
            })
        },
    }
}

/// As [`affine`], for blocks without an exact map.
const fn requantised<
    T,
    const B: usize,
    const G: usize,
    const S: usize,
    const H: usize,
    const R: usize,
>(
    name: &'static str,
) -> Type
where
    T: Block<B, G, S>,
    Requantised<T>: Affine<B, H, R>,
{
    Type {
        name,
        mlx: Some((
            Map::Requantised,
            Mlx {
                mode: Mode::Affine,
                bits: <Requantised<T> as Quants<B, H, R>>::BITS as u32,
                group_size: H as u32,
                exact_in: None,
            },
        )),
        functions: |output| {
            Some(match output {
                Output::Numbers(float) => for_float!(float, Numbers<T>),
                Output::Weight(Map::Requantised) => functions::<Weight<Requantised<T>, _, _, _>>(),
                Output::Scales(Map::Requantised, float) => {
                    for_float!(float, Scales<Requantised<T>>)
                }
                Output::Biases(Map::Requantised, float) => {
                    for_float!(float, Biases<Requantised<T>>)
                }
                _ => return None,
            })
        },
    }
}
