//! What quantised tensors are shown as: their blocks, numbers, or arrays that MLX computes with.
//!
//! The problem: a loader that does not know GGML's blocks can store an expert and do nothing with
//! it. Which arrays stand for a tensor depends on its type, its name and its shape.
//!
//! The plan: a [`Form`] is what the user asks for; [`Shown`] is what that makes of one tensor, and
//! knows each of its arrays. Nothing here is computed: sizes follow from shapes, and bytes from a
//! [`Codec`], when they are read.

use std::borrow::Cow;
use std::fmt;

use crate::codec::{Codec, Float, Map, Mlx, Mode, Output};
use crate::gguf::GgmlType;
use crate::safetensors::{Array, Dtype, Shape};

/// What quantised tensors of a model are shown as. All others keep their dtype and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Form {
    /// As the model's own blocks, of dtype U8.
    #[default]
    Raw,
    /// As numbers of this dtype.
    Numbers(Float),
    /// As what `mx.quantized_matmul` takes, with scales and biases of this dtype. What has no exact
    /// map to that is shown as numbers of the same dtype; but with `requant`, Q6_K, Q2_K, IQ2_XS and
    /// IQ2_S are quantised anew to 8 bits.
    Mlx { scales: Float, requant: bool },
}

impl Form {
    /// Every form with its usual options.
    pub const ALL: [Self; 5] = [
        Self::Raw,
        Self::Numbers(Float::F32),
        Self::Numbers(Float::F16),
        Self::Numbers(Float::Bf16),
        Self::MLX,
    ];
    /// MLX's arrays, with numbers that are the model's own.
    pub const MLX: Self = Self::Mlx {
        scales: Float::F16,
        requant: false,
    };

    /// The same, but what MLX cannot pack is quantised anew where that is possible.
    pub const REQUANTISED: Self = Self::Mlx {
        scales: Float::F16,
        requant: true,
    };

    /// The name on the command line and in headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Numbers(Float::F32) => "f32",
            Self::Numbers(Float::F16) => "f16",
            Self::Numbers(Float::Bf16) => "bf16",
            Self::Mlx { .. } => "mlx",
        }
    }
}

impl Form {
    /// The options of the command line that ask for it.
    pub fn options(self) -> String {
        let mut options = format!("--as {self}");
        if let Self::Mlx { scales, requant } = self {
            options += &format!(" --scales {}", Self::Numbers(scales));
            options += if requant { " --requant" } else { "" };
        }
        options
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<Float> for Dtype {
    fn from(float: Float) -> Self {
        match float {
            Float::F32 => Self::F32,
            Float::F16 => Self::F16,
            Float::Bf16 => Self::Bf16,
        }
    }
}

/// What one tensor is shown as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// Its own bytes.
    Stored,
    Numbers(Float),
    /// Packed codes, scales and, in affine mode, biases.
    Mlx {
        map: Map,
        mlx: Mlx,
        /// The dtype of scales and biases in affine mode.
        scales: Float,
    },
}

/// What the name of a tensor ends in that MLX can multiply by.
const WEIGHT: &str = ".weight";

impl Shown {
    /// What a form makes of a tensor with this name in its file and this logical shape, row-major;
    /// `None` if nobody here knows the numbers of its type.
    pub fn of(form: Form, ggml_type: &GgmlType, name: &str, shape: &Shape) -> Option<Self> {
        let is_quantised = Dtype::of(ggml_type) == Dtype::U8;
        match form {
            _ if !is_quantised => Some(Self::Stored),
            Form::Raw => Some(Self::Stored),
            Form::Numbers(float) => {
                Codec::of(ggml_type, Output::Numbers(float)).map(|_| Self::Numbers(float))
            }
            Form::Mlx { scales, requant } => {
                Codec::of(ggml_type, Output::Numbers(scales))?;
                let maps = [(Map::Exact, true), (Map::Requantised, requant)];
                let maps = maps.into_iter().filter(|(_, is_wanted)| *is_wanted);
                let mut maps = maps.filter_map(|(map, _)| Some((map, Mlx::of(ggml_type, map)?)));
                let (_, row) = shape
                    .dims()
                    .split_last()
                    .map_or((&[][..], 0), |(row, rows)| (rows, *row));
                let fits = |mlx: &Mlx| {
                    name.ends_with(WEIGHT)
                        && shape.dims().len() >= 2
                        && row.is_multiple_of(mlx.group_size.into())
                };
                Some(match maps.next().filter(|(_, mlx)| fits(mlx)) {
                    Some((map, mlx)) => Self::Mlx { map, mlx, scales },
                    None => Self::Numbers(scales),
                })
            }
        }
    }

