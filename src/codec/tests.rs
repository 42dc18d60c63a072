use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::float::{Bf16, F16, Number};
use super::{Codec, Float, Map, Mlx, Mode, Output};
use crate::gguf::{GGML_TYPES, GgmlType};
use crate::sys::simd::Avx2;

const FLOATS: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];
const MAPS: [Map; 2] = [Map::Exact, Map::Requantised];

fn outputs() -> Vec<Output> {
    let mut outputs = FLOATS.map(Output::Numbers).to_vec();
    for map in MAPS {
        outputs.push(Output::Weight(map));
        outputs.extend(FLOATS.map(|float| Output::Scales(map, float)));
        outputs.extend(FLOATS.map(|float| Output::Biases(map, float)));
    }
    outputs
}

fn codecs() -> Vec<(&'static GgmlType, Codec)> {
    let pairs = GGML_TYPES
        .iter()
        .flat_map(|t| outputs().into_iter().map(move |output| (t, output)));
    pairs
        .filter_map(|(t, output)| Some((t, Codec::of(t, output)?)))
        .collect()
}

fn width(float: Float) -> usize {
    match float {
        Float::F32 => 4,
        Float::F16 | Float::Bf16 => 2,
    }
}

fn whole(codec: Codec, blocks: &[u8]) -> Vec<u8> {
    let unit = codec.unit();
    let mut out = vec![0; blocks.len() / unit.blocks * unit.out];
    codec.compute(blocks, &mut out);
    out
}

#[test]
fn the_quantised_types_with_numbers_are_those_of_gguf_py_and_two_more() {
    let with = |output| -> Vec<&str> {
        let types = GGML_TYPES.iter().filter(|t| Codec::of(t, output).is_some());
        types.map(|t| t.name).collect()
    };
    let floats = ["F32", "F16", "BF16"];
    let all = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S \
               IQ4_NL IQ3_S IQ2_S IQ4_XS IQ1_M TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0";
    let all: Vec<&str> = all.split(' ').collect();
    let inexact = ["Q2_K", "Q6_K", "IQ2_XS", "IQ2_S"];
    for float in FLOATS {
        let numbers = with(Output::Numbers(float));
        let quantised: Vec<&str> = numbers
            .into_iter()
            .filter(|t| !floats.contains(t))
            .collect();
        assert_eq!(quantised, all);
    }
    let exact: Vec<&str> = all
        .iter()
        .copied()
        .filter(|t| !inexact.contains(t))
        .collect();
    assert_eq!(with(Output::Weight(Map::Exact)), exact);
    assert_eq!(with(Output::Weight(Map::Requantised)), inexact);
    for float in FLOATS {
        assert_eq!(with(Output::Scales(Map::Exact, float)), exact);
        let affine: Vec<&str> = exact
            .iter()
            .copied()
            .filter(|t| !t.ends_with("FP4"))
            .collect();
        assert_eq!(with(Output::Biases(Map::Exact, float)), affine);
    }
}

#[test]
fn units_are_the_blocks_of_the_type_and_what_its_weights_take() {
    for (t, codec) in codecs() {
        let (unit, weights) = (codec.unit(), t.block_size as usize);
        assert_eq!(unit.blocks, t.block_bytes as usize, "{codec:?}");
        let out = match codec.output {
            Output::Numbers(float) => weights * width(float),
            Output::Weight(map) => {
                let bits = Mlx::of(t, map).unwrap().bits as usize;
                // Whole U32, so that rows and slices of them are whole, too.
                assert!((weights * bits).is_multiple_of(32), "{codec:?}");
                weights * bits / 8
            }
            Output::Scales(map, float) | Output::Biases(map, float) => {
                let mlx = Mlx::of(t, map).unwrap();
                let group = mlx.group_size as usize;
                assert!(weights.is_multiple_of(group), "{codec:?}");
                let width = if mlx.mode == Mode::Affine {
                    width(float)
                } else {
                    1
                };
                weights / group * width
            }
        };
        assert_eq!(unit.out, out, "{codec:?}");
    }
}

#[test]
fn mlx_sees_each_type_in_a_mode_that_it_has() {
    for t in GGML_TYPES {
        for map in MAPS {
            let mlx = Mlx::of(t, map);
            assert_eq!(mlx.is_some(), Codec::of(t, Output::Weight(map)).is_some());
            let Some(mlx) = mlx else { continue };
            let Mlx {
                mode,
                bits,
                group_size,
                ..
            } = mlx;
            match mode {
                Mode::Affine => {
                    assert!([32, 64, 128].contains(&group_size), "{t}: {mlx:?}");
                    assert!([1, 2, 4, 5, 6, 8].contains(&bits), "{t}: {mlx:?}");
                }
                Mode::Mxfp4 => assert_eq!((t.name, bits, group_size), ("MXFP4", 4, 32)),
                Mode::Nvfp4 => assert_eq!((t.name, bits, group_size), ("NVFP4", 4, 16)),
            }
        }
    }
}

