"""Blocks as numbers and as MLX's arrays: src/codec against gguf-py, numpy, ml_dtypes and MLX."""

import subprocess

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from blocks import (
    DTYPES,
    EXACT,
    OF_GGUF_PY,
    REQUANTISED,
    ROUNDING,
    SEEN,
    SIZES,
    TYPES,
    all_bytes,
    assert_same_numbers,
    bits,
    edge_blocks,
    error,
    model_blocks,
    put_scale,
    random_blocks,
    reference,
)
from odmoe import BINARY, PATIENCE

CODEC = BINARY.parent / "examples" / "codec"
OUTPUTS = [("numbers", dtype) for dtype in DTYPES] + [("weight", "f32")]
OUTPUTS += [(output, dtype) for output in ("scales", "biases") for dtype in DTYPES]
AFFINE = [name for name, seen in SEEN.items() if seen.mode == "affine"]
ROWS = 32


@pytest.fixture(autouse=True)
def numbers_that_are_none():
    """Blocks with infinite scales make numpy warn."""
    with np.errstate(all="ignore"):
        yield


def computed(ggml_type, output, dtype, blocks, *options):
    """One output of the blocks as bytes; None if the type has no such output."""
    command = [CODEC, ggml_type, output, dtype, *options]
    done = subprocess.run(command, input=blocks.tobytes(), capture_output=True, timeout=PATIENCE)
    if done.returncode == 3:
        return None
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def numbers(ggml_type, dtype, blocks, *options):
    return np.frombuffer(computed(ggml_type, "numbers", dtype, blocks, *options), DTYPES[dtype])


# --- numbers ----------------------------------------------------------------------------------------------------------


def check_numbers(ggml_type, blocks):
    expected = reference(ggml_type, blocks)
    for dtype, numpys in DTYPES.items():
        assert_same_numbers(ggml_type, numbers(ggml_type, dtype, blocks), expected.astype(numpys), blocks)
    return expected


def test_all_types_of_gguf_py_are_known():
    quantised = {t.name for t in gguf.quants._type_traits} - {"F32", "F16", "BF16"}
    assert quantised == set(OF_GGUF_PY)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_numbers_of_random_blocks_are_those_of_gguf_py(ggml_type):
    expected = check_numbers(ggml_type, random_blocks(ggml_type, 4096))
    assert np.isfinite(expected).mean() > 0.75


@pytest.mark.parametrize("ggml_type", TYPES)
def test_numbers_of_edge_blocks_are_those_of_gguf_py(ggml_type):
    expected = check_numbers(ggml_type, edge_blocks(ggml_type))
    has_float_scales = ggml_type not in ("MXFP4", "NVFP4")
    assert np.isnan(expected).any() == np.isinf(expected).any() == has_float_scales or ggml_type == "MXFP4"


@pytest.mark.parametrize("ggml_type", ["MXFP4", "NVFP4"])
def test_every_byte_as_a_scale_has_every_code(ggml_type):
    """Also those that the standards call NaN: ggml has numbers for them."""
    scales = 1 if ggml_type == "MXFP4" else 4
    blocks = np.repeat(all_bytes(ggml_type), 256, axis=0)
    blocks[:, :scales] = np.tile(np.arange(256, dtype=np.uint8), 256)[:, None]
    expected = check_numbers(ggml_type, blocks)
    assert not np.isnan(expected).any()
    # 2^127 times 1, doubled: the largest finite number of MXFP4 at e = 255.
    largest = np.abs(expected[np.isfinite(expected)]).max()
    assert largest == (2.0**127 * 1.5 if ggml_type == "MXFP4" else 240 * 12)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_every_output_is_the_same_without_avx2(ggml_type):
    blocks = np.concatenate([random_blocks(ggml_type, 515), edge_blocks(ggml_type)])
    found = 0
    for output, dtype in OUTPUTS:
        for requant in ([], ["--requant"]):
            fast = computed(ggml_type, output, dtype, blocks, *requant)
            assert computed(ggml_type, output, dtype, blocks, "--portable", *requant) == fast
            found += fast is not None and not (output == "numbers" and requant)
    assert found == (3 + 1 + 3 if ggml_type in ("MXFP4", "NVFP4") else 3 + 1 + 6)


