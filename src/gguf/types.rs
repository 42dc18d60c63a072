//! The table of GGML tensor types: how many bytes a row of a tensor takes.
//!
//! Sizes of the mainline types follow `ggml-common.h` and `enum ggml_type` of ggml-org/ggml
//! (2026-08); those of ids 97 and above follow `type_traits` of ikawrakow/ik_llama.cpp (2026-08).

use std::fmt;

/// One GGML tensor type: a fixed number of bytes for each block of consecutive elements of a row.
///
/// A row of `ne0` elements takes `row_meta + ne0 / block_size * block_bytes` bytes, and rows
/// follow each other without padding.
#[derive(Debug, PartialEq, Eq)]
pub struct GgmlType {
    /// The id stored in a GGUF tensor info.
    pub id: u32,
    /// The name in `enum ggml_type` without its prefix; also gguf-py's `GGMLQuantizationType` name.
    pub name: &'static str,
    /// Elements per block.
    pub block_size: u32,
    /// Bytes per block.
    pub block_bytes: u32,
    /// Bytes in front of the blocks of every row (a scale for the whole row; fork types only).
    pub row_meta: u32,
    /// How many rows are interleaved; a slice at a multiple of that many rows is still exact.
    pub interleave: u32,
}

const fn ggml(
    id: u32,
    name: &'static str,
    block_size: u32,
    block_bytes: u32,
    row_meta: u32,
    interleave: u32,
) -> GgmlType {
    GgmlType {
        id,
        name,
        block_size,
        block_bytes,
        row_meta,
        interleave,
    }
}

