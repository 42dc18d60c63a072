"""`materialize`: the same tree as real files, whole or in part: section 2.1 of the contract."""

import filecmp
import json
import os
import re
import signal
import subprocess

import pytest

import models
from odmoe import BINARY, DOCUMENTS, contents, fail, files_of, mounted, needs_root, odmoe, promises, succeed, wait_for


@pytest.fixture
def model(tmp_path):
    """Four layers of three experts, in parts."""
    return models.write_small(tmp_path, layers=4, split_max_tensors=4)[0]


@promises("A materialized tree holds the bytes of the mounted one, and a partial one a part of them.")
def test_a_materialized_tree_is_the_mounted_tree(shown, tmp_path):
    out = tmp_path / "out"
    succeed("materialize", shown.paths[-1], out)
    assert contents(out) == contents(shown.root)
    newest = max(path.stat().st_mtime_ns for path in shown.paths)
    assert {path.stat().st_mtime_ns for path in files_of(out).values()} == {newest}


@promises("Materialized files get the modes that the umask gives new files.")
def test_files_get_the_modes_that_the_user_gives_new_files(model, tmp_path):
    succeed("materialize", model, tmp_path / "out", umask=0o027)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o7777 == (0o750 if path.is_dir() else 0o640), path


def named(layer, expert):
    return f"experts/layer_{layer:02}_expert_{expert:03}.safetensors"


EVERY = {named(layer, expert) for layer in range(4) for expert in range(models.EXPERTS)}
BASE = {f"base_model/{name}.safetensors" for name in ("embeddings", "norms", "lm_head")}

SELECTIONS = {
    "--base-only": BASE,
    "--experts-only": EVERY,
    "--layers 0-1,3 --experts-only": {name for name in EVERY if "layer_02" not in name},
    "--experts 0,2 --experts-only": {name for name in EVERY if "expert_001" not in name},
    "--layers 2 --experts 1 --experts-only": {named(2, 1)},
}


@pytest.fixture
def whole(model, tmp_path):
    """The tree in full, as bytes."""
    succeed("materialize", model, tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("selection", SELECTIONS)
@promises("A materialized tree holds the bytes of the mounted one, and a partial one a part of them.")
def test_a_selection_writes_those_files_and_documents_that_tell_of_them(model, whole, tmp_path, selection):
    out = tmp_path / "out"
    succeed("materialize", model, out, *selection.split())
    found = contents(out)
    chosen = SELECTIONS[selection]
    assert set(found) - DOCUMENTS == chosen
    assert all(found[name] == whole[name] for name in chosen)
    registry, full = json.loads(found["experts/registry.json"]), json.loads(whole["experts/registry.json"])
    assert list(registry.items()) == [(key, entry) for key, entry in full.items() if entry["path"] in chosen]
    metadata, full = json.loads(found["base_model/metadata.json"]), json.loads(whole["base_model/metadata.json"])
    assert metadata["weight_map"] == {
        name: file for name, file in full["weight_map"].items() if f"base_model/{file}" in chosen
    }
    assert metadata["components"] == {
        name: count if f"base_model/{name}.safetensors" in chosen else 0 for name, count in full["components"].items()
    }
    assert metadata["gguf"] == full["gguf"]
    assert metadata["moe_layers"] == sorted({entry["layer"] for entry in registry.values()})


@pytest.mark.parametrize(
    "runs",
    [
        ["--base-only", "--experts-only"],
        ["--experts-only --layers 3", "--base-only", "--layers 0-2"],
        ["--experts 1", "--experts 0", "--experts 2", ""],
    ],
    ids=" then ".join,
)
def test_partial_runs_add_up_to_the_whole(model, whole, tmp_path, runs):
    for flags in runs:
        succeed("materialize", model, tmp_path / "out", *flags.split())
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "show, flags",
    [
        ("experts", "--base-only"),
        ("hf", "--base-only"),
        ("base", "--experts-only"),
        ("joined,base", "--layers 0"),
        ("hf", "--experts 1"),
    ],
)
def test_files_that_are_not_shown_cannot_be_chosen(model, tmp_path, show, flags):
    option = flags.split()[0]
    fail("materialize", model, tmp_path / "out", "--show", show, *flags.split(), status=2, naming=[option, "--show"])
    assert not (tmp_path / "out").exists()


