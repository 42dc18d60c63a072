"""`--as mlx`: the arrays of a mount are what MLX computes with, and give the numbers of the GGUF."""

import itertools
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import forms
from blocks import EXACT, OF_GGUF_PY, REQUANTISED, SEEN, TYPES, error, model_blocks
from forms import EXPERTS, Written, is_quantised, plain, said, tensor
from odmoe import mounted
from reference import read_header

SCALES = {"f16": mx.float16, "bf16": mx.bfloat16, "f32": mx.float32}
NAMES = {"f16": "F16", "bf16": "BF16", "f32": "F32"}


@pytest.fixture(autouse=True, scope="module")
def on_the_processor():
    mx.set_default_device(mx.cpu)


def write_typed(path):
    """A layer for each type, with scales as models have them."""
    tensors = [plain("token_embd.weight", "BF16", 10, 768), plain("output_norm.weight", "F32", 512)]
    for layer, ggml_type in enumerate(OF_GGUF_PY):
        tensors.append(tensor(f"blk.{layer}.attn_q.weight", ggml_type, 16, 512))
        tensors.append(plain(f"blk.{layer}.ffn_gate_inp.weight", "F32", EXPERTS, 512))
        tensors.extend(forms.experts(layer, ggml_type))
    return forms.write(path, tensors, len(OF_GGUF_PY))