/// Every type whose size is known, ordered by id.
#[rustfmt::skip]
pub static GGML_TYPES: &[GgmlType] = &[
    //   id, name, block elements, block bytes, row meta bytes, interleaved rows
    ggml(0, "F32", 1, 4, 0, 1),
    ggml(1, "F16", 1, 2, 0, 1),
    ggml(2, "Q4_0", 32, 18, 0, 1),
    ggml(3, "Q4_1", 32, 20, 0, 1),
    ggml(6, "Q5_0", 32, 22, 0, 1),
    ggml(7, "Q5_1", 32, 24, 0, 1),
    ggml(8, "Q8_0", 32, 34, 0, 1),
    ggml(9, "Q8_1", 32, 36, 0, 1),
    ggml(10, "Q2_K", 256, 84, 0, 1),
    ggml(11, "Q3_K", 256, 110, 0, 1),
    ggml(12, "Q4_K", 256, 144, 0, 1),
    ggml(13, "Q5_K", 256, 176, 0, 1),
    ggml(14, "Q6_K", 256, 210, 0, 1),
    ggml(15, "Q8_K", 256, 292, 0, 1),
    ggml(16, "IQ2_XXS", 256, 66, 0, 1),
    ggml(17, "IQ2_XS", 256, 74, 0, 1),
    ggml(18, "IQ3_XXS", 256, 98, 0, 1),
    ggml(19, "IQ1_S", 256, 50, 0, 1),
    ggml(20, "IQ4_NL", 32, 18, 0, 1),
    ggml(21, "IQ3_S", 256, 110, 0, 1),
    ggml(22, "IQ2_S", 256, 82, 0, 1),
    ggml(23, "IQ4_XS", 256, 136, 0, 1),
    ggml(24, "I8", 1, 1, 0, 1),
    ggml(25, "I16", 1, 2, 0, 1),
    ggml(26, "I32", 1, 4, 0, 1),
    ggml(27, "I64", 1, 8, 0, 1),
    ggml(28, "F64", 1, 8, 0, 1),
    ggml(29, "IQ1_M", 256, 56, 0, 1),
    ggml(30, "BF16", 1, 2, 0, 1),
    ggml(34, "TQ1_0", 256, 54, 0, 1),
    ggml(35, "TQ2_0", 256, 66, 0, 1),
    ggml(39, "MXFP4", 32, 17, 0, 1),
    ggml(40, "NVFP4", 64, 36, 0, 1),
    ggml(41, "Q1_0", 128, 18, 0, 1),
    ggml(42, "Q2_0", 64, 18, 0, 1),
    // Types of the ik_llama.cpp fork only.
    ggml(97, "Q8_0_X4", 32, 34, 0, 1),
    ggml(98, "Q8_1_X4", 32, 36, 0, 1),
    ggml(99, "Q8_2_X4", 32, 36, 0, 1),
    ggml(133, "Q6_0", 32, 26, 0, 1),
    ggml(134, "IQ1_BN", 64, 13, 2, 1),
    ggml(135, "IQ2_BN", 64, 16, 4, 1),
    ggml(136, "Q8_K64", 64, 68, 0, 1),
    ggml(137, "IQ2_K", 256, 76, 0, 1),
    ggml(138, "IQ3_K", 256, 110, 0, 1),
    ggml(139, "IQ4_K", 256, 144, 0, 1),
    ggml(140, "IQ5_K", 256, 176, 0, 1),
    ggml(141, "IQ6_K", 256, 212, 0, 1),
    ggml(144, "IQ4_KS", 256, 136, 4, 1),
    ggml(145, "IQ2_KS", 256, 70, 2, 1),
    ggml(146, "IQ4_KSS", 256, 128, 4, 1),
    ggml(147, "Q8_K16", 64, 64, 20, 1),
    ggml(148, "Q8_K32", 256, 296, 0, 1),
    ggml(149, "Q8_KR8", 256, 296, 0, 1),
    ggml(150, "Q8_K128", 128, 140, 0, 1),
    ggml(151, "Q8_KV", 32, 32, 8, 1),
    ggml(152, "IQ5_KS", 256, 168, 4, 1),
    ggml(153, "IQ2_KT", 256, 68, 4, 1),
    ggml(154, "IQ3_KT", 256, 100, 4, 1),
    ggml(155, "IQ4_KT", 256, 128, 4, 1),
    ggml(156, "IQ3_KS", 256, 102, 2, 1),
    ggml(157, "IQ2_KL", 256, 86, 2, 1),
    ggml(158, "IQ1_KT", 256, 56, 4, 1),
    ggml(202, "Q4_0_R8", 32, 18, 0, 8),
    ggml(206, "Q5_0_R4", 32, 22, 0, 4),
    ggml(208, "Q8_0_R8", 32, 34, 0, 8),
    ggml(210, "Q2_K_R4", 256, 84, 0, 4),
    ggml(211, "Q3_K_R4", 256, 110, 0, 4),
    ggml(212, "Q4_K_R4", 256, 144, 0, 4),
    ggml(213, "Q5_K_R4", 256, 176, 0, 4),
    ggml(214, "Q6_K_R4", 256, 210, 0, 4),
    ggml(216, "IQ2_XXS_R4", 256, 66, 0, 4),
    ggml(217, "IQ2_XS_R4", 256, 74, 0, 4),
    ggml(218, "IQ3_XXS_R4", 256, 98, 0, 4),
    ggml(219, "IQ1_S_R4", 32, 6, 2, 4),
    ggml(220, "IQ4_NL_R4", 32, 18, 0, 4),
    ggml(221, "IQ3_S_R4", 256, 110, 0, 4),
    ggml(222, "IQ2_S_R4", 256, 82, 0, 4),
    ggml(223, "IQ4_XS_R8", 256, 136, 0, 8),
    ggml(229, "IQ1_M_R4", 32, 7, 2, 4),
    ggml(230, "BF16_R16", 1, 2, 0, 16),
    ggml(233, "Q6_0_R4", 32, 26, 0, 4),
    ggml(335, "IQ2_BN_R4", 64, 16, 4, 4),
    ggml(337, "IQ2_K_R4", 256, 76, 0, 4),
    ggml(338, "IQ3_K_R4", 256, 110, 0, 4),
    ggml(339, "IQ4_K_R4", 256, 144, 0, 4),
    ggml(340, "IQ5_K_R4", 256, 176, 0, 4),
    ggml(344, "IQ4_KS_R4", 256, 136, 4, 4),
    ggml(352, "IQ5_KS_R4", 256, 168, 4, 4),
    ggml(353, "MXFP4_R8", 32, 17, 0, 8),
    ggml(397, "Q8_K_R16", 256, 258, 0, 16),
    ggml(398, "Q8_KV_R8", 32, 32, 4, 8),
    ggml(399, "Q8_K_R8", 256, 258, 0, 8),
];

