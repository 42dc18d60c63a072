"""Shared by the Python examples: where an expert lies, its tensors as numbers, and what it computes."""

import json

import gguf
import ml_dtypes  # noqa: F401 (lets numpy hold BF16)
import numpy as np
from safetensors import safe_open


def expert_path(mount, layer, expert):
    return f"{mount}/experts/layer_{layer:02}_expert_{expert:03}.safetensors"


def read(path):
    """The tensors of a file of the tree by name, as float32 arrays of their logical shapes."""
    with safe_open(path, framework="numpy") as file:
        sources = json.loads(file.metadata()["odmoe.tensors"])
        return {name: as_numbers(file.get_tensor(name), sources[name]["ggml_type"]) for name in file.keys()}


def as_numbers(array, ggml_type):
    """F32, F16 and BF16 are numbers already. Other types are GGML blocks, a row of bytes per row."""
    if ggml_type in ("F32", "F16", "BF16"):
        return array.astype(np.float32)
    return gguf.quants.dequantize(array, gguf.GGMLQuantizationType[ggml_type])


def some_input(dim):
    """The same vector in every example, so that their results can be compared."""
    return np.random.default_rng(0).standard_normal(dim, dtype=np.float32)


def feed_forward(weights, x):
    """w2 · (silu(w1 · x) * (w3 · x)), with w1 and w3 [ffn, dim] and w2 [dim, ffn]."""
    gate = weights["w1.weight"] @ x
    up = weights["w3.weight"] @ x
    return weights["w2.weight"] @ (gate / (1 + np.exp(-gate)) * up)