#[test]
fn a_map_is_exact_in_the_dtypes_that_have_room_for_its_scales() {
    let exact = |name: &str, map| {
        let mlx = Mlx::of(GgmlType::from_name(name).unwrap(), map).unwrap();
        FLOATS.map(|float| mlx.is_exact(float))
    };
    for name in [
        "Q4_0", "Q5_1", "Q8_0", "Q3_K", "TQ1_0", "IQ4_NL", "Q1_0", "Q2_0",
    ] {
        assert_eq!(exact(name, Map::Exact), [true, true, false], "{name}");
    }
    for name in [
        "Q4_K", "Q5_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_XXS", "IQ1_S", "IQ1_M",
    ] {
        assert_eq!(exact(name, Map::Exact), [true, false, false], "{name}");
    }
    for name in ["MXFP4", "NVFP4"] {
        assert_eq!(exact(name, Map::Exact), [true; 3], "{name}");
    }
    for name in ["Q2_K", "Q6_K", "IQ2_XS", "IQ2_S"] {
        assert_eq!(exact(name, Map::Requantised), [false; 3], "{name}");
    }
}

#[test]
#[should_panic(expected = "not the same number of")]
fn an_output_of_another_length_is_refused() {
    let q8_0 = GgmlType::from_name("Q8_0").unwrap();
    let codec = Codec::of(q8_0, Output::Numbers(Float::F32)).unwrap();
    codec.compute(&[0; 68], &mut [0; 128]);
}

#[test]
#[should_panic(expected = "not the same number of")]
fn a_part_of_a_unit_is_refused() {
    let q8_0 = GgmlType::from_name("Q8_0").unwrap();
    let codec = Codec::of(q8_0, Output::Numbers(Float::F32)).unwrap();
    codec.compute(&[0; 35], &mut [0; 128]);
}

/// Every number of 16 bits comes back, halves between neighbours go to the even one, and what is
/// just beside a half to the nearer one; beyond the last number is infinity.
fn rounds_to_nearest_even<N: Number<2>>(infinity: u16) {
    let value = |bits: u16| f64::from(N::value(bits.to_le_bytes()));
    for bits in 0..infinity {
        let step = match bits + 1 == infinity {
            true => value(bits) - value(bits - 1),
            false => value(bits + 1) - value(bits),
        };
        let half = (value(bits) + step / 2.0) as f32; // one bit more than the number: exact
        let value = value(bits) as f32;
        let even = bits + bits % 2;
        let expected = [
            (value, bits),
            (half.next_down(), bits),
            (half, even),
            (half.next_up(), bits + 1),
        ];
        for (value, bits) in expected {
            assert_eq!(u16::from_le_bytes(N::round(value)), bits, "{value:e}");
            assert_eq!(
                u16::from_le_bytes(N::round(-value)),
                bits | 0x8000,
                "-{value:e}"
            );
            assert_eq!(N::cast(value), N::round(value));
        }
    }
    for (value, bits) in [(f32::INFINITY, infinity), (f32::MAX, infinity)] {
        assert_eq!(u16::from_le_bytes(N::round(value)), bits);
        assert_eq!(u16::from_le_bytes(N::round(-value)), bits | 0x8000);
    }
    assert_eq!(N::value(infinity.to_le_bytes()), f32::INFINITY);
    assert!(N::value((infinity + 1).to_le_bytes()).is_nan());
    assert!(N::value(N::cast(f32::NAN)).is_nan());
}

#[test]
fn f16_is_rounded_to_the_nearest_even() {
    rounds_to_nearest_even::<F16>(0x7C00);
}

#[test]
fn bf16_is_rounded_to_the_nearest_even() {
    rounds_to_nearest_even::<Bf16>(0x7F80);
}

/// Blocks of random bytes; in some, scales are zero, subnormal, infinite or NaN.
fn blocks() -> impl Strategy<Value = (Codec, Vec<u8>)> {
    let codecs: Vec<Codec> = codecs().into_iter().map(|(_, codec)| codec).collect();
    (select(codecs), 1_usize..20).prop_flat_map(|(codec, units)| {
        let byte = prop_oneof![8 => any::<u8>(), 1 => select(vec![0, 0x7C, 0x7F, 0xFC, 0xFF])];
        let bytes = prop::collection::vec(byte, units * codec.unit().blocks);
        bytes.prop_map(move |bytes| (codec, bytes))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn both_copies_of_a_function_give_the_same_bytes((codec, blocks) in blocks()) {
        let avx2 = whole(codec, &blocks);
        let mut portable = vec![0; avx2.len()];
        codec.compute_portably(&blocks, &mut portable);
        prop_assert_eq!(avx2, portable);
    }

    #[test]
    fn a_range_of_units_is_that_range_of_the_whole(
        (codec, blocks) in blocks(), from in any::<Index>(), to in any::<Index>()
    ) {
        let (unit, out) = (codec.unit(), whole(codec, &blocks));
        let units = blocks.len() / unit.blocks;
        let (from, to) = (from.index(units + 1), to.index(units + 1));
        let (from, to) = (from.min(to), from.max(to));
        let part = whole(codec, &blocks[from * unit.blocks..to * unit.blocks]);
        prop_assert_eq!(&part[..], &out[from * unit.out..to * unit.out]);
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_copy_for_avx2_is_chosen_where_the_processor_has_it() {
    assert_eq!(
        Avx2::detect().is_some(),
        std::arch::is_x86_feature_detected!("avx2")
    );
}
