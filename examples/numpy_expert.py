"""An expert with numpy, in any form but `mlx`: raw GGML blocks go through gguf-py, which takes its time.

    pip install numpy safetensors gguf ml_dtypes
    python numpy_expert.py MOUNT LAYER EXPERT
"""

import json
import sys

import gguf
import ml_dtypes  # noqa: F401 (lets numpy hold BF16)
import numpy as np
from safetensors import safe_open

mount, layer, expert = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
weights = {}
with safe_open(f"{mount}/experts/layer_{layer:02}_expert_{expert:03}.safetensors", framework="numpy") as file:
    tensors = json.loads(file.metadata()["odmoe.tensors"])
    for name in file.keys():
        array = file.get_tensor(name)
        if array.dtype == np.uint8:  # blocks, a row of bytes for each row
            array = gguf.quants.dequantize(array, gguf.GGMLQuantizationType[tensors[name]["ggml_type"]])
        print(name, array.shape, array.dtype)
        weights[name] = array.astype(np.float32)


def linear(name, x):
    """Multiplies by a matrix; some models have a number beside it, by which the product is multiplied, or a bias."""
    return weights[f"{name}.weight"] @ x * weights.get(f"{name}.scale", 1) + weights.get(f"{name}.bias", 0)


x = np.sin(np.arange(weights["w1.weight"].shape[1], dtype=np.float32))
gate = linear("w1", x)
y = linear("w2", gate / (1 + np.exp(-gate)) * linear("w3", x))
print(f"norm {np.linalg.norm(y):.6g}")
