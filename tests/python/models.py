"""Small models written by gguf-py: every type it can write, every way experts are named, and the oddities of real files."""

import itertools

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

# Q8_1 and Q8_K exist only while a model runs; no file holds them.
TYPES = [t for t in gguf.GGML_QUANT_SIZES if t not in (Type.Q8_1, Type.Q8_K)]
NAMINGS = ("stacked", "fused", "per-expert", "reference")
SPLITS = {
    "whole": {},
    "split": {"split_max_tensors": 7},
    "small-first-shard": {"split_max_tensors": 40, "small_first_shard": True},
}
EXPERTS = 3


RNG = np.random.default_rng(1)


def blocks(kind, *shape):
    """Valid data of a type with a row-major shape: quantised real numbers where gguf-py can quantise, else raw blocks."""
    try:
        return gguf.quants.quantize(RNG.standard_normal(shape, dtype=np.float32), kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = RNG.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
        return raw & 0xBF  # without that bit no scale, of whatever float format and place, is infinite or not a number


def write(path, tensors, values=(), arch="moe", **split):
    """Writes (name, array, type) triples; `values` are (key, value, type) triples. Returns the parts in order."""
    writer = gguf.GGUFWriter(path, arch, **split)
    for key, value, kind in values:
        writer.add_key_value(key, value, kind)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    finish(writer)
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def finish(writer):
    """Writes what a writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def counts(layers, experts=EXPERTS):
    return [
        ("moe.block_count", layers, GGUFValueType.UINT32),
        ("moe.embedding_length", 256, GGUFValueType.UINT32),
        ("moe.expert_count", experts, GGUFValueType.UINT32),
        ("moe.expert_used_count", 2, GGUFValueType.UINT32),
    ]


def globals_(tied=False):
    yield "token_embd.weight", blocks(Type.F16, 10, 256), Type.F16
    if not tied:
        yield "output.weight", blocks(Type.Q8_0, 10, 256), Type.Q8_0
    yield "output_norm.weight", blocks(Type.F32, 256), Type.F32


def expert_tensors(naming, layer, kind, experts=EXPERTS):
    """Gate and up have 6 rows, down has 10: sizes that no page and few alignments divide."""
    gate, up, down = (blocks(kind, experts, rows, 256) for rows in (6, 6, 10))
    blk = f"blk.{layer}"
    if naming == "stacked":
        stacks = {"down": down, "gate": gate, "up": up}  # the order of llama-quantize: by name
    elif naming == "fused":
        stacks = {"gate_up": np.concatenate([gate, up], axis=1), "down": down}
    else:
        words = {"per-expert": "ffn_{}.{}.weight", "reference": "ffn.experts.{1}.{0}.weight"}[naming]
        slots = ("gate", "down", "up") if naming == "per-expert" else ("w1", "w2", "w3")
        for e, (slot, data) in itertools.product(range(experts), zip(slots, (gate, down, up), strict=True)):
            yield f"{blk}.{words.format(slot, e)}", data[e], kind
        return
    for slot, data in stacks.items():
        yield f"{blk}.ffn_{slot}_exps.weight", data, kind


def typed(naming):
    """One layer per type."""
    yield from globals_()
    for layer, kind in enumerate(TYPES):
        yield f"blk.{layer}.attn_norm.weight", blocks(Type.F32, 256), Type.F32
        yield f"blk.{layer}.attn_q.weight", blocks(kind, 2, 256), kind
        yield f"blk.{layer}.ffn_gate_inp.weight", blocks(Type.F32, EXPERTS, 256), Type.F32
        yield from expert_tensors(naming, layer, kind)


def write_typed(folder, naming, split):
    return write(folder / "typed.gguf", typed(naming), counts(len(TYPES)), **SPLITS[split])


def oddities():
    """What real files hold besides the plain case, as (name, array, type)."""

    def f32(name, *shape):
        return name, blocks(Type.F32, *shape), Type.F32

    def q(name, *shape, kind=Type.Q4_K):
        return name, blocks(kind, *shape), kind

    yield from globals_(tied=True)
    yield f32("token_embd_norm.weight", 256)
    yield f32("position_embd.weight", 4, 256)
    # An odd number of bytes before wider numbers: this file cannot stay in the model's order.
    yield "blk.0.odd", blocks(Type.I8, 37), Type.I8
    for kind in (Type.F64, Type.BF16, Type.I16, Type.I32, Type.I64, Type.F16, Type.F32):
        yield q(f"blk.0.plain_{kind.name.lower()}", 3, 5, kind=kind)
    yield f32("blk.0.conv.weight", 2, 3, 4, 5)
    # Layer 1: biases and scales of every slice size; MXFP4 rows of 17 bytes put the biases off their alignment.
    for slot, rows in (("gate", 7), ("up", 7), ("down", 9)):
        yield q(f"blk.1.ffn_{slot}_exps.weight", EXPERTS, rows, 32, kind=Type.MXFP4)
        yield f32(f"blk.1.ffn_{slot}_exps.bias", EXPERTS, rows)
        yield f32(f"blk.1.ffn_{slot}_exps.scale", EXPERTS)
    yield f32("blk.1.ffn_norm_exps.weight", 256)
    yield f32("blk.1.exp_probs_b.bias", EXPERTS)
    # Layer 2: fused, with a bias that is halved, a scale that cannot be, and a scale of another length.
    yield q("blk.2.ffn_gate_up_exps.weight", EXPERTS, 8, 256)
    yield f32("blk.2.ffn_gate_up_exps.bias", EXPERTS, 8)
    yield f32("blk.2.ffn_gate_up_exps.scale", EXPERTS)
    yield q("blk.2.ffn_down_exps.weight", EXPERTS, 5, 256)
    yield f32("blk.2.ffn_down_exps.scale", EXPERTS + 1)
    # Layer 3: no gate, and more experts than elsewhere.
    yield q("blk.3.ffn_up_exps.weight", EXPERTS + 2, 4, 256)
    yield q("blk.3.ffn_down_exps.weight", EXPERTS + 2, 4, 256)
    # Layer 4: a single expert, whose dimension of 1 was dropped.
    for slot in ("gate", "up", "down"):
        yield q(f"blk.4.ffn_{slot}_exps.weight", 4, 256)
    # Layer 5: scales that are called those of the weights, of stacks and of a fused one; a table of rows.
    for slot in ("gate", "up", "down"):
        yield q(f"blk.5.ffn_{slot}_exps.weight", EXPERTS, 4, 64, kind=Type.NVFP4)
        yield f32(f"blk.5.ffn_{slot}_exps.weight.scale", EXPERTS)
        yield f32(f"blk.5.ffn_{slot}_exps.weight.input_scale", EXPERTS)
    yield f32("blk.5.ffn_gate_up_exps.weight.scale", EXPERTS)
    yield q("blk.5.engram_embd.weight", 3, 256)
    yield f32("blk.5.engram_q_norm.weight", 64)
    # Layer 100: numbers that outgrow their zeros, with gaps.
    for expert in (0, 7, 1000):
        for slot in ("gate", "up", "down"):
            yield q(f"blk.100.ffn_{slot}.{expert}.weight", 2, 256)
    yield f32("blk.100.ffn_up.7.weight.scale", 1)
    # Near misses, which are no routed experts.
    yield q("blk.1.ffn_gate_chexps.weight", 2, 4, 256)
    yield q("blk.1.ffn_up_shexp.weight", 4, 256)
    yield q("v.blk.1.ffn_gate_exps.weight", EXPERTS, 4, 256)
    yield f32("größe.weight", 8)


def odd_values():
    """A value of every type, and those that JSON finds hard."""
    t = GGUFValueType
    numbers = {
        t.UINT8: 200, t.INT8: -100, t.UINT16: 65535, t.INT16: -32768, t.UINT32: 2**32 - 1, t.INT32: -(2**31),
        t.FLOAT32: 0.1, t.BOOL: True, t.UINT64: 2**64 - 1, t.INT64: -(2**63), t.FLOAT64: 0.1,
    }  # fmt: skip
    yield from ((f"odd.{kind.name.lower()}", value, kind) for kind, value in numbers.items())
    for kind in (t.FLOAT32, t.FLOAT64):
        for value in (np.nan, np.inf, -np.inf, 1e-38, 1.5e30, 1.0, -0.0, 123456.7):
            yield f"odd.{kind.name.lower()}.{value}", value, kind
    yield "odd.text", 'snow ☃, "quotes", a\tcontrol \x01 and 模型', t.STRING
    yield "odd.invalid", b"caf\xe9 \xff\xfe", t.STRING
    yield "odd.long", "x" * 70_000, t.STRING
    yield "odd.just_short_enough", "y" * 65_536, t.STRING
    yield "odd.array_64", list(range(64)), t.ARRAY
    yield "odd.array_65", list(range(65)), t.ARRAY
    yield "odd.words", ["a", "", "ü"], t.ARRAY
    yield "odd.floats", [0.1, 2.5], t.ARRAY
    yield "odd.flags", [True, False], t.ARRAY
    yield "odd.nested", [[1, 2], [3]], t.ARRAY
    yield "tokenizer.ggml.tokens", [f"token {n}" for n in range(500)], t.ARRAY


def write_oddities(folder, **split):
    return write(folder / "odd.gguf", oddities(), [*counts(101), *odd_values()], **split)


def write_dense(folder):
    tensors = [*globals_(), ("blk.0.ffn_up.weight", blocks(Type.Q4_0, 4, 256), Type.Q4_0)]
    return write(folder / "dense.gguf", tensors, counts(1)[:2])


def write_small(folder, name="small.gguf", layers=2, experts=EXPERTS, rows=0, **split):
    """The plain case; with `rows`, experts of that many rows, for tests that must find bytes not yet in a cache."""
    tensors = list(globals_())
    for layer in range(layers):
        if rows:
            for slot in ("gate", "up", "down"):
                tensors.append(
                    (f"blk.{layer}.ffn_{slot}_exps.weight", blocks(Type.Q8_0, experts, rows, 256), Type.Q8_0)
                )
        else:
            tensors.extend(expert_tensors("stacked", layer, Type.Q4_0, experts))
    return write(folder / name, tensors, counts(layers, experts), **split)
