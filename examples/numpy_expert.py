"""An expert with numpy: read by safetensors, dequantised by gguf-py, applied to a vector.

    pip install numpy safetensors gguf ml_dtypes
    python numpy_expert.py MOUNT LAYER EXPERT
"""

import sys

import numpy as np

from expert import expert_path, feed_forward, read, some_input

mount, layer, expert = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
weights = read(expert_path(mount, layer, expert))
for name, matrix in weights.items():
    print(name, matrix.shape, matrix.dtype)
y = feed_forward(weights, some_input(weights["w1.weight"].shape[1]))
print(f"norm {np.linalg.norm(y):.6g}")