def write_others(path):
    """The same of the types that gguf-py does not know."""
    tensors = []
    for layer, ggml_type in enumerate(sorted(set(TYPES) - set(OF_GGUF_PY))):
        for name, shape in ("attn_q", (16, 512)), ("ffn_gate_exps", (EXPERTS, 8, 512)), ("ffn_down_exps", (EXPERTS, 4, 768)):
            blocks = model_blocks(ggml_type, np.prod(shape) // forms.SIZES[ggml_type][0])
            tensors.append((f"blk.{layer}.{name}.weight", blocks, ggml_type, shape))
    return forms.write_table(path, tensors)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx")
    return [Written(write_typed(folder / "typed.gguf")), Written(write_others(folder / "others.gguf"))]


VARIANTS = ["f16", "bf16", "f32", "f16 requant", "f32 requant"]


@pytest.fixture(scope="module", params=VARIANTS)
def shown(request, models, tmp_path_factory):
    """Both models, mounted: the dtype of scales, whether the inexact types are packed, and (model, root) pairs."""
    scales, *requant = request.param.split()
    flags = ["--as", "mlx", "--scales", scales, *(f"--{word}" for word in requant)]
    folder = tmp_path_factory.mktemp("shown")
    with mounted(models[0].path, folder / "0", *flags) as first, mounted(models[1].path, folder / "1", *flags) as second:
        yield scales, bool(requant), list(zip(models, (first, second), strict=True))


def seen_as(ggml_type, requant):
    """How MLX sees a type; None if as plain numbers."""
    return SEEN[ggml_type] if requant else EXACT.get(ggml_type)


def sibling(name, word):
    return name.removesuffix("weight") + word


def packed(arrays, entry):
    """Weight, scales and biases, of which the last may not be there."""
    return arrays[entry.name], arrays[sibling(entry.name, "scales")], arrays.get(sibling(entry.name, "biases"))


def each(shown):
    """(entry, how MLX sees it, the arrays of its file by `mx.load`, the model) of each quantised tensor."""
    scales, requant, pairs = shown
    for written, root in pairs:
        for name, entries in written.layout.items():
            arrays = mx.load(str(root / name))
            for entry in filter(is_quantised, entries):
                yield entry, seen_as(entry.source.type, requant), arrays, written


def in_f32(scales, biases):
    """MLX computes in the dtype of scales and biases; BF16 would be rounded twice."""
    if scales.dtype == mx.uint8:
        return scales, biases
    return scales.astype(mx.float32), biases.astype(mx.float32)


def test_dequantised_by_mlx_they_are_the_numbers_of_the_gguf(shown):
    scales_name, requant, _ = shown
    pairs = {ggml_type: [] for ggml_type in TYPES}
    for entry, seen, arrays, written in each(shown):
        expected = written.numbers(entry)
        if seen is None:
            ours = arrays[entry.name]
            assert ours.dtype == SCALES[scales_name]
            assert (np.array(ours.astype(mx.float32)) == rounded(expected, scales_name)).all()
            assert sibling(entry.name, "scales") not in arrays
            pairs[entry.source.type].append((expected, expected))
            continue
        weight, scales, biases = packed(arrays, entry)
        assert weight.dtype == mx.uint32
        assert scales.dtype == (SCALES[scales_name] if seen.mode == "affine" else mx.uint8)
        assert (biases is None) == (seen.mode != "affine")
        assert biases is None or biases.dtype == scales.dtype
        ours = np.array(mx.dequantize(weight, *in_f32(scales, biases), **seen.arguments, dtype=mx.float32))
        assert ours.shape == expected.shape
        if is_exact(seen, scales_name):
            np.testing.assert_array_equal(ours, expected)
        pairs[entry.source.type].append((ours, expected))
    for ggml_type, found in pairs.items():
        assert len(found) >= 1 + 2 * EXPERTS
        ours, expected = (np.concatenate([numbers.ravel() for numbers in side]) for side in zip(*found, strict=True))
        assert error(ours, expected) <= most_error(SEEN[ggml_type], scales_name), ggml_type


def most_error(seen, scales):
    """Of the norm of the weights: 1.2 times what was measured of random numbers."""
    of_scales = {"f32": 0, "f16": 2.1e-4, "bf16": 2.1e-4 * 8}[scales]
    in_f16 = max(of_scales, seen.error * (8 if scales == "bf16" else 1))
    return 1.2 * (max(4.7e-3, in_f16) if seen.requant else in_f16)


def rounded(numbers, dtype):
    return numbers.astype(forms.DTYPES[dtype]).astype(np.float32)


@pytest.mark.parametrize("shown", [v for v in VARIANTS if "requant" in v], indirect=True)
def test_requantised_numbers_are_off_by_what_is_said(shown):
    # As shares of the norm: codes that are evenly spread, unlike those of a real model, are hit better.
    measured = {"Q6_K": 3.5e-3, "Q2_K": 2.4e-3, "IQ2_XS": 3.5e-3, "IQ2_S": 3.6e-3}
    off = {name: [] for name in REQUANTISED}
    for entry, seen, arrays, written in each(shown):
        if seen.requant:
            weight, *others = packed(arrays, entry)
            ours = mx.dequantize(weight, *in_f32(*others), **seen.arguments, dtype=mx.float32)
            off[entry.source.type].append(error(np.array(ours), written.numbers(entry)))
    for name, errors in off.items():
        assert len(errors) == 1 + 3 * EXPERTS
        assert measured[name] / 1.2 < np.mean(errors) < 1.2 * measured[name], (name, np.mean(errors))


def test_mlx_multiplies_by_packed_weights(shown):
    """With the kernel of each mode, which takes legal groups only."""
    rng = np.random.default_rng(3)
    for entry, seen, arrays, _ in each(shown):
        if seen is None:
            continue
        weight, scales, biases = packed(arrays, entry)
        scales, biases = in_f32(scales, biases)
        x = rng.normal(size=(3, entry.dims[0])).astype(np.float32)
        ours = mx.quantized_matmul(mx.array(x), weight, scales, biases, transpose=True, **seen.arguments)
        dense = np.array(mx.dequantize(weight, scales, biases, **seen.arguments, dtype=mx.float32)).astype(np.float64)
        assert error(np.array(ours), x.astype(np.float64) @ dense.T) < 1e-5, entry.source.type


@pytest.mark.parametrize("shown", [v for v in VARIANTS if v != "bf16"], indirect=True)  # in it sums are rounded, too
def test_layers_of_mlx_take_the_arrays(shown):
    scales_name, _, _ = shown
    done = set()
    for entry, seen, arrays, written in each(shown):
        if seen is None or entry.source.type in done:
            continue
        done.add(entry.source.type)
        weight, scales, biases = packed(arrays, entry)
        rows, width = reversed(entry.dims)
        weights = {"weight": weight, "scales": scales} | ({} if biases is None else {"biases": biases})
        linear = nn.QuantizedLinear(width, rows, bias=False, **seen.arguments)
        linear.load_weights(list(weights.items()), strict=True)
        x = np.random.default_rng(4).normal(size=(2, width)).astype(np.float32)
        numbers = written.numbers(entry)
        most = most_error(seen, scales_name) + 2e-3
        assert error(np.array(linear(mx.array(x))), x @ numbers.T) < most, entry.source.type
        embedding = nn.QuantizedEmbedding(rows, width, **seen.arguments)
        embedding.load_weights(list(weights.items()), strict=True)
        assert error(np.array(embedding(mx.array([2, 0])).astype(mx.float32)), numbers[[2, 0]]) < most
    assert len(done) >= len(EXACT)


# --- what is said of it -----------------------------------------------------------------------------------------------


def is_exact(seen, scales):
    """Whether the numbers are those of the GGUF in F32."""
    if seen is None:
        return None
    return not seen.requant and (seen.mode != "affine" or scales == "f32" or (scales == "f16" and seen.error == 0))


def test_headers_say_mode_bits_group_size_scales_and_whether_it_is_exact(shown):
    scales, requant, pairs = shown
    for written, root in pairs:
        for name, entries in written.layout.items():
            header, notes = read_header(root / name), said(root / name)
            assert header.metadata["odmoe.form"] == "mlx"
            assert set(notes) == {entry.name for entry in entries}
            for entry in entries:
                note = dict(notes[entry.name])
                form = note.pop("form", None)
                assert note == entry.note
                if not is_quantised(entry):
                    assert form is None
                elif (seen := seen_as(entry.source.type, requant)) is None:
                    assert form == {"dtype": NAMES[scales]}
                else:
                    words = {"scales": NAMES[scales] if seen.mode == "affine" else "U8", "exact": is_exact(seen, scales)}
                    assert form == seen.arguments | words, entry.source.type


def test_arrays_of_a_tensor_lie_side_by_side_and_every_array_is_aligned(shown):
    widths = {"U32": 4, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
    _, requant, pairs = shown
    for written, root in pairs:
        for name, entries in written.layout.items():
            header = read_header(root / name)
            at = 0
            for key, info in header.tensors.items():
                start, end = info["data_offsets"]
                assert start == at, "no holes, no overlaps, in the order of the header"
                assert (header.start + start) % widths[info["dtype"]] == 0, key
                assert end - start == np.prod(info["shape"], dtype=int) * widths[info["dtype"]]
                at = end
            assert (root / name).stat().st_size == header.start + at
            if any(map(is_quantised, entries)):
                assert header.start % 4096 == 0
            order = list(header.tensors)
            for entry in filter(is_quantised, entries):
                arrays = [entry.name]
                if seen := seen_as(entry.source.type, requant):
                    arrays.append(sibling(entry.name, "scales"))
                    arrays.extend([sibling(entry.name, "biases")] * (seen.mode == "affine"))
                where = order.index(entry.name)
                assert order[where : where + len(arrays)] == arrays


def test_tensors_that_are_not_quantised_keep_dtype_and_bytes(shown):
    for written, root in shown[2]:
        for name, entry in written.entries():
            if not is_quantised(entry):
                header = read_header(root / name)
                info = header.tensors[entry.name]
                assert (info["dtype"], info["shape"]) == (entry.dtype, entry.shape)
                start, end = info["data_offsets"]
                assert (root / name).read_bytes()[header.start :][start:end] == written.data(entry)


def test_documents_name_the_form_each_quantization_and_the_real_sizes(shown):
    scales, requant, pairs = shown
    for written, root in pairs:
        metadata = json.loads((root / "base_model/metadata.json").read_text())
        assert (metadata["form"], metadata["scales"], metadata["requant"]) == ("mlx", NAMES[scales], requant)
        expected = {}
        for _, entry in written.entries():
            if is_quantised(entry) and (seen := seen_as(entry.source.type, requant)):
                expected[entry.source.name] = {"mode": seen.mode, "bits": seen.bits, "group_size": seen.group_size}
        assert metadata["quantization"] == expected
        bases = {name.removeprefix("base_model/") for name in written.layout if name.startswith("base_model/")}
        held = {key: base for base in bases for key in read_header(root / "base_model" / base).tensors}
        assert metadata["weight_map"] == held
        registry = json.loads((root / "experts/registry.json").read_text())
        assert len(registry) == sum(name.startswith("experts/") for name in written.layout)
        for item in registry.values():
            path = root / item["path"]
            assert item["size"] == path.stat().st_size
            assert item["tensors"] == sorted(read_header(path).tensors)


@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_documents_of_numbers_name_the_form_alone(models, form, tmp_path):
    with mounted(models[0].path, tmp_path / "mnt", "--as", form) as root:
        metadata = json.loads((root / "base_model/metadata.json").read_text())
        assert metadata["form"] == form and not {"scales", "requant", "quantization"} & set(metadata)
    with mounted(models[0].path, tmp_path / "mnt") as root:
        assert "form" not in json.loads((root / "base_model/metadata.json").read_text())


# --- models of several types ------------------------------------------------------------------------------------------


def write_mixed(path):
    """As llama-quantize makes Q4_K_M: some matrices of Q6_K; biases, and rows and names that MLX cannot take packed."""
    stacks = itertools.chain(
        [tensor("blk.0.ffn_gate_exps.weight", "Q4_K", EXPERTS, 8, 256)],
        [tensor("blk.0.ffn_up_exps.weight", "Q4_K", EXPERTS, 8, 256)],
        [tensor("blk.0.ffn_down_exps.weight", "Q6_K", EXPERTS, 4, 256)],
        [plain("blk.0.ffn_down_exps.bias", "F32", EXPERTS, 4)],
        [plain("blk.0.attn_norm.weight", "F32", 256)],
        [tensor("blk.0.attn_q.weight", "Q8_0", 4, 256), tensor("blk.0.rows.weight", "Q1_0", 4, 128)],
        [tensor("blk.0.table", "Q4_K", 4, 256), tensor("blk.0.vector.weight", "Q8_0", 256)],
        [tensor("blk.0.cube.weight", "Q4_0", 2, 3, 64), tensor("token_embd.weight", "Q6_K", 10, 256)],
        [tensor("blk.0.narrow.weight", "NVFP4", 4, 64), plain("blk.0.half.weight", "F16", 3, 5)],
    )
    return forms.write(path, stacks)


def test_each_tensor_of_a_mixed_model_is_shown_as_its_type_name_and_shape_allow(tmp_path):
    written = Written(write_mixed(tmp_path / "mixed.gguf"))
    with mounted(written.path, tmp_path / "mnt", "--as", "mlx", "--scales", "bf16") as root:
        tensors = {}
        for name in written.layout:
            for key, info in read_header(root / name).tensors.items():
                tensors.setdefault(key, (info["dtype"], info["shape"]))
        for name, entry in written.entries():
            if entry.source.type == "Q4_K" and entry.name.endswith(".weight"):
                weight, scales, biases = packed(mx.load(str(root / name)), entry)
                ours = np.array(mx.dequantize(weight, *in_f32(scales, biases), group_size=32, bits=4))
                assert error(ours, written.numbers(entry)) < 8 * 6.5e-4
            elif entry.source.type in ("Q6_K", "Q4_K"):
                ours = mx.load(str(root / name))[entry.name].astype(mx.float32)
                np.testing.assert_array_equal(np.array(ours), rounded(written.numbers(entry), "bf16"))
    assert tensors == {
        "w1.weight": ("U32", [8, 32]), "w1.scales": ("BF16", [8, 8]), "w1.biases": ("BF16", [8, 8]),
        "w3.weight": ("U32", [8, 32]), "w3.scales": ("BF16", [8, 8]), "w3.biases": ("BF16", [8, 8]),
        "w2.weight": ("BF16", [4, 256]), "w2.bias": ("F32", [4]),
        "blk.0.attn_norm.weight": ("F32", [256]),
        "blk.0.attn_q.weight": ("U32", [4, 64]), "blk.0.attn_q.scales": ("BF16", [4, 8]),
        "blk.0.attn_q.biases": ("BF16", [4, 8]),
        "blk.0.rows.weight": ("U32", [4, 4]), "blk.0.rows.scales": ("BF16", [4, 1]), "blk.0.rows.biases": ("BF16", [4, 1]),
        "blk.0.table": ("BF16", [4, 256]), "blk.0.vector.weight": ("BF16", [256]),
        "blk.0.cube.weight": ("U32", [2, 3, 8]), "blk.0.cube.scales": ("BF16", [2, 3, 2]),
        "blk.0.cube.biases": ("BF16", [2, 3, 2]),
        "token_embd.weight": ("BF16", [10, 256]),
        "blk.0.narrow.weight": ("U32", [4, 8]), "blk.0.narrow.scales": ("U8", [4, 4]),
        "blk.0.half.weight": ("F16", [3, 5]),
    }  # fmt: skip
