//! What the blocks of all types have in common.

/// How `B` bytes hold `S` groups of `G` weights. With the names of ggml-quants.c:
///
/// ```text
/// weight = (d * factor) * code                        Minimum::None
/// weight = (d * factor) * code + dmin * min_factor    Minimum::Added
/// weight = (d * factor) * code - dmin * min_factor    Minimum::Subtracted
/// ```
///
/// in F32, operation by operation, as in gguf-py. Products are exact, since `d`, factor and code
/// never have more than the 24 bits of an F32 together. Only the sum is rounded.
pub(super) trait Block<const B: usize, const G: usize, const S: usize> {
    /// What is added to the product, if anything.
    const MINIMUM: Minimum = Minimum::None;

    /// Whether weights have eight significant bits at most.
    const SHORT: bool = false;

    /// The codes, in the order of the weights.
    fn codes(block: &[u8; B]) -> [[i8; G]; S];

    /// The scale of the block.
    fn d(block: &[u8; B]) -> f32;

    /// What each group multiplies `d` by: small numbers.
    #[inline(always)]
    fn factors(_: &[u8; B]) -> [f32; S] {
        [1.0; S]
    }

    /// The scale of the minima of the block.
    #[inline(always)]
    fn dmin(_: &[u8; B]) -> f32 {
        0.0
    }

    /// What each group multiplies `dmin` by: small integers.
    #[inline(always)]
    fn min_factors(_: &[u8; B]) -> [f32; S] {
        [1.0; S]
    }
}

/// How the minimum of a group, if it has one, joins the product of scale and code.
pub(super) enum Minimum {
    None,
    Added,
    Subtracted,
}

/// The `N` bytes from `at` on.
#[inline(always)]
pub(super) fn field<const B: usize, const N: usize>(block: &[u8; B], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[at..at + N]);
    bytes
}
