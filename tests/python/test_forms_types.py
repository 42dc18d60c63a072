"""`--as f32`, `f16` and `bf16`: every type's numbers, read through a mount, are those of gguf-py to the bit."""

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import forms
from blocks import DTYPES, OF_GGUF_PY, SIZES, assert_same_numbers, edge_blocks, random_blocks
from forms import EXPERTS, Written, is_quantised, loaded, plain, said, shaped
from odmoe import mounted
from reference import read_header


@pytest.fixture(autouse=True)
def numbers_that_are_none():
    """Blocks with infinite scales make numpy warn."""
    with np.errstate(all="ignore"):
        yield


def edges(ggml_type, most=3000):
    """Some of all edge blocks, as the rows of a matrix."""
    blocks = edge_blocks(ggml_type)
    per_row = 512 // SIZES[ggml_type][0]
    blocks = blocks[:: -(-len(blocks) // most)]
    rows = len(blocks) // per_row
    return shaped(ggml_type, blocks[: rows * per_row], rows, 512)


def write_typed(path):
    """A layer for each type: edge blocks in the base, random ones in the experts."""
    tensors = [plain("token_embd.weight", "F16", 10, 512), plain("output_norm.weight", "F32", 512)]
    for layer, ggml_type in enumerate(OF_GGUF_PY):
        kind = GGMLQuantizationType[ggml_type]
        tensors.append((f"blk.{layer}.attn_q.weight", edges(ggml_type), kind))
        tensors.append(plain(f"blk.{layer}.ffn_gate_inp.weight", "F32", EXPERTS, 512))
        tensors.extend(forms.experts(layer, ggml_type, make=random_blocks))
    return forms.write(path, tensors, len(OF_GGUF_PY))


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    return Written(write_typed(tmp_path_factory.mktemp("typed") / "typed.gguf"))


def check(written, root, form):
    """Every tensor of the tree; returns the types that were found."""
    found = set()
    for name, entries in written.layout.items():
        arrays = loaded(root / name)
        assert set(arrays) == {entry.name for entry in entries}
        of_mlx = mx.load(str(root / name)) if form == "bf16" else {}
        for entry in entries:
            ours = arrays[entry.name]
            if not is_quantised(entry):
                assert ours.tobytes() == written.data(entry), entry.name
                continue
            theirs = written.numbers(entry).astype(DTYPES[form])
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            blocks = written.blocks(entry)
            assert_same_numbers(entry.source.type, ours.ravel(), theirs.ravel(), blocks)
            if of_mlx:
                seen = np.array(of_mlx[entry.name].view(mx.uint16)).view(ml_dtypes.bfloat16)
                assert seen.shape == theirs.shape and seen.tobytes() == ours.tobytes()
            found.add(entry.source.type)
    return found


@pytest.mark.parametrize("form", DTYPES)
def test_numbers_of_every_type_are_those_of_gguf_py(typed, tmp_path, form):
    with mounted(typed.path, tmp_path / "mnt", "--as", form) as root:
        assert check(typed, root, form) == set(OF_GGUF_PY)


@pytest.mark.parametrize("form", DTYPES)
def test_headers_of_numbers_say_what_was_done(typed, tmp_path, form):
    with mounted(typed.path, tmp_path / "mnt", "--as", form) as root:
        for name, entries in typed.layout.items():
            header, notes = read_header(root / name), said(root / name)
            assert header.metadata["odmoe.form"] == form
            # As the entries of raw trees, and one word more.
            expected = {entry.name: entry.note for entry in entries}
            for entry in filter(is_quantised, entries):
                expected[entry.name] = entry.note | {"form": {"dtype": form.upper()}}
            assert notes == expected
            dtypes = {entry.name: form.upper() if is_quantised(entry) else entry.dtype for entry in entries}
            assert {key: info["dtype"] for key, info in header.tensors.items()} == dtypes
            if any(map(is_quantised, entries)):
                assert header.start % 4096 == 0


# Blocks by the structs of ggml, and numbers written by hand: a scale of 1.5 or -0.25, then codes.
GOLDEN = {
    # Bit k of byte j is the sign of weight 8j + k: set is plus.
    "Q1_0": (
        bytes.fromhex("003e" + "01ff00aa" + "00" * 12),
        [1.5] + [-1.5] * 7 + [1.5] * 8 + [-1.5] * 8 + [-1.5, 1.5] * 4 + [-1.5] * 96,
    ),
    # Bits 2k and 2k + 1 of byte j are weight 4j + k, plus 1.
    "Q2_0": (
        bytes.fromhex("00b4" + "e4001b" + "55" * 13),
        [0.25, -0.0, -0.25, -0.5] + [0.25] * 4 + [-0.5, -0.25, -0.0, 0.25] + [-0.0] * 52,
    ),
}


@pytest.mark.parametrize("ggml_type", GOLDEN)
@pytest.mark.parametrize("form", DTYPES)
def test_numbers_of_types_that_gguf_py_cannot_decode_are_these(ggml_type, form, tmp_path):
    block, numbers = GOLDEN[ggml_type]
    blocks = np.tile(np.frombuffer(block, np.uint8), (12, 1))
    rows = 12 * len(numbers) // 128
    model = forms.write_table(tmp_path / "m.gguf", [("blk.0.ffn_up_exps.weight", blocks, ggml_type, (3, rows // 3, 128))])
    with mounted(model, tmp_path / "mnt", "--as", form) as root:
        for expert in range(3):
            (ours,) = loaded(root / f"experts/layer_00_expert_{expert:03}.safetensors").values()
            expected = np.array(numbers * 4, DTYPES[form]).reshape(-1, 128)
            assert ours.dtype == expected.dtype and ours.shape == expected.shape
            assert ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize("form", DTYPES)
def test_random_and_edge_blocks_of_those_types_are_decoded_by_their_structs(form, tmp_path):
    tensors = []
    for ggml_type in GOLDEN:
        rows = edges(ggml_type)
        tensors.append((f"blk.0.{ggml_type.lower()}.weight", rows, ggml_type, (len(rows), 512)))
        random = random_blocks(ggml_type, 3 * 8 * 512 // SIZES[ggml_type][0])
        slot = {"Q1_0": "gate", "Q2_0": "down"}[ggml_type]
        tensors.append((f"blk.0.ffn_{slot}_exps.weight", random, ggml_type, (3, 8, 512)))
    written = Written(forms.write_table(tmp_path / "m.gguf", tensors))
    with mounted(written.path, tmp_path / "mnt", "--as", form) as root:
        assert check(written, root, form) == set(GOLDEN)
