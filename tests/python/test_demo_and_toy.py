"""`demo`, `toy` and `inspect`: what a newcomer tries first."""

import json
import os
import re
import signal
import subprocess

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from models import TYPES
from odmoe import (
    BINARY,
    DATA,
    NO_FUSE,
    fail,
    files_of,
    in_private_mounts,
    mounted,
    mounts,
    needs_root,
    odmoe,
    run,
    succeed,
    wait_for,
)
from reference import PLAIN, Shown, read_header

TINY = ("--layers", 1, "--experts", 2, "--dim", 256, "--ffn-dim", 256, "--vocab", 32)


def toy(path, *flags):
    succeed("toy", path, *flags)
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


# --- demo -----------------------------------------------------------------------------------------------------------


def test_demo_shows_a_tree_and_a_verified_expert_and_leaves_nothing_behind(person, public):
    said = succeed("demo", user=person, env={**os.environ, "TMPDIR": str(public)})
    for word in ("base_model", "embeddings.safetensors", "metadata.gguf", "experts", "registry.json"):
        assert word in said
    assert os.listdir(public) == []
    assert not [m for m in mounts() if m.at.startswith(str(public))]


@needs_root
def test_demo_without_fuse_names_the_cure_and_shows_the_tree_materialized(public):
    (public / "tmp").mkdir()
    done = in_private_mounts(NO_FUSE, public, "demo", env={**os.environ, "TMPDIR": str(public / "tmp")})
    assert done.returncode == 1, done.stderr
    assert "layer_00_expert_000.safetensors" in done.stdout
    assert "/dev/fuse" in done.stderr
    assert os.listdir(public / "tmp") == []


def test_a_demo_without_a_folder_to_work_in_names_what_to_set(tmp_path):
    fail("demo", env={**os.environ, "TMPDIR": str(tmp_path / "none")}, naming=[tmp_path / "none", "set TMPDIR"])


def test_a_toy_that_is_interrupted_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen([BINARY, "toy", tmp_path / "toy.gguf", "--layers", "40"], stderr=subprocess.PIPE)
    wait_for(lambda: os.listdir(tmp_path))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.stderr.close()
    assert os.listdir(tmp_path) == []


def test_a_toy_that_takes_long_says_how_far_it_is(tmp_path):
    done = odmoe("toy", tmp_path / "toy.gguf", "--layers", 30)
    assert done.returncode == 0
    said = re.findall(r"^(\d+) %: \S+ \S+ of \S+ \S+, \S+ \S+/s$", done.stderr, re.M)
    assert said == sorted(said, key=int) and said[-1] == "100"
    assert odmoe("-q", "toy", tmp_path / "quiet.gguf", "--layers", 30).stderr == ""
    (tmp_path / "toy.gguf").unlink()
    (tmp_path / "quiet.gguf").unlink()


# --- toy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [t.name for t in TYPES])
def test_toys_of_every_type_are_good_models(kind, tmp_path):
    (path,) = toy(tmp_path / "toy.gguf", *TINY, "--type", kind.lower())
    tensors = gguf.GGUFReader(path).tensors
    stacks = [t for t in tensors if "_exps." in t.name]
    assert [t.tensor_type.name for t in stacks] == [kind] * 3
    assert [int(t.shape[2]) for t in stacks] == [2] * 3
    assert all(np.unique(t.data).size > 2 for t in stacks)
    if kind in PLAIN or kind == "Q1_0":  # types that need no computing, or that gguf-py cannot compute
        return
    for t in stacks:
        assert np.isfinite(gguf.quants.dequantize(t.data, t.tensor_type)).all()


@pytest.mark.parametrize("naming", ["stacked", "fused", "per-expert", "reference"])
@pytest.mark.parametrize("split", [1, 3])
def test_toys_of_every_naming_show_the_same_experts(naming, split, tmp_path):
    paths = toy(tmp_path / "toy.gguf", *TINY, "--naming", naming, *(("--split", split) if split > 1 else ()))
    assert len(paths) == split
    with mounted(paths[0], tmp_path / "mnt") as root:
        shown = Shown(paths, root)
        assert set(shown.expert_files()) == {f"experts/layer_00_expert_00{n}.safetensors" for n in (0, 1)}
        for name in shown.expert_files():
            with safe_open(root / name, framework="np") as file:
                assert sorted(file.keys()) == ["w1.weight", "w2.weight", "w3.weight"]
                assert file.get_tensor("w1.weight").dtype == np.float32
        assert set(files_of(root)) >= set(shown.layout)


def test_a_toy_is_decided_by_its_seed(tmp_path):
    data = [toy(tmp_path / f"{n}.gguf", *TINY, "--seed", seed)[0].read_bytes() for n, seed in enumerate((1, 1, 2))]
    assert data[0] == data[1] != data[2]


