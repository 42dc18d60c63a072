"""The programs of examples/, each run against a mount; and readers as the reference project's."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

import gguf
import mlx.core as mx
import numpy as np
import pytest

import models
from odmoe import REPO, mounted, run, succeed

EXAMPLES = REPO / "examples"
DIM, FFN = 256, 512
TYPES = ["f32", "f16", "bf16", "q4_k", "q8_0", "mxfp4", "nvfp4", "q3_k", "q6_k"]
# For what does not depend on the type.
OF_ONE_TYPE = pytest.mark.parametrize("shown", ["q4_k"], indirect=True)
# How far F16 scales, BF16 numbers, and candle's vectors of 8 bits may lead off.
CLOSE, BF16, CANDLE = 2e-3, 2e-2, 3e-2


@pytest.fixture(scope="module", params=TYPES)
def shown(request, tmp_path_factory):
    """A toy model of one type, mounted in a form by each name that is given."""
    folder = tmp_path_factory.mktemp("examples")
    model = folder / "toy.gguf"
    succeed("toy", model, "--type", request.param, "--dim", DIM, "--ffn-dim", FFN, "--vocab", 300)
    with ExitStack() as mounts:
        roots = {}

        def root(*form):
            if form not in roots:
                roots[form] = mounts.enter_context(mounted(model, folder / "-".join(("mnt", *form)), "--as", *form))
            return roots[form]

        yield model, root


def example(name, *arguments):
    done = run(sys.executable, EXAMPLES / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def norm(said):
    *matrices, last = said.splitlines()
    names = sorted(line.split()[0] for line in matrices)
    assert [name for name in names if name.endswith(".weight")] == ["w1.weight", "w2.weight", "w3.weight"]
    assert all(name.endswith((".weight", ".scale", ".bias")) for name in names)
    return float(last.removeprefix("norm "))


class Gguf:
    """The same from the GGUF itself, in F64."""

    def __init__(self, path):
        self.tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def numbers(self, name):
        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def expert(self, layer, expert, x):
        def linear(word, x):
            stack = f"blk.{layer}.ffn_{word}_exps"
            y = self.numbers(f"{stack}.weight")[expert] @ x
            if f"{stack}.scale" in self.tensors:
                y = y * self.numbers(f"{stack}.scale")[expert]
            return y + (self.numbers(f"{stack}.bias")[expert] if f"{stack}.bias" in self.tensors else 0)

        hidden = linear("gate", x)
        return linear("down", hidden / (1 + np.exp(-hidden)) * linear("up", x))

    def route(self, layer, x, used):
        scores = self.numbers(f"blk.{layer}.ffn_gate_inp.weight") @ x
        chosen = np.argsort(-scores)[:used]
        shares = np.exp(scores[chosen] - scores.max())
        return chosen, shares / shares.sum()

    def forward(self, layers, x, used=2):
        for layer in layers:
            x = x + sum(share * self.expert(layer, e, x) for e, share in zip(*self.route(layer, x, used)))
            x = x / np.sqrt(np.mean(x**2) + 1e-6)
        return x


def some_input():
    return np.sin(np.arange(DIM, dtype=np.float64))


def expected(model, layer, expert):
    return np.linalg.norm(Gguf(model).expert(layer, expert, some_input()))


def test_numpy_and_mlx_compute_what_the_gguf_says(shown):
    model, root = shown
    right = expected(model, 1, 2)
    assert norm(example("numpy_expert.py", root("raw"), 1, 2)) == pytest.approx(right, rel=1e-4)
    assert norm(example("numpy_expert.py", root("bf16"), 1, 2)) == pytest.approx(right, rel=BF16)
    assert norm(example("mlx_expert.py", root("mlx"), 1, 2)) == pytest.approx(right, rel=CLOSE)


@pytest.fixture
def scaled(tmp_path):
    """A toy of NVFP4 with a scale beside each matrix, as such models have, and a bias; products exceed F16 without it."""
    succeed("toy", tmp_path / "toy.gguf", "--type", "nvfp4", "--dim", DIM, "--ffn-dim", FFN, "--vocab", 300)
    tensors = [(t.name, t.data.copy(), t.tensor_type) for t in gguf.GGUFReader(tmp_path / "toy.gguf").tensors]
    float32 = gguf.GGMLQuantizationType.F32
    for name, data, _ in list(tensors):
        if "_exps" in name:
            data.reshape(-1, 36)[:, :4] = 0x7E  # the scales of each block: the largest
            scales = np.linspace(1, 3, len(data), dtype=np.float32) / 4096
            biases = np.cos(np.arange(len(data) * data.shape[1], dtype=np.float32)).reshape(len(data), -1)
            tensors.append((name.replace("weight", "scale"), scales, float32))
            tensors.append((name.replace("weight", "bias"), biases, float32))
    return models.write(tmp_path / "scaled.gguf", tensors, models.counts(2, 4))[0]


def test_scales_and_biases_beside_a_matrix_count(scaled, tmp_path, example_store):
    right = pytest.approx(expected(scaled, 1, 2), rel=CLOSE)
    with mounted(scaled, tmp_path / "mlx", "--as", "mlx") as root:
        assert norm(example("mlx_expert.py", root, 1, 2)) == right
        mount = example_store.Mount(root)
        assert distance(mount, example_store.ExpertStore(mount, 1), example_store, scaled) < CLOSE
        import mlx_generate

        expert = mlx_generate.Expert(root / "experts/layer_01_expert_002.safetensors")
        x = mx.array(some_input())[None].astype(mx.float16)
        gate, up = expert.multiply("w1", x), expert.multiply("w3", x)
        y = expert.multiply("w2", gate * mx.sigmoid(gate) * up)
        assert y.dtype == mx.float16 and np.linalg.norm(np.array(y.astype(mx.float32))) == right
    with mounted(scaled, tmp_path / "raw") as root:
        assert norm(example("numpy_expert.py", root, 1, 2)) == right


def test_pytorch_computes_what_the_gguf_says(shown):
    pytest.importorskip("torch", reason="PyTorch is only installed for the long form")
    model, root = shown
    assert norm(example("pytorch_expert.py", root("bf16"), 0, 3)) == pytest.approx(expected(model, 0, 3), rel=BF16)


def test_candle_multiplies_by_blocks_as_they_lie(times, shown):
    if times(0, long=1) == 0:
        pytest.skip("candle is only built in the long form")
    model, root = shown
    environment = os.environ | {"CARGO_TARGET_DIR": str(REPO / "target/candle")}
    command = ["cargo", "run", "--quiet", "--release", "--locked", "--"]

    def candle(form):
        arguments = [*command, root(form), "1", "2"]
        return subprocess.run(arguments, cwd=EXAMPLES / "candle", env=environment, capture_output=True, text=True, check=False)

    right = pytest.approx(expected(model, 1, 2), rel=CANDLE)
    kind = Gguf(model).tensors["blk.1.ffn_gate_exps.weight"].tensor_type.name
    if kind in ("MXFP4", "NVFP4"):
        assert f"candle does not know {kind}" in candle("raw").stderr
        done = candle("f16")
    else:
        done = candle("raw")
        assert done.returncode == 0, done.stderr
        blocks = FFN * DIM // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
        size = blocks * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        assert done.stdout.count(f", {size} bytes") == 3
    assert done.returncode == 0, done.stderr
    assert norm(done.stdout) == right


# --- the store ------------------------------------------------------------------------------------------------------


@pytest.fixture
def example_store(monkeypatch):
    """The program as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import mlx_expert_store

    return mlx_expert_store


