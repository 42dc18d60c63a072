"""An LRU store of experts for MLX, fed from a mount, and a MoE layer that runs on it.

The store keeps a working set of experts in memory and drops the least recently used one. While a layer
computes, it asks the kernel to read the next experts' files ahead (posix_fadvise WILLNEED): the mount
passes that on to the model. `main` runs the MoE layers of a model on one vector. With `--check` it also
computes them from the GGUF itself, with gguf-py, and compares the weights and the results.

    pip install mlx gguf safetensors ml_dtypes    # on Linux mlx[cpu]
    python mlx_expert_store.py MOUNT [--capacity N] [--check MODEL.gguf]
"""

import argparse
import collections
import json
import os

import gguf
import mlx.core as mx
import numpy as np

from expert import as_numbers, expert_path, some_input


class ExpertStore:
    """Experts of a mount as float32 arrays, at most `capacity` of them in memory."""

    def __init__(self, mount, capacity):
        self.mount = mount
        self.capacity = capacity
        self.hits = self.misses = 0
        self._experts = collections.OrderedDict()  # the most recently used one is last

    def get(self, layer, expert):
        """The weights of an expert by name."""
        key = layer, expert
        if key in self._experts:
            self.hits += 1
            self._experts.move_to_end(key)
            return self._experts[key]
        self.misses += 1
        while len(self._experts) >= self.capacity:
            self._experts.popitem(last=False)
        self._experts[key] = load(expert_path(self.mount, layer, expert))
        return self._experts[key]

    def prefetch(self, keys):
        """Asks the kernel to read the files of experts that will be needed, without waiting for it."""
        for layer, expert in keys:
            if (layer, expert) not in self._experts:
                file = os.open(expert_path(self.mount, layer, expert), os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)


def load(path):
    """The tensors of a safetensors file of the mount, as float32 arrays of MLX."""
    arrays, metadata = mx.load(path, return_metadata=True)
    sources = json.loads(metadata["odmoe.tensors"])
    mx.eval(arrays)  # reads now, and closes the file
    return {name: to_float(array, sources[name]["ggml_type"]) for name, array in arrays.items()}


def to_float(array, ggml_type):
    if array.dtype == mx.uint8:
        array = mx.array(as_numbers(np.array(array), ggml_type))
    return array.astype(mx.float32)


def feed_forward(weights, x):
    gate = weights["w1.weight"] @ x
    return weights["w2.weight"] @ (gate * mx.sigmoid(gate) * (weights["w3.weight"] @ x))


def route(router, x, used):
    """The experts that a token uses, and their shares: the softmax over the highest logits."""
    logits = router @ x
    chosen = np.argsort(-np.array(logits), kind="stable")[:used]
    shares = mx.softmax(logits[mx.array(chosen)])
    return [int(expert) for expert in chosen], shares


def forward(layers, routers, used, experts, prefetch, x):
    """Runs one vector through the MoE part of each layer. `experts(layer, expert)` gives weights."""
    for layer in layers:
        chosen, shares = route(routers[layer], x, used)
        prefetch([(layer, expert) for expert in chosen])
        y = sum(share * feed_forward(experts(layer, expert), x) for expert, share in zip(chosen, shares))
        x = x + y
        x = x / mx.linalg.norm(x) * x.size**0.5  # as a norm does between layers
    return x


def routers_of(mount, layers):
    metadata = json.load(open(f"{mount}/base_model/metadata.json"))
    names = {layer: f"blk.{layer}.ffn_gate_inp.weight" for layer in layers}
    files = {metadata["weight_map"][name] for name in names.values()}
    tensors = {}
    for file in files:
        tensors |= load(f"{mount}/base_model/{file}")
    return {layer: tensors[name] for layer, name in names.items()}


class Gguf:
    """The same weights, from the GGUF itself."""

    def __init__(self, path):
        self.tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def whole(self, name):
        tensor = self.tensors[name]
        # gguf-py gives BF16 as bytes, and knows how to take them.
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def expert(self, layer, expert):
        words = {"w1.weight": "gate", "w2.weight": "down", "w3.weight": "up"}
        stacks = {name: f"blk.{layer}.ffn_{word}_exps.weight" for name, word in words.items()}
        return {name: mx.array(self.whole(stack)[expert].astype(np.float32)) for name, stack in stacks.items()}


def check(path, store, layers, routers, used, x, y):
    """Fails unless the GGUF gives the same weights, bit by bit, and the same result."""
    model = Gguf(path)
    for layer in layers:
        assert np.array_equal(np.array(routers[layer]), model.whole(f"blk.{layer}.ffn_gate_inp.weight")), "router"
        chosen, _ = route(routers[layer], x, used)
        for expert in chosen:
            ours, theirs = store.get(layer, expert), model.expert(layer, expert)
            for name in theirs:
                same = np.array_equal(np.array(ours[name]), np.array(theirs[name]), equal_nan=True)
                assert same, f"{name} of expert {expert} of layer {layer}"
    direct = forward(layers, routers, used, model.expert, lambda keys: None, x)
    assert np.array_equal(np.array(y), np.array(direct)), "the result differs"
    print("the same as from the GGUF")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mount")
    parser.add_argument("--capacity", type=int, default=8, help="experts in memory")
    parser.add_argument("--tokens", type=int, default=3, help="how often the layers are run")
    parser.add_argument("--check", metavar="MODEL.gguf")
    args = parser.parse_args()

    registry = json.load(open(f"{args.mount}/experts/registry.json"))
    layers = sorted({entry["layer"] for entry in registry.values()})
    metadata = json.load(open(f"{args.mount}/base_model/metadata.json"))
    used = metadata["expert_used_count"] or 2
    routers = routers_of(args.mount, layers)
    store = ExpertStore(args.mount, args.capacity)

    start = x = mx.array(some_input(routers[layers[0]].shape[1]))
    for token in range(args.tokens):
        y = forward(layers, routers, used, store.get, store.prefetch, x)
        print(f"token {token}: norm of the change {mx.linalg.norm(y - x).item():.6g}, {store.hits} hits, {store.misses} misses")
        x = y
    if args.check:
        y = forward(layers, routers, used, store.get, store.prefetch, start)
        check(args.check, store, layers, routers, used, start, y)


if __name__ == "__main__":
    main()
