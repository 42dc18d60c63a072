"""An expert with PyTorch, on the numbers of `odmoe-fs mount --as bf16`.

    pip install torch safetensors
    python pytorch_expert.py MOUNT LAYER EXPERT
"""

import sys

import torch
from safetensors.torch import load_file

mount, layer, expert = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
weights = load_file(f"{mount}/experts/layer_{layer:02}_expert_{expert:03}.safetensors")
for name, tensor in weights.items():
    print(name, tuple(tensor.shape), tensor.dtype)

# The arithmetic is in F32, so that the result can be compared with those of the other examples.
w1, w2, w3 = (weights[f"{name}.weight"].float() for name in ("w1", "w2", "w3"))
x = torch.sin(torch.arange(w1.shape[1], dtype=torch.float32))
y = w2 @ (torch.nn.functional.silu(w1 @ x) * (w3 @ x))
print(f"norm {torch.linalg.norm(y):.6g}")
