"""The layout of the contract, worked out a second time and on its own, to hold the real one against.

`read_gguf` reads a model's parts, `layout` says which tensor goes where, `best_start` where a payload begins. Nothing
here is fast or defends itself: the inputs are the tests' own.
"""

import dataclasses
import functools
import json
import math
import re
import struct
from pathlib import Path

import gguf

TYPES = {t.value: (t.name, *size) for t, size in gguf.GGML_QUANT_SIZES.items()}
TYPES[42] = ("Q2_0", 64, 18)  # the newest type of ggml, not yet known to gguf-py
PLAIN = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
SIZES = {name: (block, size) for name, block, size in TYPES.values()}

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
NAMES = "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split()  # of value types, by number


@dataclasses.dataclass
class Tensor:
    name: str
    dims: tuple  # GGML order: the contiguous dimension first
    type: str
    part: int
    offset: int  # in the part's file

    @property
    def nbytes(self):
        block, size = SIZES[self.type]
        return math.prod(self.dims) // block * size


@dataclasses.dataclass
class Value:
    type: int
    value: object  # strings as bytes, arrays as lists
    of: int | None = None  # the element type of an array


@dataclasses.dataclass
class Part:
    path: Path
    version: int
    values: dict
    values_bytes: bytes  # the key/value section as it stands in the file
    tensors: list