def test_a_toy_does_not_overwrite_a_file(tmp_path):
    (tmp_path / "toy.gguf").write_text("mine")
    fail("toy", tmp_path / "toy.gguf", *TINY, naming=["toy.gguf"])
    assert (tmp_path / "toy.gguf").read_text() == "mine"


def test_an_error_does_not_name_a_file_that_the_user_has_not_named(tmp_path):
    missing = tmp_path / "no folder" / "toy.gguf"
    assert ".toy-" not in fail("toy", missing, naming=[missing.name, "No such file"])
    script = 'ulimit -f 8 && exec "$@"'  # units of 1 KiB
    done = run("bash", "-c", script, "bash", BINARY, "toy", tmp_path / "toy.gguf")
    assert done.returncode == 1 and "File too large" in done.stderr
    assert ".toy-" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_toy_that_no_block_fits_is_refused(tmp_path):
    fail("toy", tmp_path / "toy.gguf", "--dim", 100, "--type", "q4_k", naming=["q4_k"])
    fail("toy", tmp_path / "toy.gguf", "--type", "q9_k", status=2, naming=["q9_k"])
    assert os.listdir(tmp_path) == []


# --- the reference converter's toy ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_toy(tmp_path_factory):
    (path,) = toy(tmp_path_factory.mktemp("toy") / "toy.gguf", "--naming", "reference")
    return path


def test_the_reference_toy_is_the_reference_converter_s_toy(reference_toy):
    table = json.loads((DATA / "models/toy-kimi-moe-seed.json").read_text())
    reader = gguf.GGUFReader(reference_toy)
    assert [[t.name, t.shape.tolist(), t.tensor_type.name] for t in reader.tensors] == table["tensors"]
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert table["kv"].items() <= fields.items()


def test_the_reference_converter_s_output_is_matched(reference_toy, tmp_path):
    """Its files, names, registry and values: each expert's three matrices as numpy read them from the model."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(reference_toy).tensors}
    with mounted(reference_toy, tmp_path / "mnt") as root:
        registry = json.loads((root / "experts/registry.json").read_text())
        assert list(registry) == [f"layer_{layer:02d}_expert_{expert:03d}" for layer in range(2) for expert in range(4)]
        for key, entry in registry.items():
            path = root / entry["path"]
            assert list(entry) == ["path", "size", "layer", "expert_id", "tensors"]
            assert (entry["path"], entry["size"]) == (f"experts/{key}.safetensors", path.stat().st_size)
            assert entry["tensors"] == ["w1.weight", "w2.weight", "w3.weight"]
            with safe_open(path, framework="np") as file:
                assert sorted(file.keys()) == entry["tensors"]
                for name in file.keys():
                    wanted = tensors[f"blk.{entry['layer']}.ffn.experts.{entry['expert_id']}.{name}"]
                    assert wanted.shape == ((1024, 512) if name.startswith("w2") else (512, 1024))
                    np.testing.assert_array_equal(file.get_tensor(name), wanted)
        metadata = json.loads((root / "base_model/metadata.json").read_text())
        assert metadata["extracted"] is True
        assert metadata["components"] == {"embeddings": 1, "attention_layers": 10, "norms": 4, "lm_head": 1}


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_describes_the_model_for_people_and_for_programs(small):
    said = succeed("inspect", small[0])
    for word in ("moe", "Q4_0", "experts"):
        assert word in said
    assert "blk.1.ffn_down_exps.weight" in succeed("inspect", small[0], "--tensors")
    assert isinstance(json.loads(succeed("inspect", small[0], "--json")), dict)


def test_a_reader_who_stops_early_is_no_crash(small):
    """Standard output is a pipe that nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([BINARY, "inspect", small[0]], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert "panicked" not in done.stderr


def test_inspect_needs_no_fuse_and_changes_nothing(small):
    before = small[0].stat()
    succeed("inspect", small[0], "--tensors", "--json")
    after = small[0].stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


@pytest.mark.parametrize("naming", ["stacked", "fused", "per-expert", "reference"])
@pytest.mark.parametrize("kind", ["q4_k", "iq2_xs"])
def test_toys_of_every_naming_can_be_shown_in_every_form(kind, naming, tmp_path):
    sizes = ["--dim", 256, "--ffn-dim", 256, "--vocab", 256, "--layers", 1, "--experts", 2]
    model, _ = toy(tmp_path / "toy.gguf", *sizes, "--type", kind, "--naming", naming, "--split", 2)
    for form in (["f32"], ["f16"], ["bf16"], ["mlx"], ["mlx", "--requant"]):
        out = tmp_path / "-".join(form)
        succeed("materialize", model, out, "--as", *form)
        assert json.loads(succeed("verify", model, out, "--json"))["identical"] is True
        header = read_header(out / "experts/layer_00_expert_001.safetensors")
        packed = form[0] == "mlx" and (kind == "q4_k" or "--requant" in form)
        names = ["weight", "scales", "biases"] if packed else ["weight"]
        assert set(header.tensors) == {f"w{n}.{name}" for n in (1, 2, 3) for name in names}
