"""Splits a model as the reference converter does: gguf-py reads it, `save_file` writes each expert.

    converter.py MODEL.gguf DIR

The converter's own rules find no experts in files of today's llama.cpp, so this uses llama.cpp's
names. It reads and writes as the converter does. Prints the nanoseconds of the work, without imports.
"""

import json
import sys
import time
from pathlib import Path

from gguf import GGUFReader
from safetensors.numpy import save_file

SLOTS = {"gate": "w1.weight", "down": "w2.weight", "up": "w3.weight"}


def component(name):
    if "token_embd" in name:
        return "embeddings"
    if name == "output.weight":
        return "lm_head"
    return "norms" if "norm" in name else "attention_layers"


def convert(model, folder):
    reader = GGUFReader(model)
    base, layers = {}, {}
    for tensor in reader.tensors:
        block, _, rest = tensor.name.partition(".ffn_")
        slot, _, kind = rest.partition("_")
        if kind == "exps.weight":
            layers.setdefault(int(block.removeprefix("blk.")), {})[SLOTS[slot]] = tensor.data
        else:
            base.setdefault(component(tensor.name), {})[tensor.name] = tensor.data
    for name in ("base_model", "experts"):
        (folder / name).mkdir(parents=True)
    for name, tensors in base.items():
        save_file(tensors, folder / f"base_model/{name}.safetensors")
    for layer, stacks in layers.items():
        for expert in range(len(stacks["w1.weight"])):
            tensors = {name: stack[expert] for name, stack in stacks.items()}
            save_file(tensors, folder / f"experts/layer_{layer:02}_expert_{expert:03}.safetensors")


start = time.perf_counter_ns()
convert(sys.argv[1], Path(sys.argv[2]))
print(json.dumps(time.perf_counter_ns() - start))