@needs_root
def test_a_folder_without_a_name_is_called_this_one(public, nobody):
    succeed("toy", public / "toy.gguf")
    below = public / "below"
    below.mkdir()
    said = fail("materialize", "../toy.gguf", "out", user=nobody, cwd=below, naming=['"."', "Permission denied"])
    assert '""' not in said


def test_a_second_run_has_nothing_to_write(model, tmp_path):
    out = tmp_path / "out"

    def inodes():
        return {name: path.stat().st_ino for name, path in files_of(out).items() if name not in DOCUMENTS}

    succeed("materialize", model, out)
    before = inodes()
    succeed("materialize", model, out)
    assert inodes() == before


@pytest.mark.parametrize("jobs", [1, 7])
def test_the_number_of_jobs_does_not_matter(model, whole, tmp_path, jobs):
    succeed("materialize", model, tmp_path / "out", "--jobs", jobs)
    assert contents(tmp_path / "out") == whole


def test_a_dry_run_says_how_much_and_writes_nothing(model, tmp_path):
    done = odmoe("materialize", model, tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert re.search(r"\d+(\.\d+)? [KMG]?i?B", done.stdout + done.stderr)
    assert "congruent" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_differs_is_an_error_and_is_not_touched(model, tmp_path):
    out = tmp_path / "out"
    victim = out / named(1, 1)
    victim.parent.mkdir(parents=True)
    victim.write_text("a user's own file")
    fail("materialize", model, out, naming=[victim.name])
    assert victim.read_text() == "a user's own file"


def test_what_is_said_to_be_written_is_written(model, tmp_path):
    out = tmp_path / "out"
    for flags in (["--base-only"], ["--experts-only"], []):
        before = set(files_of(out)) if out.exists() else set()
        planned = odmoe("materialize", model, out, *flags, "--dry-run").stdout
        done = odmoe("materialize", model, out, *flags)
        new = {name for name in set(files_of(out)) - before if not name.endswith(".json")}
        if new:
            count, size = re.search(r"wrote (\d+) files?, (\S+ \S+), and \d documents?", done.stdout).groups()
            assert int(count) == len(new)
            assert f"to write: {count} file" in planned and f", {size}, and" in planned
            assert f"to write: {count} file" in done.stderr and f", {size}, and" in done.stderr
    assert "to write: 0 files, 0 B" in planned and "0 B are copied" in planned


def test_a_file_that_only_has_another_time_is_compared_and_taken(model, whole, tmp_path):
    out = tmp_path / "out"
    succeed("materialize", model, out)
    touched = out / named(1, 1)
    before = touched.stat()
    os.utime(touched, (1, 1))
    succeed("materialize", model, out)
    assert (touched.stat().st_ino, touched.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert contents(out) == whole

    with touched.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([contents(out)[named(1, 1)][-1] ^ 1]))
    fail("materialize", model, out, naming=[touched.name])


@pytest.mark.parametrize("document", ["base_model/metadata.json", "experts/registry.json"])
def test_a_document_that_only_has_another_time_gets_the_tree_s(model, whole, tmp_path, document):
    out = tmp_path / "out"
    succeed("materialize", model, out)
    expected = (out / document).stat().st_mtime_ns
    os.utime(out / document, (1, 1))
    succeed("materialize", model, out)
    assert (out / document).stat().st_mtime_ns == expected
    assert contents(out) == whole


def test_experts_that_do_not_exist_are_an_error(model, tmp_path):
    for flags, existing in {("--layers", "99"): "0-3", ("--layers", "2-4"): "0-3", ("--experts", "1,9"): "0-2"}.items():
        fail("materialize", model, tmp_path / "out", *flags, naming=[" ".join(flags), existing])
    assert not (tmp_path / "out").exists()


def test_another_model_of_the_same_shape_is_not_taken_for_this_one(model, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    succeed("materialize", model, out)
    before = contents(out)
    fail("materialize", models.write_small(other, layers=4, split_max_tensors=4)[0], out, naming=[str(out)])
    assert contents(out) == before


@pytest.mark.parametrize("flags", [[], ["--force"]], ids=str)
def test_experts_of_another_model_of_the_same_shape_are_never_listed_beside_those_of_this_one(tmp_path, flags):
    out = tmp_path / "out"
    for seed, layer in ((1, 0), (2, 1)):
        succeed("toy", tmp_path / f"{seed}.gguf", "--seed", seed)
        if seed == 1:
            succeed("materialize", tmp_path / "1.gguf", out, "--experts-only", "--layers", layer)
    before = contents(out)
    fail("materialize", tmp_path / "2.gguf", out, "--experts-only", "--layers", 1, *flags, naming=[named(0, 0), "other bytes"])
    assert contents(out) == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_short_leaves_only_whole_files_and_the_next_run_finishes(tmp_path, how):
    model, whole, out = tmp_path / "toy.gguf", tmp_path / "whole", tmp_path / "out"
    succeed("toy", model, "--experts", 16)
    succeed("materialize", model, whole)
    process = subprocess.Popen([BINARY, "materialize", model, out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: next(out.glob("experts/*.safetensors"), None) or process.poll() is not None)
    process.send_signal(how)
    process.communicate()
    # It may just have finished.
    assert process.returncode in (0, -how if how == signal.SIGKILL else 128 + how)
    for name, path in files_of(out).items():
        if name in files_of(whole):
            assert filecmp.cmp(path, whole / name, shallow=False), name
        else:
            assert how == signal.SIGKILL, f"{name} was not removed"
    succeed("materialize", model, out)
    assert set(files_of(out)) == set(files_of(whole))
    assert not filecmp.cmpfiles(out, whole, files_of(whole), shallow=False)[1]


@needs_root
def test_a_target_without_room_is_refused_with_both_figures(tmp_path):
    (model,) = models.write_small(tmp_path, rows=2000)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", out], check=True)
    try:
        said = fail("materialize", model, out, naming=[out])
        assert len(re.findall(r"\d[\d.,]*", said.replace(str(out), ""))) == 2, said
        assert list(out.iterdir()) == []
    finally:
        subprocess.run(["umount", out], check=True)


def test_a_place_that_is_no_folder_is_refused(model, tmp_path):
    (tmp_path / "file").touch()
    fail("materialize", model, tmp_path / "file", naming=[tmp_path / "file"])


def test_a_mounted_tree_is_never_written_into(model, tmp_path):
    with mounted(model, tmp_path / "mnt") as root:
        fail("materialize", model, root, naming=[root])


def test_a_finished_tree_needs_no_room_to_write(tmp_path, small):
    """Not even for the documents, which are there."""
    out = tmp_path / "out"
    succeed("materialize", small[0], out)
    before = {name: path.stat().st_ino for name, path in files_of(out).items()}
    assert succeed("materialize", small[0], out).startswith("nothing to write: all files are complete")
    assert {name: path.stat().st_ino for name, path in files_of(out).items()} == before
    (out / "experts/registry.json").write_text("{}")
    assert succeed("materialize", small[0], out).startswith("nothing to write but the documents")


def test_what_another_model_has_left_in_the_target_is_named(tmp_path, small):
    out = tmp_path / "out"
    succeed("materialize", small[0], out)
    stranger = out / "experts/layer_77_expert_777.safetensors"
    stranger.touch()
    done = odmoe("materialize", small[0], out)
    assert done.returncode == 0 and str(stranger) in done.stderr and "1 file" in done.stderr


def test_experts_that_are_gone_are_named_when_the_registry_forgets_them(tmp_path, small):
    out = tmp_path / "out"
    succeed("materialize", small[0], out)
    gone = out / "experts/layer_01_expert_001.safetensors"
    gone.unlink()
    done = odmoe("materialize", small[0], out, "--layers", 0)
    assert done.returncode == 0 and "layer_01_expert_001" in done.stderr
    assert "layer_01_expert_001" not in (out / "experts/registry.json").read_text()
