"""What the system refuses of a target is told with the step that helps, and no other: each on the real thing."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess

import pytest

import models
from odmoe import (
    FAILING_DISK,
    MIB,
    detach,
    expert_gguf,
    fail,
    failing_disk,
    file_system,
    files_of,
    mount_at,
    needs_root,
    sparse_gguf,
    succeed,
    wait_for,
)
from test_materialize_faults import held_up

EXPERT = "experts/layer_00_expert_001.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.write_small(tmp_path_factory.mktemp("model"))[0]


def refused(*arguments, saying, step, **options):
    """A run of `materialize` that fails, with these words before and after the hint begins; never advised is what cannot help."""
    said = fail("materialize", *arguments, naming=[saying], **options)
    what, _, hint = said[said.index("error: ") :].partition("; ")
    assert saying in what and step in hint, said
    assert "--force" not in said and "-v" not in hint.split(), said
    return said


@contextlib.contextmanager
def changed(path, flag):
    """A file or folder with an attribute of chattr(1)."""
    subprocess.run(["chattr", f"+{flag}", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


# --- what is asked for before anything is written -------------------------------------------------------------------


def test_a_path_that_is_too_long(model, tmp_path):
    refused(model, tmp_path.joinpath(*["a" * 200] * 25), saying="File name too long", step="a shorter name or path")
    refused(model, tmp_path / ("a" * 300), saying="File name too long", step="a shorter name or path")


def test_links_that_lead_nowhere(model, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(model, tmp_path / "a/out", saying="Too many levels of symbolic links", step="check the symbolic links")
    (tmp_path / "c").symlink_to("nothing")
    refused(model, tmp_path / "c", saying=f'"{tmp_path}/c" is a link', step="remove it")
    refused(model, tmp_path / "c/out", saying=f'"{tmp_path}/c" is a link', step="remove it")
    assert not (tmp_path / "nothing").exists()


@needs_root
@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--force"]], ids=str)
def test_a_file_system_that_is_read_only(public, flags):
    (model,) = models.write_small(public)
    for kind in ("tmpfs", "ext4"):
        with file_system(kind, public, 20 * MIB) as at:
            (at / "there").mkdir()
            subprocess.run(["mount", "-o", "remount,ro", at], check=True)
            for out in (at / "new", at / "there"):
                refused(model, out, *flags, saying="Read-only file system", step="mounted read-only")


@needs_root
def test_a_folder_that_is_closed(public, nobody):
    (model,) = models.write_small(public)
    (public / "closed").mkdir(mode=0o700)
    (public / "unreadable").mkdir(mode=0o711)
    (public / "readable").mkdir(mode=0o755)
    for out in ("closed/out", "closed/a/b", "unreadable/out", "readable/out", "readable"):
        refused(model, public / out, user=nobody, saying="Permission denied", step="check the permissions")


@needs_root
def test_a_folder_that_may_be_written_to_but_not_read_holds_a_target(public, nobody):
    (model,) = models.write_small(public)
    (public / "box").mkdir()
    (public / "box").chmod(0o733)
    succeed("materialize", model, public / "box/out", user=nobody)
    succeed("verify", model, public / "box/out", user=nobody)


# --- what shows while it is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--force"]], ids=str)
@pytest.mark.parametrize("name", [EXPERT, "experts/registry.json", "base_model/metadata.json", "base_model/metadata.gguf"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_written(model, tmp_path, name, flags):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    for dry in [[], ["--dry-run"]]:
        refused(model, out, *flags, *dry, saying=f'"{out / name}" is a directory', step="remove it")
    assert files_of(out) == {}


@pytest.mark.parametrize("name", [EXPERT, "experts/registry.json", "base_model/metadata.json"])
def test_force_is_advised_where_it_helps(model, tmp_path, name):
    out = tmp_path / "out"
    for make in (os.mkfifo, lambda path: path.write_text("theirs"), lambda path: path.symlink_to("/dev/null")):
        (out / name).parent.mkdir(parents=True)
        make(out / name)
        assert "--force" in fail("materialize", model, out, naming=[out / name])
        succeed("materialize", model, out, "--force")
        succeed("verify", model, out)
        shutil.rmtree(out)


@needs_root
def test_a_folder_that_cannot_be_changed(model, tmp_path):
    with file_system("ext4", tmp_path, 30 * MIB) as at:
        out = at / "out"
        for name in ("experts", "."):
            (out / name).mkdir(parents=True, exist_ok=True)
            with changed(out / name, "i"):
                refused(model, out, saying="Operation not permitted", step="lsattr")
        succeed("materialize", model, out)
        (out / EXPERT).write_text("theirs")
        with changed(out / EXPERT, "i"):
            refused(model, out, "--force", saying="Operation not permitted", step="lsattr")


@needs_root
def test_something_mounted_in_the_place_of_a_file(model, tmp_path):
    out = tmp_path / "out"
    (out / EXPERT).parent.mkdir(parents=True)
    (out / EXPERT).write_text("theirs")
    subprocess.run(["mount", "--bind", out / EXPERT, out / EXPERT], check=True)
    try:
        refused(model, out, "--force", saying="resource busy", step="unmount")
    finally:
        subprocess.run(["umount", out / EXPERT], check=True)


@pytest.mark.parametrize("limit", [MIB, 4096])
def test_a_limit_on_the_size_of_files(tmp_path, limit):
    model = expert_gguf(tmp_path, experts=2)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    refused(model, tmp_path / "out", preexec_fn=limited, saying="File too large", step="ulimit -f")


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_file_system_without_room_for_more_files(tmp_path, kind):
    (model,) = models.write_small(tmp_path, layers=40)
    with file_system(kind, tmp_path, 40 * MIB) as at:
        if kind == "tmpfs":
            subprocess.run(["mount", "-o", "remount,nr_inodes=40", at], check=True)
        else:
            for number in range(os.statvfs(at).f_ffree - 40):
                (at / str(number)).touch()
        refused(model, at / "out", saying="No space left on device", step="df -i")


@needs_root
def test_a_quota(tmp_path):
    model = expert_gguf(tmp_path, experts=12)
    with file_system("btrfs", tmp_path, 400 * MIB) as at:
        for command in (["subvolume", "create", at / "out"], ["quota", "enable", at], ["qgroup", "limit", "10M", at / "out"]):
            subprocess.run(["btrfs", *command], check=True, capture_output=True)
        refused(model, at / "out", saying="Disk quota exceeded", step="quota")


@needs_root
def test_a_disk_that_fails(tmp_path):
    """Its image is larger than the file system that holds it."""
    model = expert_gguf(tmp_path, experts=60)
    with file_system("tmpfs", tmp_path, 120 * MIB) as below, file_system("ext4", below, 600 * MIB) as at:
        said = refused(model, at / "out", saying="cannot", step="dmesg")
        assert "Input/output error" in said or "Read-only file system" in said
        assert not [name for name in files_of(at / "out") if name.endswith(".safetensors") and "expert_" in name]


def test_too_few_descriptors(model, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))

    refused(model, tmp_path / "out", "--jobs", 8, preexec_fn=limited, saying="Too many open files", step="ulimit -n")


@needs_root
def test_a_file_system_whose_process_is_dead(model, tmp_path):
    at = tmp_path / "dead"
    at.mkdir()
    (tmp_path / "empty").mkdir()
    process = subprocess.Popen([FAILING_DISK, tmp_path / "empty", at, tmp_path / "faults"], stderr=subprocess.PIPE)
    try:
        wait_for(lambda: mount_at(at))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        refused(model, at / "out", saying="not connected", step="mount that again")
        refused(model, at, saying="not connected", step="mount that again")
    finally:
        detach(at)


@needs_root
def test_a_file_system_that_makes_no_files(model, tmp_path):
    """Neither those without a name, which are tried first."""
    (tmp_path / "empty").mkdir()
    with failing_disk(tmp_path / "empty", tmp_path) as disk:
        refused(model, disk.at / "out", saying="cannot create files in", step="choose a directory")


@needs_root
def test_a_target_that_is_removed_meanwhile(tmp_path):
    out = tmp_path / "out"
    with held_up(tmp_path, out) as (_, _, go_on):
        shutil.rmtree(out)
        status, errors = go_on()
    assert status == 1 and ("since it was removed" in errors or "was moved or replaced" in errors), errors


@needs_root
def test_a_file_that_appears_meanwhile(tmp_path):
    out = tmp_path / "out"
    with held_up(tmp_path, out) as (model, _, go_on):
        (out / EXPERT).write_text("theirs")
        status, errors = go_on()
        assert status == 1 and "appeared while the tree was being written" in errors and "--force" not in errors, errors
        assert (out / EXPERT).read_text() == "theirs"
        (out / EXPERT).unlink()
        succeed("materialize", model, out)


def test_an_option_that_chooses_nothing_names_the_options(tmp_path):
    kv = {"general.architecture": "moe", "moe.block_count": 2, "moe.expert_count": 4, "moe.expert_used_count": 2}
    stacks = [[f"blk.{layer}.ffn_up_exps.weight", [32, 4, 2 + 2 * layer], "F32"] for layer in (0, 1)]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": stacks}))
    (model,) = sparse_gguf(table, tmp_path / "model.gguf")
    chosen = ["--layers", "0", "--experts", "3"]
    refused(model, tmp_path / "out", *chosen, saying="nothing to write", step="choose others with --layers or --experts")
