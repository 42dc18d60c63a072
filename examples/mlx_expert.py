"""An expert with MLX: `mx.load` reads the file as it is; only GGML blocks go through gguf-py.

    pip install mlx gguf safetensors ml_dtypes    # on Linux mlx[cpu]
    python mlx_expert.py MOUNT LAYER EXPERT
"""

import json
import sys

import mlx.core as mx
import numpy as np

from expert import as_numbers, expert_path, some_input

mount, layer, expert = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
arrays, metadata = mx.load(expert_path(mount, layer, expert), return_metadata=True)
sources = json.loads(metadata["odmoe.tensors"])


def numbers(name):
    array = arrays[name]
    if array.dtype != mx.uint8:
        return array.astype(mx.float32)
    return mx.array(as_numbers(np.array(array), sources[name]["ggml_type"]))


w1, w2, w3 = (numbers(f"{name}.weight") for name in ("w1", "w2", "w3"))
x = mx.array(some_input(w1.shape[1]))
gate = w1 @ x
y = w2 @ (gate * mx.sigmoid(gate) * (w3 @ x))
for name, matrix in (("w1.weight", w1), ("w2.weight", w2), ("w3.weight", w3)):
    print(name, matrix.shape, matrix.dtype)
print(f"norm {mx.linalg.norm(y).item():.6g}")
