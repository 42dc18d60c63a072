"""MoE layers in MLX whose experts come from a mount when they are needed: `odmoe-fs mount --as mlx`.

The store holds experts up to a number of bytes; beyond that, those that were used longest ago go. While a
layer computes, a thread loads what the *next* layer's router picks for the hidden state of *this* layer:
a layer changes the state little, so most of these experts are those that it picks in its turn.

    pip install mlx    # on Linux mlx[cpu]
    python mlx_expert_store.py MOUNT [--memory MIB] [--tokens N]
"""

import argparse
import collections
import concurrent.futures
import json
import time

import mlx.core as mx


class Mount:
    """The tree of a mount: matrices by name, and where the experts are."""

    def __init__(self, path):
        self.path = path
        with open(f"{path}/base_model/metadata.json") as metadata, open(f"{path}/experts/registry.json") as registry:
            self.metadata = json.load(metadata)
            self.registry = {(entry["layer"], entry["expert_id"]): entry for entry in json.load(registry).values()}
        if self.metadata.get("form") != "mlx":
            raise SystemExit(f"{path} is not a mount --as mlx")

    def matrices(self, path):
        """The weights of a file by name, each a function that multiplies by it; nothing is read yet."""
        # On Metal, a kernel that waits for a slow disk can exceed its time limit, so the processor reads.
        arrays, metadata = mx.load(f"{self.path}/{path}", return_metadata=True, stream=mx.cpu)
        tensors = json.loads(metadata["odmoe.tensors"])
        return {name: self._matrix(arrays, name, tensors[name]["gguf_name"]) for name in tensors if name.endswith(".weight")}

    def _matrix(self, arrays, name, gguf_name):
        # As `mx.quantized_matmul` calls them: mode, bits, group_size. What is not listed is plain numbers.
        how = self.metadata["quantization"].get(gguf_name)
        stem = name.removesuffix("weight")
        parts = [arrays[stem + part] for part in ("weight", "scales", "biases") if stem + part in arrays]
        scale = arrays.get(stem + "scale")
        if scale is not None and scale.size > 1:  # of the router's input, in models of Gemma
            scale = None
        return Matrix(how, parts, scale, arrays.get(stem + "bias"))


class Matrix:
    """Multiplies by a weight of shape [out, in], packed or plain; some have a scale for the product, or a bias."""

    def __init__(self, how, arrays, scale, bias):
        self.how, self.arrays, self.scale, self.bias = how, arrays, scale, bias

    def __call__(self, x):
        if self.scale is None:
            y = self._product(x)
        else:  # without it, the product may be too large for F16
            y = (self._product(x.astype(mx.float32)) * self.scale).astype(x.dtype)
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def _product(self, x):
        if self.how:
            return mx.quantized_matmul(x, *self.arrays, **self.how)
        return x @ self.arrays[0].T


class ExpertStore:
    """Experts in memory, at most `budget` bytes of them."""

    def __init__(self, mount, budget):
        self.mount, self.budget = mount, budget
        self.bytes = 0  # held, or being loaded
        self.counts = collections.defaultdict(collections.Counter)  # by layer
        self._experts = collections.OrderedDict()  # futures; the one that was used last is last
        self._loader = concurrent.futures.ThreadPoolExecutor(max_workers=1)

    def get(self, layer, experts):
        """These experts of a layer, as futures: what is not here is being loaded."""
        for expert in experts:
            self.counts[layer]["hits" if (layer, expert) in self._experts else "misses"] += 1
        return [self._load(layer, expert) for expert in experts]

    def prefetch(self, layer, experts):
        """Loads experts that will be needed, without waiting for them."""
        for expert in experts:
            self._load(layer, expert)

    def _load(self, *key):
        if key not in self._experts:
            entry = self.mount.registry[key]
            self.counts[key[0]]["bytes"] += entry["size"]
            self.bytes += entry["size"]
            while self._experts and self.bytes > self.budget:
                oldest, _ = self._experts.popitem(last=False)
                self.bytes -= self.mount.registry[oldest]["size"]
            self._experts[key] = self._loader.submit(self._read, entry["path"])
        self._experts.move_to_end(key)
        return self._experts[key]

    def _read(self, path):
        expert = self.mount.matrices(path)
        mx.eval([(matrix.arrays, matrix.scale, matrix.bias) for matrix in expert.values()])
        return expert


def feed_forward(expert, x):
    gate = expert["w1.weight"](x)
    return expert["w2.weight"](gate * mx.sigmoid(gate) * expert["w3.weight"](x))


def route(router, x, used):
    """The experts that a token uses, and their shares: the softmax over the highest scores."""
    scores = router(x)[0]
    chosen = mx.argsort(-scores)[:used]
    return chosen.tolist(), mx.softmax(scores[chosen])


def forward(layers, routers, used, store, x):
    """Runs one vector [1, dim] through the MoE part of each layer."""
    for layer, following in zip(layers, [*layers[1:], None]):
        start = time.perf_counter()
        chosen, shares = route(routers[layer], x, used)
        experts = store.get(layer, chosen)
        if following is not None:
            store.prefetch(following, route(routers[following], x, used)[0])
        y = sum(share * feed_forward(expert.result(), x) for share, expert in zip(shares, experts))
        x = mx.fast.rms_norm(x + y.astype(x.dtype), None, 1e-6)
        mx.eval(x)
        store.counts[layer]["time"] += time.perf_counter() - start
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mount")
    parser.add_argument("--memory", type=float, default=1024, metavar="MIB", help="for experts")
    parser.add_argument("--tokens", type=int, default=3, help="how often the layers are run")
    args = parser.parse_args()

    mount = Mount(args.mount)
    store = ExpertStore(mount, args.memory * 2**20)
    layers = mount.metadata["moe_layers"]
    used = mount.metadata["expert_used_count"] or 2
    names = {layer: f"blk.{layer}.ffn_gate_inp.weight" for layer in layers}
    files = {mount.metadata["weight_map"][name] for name in names.values()}
    base = {name: matrix for file in files for name, matrix in mount.matrices(f"base_model/{file}").items()}
    routers = {layer: base[name] for layer, name in names.items()}

    # Activations of another dtype than the scales would make MLX compute in F32.
    dtype = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[mount.metadata["scales"]]
    x = mx.sin(mx.arange(mount.metadata["embedding_length"]))[None].astype(dtype)
    for _ in range(args.tokens):
        x = forward(layers, routers, used, store, x)
    print(f"first numbers {[round(number, 4) for number in x[0, :4].tolist()]}")
    for layer in layers:
        n = store.counts[layer]
        mib, ms = n["bytes"] / 2**20, n["time"] / args.tokens * 1000
        print(f"layer {layer}: {n['hits']} hits, {n['misses']} misses, {mib:.1f} MiB read, {ms:.1f} ms a token")


if __name__ == "__main__":
    main()
