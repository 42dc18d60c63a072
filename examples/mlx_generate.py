#!/usr/bin/env python3
"""Generate text with a model larger than memory: experts are read from the mount when they are needed.

    odmoe-fs mount --show experts,hf --as mlx MODEL.gguf MOUNT
    pip install mlx-lm
    python examples/mlx_generate.py MOUNT --prompt "Why is the sky blue?" --budget 8G

mlx-lm builds the model from hf/ and loads nothing before it is used. Then each block of experts is replaced by one that
asks a store: it reads experts/layer_LL_expert_EEE.safetensors, keeps those used last within a budget of bytes, and has
files read ahead while others are computed with. The tokens are those of `mlx_lm.generate` on the whole directory.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import stream_generate
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import load_model, load_tokenizer

AHEAD = 2  # layers whose experts are read while one is computed
READERS = 4  # threads that read ahead
CHUNK = 1 << 20  # bytes that they read at a time


@dataclasses.dataclass
class Counts:
    """What a store has done."""

    hits: int = 0
    misses: int = 0
    read: int = 0

    @property
    def rate(self):
        return self.hits / max(1, self.hits + self.misses)


class Expert:
    """The three matrices of an expert: w1 (gate), w2 (down) and w3 (up)."""

    def __init__(self, path):
        # On the CPU, since a kernel of the GPU that waits for a disk may run into a time limit.
        self.arrays, metadata = mx.load(str(path), return_metadata=True, stream=mx.cpu)
        mx.eval(self.arrays)
        self.forms = {name: t.get("form", {}) for name, t in json.loads(metadata["odmoe.tensors"]).items()}
        self.bytes = sum(array.nbytes for array in self.arrays.values())

    def multiply(self, name, x):
        scale, bias = self.arrays.get(f"{name}.scale"), self.arrays.get(f"{name}.bias")
        if scale is None:
            y = self.product(name, x)
        else:  # one number for the product, which without it may be too large for F16
            y = (self.product(name, x.astype(mx.float32)) * scale).astype(x.dtype)
        return y if bias is None else y + bias.astype(y.dtype)

    def product(self, name, x):
        weight, form = self.arrays[f"{name}.weight"], self.forms[f"{name}.weight"]
        if "mode" not in form:
            return x @ weight.T.astype(x.dtype)
        scales, biases = self.arrays[f"{name}.scales"], self.arrays.get(f"{name}.biases")
        sizes = {key: form[key] for key in ("group_size", "bits", "mode")}
        return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **sizes)


class Store:
    """Experts by layer and number. Those used last stay in memory, as many as the budget allows."""

    def __init__(self, folder, budget):
        self.folder, self.budget = Path(folder), budget
        self.paths = {}
        for path in self.folder.glob("layer_*_expert_*.safetensors"):
            layer, expert = re.findall(r"\d+", path.name)
            self.paths[int(layer), int(expert)] = path
        self.kept = collections.OrderedDict()
        self.bytes = 0
        self.last = collections.defaultdict(tuple)  # what each layer used for the last token
        self.coming = set()
        self.readers = ThreadPoolExecutor(READERS)
        self.counts = Counts()

    def take(self, layer, experts):
        """These experts of a layer, in order, one at a time, so that no more than one is in memory beyond the budget."""
        self.read_ahead(layer, experts)
        for expert in experts:
            yield expert, self.one((layer, expert))
        self.last[layer] = experts

    def one(self, key):
        if key in self.kept:
            self.counts.hits += 1
            self.kept.move_to_end(key)
            return self.kept[key]
        self.counts.misses += 1
        expert = Expert(self.paths[key])
        self.counts.read += expert.bytes
        self.bytes += expert.bytes
        self.kept[key] = expert
        while self.bytes > self.budget and len(self.kept) > 1:
            _, oldest = self.kept.popitem(last=False)
            self.bytes -= oldest.bytes
        return expert

    def read_ahead(self, layer, experts):
        """Has the kernel read what is needed now, and what the next layers are likely to use: what they used last."""
        keys = [(layer, expert) for expert in experts]
        keys += [(layer + n, expert) for n in range(1, AHEAD + 1) for expert in self.last[layer + n]]
        for key in keys:
            if key not in self.kept and key not in self.coming and key in self.paths:
                self.coming.add(key)
                self.readers.submit(self.touch, key)

    def touch(self, key):
        """Reads a file into the page cache, from where the main thread takes it."""
        file = os.open(self.paths[key], os.O_RDONLY)
        try:
            while os.read(file, CHUNK):
                pass
        finally:
            os.close(file)
            self.coming.discard(key)


class StoredExperts(nn.Module):
    """Takes the place of a `SwitchGLU` whose experts are in a store."""

    def __init__(self, store, layer, activation):
        super().__init__()
        self._store, self._layer, self._activation = store, layer, activation

    def __call__(self, x, indices):
        chosen = np.array(indices)
        used = chosen.shape[-1]
        flat, rows = chosen.reshape(-1), x.reshape(-1, x.shape[-1])
        order, outputs = np.argsort(flat, kind="stable"), []
        experts, starts = np.unique(flat[order], return_index=True)
        ends = [*starts[1:], len(flat)]
        places = dict(zip(experts.tolist(), zip(starts, ends, strict=True), strict=True))
        for number, expert in self._store.take(self._layer, tuple(places)):
            start, end = places[number]
            mine = rows[mx.array(order[start:end] // used)]
            hidden = self._activation(expert.multiply("w3", mine), expert.multiply("w1", mine))
            outputs.append(expert.multiply("w2", hidden))
            # Before the next expert is read, so that this one may be forgotten.
            mx.eval(outputs[-1])
        y = mx.concatenate(outputs)[mx.array(np.argsort(order, kind="stable"))]
        return y.reshape(*chosen.shape, y.shape[-1])


def replace_experts(model, store):
    """Puts a store in the place of all experts of a model; returns how many blocks it has taken."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, SwitchGLU)]
    for path, module in found:
        *parents, name = path.split(".")
        owner = model
        for word in parents:
            owner = owner[int(word)] if isinstance(owner, list) else getattr(owner, word)
        layer = int(re.search(r"layers\.(\d+)", path)[1])
        setattr(owner, name, StoredExperts(store, layer, module.activation))
    return len(found)


