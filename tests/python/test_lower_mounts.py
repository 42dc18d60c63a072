"""A model that comes from a server or another program: what arrives there, by counts that do not wobble."""

import os
import subprocess
from pathlib import Path

import pytest

import models
from odmoe import BINARY, KIB, MIB, daemon_of, expert_gguf, failing_disk, mounted, needs_root, odmoe, promises, succeed
from reference import Shown

pytestmark = needs_root  # the lower mount lets everybody in

# What the kernel reads ahead of a FUSE file system, and so more than is wanted at the end of each matrix.
READ_AHEAD = 128 * KIB
FLAGS = [[], ["--stats"], ["--keep-source-cache"], ["--cache", "direct"]]


@pytest.fixture
def model(tmp_path):
    """Experts of 13.5 MiB."""
    (tmp_path / "store").mkdir()
    return expert_gguf(tmp_path / "store", experts=3, rows=8192)


@pytest.fixture
def lower(model, tmp_path):
    """The model on a file system of another program, which the kernel caches, as it does rclone's."""
    # One thread, so that requests are told in the order in which the kernel sends them.
    with failing_disk(model.parent, tmp_path, "--cached", "--threads", "1") as disk:
        yield disk


def expert(root, number):
    return root / f"experts/layer_00_expert_{number:03}.safetensors"


def read_in_order(path, block=MIB):
    with open(path, "rb", buffering=0) as file:
        return b"".join(iter(lambda: file.read(block), b""))


def reads(requests):
    return [(offset, offset + size) for kind, *rest in requests if kind == "read" for *_, offset, size in [rest]]


def turns(ranges):
    """How often a read did not go on where the one before had ended."""
    return sum(after[0] != before[1] for before, after in zip(ranges, ranges[1:], strict=False))


@promises(
    "A model on another FUSE or a network file system is read through one descriptor for each part, in order, by the read-ahead of the kernel alone."
)
@pytest.mark.parametrize("flags", FLAGS)
def test_an_expert_is_read_in_order_through_one_descriptor_and_once(model, lower, tmp_path, flags):
    with mounted(lower.at / model.name, tmp_path / "mnt", *flags) as root:
        shown = Shown([model], root)
        name = "experts/layer_00_expert_001.safetensors"
        payload = b"".join(bytes(shown.bytes[0][e.offset : e.offset + e.nbytes]) for e in shown.layout[name])
        before = len(lower.requests())
        assert read_in_order(root / name).endswith(payload)
        ranges = reads(lower.requests()[before:])
        # Of each of the three matrices a little more than was wanted, and nothing twice.
        fetched = sum(end - start for start, end in ranges)
        assert len(payload) <= fetched <= len(payload) + 3 * 2 * READ_AHEAD
        distinct = set()
        for start, end in ranges:
            distinct.update(range(start // 4096, -(-end // 4096)))
        assert 4096 * len(distinct) <= fetched + 4096 * len(ranges)
        # From matrix to matrix, and where requests overtook each other, more often on a busy machine.
        assert turns(ranges) <= 2 + len(ranges) // 6
        opens = [request for request in lower.requests() if request[0] == "open"]
        assert [request[1] for request in opens] == [model.name]
        assert all("direct" not in request for request in opens)
        held = [os.readlink(path) for path in Path(f"/proc/{daemon_of(root)}/fd").iterdir()]
        assert held.count(str(lower.at / model.name)) == 1


def test_a_look_at_every_header_fetches_little(model, lower, tmp_path):
    with mounted(lower.at / model.name, tmp_path / "mnt") as root:
        before = len(lower.requests())
        for number in range(3):
            with expert(root, number).open("rb", buffering=0) as file:
                file.read(4096)
        fetched = sum(end - start for start, end in reads(lower.requests()[before:]))
        assert fetched <= 3 * 2 * READ_AHEAD


@pytest.mark.parametrize("command", ["verify", "materialize"])
def test_other_commands_read_each_byte_about_once_through_one_descriptor(model, lower, tmp_path, command):
    arguments = [tmp_path / "out"] if command == "materialize" else []
    succeed(command, lower.at / model.name, *arguments)
    opens = [request for request in lower.requests() if request[0] == "open"]
    assert len(opens) == 1 and "direct" not in opens[0]
    if command == "materialize":
        fetched = sum(end - start for start, end in reads(lower.requests()))
        assert model.stat().st_size <= fetched + MIB and fetched <= 1.2 * model.stat().st_size
        succeed("verify", model, tmp_path / "out")


def test_each_part_of_a_split_set_is_read_as_its_own_file_system_is(tmp_path):
    """One part on a disk, which is read past the page cache, the other on a lower mount."""
    (tmp_path / "store").mkdir()
    (tmp_path / "set").mkdir()
    here, there = models.write_small(tmp_path / "store", rows=2000, split_max_tensors=6)
    with failing_disk(tmp_path / "store", tmp_path, "--cached", "--threads", "1") as lower:
        (tmp_path / "set" / here.name).write_bytes(here.read_bytes())
        (tmp_path / "set" / there.name).symlink_to(lower.at / there.name)
        with mounted(tmp_path / "set" / here.name, tmp_path / "mnt") as root:
            held = [os.readlink(path) for path in Path(f"/proc/{daemon_of(root)}/fd").iterdir()]
            assert held.count(str(tmp_path / "set" / here.name)) == 2
            assert held.count(str(lower.at / there.name)) == 1
            shown = Shown([here, there], root)
            for name in shown.expert_files():
                payload = b"".join(
                    bytes(shown.bytes[e.part][e.offset : e.offset + e.nbytes]) for e in shown.layout[name]
                )
                assert read_in_order(root / name).endswith(payload)
            assert {request[1] for request in lower.requests()} == {there.name}


def test_parts_that_are_opened_for_each_read_are_opened_as_their_file_system_is(tmp_path):
    """More parts than descriptors, all of them on a lower mount."""
    (tmp_path / "store").mkdir()
    paths = models.write_small(tmp_path / "store", split_max_tensors=1)
    with failing_disk(tmp_path / "store", tmp_path, "--cached", "--threads", "1") as lower:
        limit = ["prlimit", f"--nofile={2 * len(paths)}", "--"]
        (tmp_path / "mnt").mkdir()
        command = [*limit, BINARY, "mount", lower.at / paths[0].name, tmp_path / "mnt"]
        subprocess.run([str(word) for word in command], check=True)
        try:
            shown = Shown(paths, tmp_path / "mnt")
            for name in shown.expert_files():
                payload = b"".join(
                    bytes(shown.bytes[e.part][e.offset : e.offset + e.nbytes]) for e in shown.layout[name]
                )
                assert read_in_order(tmp_path / "mnt" / name).endswith(payload)
        finally:
            succeed("umount", tmp_path / "mnt")
        opens = [request for request in lower.requests() if request[0] == "open"]
        assert len(opens) > len(paths) and all("direct" not in request for request in opens)


def test_who_mounts_is_told_that_a_lower_mount_keeps_what_is_read(model, lower, tmp_path):
    (tmp_path / "mnt").mkdir()
    for flags, is_told in (([], True), (["--cache", "direct"], False), (["--keep-source-cache"], False)):
        done = odmoe("mount", lower.at / model.name, tmp_path / "mnt", *flags)
        succeed("umount", tmp_path / "mnt")
        assert done.returncode == 0
        assert ("in memory twice" in done.stderr) == is_told, flags
