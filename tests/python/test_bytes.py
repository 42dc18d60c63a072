"""The numbers of the model: what `safe_open` and MLX read through the mount is what gguf-py reads from the model."""

import functools
import json

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from odmoe import files_of, promises
from reference import PLAIN


@pytest.fixture
def by_gguf_py(built):
    """Every tensor of the model as gguf-py reads it, by name."""
    return {t.name: t for path in built.paths for t in gguf.GGUFReader(path).tensors}


def read_all(shown):
    """(file, name, array, what `odmoe.tensors` says of it, expert number or None) of every tensor in the mount."""
    for path in files_of(shown.root).values():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                notes, expert = json.loads(file.metadata()["odmoe.tensors"]), file.metadata().get("expert")
                for key in file.keys():
                    yield path.name, key, file.get_tensor(key), notes[key], expert and int(expert)


def piece(whole, ours, key, note, expert):
    """What one file should hold of a tensor that gguf-py has read whole."""
    if expert is None:
        return whole
    if whole.ndim > ours.ndim:  # a stack of experts
        whole = whole[expert]
    if "_gate_up_" in note["gguf_name"]:  # gate rows first, then up rows
        whole = np.split(whole, 2)[("w1", "w3").index(key[:2])]
    return whole


@promises("Every file of `base_model/` and `experts/` is an ordinary safetensors file, a JSON document, or a GGUF without tensors.")
def test_safe_open_gives_the_bytes_that_gguf_py_gives(built, by_gguf_py):
    seen = dict.fromkeys(by_gguf_py, 0)
    for file, key, ours, note, expert in read_all(built):
        theirs = by_gguf_py[note["gguf_name"]].data
        if note["ggml_type"] == "BF16":  # gguf-py leaves it as bytes
            theirs = theirs.view(ml_dtypes.bfloat16)
        theirs = piece(theirs, ours, key, note, expert)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), f"{file}: {key}"
        assert ours.tobytes() == theirs.tobytes(), f"{file}: {key}"
        seen[note["gguf_name"]] += ours.nbytes
    assert seen == {t.name: t.n_bytes for t in by_gguf_py.values()}


def test_quantised_tensors_dequantise_to_the_model_s_numbers_by_their_metadata_alone(built, by_gguf_py):
    @functools.cache
    def whole(name):
        return gguf.quants.dequantize(by_gguf_py[name].data, by_gguf_py[name].tensor_type)

    checked = set()
    for file, key, ours, note, expert in read_all(built):
        kind = note["ggml_type"]
        if kind in PLAIN or kind == "Q1_0":  # gguf-py can write Q1_0 but not compute it
            continue
        numbers = gguf.quants.dequantize(ours, gguf.GGMLQuantizationType[kind])
        assert list(numbers.shape) == note["shape"], f"{file}: {key}"
        assert np.isfinite(numbers).all(), f"{file}: {key}"
        np.testing.assert_array_equal(
            numbers, piece(whole(note["gguf_name"]), ours, key, note, expert), f"{file}: {key}"
        )
        checked.add(kind)
    assert checked == {t.tensor_type.name for t in by_gguf_py.values()} - PLAIN.keys() - {"Q1_0"}


def test_mlx_loads_every_expert(shown):
    for name, entries in shown.expert_files().items():
        if any(e.dtype == "F64" for e in entries):  # MLX refuses a whole file for one
            continue
        loaded = mx.load(str(shown.root / name))
        assert loaded.keys() == {e.name for e in entries}
        for e in entries:
            array = loaded[e.name]
            assert list(array.shape) == e.shape, f"{name}: {e.name}"
            raw = np.array(array.flatten().view(mx.uint8)).tobytes()
            assert raw == shown.bytes[e.part][e.offset : e.offset + e.nbytes], f"{name}: {e.name}"