# --- MLX --------------------------------------------------------------------------------------------------------------


def array(data, dtype):
    if dtype == "bf16":
        return mx.array(np.frombuffer(data, np.uint16)).view(mx.bfloat16).reshape(ROWS, -1)
    return mx.array(np.frombuffer(data, {"f32": np.float32, "f16": np.float16}[dtype])).reshape(ROWS, -1)


def arrays(ggml_type, blocks, dtype):
    """Weight, scales and biases; scales and biases are as `dtype` has them, but in F32, which MLX then computes in."""
    seen = SEEN[ggml_type]
    weight = np.frombuffer(computed(ggml_type, "weight", dtype, blocks, *seen.options), np.uint32).reshape(ROWS, -1)
    scales = computed(ggml_type, "scales", dtype, blocks, *seen.options)
    if seen.mode != "affine":
        return mx.array(weight), mx.array(np.frombuffer(scales, np.uint8)).reshape(ROWS, -1), None
    biases = computed(ggml_type, "biases", dtype, blocks, *seen.options)
    return mx.array(weight), array(scales, dtype).astype(mx.float32), array(biases, dtype).astype(mx.float32)


def seen_by_mlx(ggml_type, blocks, dtype):
    weights = mx.dequantize(*arrays(ggml_type, blocks, dtype), **SEEN[ggml_type].arguments, dtype=mx.float32)
    return np.array(weights).ravel()


@pytest.fixture(autouse=True)
def on_the_processor():
    mx.set_default_device(mx.cpu)


