"""`materialize --as` is a converter that can be stopped, checked and continued; `verify` knows the form of a tree."""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest

import models
from forms import OPTIONS, write_mixed
from odmoe import BINARY, contents, expert_gguf, fail, files_of, mounted, odmoe, promises, sparse_gguf, succeed
from reference import read_header

COMPUTED = OPTIONS[1:]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_mixed(tmp_path_factory.mktemp("mixed") / "mixed.gguf")


def verified(model, tree):
    done = odmoe("verify", model, tree, "--json")
    return done.returncode, json.loads(done.stdout)


@promises(
    "A run that is killed, or whose machine loses its power, at any moment leaves no wrong file, and the same command "
    "finishes the work."
)
def test_a_killed_run_is_finished_by_the_same_command(tmp_path, times):
    model = expert_gguf(tmp_path, experts=4)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance, out, kills = random.Random(seed), tmp_path / "out", 0
    flags = ["--as", "mlx", "--scales", "bf16"]
    for n in range(times(3, long=30)):
        shutil.rmtree(out, ignore_errors=True)
        command = [BINARY, "materialize", model, out, *flags]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            # The first one surely does not end before.
            time.sleep(chance.random() * 0.4 if n else 0)
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        if out.exists():
            for difference in verified(model, out)[1]["differences"]:
                assert difference["kind"] in ("missing", "extra"), difference
        succeed("materialize", model, out, *flags, "--verify")
        assert verified(model, out)[0] == 0
        assert "nothing to write" in succeed("materialize", model, out, *flags)
    assert kills


@pytest.mark.parametrize("options", COMPUTED, ids=" ".join)
def test_verifying_dry_runs_and_selections_add_up(mixed, options, tmp_path):
    out = tmp_path / "out"
    said = succeed("materialize", mixed, out, *options, "--dry-run")
    assert "to write: " in said and not out.exists()
    for selection in (["--base-only"], ["--layers", "0-2", "--experts", "1"], ["--experts-only"]):
        succeed("materialize", mixed, out, *options, *selection, "--verify")
        assert verified(mixed, out)[0] == 0
    with mounted(mixed, tmp_path / "mnt", *options) as root:
        assert contents(root) == contents(out)
    assert "nothing to write" in succeed("materialize", mixed, out, *options, "--verify")
    path = out / "experts/layer_03_expert_001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    status, report = verified(mixed, out)
    assert status == 3 and [d["path"] for d in report["differences"]] == ["experts/layer_03_expert_001.safetensors"]


@pytest.mark.parametrize("first", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("selection", [[], ["--experts-only"]], ids=str)
def test_a_folder_of_another_form_is_refused_with_the_options_that_made_it(mixed, first, selection, tmp_path):
    out = tmp_path / "out"
    succeed("materialize", mixed, out, *first, "--base-only")
    before = contents(out)
    full = first or ["--as", "raw"]
    if "mlx" in full and "--scales" not in full:
        full = [*full, "--scales", "f16"]
    for other in OPTIONS:
        if other == first:
            continue
        said = fail("materialize", mixed, out, *other, *selection)
        assert f'{out}" holds a model in another form ({" ".join(full)}); ' in said
        assert f"choose another directory, or use {' '.join(full)} as before" in said
    assert contents(out) == before
    succeed("materialize", mixed, out, *first)
    assert verified(mixed, out)[0] == 0


def test_a_folder_of_another_form_is_replaced_if_that_is_forced(mixed, tmp_path):
    succeed("materialize", mixed, tmp_path / "out", "--as", "mlx")
    succeed("materialize", mixed, tmp_path / "out", "--as", "bf16", "--force")
    with mounted(mixed, tmp_path / "mnt", "--as", "bf16") as root:
        assert contents(root) == contents(tmp_path / "out")


@pytest.mark.parametrize("damage", ["lost", "cut", "not JSON", "of nothing"])
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_verify_finds_the_form_of_a_tree_without_metadata(mixed, options, damage, tmp_path):
    out = tmp_path / "out"
    succeed("materialize", mixed, out, *options)
    path = out / "base_model/metadata.json"
    if damage == "lost":
        path.unlink()
    else:
        text = path.read_bytes()
        path.write_bytes({"cut": text[: len(text) // 2], "not JSON": b"\xff" * len(text), "of nothing": b"{}"}[damage])
    status, report = verified(mixed, out)
    assert status == 3
    assert [d["path"] for d in report["differences"]] == ["base_model/metadata.json"]


def test_verify_of_a_mount_knows_its_form(mixed, tmp_path):
    for options in OPTIONS:
        with mounted(mixed, tmp_path / "mnt", *options) as root:
            assert verified(mixed, root)[0] == 0


def test_verify_names_the_form_that_a_model_cannot_be_shown_in(mixed, tmp_path):
    succeed("materialize", mixed, tmp_path / "out", "--as", "bf16")
    table = tmp_path / "ik.json"
    kv = {"general.architecture": "moe"}
    table.write_text(json.dumps({"kv": kv, "tensors": [["a.weight", [256, 2], "IQ4_KS"]]}))
    (other,) = sparse_gguf(table, tmp_path / "ik.gguf")
    said = fail("verify", other, tmp_path / "out", naming=["name the model that the tree was made from"])
    assert f'{tmp_path / "out"}" holds bf16, which' in said and "IQ4_KS (1 tensor)" in said


@pytest.mark.parametrize("command", ["mount", "materialize", "inspect"])
@pytest.mark.parametrize("option", [["--scales", "f32"], ["--requant"]], ids=" ".join)
@pytest.mark.parametrize("form", [[], ["--as", "raw"], ["--as", "bf16"]], ids=str)
def test_options_of_mlx_without_it_are_wrong_usage(model, command, option, form, tmp_path):
    where = [] if command == "inspect" else [tmp_path]
    words = f"{option[0]} means nothing with --as {form[-1] if form else 'raw'}"
    said = fail(command, model, *where, *form, *option, status=2, naming=[words, "add --as mlx, or leave it out"])
    assert said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["q4_k", "F16", ""])
def test_a_form_that_does_not_exist_is_wrong_usage(model, value, tmp_path):
    fail("mount", model, tmp_path, f"--as={value}", status=2, naming=["raw, f32, f16, bf16, mlx"])


def test_options_of_mount_take_the_form(tmp_path):
    (model,) = models.write_small(tmp_path)
    with mounted(model, tmp_path / "mnt", "-o", "as=mlx,scales=bf16,requant") as root:
        assert len(files_of(root)) > 6
        metadata = json.loads((root / "base_model/metadata.json").read_text())
        assert (metadata["form"], metadata["scales"], metadata["requant"]) == ("mlx", "BF16", True)
        header = read_header(root / "experts/layer_00_expert_000.safetensors")
        assert header.tensors["w1.scales"]["dtype"] == "BF16"