impl GgmlType {
    /// The type with this id, if its size is known and rows of it can be addressed.
    pub fn from_id(id: u32) -> Option<&'static GgmlType> {
        GGML_TYPES
            .binary_search_by_key(&id, |t| t.id)
            .ok()
            .map(|at| &GGML_TYPES[at])
    }

    /// The type with this name, in upper or lower case.
    pub fn from_name(name: &str) -> Option<&'static GgmlType> {
        GGML_TYPES
            .iter()
            .find(|t| t.name.eq_ignore_ascii_case(name))
    }

    /// Bytes of one row of `ne0` elements; `None` if `ne0` is not a whole number of blocks or
    /// the size overflows.
    pub fn row_bytes(&self, ne0: u64) -> Option<u64> {
        if !ne0.is_multiple_of(u64::from(self.block_size)) {
            return None;
        }
        (ne0 / u64::from(self.block_size))
            .checked_mul(u64::from(self.block_bytes))?
            .checked_add(u64::from(self.row_meta))
    }

    /// Bytes of a tensor with the dimensions `ne` (GGUF order, contiguous first); `None` as for
    /// [`row_bytes`](Self::row_bytes).
    pub fn tensor_bytes(&self, ne: [u64; 4]) -> Option<u64> {
        ne[1..]
            .iter()
            .try_fold(self.row_bytes(ne[0])?, |bytes, &n| bytes.checked_mul(n))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Q4_2 had this id until 2023, before there was GGUF; Ollama has reused it.
pub const OLLAMA_MXFP4: u32 = 4;

/// What is known of an id without a usable size: `(name, advice)`.
pub(super) fn retired(id: u32) -> Option<(&'static str, &'static str)> {
    const REMOVED: &str = "quantise the model again, llama.cpp removed it";
    const REPACKED: &str =
        "quantise to Q4_0 or IQ4_NL instead, llama.cpp removed this pre-packed type";
    match id {
        OLLAMA_MXFP4 => Some(("Q4_2", REMOVED)),
        5 => Some(("Q4_3", REMOVED)),
        31 => Some(("Q4_0_4_4", REPACKED)),
        32 => Some(("Q4_0_4_8", REPACKED)),
        33 => Some(("Q4_0_8_8", REPACKED)),
        // In ik_llama.cpp 36 is I2_S, which has one scale for the whole tensor: no row of it
        // stands alone. In llama.cpp it was IQ4_NL_4_4.
        36 => Some(("IQ4_NL_4_4 or I2_S", REPACKED)),
        37 => Some(("IQ4_NL_4_8", REPACKED)),
        38 => Some(("IQ4_NL_8_8", REPACKED)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_ordered_by_id_and_names_are_unique() {
        assert!(GGML_TYPES.windows(2).all(|w| w[0].id < w[1].id));
        let names: std::collections::HashSet<_> = GGML_TYPES.iter().map(|t| t.name).collect();
        assert_eq!(names.len(), GGML_TYPES.len());
    }

    #[test]
    fn sizes_agree_with_published_files() {
        let bytes = |name: &str, ne| GgmlType::from_name(name).unwrap().tensor_bytes(ne).unwrap();
        // Kimi-K2.5 Q4_K: one stacked matrix of 384 experts.
        assert_eq!(bytes("q4_k", [7168, 2048, 384, 1]), 3_170_893_824);
        // IQ4_KT [7168, 163840] is logged as 560.62 MiB, which needs the four bytes per row.
        let mib = bytes("IQ4_KT", [7168, 163_840, 1, 1]) as f64 / f64::from(1 << 20);
        assert!((mib - 560.62).abs() < 0.01, "{mib}");
    }

    #[test]
    fn a_row_must_hold_whole_blocks_and_sizes_never_wrap() {
        let q4_0 = GgmlType::from_name("Q4_0").unwrap();
        assert_eq!(q4_0.row_bytes(33), None);
        assert_eq!(q4_0.row_bytes(64), Some(36));
        let i64_ = GgmlType::from_name("I64").unwrap();
        assert_eq!(i64_.tensor_bytes([1 << 61, 1, 1, 1]), None);
        assert_eq!(i64_.tensor_bytes([0, 7, 1, 1]), Some(0));
    }
}