def routers_of(mount):
    base = mount.matrices("base_model/attention_layers.safetensors")
    return {layer: base[f"blk.{layer}.ffn_gate_inp.weight"] for layer in (0, 1)}


def distance(mount, store, example_store, model):
    """How far the store's result is from that of a model, as a share of its norm."""
    right = Gguf(model).forward([0, 1], some_input())
    y = example_store.forward([0, 1], routers_of(mount), 2, store, mx.array(some_input())[None])
    return np.linalg.norm(np.array(y.astype(mx.float32))[0] - right) / np.linalg.norm(right)


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_the_store_computes_what_the_gguf_says(budget, shown, example_store):
    """Also if not even one expert is within the budget."""
    model, root = shown
    for form, close in ((("mlx", "--scales", "f32"), 1e-4), (("mlx",), CLOSE)):
        mount = example_store.Mount(root(*form))
        store = example_store.ExpertStore(mount, budget)
        assert distance(mount, store, example_store, model) < close


def test_the_store_of_another_model_gets_another_result(shown, example_store, tmp_path):
    """The check that holds the others: one matrix of each expert is another one."""
    model, root = shown
    damaged = shutil.copy(model, tmp_path / "damaged.gguf")
    for layer in (0, 1):
        tensor = next(t for t in gguf.GGUFReader(damaged).tensors if t.name == f"blk.{layer}.ffn_down_exps.weight")
        content = bytearray(damaged.read_bytes())
        start, end = int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
        size = int(tensor.n_bytes) // 4
        content[start + size : end] = content[start : end - size]
        damaged.write_bytes(content)
    mount = example_store.Mount(root("mlx"))
    right, wrong = (Gguf(path).forward([0, 1], some_input()) for path in (model, damaged))
    assert np.linalg.norm(right - wrong) > 2 * CLOSE * np.linalg.norm(right)
    assert distance(mount, example_store.ExpertStore(mount, 1 << 30), example_store, model) < CLOSE


@OF_ONE_TYPE
def test_the_store_keeps_what_was_used_last_within_its_budget(shown, example_store):
    mount = example_store.Mount(shown[1]("mlx"))
    size = {key: entry["size"] for key, entry in mount.registry.items()}
    store = example_store.ExpertStore(mount, 2 * max(size.values()))
    held = []
    for layer, expert in [(0, 0), (0, 1), (0, 0), (1, 2), (0, 0), (0, 1)]:
        store.get(layer, [expert])[0].result()
        held.append(store.bytes)
    first, second, other = size[0, 0], size[0, 1], size[1, 2]
    assert held == [first, *[first + second] * 2, *[first + other] * 2, first + second]
    assert store.counts[0] == {"hits": 2, "misses": 3, "bytes": first + 2 * second}
    assert store.counts[1] == {"misses": 1, "bytes": other}


