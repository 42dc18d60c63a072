"""An expert with PyTorch.

    pip install torch safetensors gguf ml_dtypes
    python pytorch_expert.py MOUNT LAYER EXPERT
"""

import json
import sys

import torch
from safetensors import safe_open

from expert import as_numbers, expert_path, some_input

mount, layer, expert = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with safe_open(expert_path(mount, layer, expert), framework="pt") as file:
    sources = json.loads(file.metadata()["odmoe.tensors"])
    weights = {name: file.get_tensor(name) for name in file.keys()}
for name, tensor in weights.items():
    if tensor.dtype == torch.uint8:
        tensor = torch.from_numpy(as_numbers(tensor.numpy(), sources[name]["ggml_type"]))
    weights[name] = tensor.float()
    print(name, tuple(weights[name].shape), weights[name].dtype)

x = torch.from_numpy(some_input(weights["w1.weight"].shape[1]))
hidden = torch.nn.functional.silu(weights["w1.weight"] @ x) * (weights["w3.weight"] @ x)
print(f"norm {torch.linalg.norm(weights['w2.weight'] @ hidden):.6g}")
