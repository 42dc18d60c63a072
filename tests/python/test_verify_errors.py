"""`verify` where nothing can be compared: models with a fault, missing trees, signals, and mounts that do not answer."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from odmoe import (
    BINARY,
    DATA,
    PATIENCE,
    daemon_of,
    detach,
    expert_gguf,
    fail,
    files_of,
    mounted,
    needs_root,
    promises,
    sparse_gguf,
    succeed,
    wait_for,
)
from test_verify import METADATA, REGISTRY, differences


def test_a_sound_model_is_said_to_be_so(shown):
    said = json.loads(succeed("verify", shown.paths[0], "--json"))
    assert said["parts"] == len(shown.paths)
    assert said["files"] == len(files_of(shown.root))
    assert f"{said['tensors']} tensor" in succeed("verify", shown.paths[0]).replace(",", "")


def test_a_model_with_a_fault_is_an_error_not_a_difference(tmp_path):
    hostile = DATA / "hostile" / "data-truncated.gguf"
    said = fail("verify", hostile, status=1, naming=[hostile.name])
    assert fail("verify", hostile, tmp_path, status=1) == said


def test_what_is_no_tree_is_an_error(small, tmp_path):
    fail("verify", small[0], tmp_path / "nothing", naming=["nothing", "does not exist"])
    fail("verify", small[0], small[0], naming=[small[0].name, "not a directory"])
    for usage in [[], [small[0], "--quick"], [small[0], tmp_path, "--jobs", "0"]]:
        fail("verify", *usage, status=2)


def test_an_empty_folder_lacks_the_documents(small, tmp_path):
    assert differences(small[0], tmp_path) == [(METADATA, "missing"), (REGISTRY, "missing")]


def test_a_model_that_changes_meanwhile_is_an_error(tmp_path):
    """Nothing can be said of the tree then."""
    model = expert_gguf(tmp_path, experts=64)
    with mounted(model, tmp_path / "mnt") as root:
        process = verifying(model, root)
        os.utime(model, (1, 1))
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert model.name in errors and "has changed" in errors


@pytest.mark.parametrize("flags", [[], ["--quick"], ["--json"]], ids=str)
def test_a_mount_whose_model_has_changed_is_an_error_not_a_difference(tmp_path, flags):
    model = expert_gguf(tmp_path, experts=2)
    with mounted(model, tmp_path / "mnt") as root:
        os.utime(model, (1, 1))
        fail("verify", model, root, *flags, naming=[root, "has changed since it was mounted", "--replace"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(number, tmp_path):
    parts = sparse_gguf("kimi-k2.5-q4_k_m", tmp_path / "model.gguf", "--splits", 3)
    with mounted(parts[0], tmp_path / "mnt") as root:
        process = verifying(parts[0], root)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, errors
    assert output == "" and "stopped before everything was compared" in errors


def verifying(model, root):
    """A run of `verify` that has begun to compare, and is far from its end."""
    process = subprocess.Popen(
        [BINARY, "verify", model, root], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # It blocks the signals, and starts its workers, right before it compares.
    wait_for(lambda: len(os.listdir(f"/proc/{process.pid}/task")) > 2 or process.poll() is not None)
    return process


@contextlib.contextmanager
def stopped(where):
    """A mount that does not answer."""
    pid = daemon_of(where)
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    wait_for(lambda: all(" T " in (task / "stat").read_text() for task in tasks.iterdir()))
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@promises("`verify` does not wait for a daemon that is stopped when it begins.")
@pytest.mark.parametrize("flags", [[], ["--quick"], ["--json"]], ids=str)
@pytest.mark.parametrize("name", ["mnt", "link", "mnt/experts", "other/../mnt"])
def test_a_mount_that_does_not_answer_is_an_error_and_is_not_waited_for(small, tmp_path, name, flags):
    (tmp_path / "link").symlink_to("mnt")
    (tmp_path / "other").mkdir()
    with mounted(small[0], tmp_path / "mnt") as root, stopped(root):
        said = fail("verify", small[0], tmp_path / name, *flags, naming=[root, "does not answer", "odmoe-fs status"])
        assert "-v" not in said


def test_a_mount_beside_a_tree_that_does_not_answer_holds_nobody_up(small, tmp_path):
    succeed("materialize", small[0], tmp_path)
    with mounted(small[0], tmp_path / "mnt") as root, stopped(root):
        assert differences(small[0], tmp_path) == [("mnt", "extra")]
        assert "nothing to write" in succeed("materialize", small[0], tmp_path)


def test_a_mount_whose_process_is_dead_is_an_error(small, tmp_path):
    where = tmp_path / "mnt"
    with contextlib.suppress(AssertionError), mounted(small[0], where):
        os.kill(daemon_of(where), signal.SIGKILL)
        fail("verify", small[0], where, naming=[where, "is dead", "mount it again"])


@needs_root
def test_a_mount_of_another_user_is_an_error_that_says_who_may_read_it(model, public, nobody):
    with mounted(model, public / "mnt") as root:
        fail("verify", model, root, user=nobody, naming=[root, "Permission denied", "the user who made it"])


def test_a_mount_that_ends_during_the_comparison_is_one_error_and_no_difference(tmp_path):
    model = sparse_gguf("kimi-k2.5-q4_k_m", tmp_path / "kimi.gguf")[0]
    where = tmp_path / "mnt"
    where.mkdir()
    succeed("mount", model, where)
    try:
        command = [BINARY, "-q", "verify", "--quick", model, where]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        def is_comparing():
            with contextlib.suppress(OSError):
                links = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
                return any(link.startswith(f"{where}/experts/layer") for link in links)
            return False

        wait_for(is_comparing)
        succeed("umount", "--lazy", where)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        detach(where)
    assert (process.returncode, out) == (1, ""), out[:500]
    assert "ended during the comparison" in err and err.count("\n") == 2
