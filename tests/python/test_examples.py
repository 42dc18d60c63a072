"""The programs of examples/, each run against a mount; and readers as the reference project's."""

import json
import os
import shutil
import subprocess
import sys

import gguf
import mlx.core as mx
import numpy as np
import pytest

from odmoe import REPO, mounted, run, succeed

EXAMPLES = REPO / "examples"
TYPES = ["f32", "f16", "bf16", "q4_k", "q8_0", "mxfp4"]


@pytest.fixture(scope="module", params=TYPES)
def shown(request, tmp_path_factory):
    """A toy model of one type, mounted."""
    folder = tmp_path_factory.mktemp("examples")
    model = folder / "toy.gguf"
    succeed("toy", model, "--type", request.param, "--dim", 256, "--ffn-dim", 512, "--vocab", 300)
    with mounted(model, folder / "mnt") as root:
        yield model, root


def example(name, *arguments):
    done = run(sys.executable, EXAMPLES / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def norm(said):
    return float(said.splitlines()[-1].removeprefix("norm "))


def expected(model, layer, expert):
    """The same from the GGUF itself."""
    tensors = {t.name: t for t in gguf.GGUFReader(model).tensors}

    def matrix(word):
        tensor = tensors[f"blk.{layer}.ffn_{word}_exps.weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)[expert].astype(np.float64)

    x = np.random.default_rng(0).standard_normal(256, dtype=np.float32).astype(np.float64)
    gate = matrix("gate") @ x
    return np.linalg.norm(matrix("down") @ (gate / (1 + np.exp(-gate)) * (matrix("up") @ x)))


def test_numpy_and_mlx_compute_what_the_gguf_says(shown):
    model, root = shown
    for name in ("numpy_expert.py", "mlx_expert.py"):
        said = example(name, root, 1, 2)
        assert [line.split()[0] for line in sorted(said.splitlines()[:-1])] == ["w1.weight", "w2.weight", "w3.weight"]
        assert norm(said) == pytest.approx(expected(model, 1, 2), rel=1e-4)


def test_pytorch_computes_what_the_gguf_says(shown):
    pytest.importorskip("torch", reason="PyTorch is only installed for the long form")
    model, root = shown
    assert norm(example("pytorch_expert.py", root, 0, 3)) == pytest.approx(expected(model, 0, 3), rel=1e-4)


def test_candle_reads_experts(times, shown):
    if times(0, long=1) == 0:
        pytest.skip("candle is only built in the long form")
    model, root = shown
    if model.stat().st_size < 6 << 20:
        pytest.skip("for types that are numbers")
    target = REPO / "target/candle"
    command = ["cargo", "run", "--quiet", "--release", "--locked", "--", root, "1", "2"]
    done = subprocess.run(
        command, cwd=EXAMPLES / "candle", env=os.environ | {"CARGO_TARGET_DIR": str(target)}, capture_output=True, text=True, check=False
    )
    if "is GGML blocks" not in done.stderr:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("weight") == 3 and float(done.stdout.split()[-1]) > 0


def test_the_expert_store_gets_the_same_numbers_as_the_gguf(shown):
    model, root = shown
    said = example("mlx_expert_store.py", root, "--check", model, "--capacity", 3)
    assert said.splitlines()[-1] == "the same as from the GGUF"
    assert "misses" in said


def test_the_store_keeps_what_was_used_last_and_no_more(shown, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from mlx_expert_store import ExpertStore

    store = ExpertStore(shown[1], capacity=2)
    store.prefetch([(0, 0), (0, 1)])
    for key in [(0, 0), (0, 1), (0, 0), (1, 2), (0, 0), (0, 1)]:
        store.get(*key)
    assert (store.hits, store.misses) == (2, 4)


def test_the_expert_store_finds_a_wrong_weight(shown, tmp_path):
    """The check that holds the others."""
    model, root = shown
    damaged = shutil.copy(model, tmp_path / "damaged.gguf")
    tensor = next(t for t in gguf.GGUFReader(damaged).tensors if t.name == "blk.0.ffn_down_exps.weight")
    with open(damaged, "r+b") as file:
        for offset in range(int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes), 4001):
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
    done = run(sys.executable, EXAMPLES / "mlx_expert_store.py", root, "--check", damaged)
    assert done.returncode != 0 and "of layer 0" in done.stderr


def test_readers_as_the_reference_project_has_them_work(shown):
    """An index of all experts by name, one expert at a time by `mx.load`, base weights by component."""
    model, root = shown
    index = json.loads((root / "experts/registry.json").read_text())
    assert len(index) == 8
    for name, entry in index.items():
        assert name == f"layer_{entry['layer']:02d}_expert_{entry['expert_id']:03d}"
        assert (root / entry["path"]).stat().st_size == entry["size"]
        weights = mx.load(str(root / entry["path"]))
        assert sorted(weights) == entry["tensors"]
        # Its runtime multiplies by the transposed matrix.
        if weights["w1.weight"].dtype != mx.uint8:
            assert (mx.ones((1, 256), weights["w1.weight"].dtype) @ weights["w1.weight"].T).shape == (1, 512)
    metadata = json.loads((root / "base_model/metadata.json").read_text())
    assert metadata["extracted"] is True
    for component, count in metadata["components"].items():
        file = root / f"base_model/{component}.safetensors"
        assert file.exists() == (count > 0)
        assert len(mx.load(str(file))) == count