    /// Bytes of all arrays of a tensor with this type and logical shape.
    pub fn bytes(self, ggml_type: &GgmlType, shape: &Shape) -> u64 {
        let arrays = (0..self.arrays()).map(|n| {
            let (dtype, shape) = self.elements(n, ggml_type, shape);
            shape.bytes(dtype)
        });
        arrays.fold(0, u64::saturating_add)
    }

    /// Whether anything is computed.
    pub fn is_computed(self) -> bool {
        self != Self::Stored
    }

    /// How many arrays it is.
    pub fn arrays(self) -> usize {
        match self {
            Self::Stored | Self::Numbers(_) => 1,
            Self::Mlx { mlx, .. } if mlx.mode == Mode::Affine => 3,
            Self::Mlx { .. } => 2,
        }
    }

    /// What makes the `n`-th array from the blocks of a type; `None` if it is the tensor's own bytes.
    pub fn codec(self, n: usize, ggml_type: &GgmlType) -> Option<Codec> {
        let output = match (self, n) {
            (Self::Stored, _) => return None,
            (Self::Numbers(float), _) => Output::Numbers(float),
            (Self::Mlx { map, .. }, 0) => Output::Weight(map),
            (Self::Mlx { map, scales, .. }, 1) => Output::Scales(map, scales),
            (Self::Mlx { map, scales, .. }, _) => Output::Biases(map, scales),
        };
        let codec = Codec::of(ggml_type, output);
        Some(codec.expect("only what has a codec is shown as computed"))
    }

    /// The dtype and shape of the `n`-th array of a tensor with this type and logical shape,
    /// row-major.
    pub fn elements(self, n: usize, ggml_type: &GgmlType, shape: &Shape) -> (Dtype, Shape) {
        match self {
            Self::Stored => (Dtype::of(ggml_type), shape.stored(ggml_type)),
            Self::Numbers(float) => (float.into(), *shape),
            Self::Mlx { mlx, .. } if n == 0 => {
                let bits = u64::from(mlx.bits);
                (Dtype::U32, shape.with_last(|row| row * bits / 32))
            }
            Self::Mlx { mlx, scales, .. } => {
                let dtype = match mlx.mode {
                    Mode::Affine => scales.into(),
                    Mode::Mxfp4 | Mode::Nvfp4 => Dtype::U8,
                };
                let groups = shape.with_last(|row| row / u64::from(mlx.group_size));
                (dtype, groups)
            }
        }
    }

    /// The array, with the name that it has if the tensor has this one.
    pub fn array<'a>(
        self,
        n: usize,
        ggml_type: &GgmlType,
        name: &'a str,
        shape: &Shape,
    ) -> Array<'a> {
        let (dtype, shape) = self.elements(n, ggml_type, shape);
        let name = match self {
            Self::Mlx { .. } if n > 0 => {
                let stem = name.strip_suffix(WEIGHT).unwrap_or(name);
                let suffix = if n == 1 { ".scales" } else { ".biases" };
                Cow::Owned([stem, suffix].concat())
            }
            _ => name.into(),
        };
        Array {
            bytes: shape.bytes(dtype),
            name,
            dtype,
            shape,
        }
    }
}

/// Types whose numbers nobody here knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownTypes(pub Vec<(&'static str, usize)>);

impl fmt::Display for UnknownTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types = self.0.iter().map(|(name, tensors)| {
            let plural = if *tensors == 1 { "" } else { "s" };
            format!("{name} ({tensors} tensor{plural})")
        });
        f.write_str(&types.collect::<Vec<_>>().join(", "))
    }
}