def row_blocks(ggml_type, width=2048):
    """Blocks for ROWS rows."""
    return model_blocks(ggml_type, ROWS * width // SIZES[ggml_type][0])


@pytest.mark.parametrize("ggml_type", EXACT)
def test_mlx_has_the_numbers_of_the_gguf(ggml_type):
    blocks = row_blocks(ggml_type)
    expected = reference(ggml_type, blocks)
    np.testing.assert_array_equal(seen_by_mlx(ggml_type, blocks, "f32"), expected)
    if EXACT[ggml_type].error == 0:
        np.testing.assert_array_equal(seen_by_mlx(ggml_type, blocks, "f16"), expected)


@pytest.mark.parametrize("ggml_type", SEEN)
def test_scales_of_16_bits_cost_what_is_said(ggml_type):
    blocks = row_blocks(ggml_type, 16384)
    expected, seen = reference(ggml_type, blocks), SEEN[ggml_type]
    assert error(seen_by_mlx(ggml_type, blocks, "f16"), expected) <= seen.error
    # BF16 has three bits fewer, and cannot hold an F16 either.
    in_bf16 = 7e-3 if seen.requant else 8.5 * max(ROUNDING, seen.error) if seen.mode == "affine" else 0
    assert error(seen_by_mlx(ggml_type, blocks, "bf16"), expected) <= in_bf16


@pytest.mark.parametrize("ggml_type", REQUANTISED)
def test_requantising_moves_no_weight_by_more_than_half_a_step(ggml_type):
    blocks = row_blocks(ggml_type)
    expected, ours = reference(ggml_type, blocks), seen_by_mlx(ggml_type, blocks, "f32")
    _, scales, _ = arrays(ggml_type, blocks, "f32")
    steps = np.abs(np.repeat(np.array(scales).ravel(), 32))
    # Where the extreme codes of two groups with scales of opposite signs meet, 128 becomes 127.
    limit = 1.001 if ggml_type == "Q6_K" else 0.501
    assert (np.abs(ours - expected) <= limit * steps).all()
    assert 1e-4 < error(ours, expected) < SEEN[ggml_type].error


@pytest.mark.parametrize("ggml_type", REQUANTISED)
def test_requantising_blocks_without_weights_gives_zeros(ggml_type):
    blocks = np.zeros((ROWS * 2, SIZES[ggml_type][1]), np.uint8)
    assert (seen_by_mlx(ggml_type, blocks, "f16") == 0).all()


@pytest.mark.parametrize("ggml_type", SEEN)
def test_mlx_multiplies_by_these_arrays(ggml_type):
    """As a linear layer does, with its own kernel for each mode, bits and group size."""
    blocks, seen = row_blocks(ggml_type), SEEN[ggml_type]
    weight, scales, biases = arrays(ggml_type, blocks, "f32")
    x = np.random.default_rng(1).normal(size=(5, 2048)).astype(np.float32)
    ours = mx.quantized_matmul(mx.array(x), weight, scales, biases, transpose=True, **seen.arguments)
    exact = seen_by_mlx(ggml_type, blocks, "f32") if seen.requant else reference(ggml_type, blocks)
    exact = x.astype(np.float64) @ exact.astype(np.float64).reshape(ROWS, -1).T
    assert ours.shape == exact.shape
    assert error(np.array(ours), exact) < 1e-5


@pytest.mark.parametrize("ggml_type", AFFINE)
def test_scales_and_biases_of_16_bits_are_roundings_of_those_of_32(ggml_type):
    """Biases that are multiples of the scales may be rounded twice: they are multiples of the rounded scales."""
    blocks, options = row_blocks(ggml_type), SEEN[ggml_type].options
    for output in ("scales", "biases"):
        exact = np.frombuffer(computed(ggml_type, output, "f32", blocks, *options), np.float32)
        for dtype, numpys in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
            ours = np.frombuffer(computed(ggml_type, output, dtype, blocks, *options), numpys)
            if output == "scales":
                np.testing.assert_array_equal(bits(ours), bits(exact.astype(numpys)))
            else:
                off = np.abs(ours.astype(np.float32) - exact)
                assert (off <= np.abs(exact) * 2.0 ** (-10 if dtype == "f16" else -7)).all()


def test_f16_biases_beyond_f16_are_infinite():
    block = np.zeros((1, 34), np.uint8)
    for scale, bias in ((511.5, -65472), (512, -np.inf), (-512, np.inf)):
        put_scale("Q8_0", block, 0, np.float16(scale).view(np.uint16))
        assert np.frombuffer(computed("Q8_0", "biases", "f16", block), np.float16) == bias
        assert np.frombuffer(computed("Q8_0", "biases", "f32", block), np.float32) == -128 * scale


def test_scales_of_mxfp4_are_its_bytes():
    blocks = all_bytes("MXFP4")
    assert computed("MXFP4", "scales", "f16", blocks) == blocks[:, 0].tobytes()
    assert computed("MXFP4", "biases", "f16", blocks) is None


def test_scales_of_nvfp4_mean_in_mlx_what_they_mean_in_ggml():
    """MLX has NaN for 0x7F and 0xFF, and a sign in bit 7. ggml has 0 for 0x7F, and for 0xFF 480 or, on CUDA, 0."""
    blocks = random_blocks("NVFP4", ROWS * 8)
    blocks[:, :4] = np.arange(ROWS * 32).reshape(-1, 4) % 256
    scales = np.frombuffer(computed("NVFP4", "scales", "f32", blocks), np.uint8)
    expected = np.arange(256) & 0x7F
    expected[[0x7F, 0xFF]] = 0
    np.testing.assert_array_equal(scales, np.tile(expected, ROWS // 8))
    ours, theirs = seen_by_mlx("NVFP4", blocks, "f32"), reference("NVFP4", blocks)
    here = np.repeat(blocks[:, :4].ravel(), 16) != 0xFF
    np.testing.assert_array_equal(ours[here], theirs[here])
    assert (ours[~here] == 0).all()