@OF_ONE_TYPE
def test_the_store_loads_what_the_router_of_the_next_layer_picks(shown, example_store):
    mount = example_store.Mount(shown[1]("mlx"))
    store = example_store.ExpertStore(mount, 1 << 30)
    foreseen = []
    load = store.prefetch
    store.prefetch = lambda layer, experts: (foreseen.append((layer, experts)), load(layer, experts))
    x = mx.array(some_input())[None]
    routers = routers_of(mount)
    example_store.forward([0, 1], routers, 2, store, x)
    picked, _ = example_store.route(routers[1], x, 2)
    assert foreseen == [(1, picked)]
    # Every one of them that layer 1 did use was there already.
    used, _ = Gguf(shown[0]).route(1, Gguf(shown[0]).forward([0], some_input()), 2)
    assert store.counts[1]["hits"] == len(set(picked) & set(used.tolist()))
    assert store.counts[1]["hits"] + store.counts[1]["misses"] == 2


@OF_ONE_TYPE
def test_the_store_says_for_each_layer_what_it_read_and_how_long_it_took(shown):
    said = example("mlx_expert_store.py", shown[1]("mlx"), "--tokens", 2, "--memory", 64).splitlines()
    assert said[0].startswith("first numbers [")
    for layer, line in enumerate(said[1:]):
        words = line.replace(",", "").split()
        assert words[:2] == ["layer", f"{layer}:"] and int(words[2]) + int(words[4]) == 4
        assert words[3:6:2] == ["hits", "misses"] and words[7:9] == ["MiB", "read"] and words[10:] == ["ms", "a", "token"]
        assert float(words[6]) > 0 and float(words[9]) > 0
    assert len(said) == 3


@OF_ONE_TYPE
def test_the_store_refuses_a_mount_of_another_form(shown):
    done = run(sys.executable, EXAMPLES / "mlx_expert_store.py", shown[1]("raw"))
    assert done.returncode == 1 and "is not a mount --as mlx" in done.stderr


def test_the_store_and_the_example_take_mixed_models(tmp_path, example_store):
    """Matrices that MLX packs in two ways, and one that it cannot pack, in one expert."""
    tensors = {}
    for kind, word in (("q4_k", "gate"), ("mxfp4", "up"), ("q6_k", "down")):
        toy = tmp_path / f"{kind}.gguf"
        succeed("toy", toy, "--type", kind, "--dim", DIM, "--ffn-dim", FFN, "--vocab", 300)
        for tensor in gguf.GGUFReader(toy).tensors:
            if f".ffn_{word}_exps." in tensor.name or ".ffn_gate_inp." in tensor.name:
                tensors[tensor.name] = (tensor.name, tensor.data, tensor.tensor_type)
    model = models.write(tmp_path / "mixed.gguf", tensors.values(), models.counts(2, 4))[0]
    for flags, kinds in (((), {"F16"}), (("--requant",), set())):
        with mounted(model, tmp_path / f"mnt{len(flags)}", "--as", "mlx", *flags) as root:
            mount = example_store.Mount(root)
            with (root / "experts/layer_00_expert_000.safetensors").open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            assert {header["w2.weight"]["dtype"]} & {"F16"} == kinds
            assert header["w1.weight"]["dtype"] == header["w3.weight"]["dtype"] == "U32"
            store = example_store.ExpertStore(mount, 1 << 30)
            assert distance(mount, store, example_store, model) < (1e-2 if flags else CLOSE)
            assert norm(example("mlx_expert.py", root, 0, 1)) == pytest.approx(expected(model, 0, 1), rel=2e-2 if flags else CLOSE)


def test_readers_as_the_reference_project_has_them_work(shown):
    """An index of all experts by name, one expert at a time by `mx.load`, base weights by component."""
    root = shown[1]("raw")
    index = json.loads((root / "experts/registry.json").read_text())
    assert len(index) == 8
    for name, entry in index.items():
        assert name == f"layer_{entry['layer']:02d}_expert_{entry['expert_id']:03d}"
        assert (root / entry["path"]).stat().st_size == entry["size"]
        weights = mx.load(str(root / entry["path"]))
        assert sorted(weights) == entry["tensors"]
        # Its runtime multiplies by the transposed matrix.
        if weights["w1.weight"].dtype != mx.uint8:
            assert (mx.ones((1, DIM), weights["w1.weight"].dtype) @ weights["w1.weight"].T).shape == (1, FFN)
    metadata = json.loads((root / "base_model/metadata.json").read_text())
    assert metadata["extracted"] is True
    for component, count in metadata["components"].items():
        file = root / f"base_model/{component}.safetensors"
        assert file.exists() == (count > 0)
        assert len(mx.load(str(file))) == count