class Cursor:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form):
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self):
        length = self.take("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at])

    def value(self, kind):
        if kind == 8:
            return Value(kind, self.string())
        if kind != 9:
            return Value(kind, self.take(SCALARS[kind]))
        of, count = self.take("I"), self.take("Q")
        return Value(kind, [self.value(of) for _ in range(count)], of)


def read_part(path, number, header_limit=64 << 20):
    with open(path, "rb") as file:
        data = file.read(header_limit)
    at = Cursor(data)
    assert at.take("4s") == b"GGUF"
    version, n_tensors, n_values = at.take("I"), at.take("Q"), at.take("Q")
    values = {}
    for _ in range(n_values):
        key = at.string().decode()
        values[key] = at.value(at.take("I"))
    values_bytes = data[24 : at.at]
    infos = []
    for _ in range(n_tensors):
        name = at.string().decode()
        dims = tuple(at.take("Q") for _ in range(at.take("I")))
        infos.append((name, dims, TYPES[at.take("I")][0], at.take("Q")))
    alignment = values["general.alignment"].value if "general.alignment" in values else 32
    start = -(-at.at // alignment) * alignment
    return Part(Path(path), version, values, values_bytes, [Tensor(n, d, t, number, start + o) for n, d, t, o in infos])


def read_gguf(paths):
    return [read_part(path, number) for number, path in enumerate(paths)]


@dataclasses.dataclass
class Entry:
    """A tensor of a safetensors file: a range of a part under a new name."""

    name: str
    dims: tuple
    source: Tensor
    offset: int
    nbytes: int

    @property
    def part(self):
        return self.source.part

    @property
    def width(self):
        return PLAIN.get(self.source.type, 1)

    @property
    def dtype(self):
        return self.source.type if self.source.type in PLAIN else "U8"

    @property
    def shape(self):
        if self.source.type in PLAIN:
            return list(reversed(self.dims))
        block, size = SIZES[self.source.type]
        return [*reversed(self.dims[1:]), self.dims[0] // block * size]

    @property
    def note(self):
        """What `odmoe.tensors` says of it."""
        return {
            "ggml_type": self.source.type,
            "shape": list(reversed(self.dims)),
            "gguf_name": self.source.name,
            "gguf_part": self.part,
            "gguf_offset": self.offset,
        }


# A scale may be called one of the weight, in the second dialect of NVFP4.
SUFFIX = r"(?:weight\.(?=scale$|input_scale$))?([^.]+)"
STACK = re.compile(rf"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.{SUFFIX}")
SINGLE = re.compile(rf"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.{SUFFIX}")
TOY = re.compile(rf"blk\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.{SUFFIX}")
SLOTS = {"gate": ["w1"], "down": ["w2"], "up": ["w3"], "gate_up": ["w1", "w3"]}


def axis(tensor, suffix):
    """The expert axis of a stack, and how many experts it has."""
    place = {"weight": 2, "bias": 1}.get(suffix, 0)
    return place, (tensor.dims[place] if place < len(tensor.dims) else 1)


def experts_of(tensor, counts):
    """(layer, expert, entry) for every piece of a routed expert's tensor; nothing for a tensor of the base."""
    if m := STACK.fullmatch(tensor.name):
        layer, slots, suffix = int(m[1]), SLOTS[m[2]], m[3]
        place, count = axis(tensor, suffix)
        dims = tensor.dims[:place] + tensor.dims[place + 1 :]
        if count != counts.get(layer) or (len(slots) == 2 and not dims):
            return
        if len(slots) == 2:  # the rows, which are the slowest dimension left, are halved
            dims = (*dims[:-1], dims[-1] // 2)
        size = tensor.nbytes // count // len(slots)
        for expert in range(count):
            for half, slot in enumerate(slots):
                offset = tensor.offset + (expert * len(slots) + half) * size
                yield layer, expert, Entry(f"{slot}.{suffix}", dims, tensor, offset, size)
    elif m := SINGLE.fullmatch(tensor.name) or TOY.fullmatch(tensor.name):
        layer, expert, slot, suffix = m.groups() if TOY.fullmatch(tensor.name) else (m[1], m[3], SLOTS[m[2]][0], m[4])
        yield int(layer), int(expert), Entry(f"{slot}.{suffix}", tensor.dims, tensor, tensor.offset, tensor.nbytes)


def base_file(name):
    if re.search(r"(token|engram)_embd", name) or re.match(r"(position_embd|token_types|per_layer_token_embd)\.", name):
        return "embeddings"
    if name in ("output.weight", "output.bias"):
        return "lm_head"
    return "norms" if "norm" in name else "attention_layers"


def layout(parts):
    """Path of every safetensors file -> its entries in payload order."""
    counts, files = {}, {}
    tensors = [t for part in parts for t in part.tensors]
    for t in tensors:
        if (m := STACK.fullmatch(t.name)) and m[3] == "weight":
            counts[int(m[1])] = axis(t, "weight")[1]
    for t in tensors:
        pieces = list(experts_of(t, counts))
        for layer, expert, entry in pieces:
            files.setdefault((layer, expert), []).append(entry)
        if not pieces:
            files.setdefault(base_file(t.name), []).append(Entry(t.name, t.dims, t, t.offset, t.nbytes))
    return {path_of(key): in_order(entries) for key, entries in files.items()}


def path_of(key):
    if isinstance(key, str):
        return f"base_model/{key}.safetensors"
    return "experts/layer_{:02}_expert_{:03}.safetensors".format(*key)


def in_order(entries):
    """Source order; by width, widest first, only where a tensor would otherwise lie across its own alignment."""
    entries = sorted(entries, key=lambda e: (e.part, e.offset))  # stable: equal offsets keep the table's order
    at = 0
    for entry in entries:
        if at % entry.width:
            return sorted(entries, key=lambda e: -e.width)
        at += entry.nbytes
    return entries


def best_start(entries, unpadded):
    """Where a payload begins whose unpadded header ends at `unpadded`: most bytes congruent, then least padding."""
    weights, at = {}, 0
    for entry in entries:
        residue = (entry.offset - at) % 4096
        weights[residue] = weights.get(residue, 0) + entry.nbytes
        at += entry.nbytes
    starts = range(-(-unpadded // 8) * 8, unpadded + 4096, 8)
    return max(starts, key=lambda start: (weights.get(start % 4096, 0), -start))


@dataclasses.dataclass
class Header:
    """A safetensors header as it stands in a file."""

    text: str
    start: int  # of the payload
    metadata: dict
    tensors: dict


def read_header(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(length).decode()
    assert len(text.encode()) == length
    fields = json.loads(text)
    return Header(text, 8 + length, fields.pop("__metadata__"), fields)


@dataclasses.dataclass
class Shown:
    """A model, its mount, and what the contract says the mount holds."""

    paths: list
    root: Path

    @functools.cached_property
    def parts(self):
        return read_gguf(self.paths)

    @functools.cached_property
    def layout(self):
        return layout(self.parts)

    @functools.cached_property
    def bytes(self):
        """Every part, whole."""
        return [path.read_bytes() for path in self.paths]

    @property
    def tensors(self):
        return [t for part in self.parts for t in part.tensors]

    def expert_files(self):
        return {path: entries for path, entries in self.layout.items() if path.startswith("experts/")}
