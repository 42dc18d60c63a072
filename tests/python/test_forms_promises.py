"""What docs/SEMANTICS.md promises of forms, each on a small model of several types."""

import errno
import json
import os

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

import models
from odmoe import contents, fail, failing_disk, files_of, mounted, odmoe, promises, sparse_gguf, succeed
from reference import read_header

FORMS = [("f32",), ("f16",), ("bf16",), ("mlx",), ("mlx", "--scales", "f32", "--requant")]
NAMES = ["-".join(form) for form in FORMS]
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
KINDS = ["q4_k", "q6_k", "mxfp4", "f16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Stacks of four types, the last one of numbers, beside routers of F32."""
    folder = tmp_path_factory.mktemp("promises")
    tensors = []
    for layer, kind in enumerate(KINDS):
        toy = folder / f"{kind}.gguf"
        succeed("toy", toy, "--type", kind, "--dim", 256, "--ffn-dim", 512, "--vocab", 64, "--layers", len(KINDS))
        for tensor in gguf.GGUFReader(toy).tensors:
            if tensor.name.startswith(f"blk.{layer}."):
                tensors.append((tensor.name, tensor.data, tensor.tensor_type))
    return models.write(folder / "mixed.gguf", tensors, models.counts(len(KINDS), 4))[0]


@pytest.fixture(scope="module", params=FORMS, ids=NAMES)
def shown(request, model, tmp_path_factory):
    """The form, and the model mounted in it."""
    with mounted(model, tmp_path_factory.mktemp("mounts") / "mnt", "--as", *request.param) as root:
        yield request.param, root


def tensors_of(root):
    """(path, what the header says of a tensor, its arrays by safetensors, by their whole names) of every tensor."""
    for name, path in files_of(root).items():
        if not name.endswith(".safetensors"):
            continue
        said = json.loads(read_header(path).metadata["odmoe.tensors"])
        with safe_open(path, framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, note in said.items():
            stem = key.removesuffix(".weight")
            own = [key, f"{stem}.scales", f"{stem}.biases"]
            yield name, key, note, {own_key: arrays.pop(own_key) for own_key in own if own_key in arrays}
        assert not arrays, "arrays that belong to no tensor"


def by_gguf_py(model):
    """Every tensor as gguf-py reads it: its numbers, and its bytes."""
    found = {}
    for tensor in gguf.GGUFReader(model).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = numbers, tensor.data, int(tensor.data_offset)
    return found


def slice_of(whole, note):
    """The part of a tensor of the model that a file has, by where it begins."""
    numbers, stored, offset = whole[note["gguf_name"]]
    shape = tuple(note["shape"])
    if numbers.shape == shape:
        return numbers, stored
    number = (note["gguf_offset"] - offset) // (stored.nbytes // len(stored))
    assert numbers[number].shape == shape
    return numbers[number], stored[number]


def is_quantised(note):
    return note["ggml_type"] not in ("F32", "F16")


@promises("In every form, each run of the model's blocks feeds exactly one tensor: one, two or three arrays of it.")
def test_each_byte_of_the_model_feeds_one_tensor(shown, model):
    runs = []
    for _, _, note, arrays in tensors_of(shown[1]):
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[note["ggml_type"]]]
        runs.append((note["gguf_offset"], int(np.prod(note["shape"])) // block * size))
        mode = note.get("form", {}).get("mode")
        assert len(arrays) == {"affine": 3, "mxfp4": 2, None: 1}[mode]
    runs.sort()
    tensors = sorted((int(t.data_offset), int(t.n_bytes)) for t in gguf.GGUFReader(model).tensors)
    assert sum(size for _, size in runs) == sum(size for _, size in tensors)
    assert all(start + size <= following for (start, size), (following, _) in zip(runs, runs[1:]))


@promises("Tensors of `base_model/` and `experts/` that are not quantised keep their dtype and their bytes in every form.")
def test_tensors_of_numbers_are_those_of_the_model(shown, model):
    whole, seen = by_gguf_py(model), set()
    for _, key, note, arrays in tensors_of(shown[1]):
        if not is_quantised(note):
            _, stored = slice_of(whole, note)
            assert "form" not in note and arrays[key].dtype == stored.dtype and (arrays[key] == stored).all()
            seen.add(note["ggml_type"])
    assert seen == {"F32", "F16"}


@promises(
    "`f32` shows the numbers of gguf-py, bit for bit; `f16` and `bf16` show these rounded to the nearest, ties to even."
)
@pytest.mark.parametrize("form", ["f32", "f16", "bf16"])
def test_numbers_are_those_of_gguf_py(form, model, tmp_path):
    succeed("materialize", model, tmp_path / form, "--as", form)
    whole = by_gguf_py(model)
    for _, key, note, arrays in tensors_of(tmp_path / form):
        if is_quantised(note):
            numbers, _ = slice_of(whole, note)
            dtype = DTYPES[note["form"]["dtype"]]
            assert note["form"]["dtype"] == form.upper()
            assert arrays[key].tobytes() == numbers.astype(dtype).tobytes()


@promises(
    "`mlx` shows the model's own numbers but for the rounding of its scales, and each header says whether they are exact; "
    "only `--requant` makes others."
)
@pytest.mark.parametrize(("scales", "rounding"), [("f32", 0), ("f16", 2e-3)])
@pytest.mark.parametrize("requant", [False, True])
def test_mlx_sees_the_numbers_of_gguf_py(scales, rounding, requant, model, tmp_path):
    flags = ["--scales", scales, *(["--requant"] if requant else [])]
    succeed("materialize", model, tmp_path / "out", "--as", "mlx", *flags)
    whole = by_gguf_py(model)
    for _, key, note, arrays in tensors_of(tmp_path / "out"):
        if not is_quantised(note):
            continue
        numbers, _ = slice_of(whole, note)
        form = note["form"]
        if note["ggml_type"] == "Q6_K" and not requant:
            assert form == {"dtype": scales.upper()}
            assert arrays[key].tobytes() == numbers.astype(DTYPES[scales.upper()]).tobytes()
            continue
        weight, *others = (mx.array(array) for array in arrays.values())
        others = [array.astype(mx.float32) if form["mode"] == "affine" else array for array in others]
        how = {name: form[name] for name in ("mode", "bits", "group_size")}
        ours = np.array(mx.dequantize(weight, *others, **how).astype(mx.float32))
        error = np.linalg.norm(ours - numbers) / np.linalg.norm(numbers)
        assert form["exact"] == (error == 0)
        assert error == 0 or error <= (5e-3 if note["ggml_type"] == "Q6_K" else rounding)


@promises(
    "The size, inode number and times of a file in a form do not depend on what is read, and any range of it is that range "
    "of the whole."
)
def test_sizes_are_known_before_and_ranges_are_slices(shown):
    def status(path):
        s = path.stat()
        return s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns

    before = {name: status(path) for name, path in files_of(shown[1]).items()}
    random = np.random.default_rng(3)
    for name, path in files_of(shown[1]).items():
        with open(path, "rb") as file:
            whole = file.read()
            assert len(whole) == before[name][0]
            for start in random.integers(0, len(whole), 20):
                length = int(random.integers(1, 10_000))
                assert os.pread(file.fileno(), length, int(start)) == whole[start : start + length]
    assert {name: status(path) for name, path in files_of(shown[1]).items()} == before


@promises("`materialize` writes the bytes that a mount shows in the same form, and `verify` finds the form in the tree.")
def test_a_materialized_form_is_the_mounted_one(shown, model, tmp_path):
    form, root = shown
    succeed("materialize", model, tmp_path / "out", "--as", *form)
    assert contents(tmp_path / "out") == contents(root)
    for tree in (tmp_path / "out", root):
        assert json.loads(succeed("verify", model, tree, "--json"))["identical"] is True
    damaged = tmp_path / "out/experts/layer_01_expert_002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(content)
    report = json.loads(odmoe("verify", model, tmp_path / "out", "--json").stdout)
    assert [(d["path"], d["kind"]) for d in report["differences"]] == [(f"experts/{damaged.name}", "payload")]


@promises("A type whose numbers are not known is an error that names it, in every form but `raw`.")
@pytest.mark.parametrize("command", ["mount", "materialize", "inspect"])
def test_types_that_nobody_here_knows_are_refused_by_name(command, tmp_path):
    table = tmp_path / "table.json"
    stacks = [[f"blk.0.ffn_{name}_exps.weight", [256, 256, 2], kind] for name, kind in (("up", "IQ4_KS"), ("down", "IQ5_K"))]
    table.write_text(json.dumps({"kv": {"general.architecture": "moe"}, "tensors": stacks}))
    model = sparse_gguf(table, tmp_path / "model.gguf")[0]
    (tmp_path / "mnt").mkdir()
    directory = [] if command == "inspect" else [tmp_path / "mnt"]
    for form in FORMS:
        said = fail(command, model, *directory, "--as", *form, naming=["IQ4_KS (1 tensor)", "IQ5_K (1 tensor)"])
        assert "the numbers of these types are not known" in said and "--as raw" in said
    assert os.listdir(tmp_path / "mnt") == []
    succeed("inspect", model, "--as", "raw")


@promises("A part that is truncated, changes or cannot be read is EIO in computed files, too.")
@pytest.mark.parametrize("change", ["truncated", "written to"])
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_a_changed_model_is_an_error_in_computed_files(form, change, model, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    with mounted(copy, tmp_path / "mnt", "--as", *form) as root:
        (root / "experts/layer_00_expert_000.safetensors").read_bytes()
        if change == "truncated":
            os.truncate(copy, copy.stat().st_size // 2)
        else:
            with copy.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\0")
        # Its numbers are from the end of the part, and were not read before.
        with pytest.raises(OSError) as error:
            (root / "experts/layer_02_expert_003.safetensors").read_bytes()
        assert error.value.errno == errno.EIO


@promises("A part that is truncated, changes or cannot be read is EIO in computed files, too.")
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_an_error_of_the_disk_is_one_of_the_arrays_that_it_feeds(form, model, tmp_path):
    tensor = next(t for t in gguf.GGUFReader(model).tensors if t.name == "blk.1.ffn_up_exps.weight")
    start, size = int(tensor.data_offset), int(tensor.n_bytes) // 4
    (tmp_path / "store").mkdir()
    copy = tmp_path / "store/copy.gguf"
    copy.write_bytes(model.read_bytes())
    file = "experts/layer_01_expert_{:03}.safetensors"
    with failing_disk(copy.parent, tmp_path) as disk, mounted(disk.at / copy.name, tmp_path / "mnt", "--as", *form) as root:
        disk.fails(("eio", start + 2 * size, start + 3 * size))
        with pytest.raises(OSError) as error:
            (root / file.format(2)).read_bytes()
        assert error.value.errno == errno.EIO
        others = [(root / file.format(number)).read_bytes() for number in (0, 1, 3)]
        disk.fails()
        whole = (root / file.format(2)).read_bytes()
    with mounted(model, tmp_path / "sound", "--as", *form) as root:
        assert [(root / file.format(number)).read_bytes() for number in (0, 1, 3, 2)] == [*others, whole]
