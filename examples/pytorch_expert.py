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


def linear(name, x):
    """Multiplies by a matrix; some models have a number beside it, by which the product is multiplied, or a bias."""
    # In F32, so that the result can be compared with those of the other examples.
    y = weights[f"{name}.weight"].float() @ x
    return y * weights.get(f"{name}.scale", 1) + weights.get(f"{name}.bias", 0)


x = torch.sin(torch.arange(weights["w1.weight"].shape[1], dtype=torch.float32))
y = linear("w2", torch.nn.functional.silu(linear("w1", x)) * linear("w3", x))
print(f"norm {torch.linalg.norm(y):.6g}")
