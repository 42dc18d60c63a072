"""Models of every quantised type for tests of `--as`, and what their files must hold then."""

import json

import gguf
import numpy as np
from safetensors import safe_open

import models
from blocks import DTYPES, SIZES, model_blocks, random_blocks, reference
from odmoe import sparse_gguf
from reference import layout, read_gguf, read_header

EXPERTS = 3
FORMS = [*DTYPES, "mlx"]
# What --as may be given with; each makes another tree.
OPTIONS = [[], ["--as", "f32"], ["--as", "f16"], ["--as", "bf16"], ["--as", "mlx"]]
OPTIONS += [["--as", "mlx", "--scales", "f32"], ["--as", "mlx", "--scales", "bf16", "--requant"]]


def shaped(ggml_type, blocks, *shape):
    """Blocks as the rows of a tensor with this logical shape."""
    block, size = SIZES[ggml_type]
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def tensor(name, ggml_type, *shape, make=model_blocks):
    """A (name, array, type) triple for `models.write`."""
    count = int(np.prod(shape)) // SIZES[ggml_type][0]
    return name, shaped(ggml_type, make(ggml_type, count), *shape), gguf.GGMLQuantizationType[ggml_type]


def experts(layer, ggml_type, gate=(8, 512), down=(4, 768), make=model_blocks, number=EXPERTS):
    """The three stacks of a layer."""
    for slot, shape in (("gate", gate), ("up", gate), ("down", down)):
        yield tensor(f"blk.{layer}.ffn_{slot}_exps.weight", ggml_type, number, *shape, make=make)


def plain(name, kind, *shape):
    """A tensor that is not quantised."""
    kind = gguf.GGMLQuantizationType[kind]
    return name, models.blocks(kind, *shape), kind


def write(path, tensors, layers=1):
    (model,) = models.write(path, tensors, models.counts(layers))
    return model


def write_table(path, tensors):
    """The same, by the writer of this project: gguf-py does not know every type. `tensors` are (name, blocks, type, shape)."""
    table = path.with_suffix(".json")
    kv = {"general.architecture": "moe", "moe.block_count": 1, "moe.expert_count": EXPERTS}
    rows = [[name, list(reversed(shape)), kind] for name, _, kind, shape in tensors]
    table.write_text(json.dumps({"kv": kv, "tensors": rows}))
    (model,) = sparse_gguf(table, path)
    with model.open("r+b") as file:
        for found, (_, blocks, _, _) in zip(read_gguf([model])[0].tensors, tensors, strict=True):
            file.seek(found.offset)
            file.write(blocks.tobytes())
    return model


def write_mixed(path):
    """A layer for each of some types, in the base and in experts, between tensors that are not quantised."""
    tensors = [plain("token_embd.weight", "F16", 10, 256), plain("blk.0.odd", "I8", 37)]
    for layer, ggml_type in enumerate(("Q4_K", "Q6_K", "MXFP4", "NVFP4", "Q8_0", "IQ1_S", "TQ1_0")):
        tensors.append(tensor(f"blk.{layer}.attn_q.weight", ggml_type, 5, 256, make=random_blocks))
        tensors.append(tensor(f"blk.{layer}.table", ggml_type, 3, 512, make=random_blocks))
        tensors.append(plain(f"blk.{layer}.attn_norm.weight", "F32", 7))
        tensors.extend(experts(layer, ggml_type, gate=(6, 256), down=(10, 256), make=random_blocks))
    return write(path, tensors, 7)


class Written:
    """A model in a file, and what the tree of `raw` holds by the second opinion of reference.py."""

    def __init__(self, path):
        self.path = path
        self.bytes = path.read_bytes()
        self.layout = layout(read_gguf([path]))

    def entries(self):
        """(file, entry) of everything that is shown."""
        return [(name, entry) for name, entries in self.layout.items() for entry in entries]

    def data(self, entry):
        return self.bytes[entry.offset : entry.offset + entry.nbytes]

    def blocks(self, entry):
        return np.frombuffer(self.data(entry), np.uint8).reshape(-1, SIZES[entry.source.type][1])

    def numbers(self, entry):
        """A quantised tensor by gguf-py, in its logical shape."""
        return reference(entry.source.type, self.blocks(entry)).reshape(tuple(reversed(entry.dims)))


def is_quantised(entry):
    return entry.dtype == "U8"


def loaded(path):
    """Every array of a file by safetensors."""
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def said(path):
    """What `odmoe.tensors` says of each tensor of a file."""
    return json.loads(read_header(path).metadata["odmoe.tensors"])
