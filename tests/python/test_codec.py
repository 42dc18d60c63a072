"""Blocks as numbers and as MLX's arrays: src/codec against gguf-py, numpy, ml_dtypes and MLX."""

import dataclasses
import platform
import subprocess

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from odmoe import BINARY, PATIENCE

CODEC = BINARY.parent / "examples" / "codec"

# Where the F16 scales of a block begin. IQ1_M has its one in four pieces, the last two types have bytes.
SCALES = {
    **dict.fromkeys(["Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S"], [0]),
    **dict.fromkeys(["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"], [0]),
    **dict.fromkeys(["Q4_1", "Q5_1", "Q4_K", "Q5_K"], [0, 2]),
    **{"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64]},
    **{"IQ1_M": [], "MXFP4": [], "NVFP4": []},
}
SIZES = {t.name: size for t, size in GGML_QUANT_SIZES.items()} | {"Q1_0": (128, 18), "Q2_0": (64, 18)}
TYPES = sorted(SCALES)
OF_GGUF_PY = [name for name in TYPES if name not in ("Q1_0", "Q2_0")]
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
OUTPUTS = [("numbers", dtype) for dtype in DTYPES] + [("weight", "f32")]
OUTPUTS += [(output, dtype) for output in ("scales", "biases") for dtype in DTYPES]

# Zero, both signs; the least and the largest subnormal; the least and the largest number; infinity; NaN of every
# kind: quiet and signalling, with and without a payload, both signs.
EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00]
EDGES += [0x7E00, 0xFE00, 0x7E01, 0xFE05, 0x7C01, 0xFD55, 0x7FFF]


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


def reference(ggml_type, blocks):
    """What gguf-py gives; it needs many blocks at a time, since numpy treats one block in another way."""
    if ggml_type in OF_GGUF_PY:
        return dequantize(blocks.reshape(1, -1), GGMLQuantizationType[ggml_type]).ravel()
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if ggml_type == "Q1_0":  # from block_q1_0 of ggml
        bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
        return (d * np.where(bits, np.float32(1), np.float32(-1))).ravel()
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3  # block_q2_0
    return (d * (codes.reshape(len(blocks), -1).astype(np.float32) - 1)).ravel()


def put_scale(ggml_type, blocks, place, bits):
    """Sets an F16 scale of each block."""
    bits = np.broadcast_to(np.asarray(bits, np.uint16), len(blocks))
    if ggml_type == "IQ1_M":
        words = blocks[:, 48:].copy().view(np.uint16) & 0x0FFF
        words |= (bits[:, None] << np.array([12, 8, 4, 0], np.uint16)) & 0xF000
        blocks[:, 48:] = words.view(np.uint8)
    else:
        blocks[:, place : place + 2] = bits.copy().view(np.uint8).reshape(-1, 2)


def places(ggml_type):
    return [48] if ggml_type == "IQ1_M" else SCALES[ggml_type]


def all_bytes(ggml_type):
    """256 blocks, in which every byte has every value."""
    at = np.arange(SIZES[ggml_type][1])
    return ((np.arange(256)[:, None] + 37 * at) % 256).astype(np.uint8)


def edge_blocks(ggml_type):
    """Every edge as a scale of all codes; where there are two scales, every pair of edges."""
    blocks = all_bytes(ggml_type)
    many = [blocks]
    first, *second = places(ggml_type) or [None]
    for edge in EDGES if first is not None else []:
        for other in EDGES if second else [None]:
            some = blocks[:: 16 if second else 4].copy() if edge != 0x0400 else blocks.copy()
            put_scale(ggml_type, some, first, edge)
            if second:
                put_scale(ggml_type, some, second[0], other)
            many.append(some)
    return np.concatenate(many)


def random_blocks(ggml_type, count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIZES[ggml_type][1]), dtype=np.uint8)


