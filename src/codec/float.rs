//! Single numbers: the scales of blocks as F32, and F32 as the numbers of an output.
//!
//! Everything is a select or plain arithmetic, so that loops over it are vectorised. NaN bits are
//! spelled out, since neither IEEE 754 nor Rust says what they are: they are those of gguf-py
//! (numpy, ml_dtypes) on x86 processors, on every machine.

/// What the numbers of an output are, little-endian, in `W` bytes each.
pub(super) trait Number<const W: usize> {
    /// The nearest number, ties to even, overflow to infinity. Not for NaN.
    fn round(value: f32) -> [u8; W];

    /// As [`round`](Self::round), for a value of eight significant bits at most.
    #[inline(always)]
    fn round_short(value: f32) -> [u8; W] {
        Self::round(value)
    }

    /// As [`round`](Self::round), and NaN as numpy and ml_dtypes cast it.
    fn cast(value: f32) -> [u8; W];

    /// The value of such a number.
    fn value(bytes: [u8; W]) -> f32;
}

pub(super) const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Number<4> for F32 {
    #[inline(always)]
    fn round(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }

    #[inline(always)]
    fn cast(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }

    #[inline(always)]
    fn value(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }
}

impl Number<2> for F16 {
    #[inline(always)]
    fn round(value: f32) -> [u8; 2] {
        const LEAST_NORMAL: f32 = power_of_two(-14);
        const INFINITE: f32 = power_of_two(16); // what is greater rounds as this does
        let sign = (value.to_bits() >> 16) & 0x8000;
        let size = value.abs();
        let size = if size < INFINITE { size } else { INFINITE };
        let bits = size.to_bits();
        // The exponents of F16 are less by 112; 13 bits of the mantissa go.
        let half_and_odd = 0x0FFF + ((bits >> 13) & 1);
        let normal = bits.wrapping_sub(112 << 23).wrapping_add(half_and_odd) >> 13;
        // The sum is rounded to multiples of its last bit, 2^-24, which is the least subnormal.
        let subnormal = (size + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let half = if size < LEAST_NORMAL {
            subnormal
        } else {
            normal
        };
        ((half | sign) as u16).to_le_bytes()
    }

    /// A NaN keeps its sign and the upper ten bits of its payload.
    #[inline(always)]
    fn cast(value: f32) -> [u8; 2] {
        if value.is_nan() {
            let bits = value.to_bits();
            (((bits >> 16) & 0x8000 | 0x7C00 | (bits >> 13) & 0x3FF) as u16).to_le_bytes()
        } else {
            Self::round(value)
        }
    }

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        let half = i16::from_le_bytes(bytes);
        // Sign, exponent and mantissa in their places. The exponent is too small by 112, that of a
        // subnormal, too.
        let bits = (i32::from(half) << 13) as u32 & 0x8FFF_E000;
        if half & 0x7C00 == 0x7C00 {
            f32::from_bits(bits | f32::INFINITY.to_bits())
        } else {
            f32::from_bits(bits) * power_of_two(112)
        }
    }
}

impl Number<2> for Bf16 {
    #[inline(always)]
    fn round(value: f32) -> [u8; 2] {
        let bits = value.to_bits();
        ((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes()
    }

    /// BF16 has room for it: there is nothing to round.
    #[inline(always)]
    fn round_short(value: f32) -> [u8; 2] {
        ((value.to_bits() >> 16) as u16).to_le_bytes()
    }

    /// A NaN keeps its sign alone.
    #[inline(always)]
    fn cast(value: f32) -> [u8; 2] {
        if value.is_nan() {
            ((value.to_bits() >> 16) as u16 & 0x8000 | 0x7FC0).to_le_bytes()
        } else {
            Self::round(value)
        }
    }

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }
}

/// The F16 at this place of a block.
#[inline(always)]
pub(super) fn f16<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    F16::value([block[at], block[at + 1]])
}

/// `a * b` with the NaN of [`nan`].
pub(super) fn times(a: f32, b: f32) -> f32 {
    nan(a, b, a * b)
}

/// `a + b` with the NaN of [`nan`].
pub(super) fn plus(a: f32, b: f32) -> f32 {
    nan(a, b, a + b)
}

/// `a - b` with the NaN of [`nan`].
pub(super) fn minus(a: f32, b: f32) -> f32 {
    nan(a, b, a - b)
}

/// The result of an operation on `a` and `b`, where it is NaN the one that x86 processors give:
/// `a` made quiet, else `b` made quiet, else the negative one without a payload.
fn nan(a: f32, b: f32, result: f32) -> f32 {
    const QUIET: u32 = 1 << 22;
    if !result.is_nan() {
        result
    } else if a.is_nan() {
        f32::from_bits(a.to_bits() | QUIET)
    } else if b.is_nan() {
        f32::from_bits(b.to_bits() | QUIET)
    } else {
        f32::from_bits(0xFFC0_0000)
    }
}