def load(mount, budget):
    """The model and its tokenizer, with the experts in a store of the mount."""
    mount = Path(mount)
    model, config = load_model(mount / "hf", lazy=True)
    store = Store(mount / "experts", budget)
    if not replace_experts(model, store):
        sys.exit(f"{mount}: the model has no experts; mlx_lm.generate is all it needs")
    if not store.paths:
        sys.exit(f"{mount}: there is no experts/; mount the model with --show experts,hf --as mlx")
    mx.eval(model.parameters())
    ends = config.get("eos_token_id")
    return model, load_tokenizer(mount / "hf", eos_token_ids=ends), store


def size(text):
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text.upper())
    if not parts:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 8G")
    number, unit = parts.groups()
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mount", help="a mount made with --show experts,hf --as mlx")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--budget", type=size, default=size("8G"), help="bytes of experts in memory, such as 8G")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="print tokens and figures as a JSON object")
    return parser.parse_args()


def main():
    args = arguments()
    model, tokenizer, store = load(args.mount, args.budget)
    prompt = args.prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens, began = [], time.perf_counter()
    for answer in stream_generate(model, tokenizer, prompt, max_tokens=args.max_tokens):
        tokens.append(answer.token)
        if not args.json:
            print(answer.text, end="", flush=True)
    taken = time.perf_counter() - began
    figures = {
        "tokens": tokens,
        "tokens_per_second": len(tokens) / taken,
        "hit_rate": store.counts.rate,
        "bytes_read": store.counts.read,
        "bytes_kept": store.bytes,
        "peak_bytes": mx.get_peak_memory(),
    }
    if args.json:
        print(json.dumps(figures))
        return
    print(
        f"\n{len(tokens)} tokens, {figures['tokens_per_second']:.2f} per second; experts: {store.counts.rate:.0%} from "
        f"memory, {store.counts.read / 1e9:.2f} GB read; peak memory {figures['peak_bytes'] / 1e9:.2f} GB",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
