"""The Python clients: clients.py (safe-open | headers | mlx | forward) FILES...

Prints nanoseconds, bytes and their sum as JSON. The clock runs for the loader's work alone: not for
imports, and not for the sum, which is taken afterwards of the arrays that were loaded.
"""

import json
import sys
import time

import numpy as np
from safetensors import safe_open


def words(arrays):
    """The sum of all bytes, as 64-bit words."""
    return sum(int(a.reshape(-1).view(np.uint64).sum(dtype=np.uint64)) for a in arrays) % 2**64


def load_safe_open(paths):
    """Copies every tensor out, as numpy arrays are."""
    arrays = []
    for path in paths:
        with safe_open(path, framework="numpy") as file:
            arrays += [file.get_tensor(name) for name in file.keys()]
    return arrays


def load_headers(paths):
    """Reads what loaders look at first: names and metadata of every file."""
    for path in paths:
        with safe_open(path, framework="numpy") as file:
            assert len(file.keys()) == 3 and file.metadata()
    return []


def load_mlx(paths):
    import mlx.core as mx

    arrays = []
    for path in paths:
        loaded = mx.load(path)
        mx.eval(list(loaded.values()))
        arrays += loaded.values()
    return arrays


def load_forward(paths):
    """Loads experts of MLX's arrays, 4 bits in groups of 32, and lets each compute a token."""
    import mlx.core as mx

    arrays = []
    for path in paths:
        loaded = mx.load(path)

        def times(x, name, loaded=loaded):
            packed = (loaded[f"{name}.{key}"] for key in ("weight", "scales", "biases"))
            return mx.quantized_matmul(x, *packed, group_size=32, bits=4)

        x = mx.ones((1, loaded["w1.scales"].shape[1] * 32), mx.float16)
        gate = times(x, "w1")
        out = times(gate * mx.sigmoid(gate) * times(x, "w3"), "w2")
        mx.eval(out, list(loaded.values()))
        arrays += loaded.values()
    return arrays


def main():
    way, *paths = sys.argv[1:]
    load = {"safe-open": load_safe_open, "headers": load_headers, "mlx": load_mlx, "forward": load_forward}[way]
    if way in ("mlx", "forward"):
        import mlx.core as mx

        mx.eval(mx.zeros(1))  # starts its threads
    start = time.perf_counter_ns()
    arrays = load(paths)
    nanoseconds = time.perf_counter_ns() - start
    arrays = [np.asarray(array) for array in arrays]
    print(json.dumps({"nanoseconds": nanoseconds, "bytes": sum(a.nbytes for a in arrays), "sum": words(arrays)}))


main()
