"""`materialize` knows its own files by their time, as the target stores it; where the time differs, the workers compare bytes."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest

import models
from odmoe import (
    BINARY,
    MIB,
    contents,
    counters,
    expert_gguf,
    fail,
    file_system,
    files_of,
    needs_root,
    odmoe,
    promises,
    succeed,
)

KINDS = ["ext4", "ext4-128", "xfs", "btrfs", "tmpfs", "exfat"]
YEAR = 365 * 24 * 3600
# Of a model, in nanoseconds: not every file system holds each of them.
TIMES = {
    "now": time.time_ns() // 10**9 * 10**9 + 123_456_789,
    "a nanosecond before a second": 1_700_000_000_999_999_999,
    "1970": 0,
    "1969": -1,
    "1960": -10 * YEAR * 10**9 + 987_654_321,
    "1890": -80 * YEAR * 10**9 + 5,
    "2039": 69 * YEAR * 10**9 + 123_456_789,
    "2107": 137 * YEAR * 10**9 + 999_999_999,
    "2500": 530 * YEAR * 10**9 + 1,
}


@pytest.fixture
def model(tmp_path):
    """On a file system that holds every time."""
    (tmp_path / "model").mkdir()
    with file_system("tmpfs", tmp_path / "model", 20 * MIB) as at:
        yield models.write_small(at)[0]


def at_time(model, nanoseconds):
    os.utime(model, ns=(nanoseconds, nanoseconds))
    assert model.stat().st_mtime_ns == nanoseconds
    return model


def looks(out):
    """What tells whether a file was written: names, inodes, sizes and times."""
    stats = [(name, os.lstat(path)) for name, path in files_of(out).items()]
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_nlink) for name, s in stats}


def bytes_read(*arguments):
    """What a run has read by system calls, of whatever file, and what it said."""
    process = subprocess.Popen([BINARY, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    read = counters(process.pid)["rchar"]
    out, err = process.communicate()
    assert process.returncode == 0, err
    return read, out + err


# --- recognised -----------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_tree_is_recognised_whatever_times_the_target_can_hold(model, tmp_path, kind, when):
    at_time(model, TIMES[when])
    with file_system(kind, tmp_path, 400 * MIB if kind in ("xfs", "btrfs") else 40 * MIB) as at:
        out = at / "out"
        succeed("materialize", model, out)
        before = looks(out)
        done = odmoe("materialize", model, out)
        assert done.stdout.startswith("nothing to write: all files are complete"), done.stdout
        assert "to compare" not in done.stderr and looks(out) == before
        # In parts, too: what other runs have written is listed.
        succeed("materialize", model, out, "--experts-only", "--layers", "0")
        assert looks(out) == before
        assert json.loads(succeed("verify", model, out, "--json"))["whole"]


@needs_root
@pytest.mark.parametrize("kind", ["ext4-128", "exfat"])
def test_where_times_are_coarse_no_payload_is_read_to_recognise_a_tree(tmp_path, kind):
    model = expert_gguf(tmp_path, experts=8)
    at_time(model, 1_700_000_001_234_567_890)
    with file_system(kind, tmp_path, 100 * MIB) as at:
        succeed("materialize", model, at / "out")
        assert (at / "out/experts/registry.json").stat().st_mtime_ns == 1_700_000_001_000_000_000
        for dry in [[], ["--dry-run"]]:
            read, _ = bytes_read("materialize", model, at / "out", *dry)
            assert read < MIB


@needs_root
@pytest.mark.parametrize("kind", ["ext4-128", "exfat"])
def test_where_times_are_coarse_another_model_is_still_told_from_this_one(tmp_path, kind):
    ours = expert_gguf(tmp_path, experts=2)
    other = tmp_path / "other.gguf"
    other.write_bytes(ours.read_bytes()[:-5000] + bytes(5000))
    at_time(ours, 1_700_000_001_500_000_000)
    at_time(other, 1_700_000_003_500_000_000)
    with file_system(kind, tmp_path, 60 * MIB) as at:
        out = at / "out"
        succeed("materialize", other, out)
        before = contents(out)
        fail("materialize", ours, out, naming=["other bytes", "--force"])
        assert contents(out) == before
        done = odmoe("materialize", ours, out, "--force")
        assert done.returncode == 0 and "to compare: 4 files" in done.stderr
        assert re.match(r"wrote \d files", done.stdout)
        assert json.loads(succeed("verify", ours, out, "--json"))["identical"]
        assert "nothing to write: all" in succeed("materialize", ours, out)


@needs_root
@pytest.mark.parametrize("kind", ["exfat", "ext4-128"])
@promises("A run that is killed, or whose machine loses its power, at any moment leaves no wrong file, and the same command finishes the work.")
def test_a_tree_on_it_is_finished_and_verified(tmp_path, kind):
    """exFAT has no files without a name, no links, and no rename that refuses to replace."""
    model = expert_gguf(tmp_path, experts=6)
    with file_system(kind, tmp_path, 100 * MIB) as at:
        out = at / "out"
        succeed("materialize", model, out, "--verify")
        whole = contents(out)
        for name in ("experts/layer_00_expert_003.safetensors", "base_model/norms.safetensors", "base_model/metadata.json"):
            (out / name).unlink()
        (out / "experts/.odmoe-killed.tmp").write_bytes(bytes(100_000))
        succeed("materialize", model, out)
        assert contents(out) == whole
        (out / "experts/layer_00_expert_002.safetensors").write_text("theirs")
        fail("materialize", model, out, naming=["--force"])
        succeed("materialize", model, out, "--force")
        assert contents(out) == whole


# --- compared -------------------------------------------------------------------------------------------------------


def test_files_whose_time_differs_are_compared_with_progress_and_get_their_time(tmp_path):
    model = expert_gguf(tmp_path, experts=8)
    out = tmp_path / "out"
    succeed("materialize", model, out)
    whole, before = contents(out), looks(out)
    for path in files_of(out).values():
        os.utime(path, (1, 1))
    done = odmoe("materialize", model, out, "--jobs", 3)
    assert done.returncode == 0
    assert "to compare: 10 files, 27.04 MiB, that look complete but have another time" in done.stderr, done.stderr
    assert done.stdout.startswith("nothing to write but the documents")
    assert contents(out) == whole
    after = looks(out)
    assert {name: look[:3] for name, look in after.items() if name.endswith(".safetensors")} == {
        name: look[:3] for name, look in before.items() if name.endswith(".safetensors")
    }
    assert "to compare" not in odmoe("materialize", model, out).stderr


def test_of_files_that_were_not_chosen_those_of_this_model_stay_listed(tmp_path, small):
    out = tmp_path / "out"
    succeed("materialize", small[0], out)
    registry = (out / "experts/registry.json").read_bytes()
    for path in files_of(out).values():
        os.utime(path, (1, 1))
    succeed("materialize", small[0], out, "--experts-only", "--layers", "0", "--experts", "1")
    assert (out / "experts/registry.json").read_bytes() == registry


def test_one_wrong_byte_in_a_file_whose_time_differs_is_found(tmp_path, small):
    out = tmp_path / "out"
    succeed("materialize", small[0], out)
    victim = out / "experts/layer_01_expert_002.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    fail("materialize", small[0], out, naming=[victim, "other bytes", "--force"])
    fail("materialize", small[0], out, "--base-only", naming=[victim, "other bytes", "was not chosen"])
    assert victim.read_bytes() == data
    assert succeed("materialize", small[0], out, "--force").startswith("wrote 1 file,")
    assert json.loads(succeed("verify", small[0], out, "--json"))["identical"]


@needs_root
def test_files_of_another_user_are_compared_and_stay_as_they_are(public, nobody):
    (model,) = models.write_small(public)
    out = public / "out"
    succeed("materialize", model, out)
    for folder in (out, out / "experts", out / "base_model"):
        folder.chmod(0o777)
    old = out / "experts/layer_00_expert_001.safetensors"
    os.utime(old, (1, 1))
    for _ in range(2):
        done = odmoe("materialize", model, out, user=nobody)
        assert done.returncode == 0 and old.stat().st_mtime == 1
        assert "the time of 1 file" in done.stderr and str(old) in done.stderr and "cannot be set" in done.stderr
    assert json.loads(succeed("verify", model, out, "--json"))["whole"]


@needs_root
def test_room_for_files_that_turn_out_to_be_of_another_model_is_asked_for(tmp_path):
    ours = expert_gguf(tmp_path, experts=8)
    other = tmp_path / "other.gguf"
    data = bytearray(ours.read_bytes())
    for at in range(64 << 10, len(data), 64 << 10):
        data[at] ^= 1
    other.write_bytes(data)
    with file_system("tmpfs", tmp_path, 40 * MIB) as at:
        succeed("materialize", other, at / "out")
        before = contents(at / "out")
        fail("materialize", ours, at / "out", "--force", naming=["room for", "with --force"])
        assert contents(at / "out") == before


# --- a dry run ------------------------------------------------------------------------------------------------------


class Snapshot:
    """All that can be known of a folder without reading its files."""

    def __init__(self, folder):
        self.folder = folder
        self.paths = self._list()
        self.before = self._look()

    def _list(self):
        return [self.folder, *sorted(self.folder.rglob("*"))]

    def _look(self):
        return [os.lstat(path) for path in self.paths]

    def changes(self):
        # First of all, since listing is a use of folders.
        after = self._look()
        fields = [name for name in dir(os.stat_result) if name.startswith("st_")]
        looks = zip(self.paths, self.before, after, strict=True)
        changed = [(path, name) for path, old, new in looks for name in fields if getattr(old, name) != getattr(new, name)]
        return changed + [path for path in self._list() if path not in self.paths]


@needs_root
@promises("A dry run changes nothing in the target and compares no bytes.")
@pytest.mark.parametrize("flags", [[], ["--force"], ["--experts-only", "--layers", "0"], ["--reflink", "always"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_changes_nothing(tmp_path, kind, flags):
    model = expert_gguf(tmp_path, experts=4)
    with file_system(kind, tmp_path, 400 * MIB if kind in ("xfs", "btrfs") else 80 * MIB) as at:
        states = [at / "new/er", at / "half", at / "whole", at / "old"]
        for out in states[1:]:
            succeed("materialize", model, out, "--reflink", "never")
        for path in list(files_of(states[1]).values())[::2]:
            path.unlink()
        for path in files_of(states[3]).values():
            os.utime(path, (1, 1))
        for out in states[1:]:
            (out / "experts/.odmoe-killed.tmp").write_bytes(bytes(100_000))
        subprocess.run(["sync", "-f", at], check=True)
        before = Snapshot(at)
        for out in states:
            read, said = (0, "")
            done = odmoe("materialize", model, out, "--dry-run", *flags)
            assert done.returncode == 0 or "--reflink always" in " ".join(flags), done.stderr
            if done.returncode == 0:
                read, said = bytes_read("materialize", model, out, "--dry-run", *flags)
                assert ("to compare: " in said) == (out.name == "old"), said
                assert read < 2 * MIB, "nothing is compared"
        changed = before.changes()
        if kind == "exfat":  # its process keeps times of access by itself
            changed = [(path, name) for path, name in changed if "atime" not in name]
        assert changed == []


@needs_root
@pytest.mark.parametrize("kind", ["ext4", "ext4-128", "xfs", "btrfs", "tmpfs"])
def test_a_dry_run_of_a_finished_tree_on_a_file_system_that_is_read_only(tmp_path, kind):
    model = models.write_small(tmp_path)[0]
    with file_system(kind, tmp_path, 400 * MIB if kind in ("xfs", "btrfs") else 40 * MIB) as at:
        succeed("materialize", model, at / "out")
        subprocess.run(["mount", "-o", "remount,ro", at], check=True)
        said = succeed("materialize", model, at / "out", "--dry-run")
        assert "to write: 0 files" in said
        # How coarse its times are cannot be tried.
        assert "to compare" not in said
        assert succeed("materialize", model, at / "out").startswith("nothing to write: all files are complete")
        fail("materialize", model, at / "other", "--dry-run", naming=["Read-only file system"])


@needs_root
def test_a_dry_run_counts_on_the_room_of_what_a_killed_run_has_left(tmp_path):
    model = expert_gguf(tmp_path, experts=8)
    with file_system("tmpfs", tmp_path, 34 * MIB) as at:
        leftover = at / "out/experts/.odmoe-killed.tmp"
        leftover.parent.mkdir(parents=True)
        leftover.write_bytes(bytes(20 * MIB))
        before = Snapshot(at)
        succeed("materialize", model, at / "out", "--dry-run")
        assert before.changes() == []
        (at / "other").write_bytes(bytes(10 * MIB))
        fail("materialize", model, at / "out", "--dry-run", naming=["has room for"])
        assert leftover.exists()
        (at / "other").unlink()
        succeed("materialize", model, at / "out")


@needs_root
def test_a_finished_tree_needs_no_room_at_all(tmp_path):
    model = expert_gguf(tmp_path, experts=4)
    with file_system("tmpfs", tmp_path, 20 * MIB) as at:
        succeed("materialize", model, at / "out")
        with open(at / "filler", "wb") as filler:
            while True:
                try:
                    filler.write(bytes(65536))
                    filler.flush()
                except OSError:
                    break
        for dry in [[], ["--dry-run"]]:
            succeed("materialize", model, at / "out", *dry)


def test_a_copy_of_a_tree_is_recognised_by_its_bytes(tmp_path, small):
    """cp keeps no times."""
    succeed("materialize", small[0], tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    done = odmoe("materialize", small[0], tmp_path / "copy")
    assert done.returncode == 0 and "to compare" in done.stderr
    assert done.stdout.startswith("nothing to write but the documents")
