"""The tensor tables of real models as files of full size, their payload a hole: a 578 GiB model takes a few MB of disk."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import reference
from odmoe import DATA, DOCUMENTS, daemon_of, mounted, sparse_gguf
from reference import Shown

EXPECTED = json.loads((DATA / "expected_layout.json").read_text())
FEW = 9  # parts, as published models have


def scan(root):
    """Name -> (inode number, size) of everything in a tree, and its parent, without opening anything."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            s = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), root)] = (s.st_ino, s.st_size)
    return found


def a_sample(layout):
    """The base files, and experts from the first layer to the last."""
    experts = [name for name in layout if name.startswith("experts/")]
    return [name for name in layout if name.startswith("base_model/")] + experts[:: max(1, len(experts) // 40)]


def check(shown, expected):
    tree = scan(shown.root)
    sizes = {name: size for name, (_, size) in tree.items() if name.endswith(".safetensors")}
    assert set(sizes) == set(shown.layout)
    assert sum(name.startswith("experts/") for name in sizes) == expected["expert_files"]
    payloads = {name: sum(e.nbytes for e in entries) for name, entries in shown.layout.items()}
    assert sum(payloads.values()) == expected["bytes"]
    assert sorted({payloads[name] for name in shown.expert_files()}) == expected["expert_payload_sizes"]

    metadata = json.loads((shown.root / "base_model/metadata.json").read_text())
    registry = json.loads((shown.root / "experts/registry.json").read_text())
    assert metadata["components"] == expected["base_files_tensor_counts"]
    assert metadata["moe_layers"] == expected["moe_layers"]
    assert {entry["path"]: entry["size"] for entry in registry.values()} == {n: sizes[n] for n in shown.expert_files()}
    assert sorted({t for entry in registry.values() for t in entry["tensors"]}) == expected["expert_tensors"]

    for name in a_sample(shown.layout):
        entries, header = shown.layout[name], reference.read_header(shown.root / name)
        assert sizes[name] == header.start + payloads[name], name
        assert list(header.tensors) == [e.name for e in entries], name
        assert json.loads(header.metadata["odmoe.tensors"]) == {e.name: e.note for e in entries}, name
        unpadded = 8 + len(header.text.rstrip(" ").encode())
        assert header.start == reference.best_start(entries, unpadded), name
        with safe_open(shown.root / name, framework="np") as file:
            assert set(file.keys()) == {e.name for e in entries}
    return tree


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_of_full_size_has_the_right_files_whole_and_in_parts_and_under_any_name(name, tmp_path):
    expected = EXPECTED[name]
    (whole,) = sparse_gguf(name, tmp_path / "model.gguf")
    with mounted(whole, tmp_path / "mnt") as root:
        shown = Shown([whole], root)
        tree = check(shown, expected)
        renamed = tmp_path / "other name.bin"
        os.link(whole, renamed)
        with mounted(renamed, tmp_path / "again") as again:
            assert scan(again) == tree
            for file in DOCUMENTS:
                assert (again / file).read_bytes() == (root / file).read_bytes()
            for file in a_sample(shown.layout):
                assert reference.read_header(again / file) == reference.read_header(root / file)
    parts = sparse_gguf(name, tmp_path / "parts.gguf", "--splits", FEW)
    assert len(parts) == FEW
    with mounted(parts[3], tmp_path / "mnt") as root:
        check(Shown(parts, root), expected)


@pytest.mark.parametrize("name", [n for n in EXPECTED if re.match(r"kimi|deepseek|glm|qwen.*-a3b|mixtral", n)])
def test_every_expert_of_common_models_is_page_congruent_throughout(name, tmp_path):
    (model,) = sparse_gguf(name, tmp_path / "model.gguf")
    with mounted(model, tmp_path / "mnt") as root:
        shown = Shown([model], root)
        for path, entries in list(shown.expert_files().items())[::97]:
            at = reference.read_header(root / path).start
            for e in entries:
                assert (at - e.offset) % 4096 == 0, f"{path}: {e.name}"
                at += e.nbytes


def words(part, offset, length):
    """The payload that `sparse_gguf --fill-words` writes: splitmix64 of the part and the place of each aligned word."""
    first = offset // 8
    with np.errstate(over="ignore"):
        x = np.arange(first, -(-(offset + length) // 8), dtype=np.uint64) * np.uint64(8)
        x = (x | np.uint64(part << 48)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x.astype("<u8").tobytes()[offset - first * 8 :][:length]


@pytest.mark.parametrize(
    "flags", [(), ("--splits", 9), ("--first-empty", "--splits", 4), ("--one-per-part",), ("--alignment", 64)], ids=str
)
def test_every_byte_of_the_torture_model_is_the_one_its_place_says(flags, tmp_path):
    paths = sparse_gguf("torture-small", tmp_path / "t.gguf", "--fill-words", *flags)
    with mounted(paths[0], tmp_path / "mnt") as root:
        for path in root.rglob("*.safetensors"):
            header, data = reference.read_header(path), path.read_bytes()
            for name, note in json.loads(header.metadata["odmoe.tensors"]).items():
                first, end = header.tensors[name]["data_offsets"]
                ours = data[header.start + first : header.start + end]
                assert ours == words(note["gguf_part"], note["gguf_offset"], end - first), f"{path.name}: {name}"


def test_kimi_k2_5_opens_expert_by_expert_in_little_memory(tmp_path):
    paths = sparse_gguf("kimi-k2.5-q4_k_m", tmp_path / "kimi.gguf", "--splits", FEW, "--tokenizer")
    with mounted(paths[0], tmp_path / "mnt") as root:
        names = sorted(os.listdir(root / "experts"))
        assert len(names) == 23_041
        assert names.pop() == "registry.json"
        for name in names:
            with safe_open(root / "experts" / name, framework="np") as file:
                assert set(file.keys()) == {"w1.weight", "w2.weight", "w3.weight"}
        for document in DOCUMENTS:
            (root / document).read_bytes()
        status = Path(f"/proc/{daemon_of(root)}/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
        assert peak < 48 * 1024, f"the daemon's memory peaked at {peak} KiB"
