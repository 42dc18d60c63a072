"""An expert with MLX, which computes on the packed arrays of `odmoe-fs mount --as mlx`.

    pip install mlx    # on Linux mlx[cpu]
    python mlx_expert.py MOUNT LAYER EXPERT
"""

import json
import sys

import mlx.core as mx

mount, layer, expert = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
arrays, metadata = mx.load(f"{mount}/experts/layer_{layer:02}_expert_{expert:03}.safetensors", return_metadata=True)
tensors = json.loads(metadata["odmoe.tensors"])


def linear(name, x):
    """Multiplies by a matrix, which is packed, or numbers where MLX cannot pack its type.

    Some models have a number beside a matrix, by which the product is multiplied (NVFP4), or a bias.
    """
    weight, form = arrays[f"{name}.weight"], tensors[f"{name}.weight"].get("form", {})
    print(f"{name}.weight", weight.shape, weight.dtype, tensors[f"{name}.weight"]["ggml_type"])
    if "mode" in form:
        how = {key: form[key] for key in ("mode", "bits", "group_size")}
        # MXFP4 and NVFP4 have no biases.
        y = mx.quantized_matmul(x, weight, arrays[f"{name}.scales"], arrays.get(f"{name}.biases"), **how)
    else:
        y = x @ weight.T
    return y * arrays.get(f"{name}.scale", 1) + arrays.get(f"{name}.bias", 0)


x = mx.sin(mx.arange(tensors["w1.weight"]["shape"][1]))[None]
gate = linear("w1", x)
y = linear("w2", gate * mx.sigmoid(gate) * linear("w3", x))
print(f"norm {mx.linalg.norm(y).item():.6g}")