def model_blocks(ggml_type, count, seed=0):
    """Random codes with scales as a model has them: finite, and of similar size."""
    rng = np.random.default_rng(seed)
    blocks = random_blocks(ggml_type, count, seed)
    for place in places(ggml_type):
        scales = rng.uniform(0.5, 1.0, count) * 2.0**-9
        put_scale(ggml_type, blocks, place, scales.astype(np.float16).view(np.uint16))
    if ggml_type == "MXFP4":
        blocks[:, 0] = rng.integers(110, 124, count)
    if ggml_type == "NVFP4":
        blocks[:, :4] = rng.integers(0, 0x7F, (count, 4))
    return blocks


def bits(array):
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


# --- numbers ----------------------------------------------------------------------------------------------------------


def check_numbers(ggml_type, blocks):
    expected = reference(ggml_type, blocks)
    for dtype, numpys in DTYPES.items():
        ours, theirs = numbers(ggml_type, dtype, blocks), expected.astype(numpys)
        same = bits(ours) == bits(theirs)
        nan = np.isnan(ours) & np.isnan(theirs)
        if ggml_type in ("Q4_1", "Q5_1"):
            # Of a sum of two NaN gguf-py gives one or the other: that of the scale with many blocks at a time, that
            # of the minimum with one.
            minimum = blocks[:, 2:4].copy().view(np.float16)
            same |= nan & np.isnan(np.repeat(minimum, SIZES[ggml_type][0]))
        if ggml_type == "Q1_0" or platform.machine() != "x86_64":
            same |= nan  # whose sign and payload are the processor's
        wrong = np.flatnonzero(~same)
        assert not len(wrong), (ggml_type, dtype, wrong[:9], ours[wrong[:9]], theirs[wrong[:9]])
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


@dataclasses.dataclass(frozen=True)
class Seen:
    """How MLX sees a type, and what F16 scales cost at most: the error as a share of the norm of the weights."""

    bits: int
    group_size: int
    error: float
    mode: str = "affine"
    requant: bool = False

    @property
    def options(self):
        return ["--requant"] if self.requant else []

    @property
    def arguments(self):
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


# Where biases are multiples of the scales by a power of two, each weight is off by what its scale is rounded by.
ROUNDING = 2.1e-4
EXACT = {
    "Q4_0": Seen(4, 32, 0), "Q4_1": Seen(4, 32, 0), "Q5_0": Seen(5, 32, 0), "Q5_1": Seen(5, 32, 0),
    "Q8_0": Seen(8, 32, 0), "Q3_K": Seen(8, 128, 0), "IQ4_NL": Seen(8, 32, 0), "TQ1_0": Seen(2, 128, 0),
    "TQ2_0": Seen(2, 128, 0), "Q2_0": Seen(2, 64, 0), "Q1_0": Seen(1, 128, 0),
    "Q4_K": Seen(4, 32, 6.5e-4), "Q5_K": Seen(5, 32, 6.5e-4), "IQ4_XS": Seen(8, 32, ROUNDING),
    "IQ3_S": Seen(4, 32, 5.5e-4), "IQ3_XXS": Seen(6, 32, ROUNDING), "IQ2_XXS": Seen(8, 32, ROUNDING),
    "IQ1_S": Seen(2, 32, 4.8e-4), "IQ1_M": Seen(8, 128, 5.4e-4),
    "MXFP4": Seen(4, 32, 0, "mxfp4"), "NVFP4": Seen(4, 16, 0, "nvfp4"),
}  # fmt: skip
REQUANTISED = {
    "Q6_K": Seen(8, 32, 4.7e-3, requant=True), "Q2_K": Seen(8, 32, 4.7e-3, requant=True),
    "IQ2_XS": Seen(8, 32, 4.7e-3, requant=True), "IQ2_S": Seen(8, 32, 4.7e-3, requant=True),
}  # fmt: skip
SEEN = EXACT | REQUANTISED
AFFINE = [name for name, seen in SEEN.items() if seen.mode == "affine"]
ROWS = 32


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


def error(ours, theirs):
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


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
