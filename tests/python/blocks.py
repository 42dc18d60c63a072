"""Blocks of every quantised type with their numbers by gguf-py, and how MLX sees the type."""

import dataclasses
import platform

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

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

# Zero, both signs; the least and the largest subnormal; the least and the largest number; infinity; NaN of every
# kind: quiet and signalling, with and without a payload, both signs.
EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00]
EDGES += [0x7E00, 0xFE00, 0x7E01, 0xFE05, 0x7C01, 0xFD55, 0x7FFF]


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


def assert_same_numbers(ggml_type, ours, theirs, blocks):
    """Numbers of these blocks are the same to the bit."""
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
    assert not len(wrong), (ggml_type, ours.dtype, wrong[:9], ours[wrong[:9]], theirs[wrong[:9]])


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


def error(ours, theirs):
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
