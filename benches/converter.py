"""Splits a model as the reference converter does: gguf-py reads it, `save_file` writes each expert.

    converter.py MODEL.gguf DIR
    converter.py MODEL.gguf DIR (bf16 | mlx) N

The converter's own rules find no experts in files of today's llama.cpp, so this uses llama.cpp's
names. It reads and writes as the converter does. With a form it writes the first N experts of layer 0
as numbers, or as MLX's own quantisation of them (`mx.quantize`), as people do. Prints the nanoseconds of the work, without imports.
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


def convert_numbers(model, folder, form, count):
    (folder / "experts").mkdir(parents=True)
    stacks = {t.name: t for t in GGUFReader(model).tensors if t.name.startswith("blk.0.") and "_exps." in t.name}
    for expert in range(count):
        arrays = {}
        for slot, name in SLOTS.items():
            stack = stacks[f"blk.0.ffn_{slot}_exps.weight"]
            numbers = dequantize(stack.data[expert], stack.tensor_type)
            if form == "bf16":
                arrays[name] = mx.array(numbers).astype(mx.bfloat16)
                continue
            packed = mx.quantize(mx.array(numbers).astype(mx.float16), group_size=32, bits=4)
            stem = name.removesuffix(".weight")
            arrays |= {f"{stem}.{key}": a for key, a in zip(("weight", "scales", "biases"), packed, strict=True)}
        mx.save_safetensors(str(folder / f"experts/layer_00_expert_{expert:03}.safetensors"), arrays)


model, folder, *form = sys.argv[1:]
if form:
    import mlx.core as mx
    from gguf import dequantize

start = time.perf_counter_ns()
if form:
    convert_numbers(model, Path(folder), form[0], int(form[1]))
else:
    convert(model, Path(folder))
print(json.dumps(time.perf_counter_ns() - start))
