"""What reading through a mount costs, by counts that do not wobble: requests, pages in memory, bytes read of the model."""

import collections
import contextlib
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import safe_open

from odmoe import (
    KIB,
    MIB,
    anonymous,
    cached,
    counters,
    daemon_of,
    evict,
    expert_gguf,
    fail,
    file_system,
    mount_at,
    mounted,
    needs_root,
    odmoe,
    promises,
    succeed,
    wait_for,
)
from reference import Shown

EXPERTS = 16
# Whose pages of an expert lie in pages of the model: all but a few.
FILE_SYSTEMS = ["ext4", "xfs", "btrfs"]
# In pages of either cache: the header of the model, and what mounting and listing read.
SLACK = MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """54 MiB of experts."""
    return expert_gguf(tmp_path_factory.mktemp("model"), experts=EXPERTS)


@pytest.fixture(scope="module", params=FILE_SYSTEMS)
def on_disk(request, model, tmp_path_factory):
    """The model on a file system of a disk."""
    with file_system(request.param, tmp_path_factory.mktemp("disk"), 400 * MIB) as at:
        yield Path(shutil.copy(model, at))


@contextlib.contextmanager
def cold(model, where, *flags, **options):
    """A mount of a model of which nothing is in memory, and the daemon."""
    evict(model)
    with mounted(model, where, *flags, **options) as root:
        evict(model)
        yield root, daemon_of(root)


def expert_files(root):
    return sorted((root / "experts").glob("*.safetensors"))


def read_in_order(path, block=MIB):
    """Reads every byte of a file; returns how many there are, and how many are in the page cache then."""
    buffer = bytearray(block)
    with open(path, "rb", buffering=0) as file:
        size = 0
        while n := file.readinto(buffer):
            size += n
        return size, cached(file)


def map_in_order(path):
    with open(path, "rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for at in range(0, len(mapped), 4096):
            _ = mapped[at]
        return len(mapped), cached(file)


# --- requests -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tracing():
    """The kernel's folder for tracing."""
    usual = Path("/sys/kernel/tracing")
    if (usual / "instances").is_dir():
        yield usual
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tracefs", "none", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def requests_to(root):
    """Counts the requests to the daemon of a mount by kind; the counts are there after the block."""
    counts = collections.Counter()
    device = re.search(rf" 0:(\d+) \S+ {re.escape(str(root))} ", Path("/proc/self/mountinfo").read_text())[1]
    with tracing() as trace_folder:
        if not (trace_folder / "events/fuse/fuse_request_send").is_dir():
            pytest.skip("this kernel traces no requests of FUSE")
        ours = trace_folder / f"instances/odmoe-tests-{os.getpid()}"
        ours.mkdir()
        try:
            event = ours / "events/fuse/fuse_request_send"
            (event / "filter").write_text(f"connection == {device}")
            (event / "enable").write_text("1")
            yield counts
            (event / "enable").write_text("0")
            trace = (ours / "trace").read_text()
            kept, written = re.search(r"entries-in-buffer/entries-written: (\d+)/(\d+)", trace).groups()
            assert kept == written, "the buffer is too small"
            counts.update(re.findall(r"\(FUSE_(\w+)\)", trace))
        finally:
            ours.rmdir()


def open_and_look(path, times):
    for _ in range(times):
        fd = os.open(path, os.O_RDONLY)
        os.pread(fd, 4096, 0)
        os.close(fd)


@needs_root
def test_opening_a_cached_file_again_and_again_asks_the_daemon_nothing(model, tmp_path):
    with cold(model, tmp_path / "mnt") as (root, daemon):
        path = expert_files(root)[0]
        read_in_order(path)
        os.stat(path)
        before = counters(daemon)["syscr"]
        with requests_to(root) as requests:
            open_and_look(path, 100_000)
        assert counters(daemon)["syscr"] == before
        assert not requests


@needs_root
def test_looking_at_every_file_opens_none_of_them(model, tmp_path):
    with cold(model, tmp_path / "mnt") as (root, _), requests_to(root) as requests:
        for path in expert_files(root):
            open_and_look(path, 2)
    # The kernel asks once whether it must ask.
    assert requests["OPEN"] <= 1 and requests["OPENDIR"] <= 1 and requests["FLUSH"] <= 1
    assert not requests["RELEASE"] and not requests["RELEASEDIR"]
    assert requests["READ"] <= 2 * EXPERTS


@needs_root
@pytest.mark.parametrize("size", [128 * KIB, 512 * KIB, MIB])
def test_requests_are_as_large_as_was_asked_for(model, tmp_path, size):
    flags = [] if size == 128 * KIB else ["--readahead", f"{size // KIB}K"]
    with cold(model, tmp_path / "mnt", *flags) as (root, _):
        device = os.stat(root).st_dev
        granted = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
        assert int(granted) == size // KIB
        files = expert_files(root)
        with requests_to(root) as requests:
            read = sum(read_in_order(path)[0] for path in files)
    fewest = read / size
    # Of each file the last one is cut by its end, and another the kernel sends when its window moves.
    assert fewest <= requests["READ"] <= fewest + 2 * len(files)


@needs_root
def test_a_normal_user_is_told_what_root_can_do_for_larger_requests(public, nobody):
    model = expert_gguf(public, experts=1)
    where = public / "mnt"
    where.mkdir()
    os.chown(where, nobody.uid, nobody.gid)
    try:
        done = odmoe("mount", model, where, "--readahead", "1M", user=nobody)
        assert done.returncode == 0 and mount_at(where)
        (said,) = [line for line in done.stderr.splitlines() if "read-ahead" in line]
        command = re.search(r"echo 1024 \| sudo tee (/sys/class/bdi/\S+/read_ahead_kb)", said)
        assert command and Path(command[1]).read_text() == "128\n"
        subprocess.run(["sh", "-c", command[0].replace("sudo ", "")], check=True, capture_output=True)
        assert Path(command[1]).read_text() == "1024\n"
    finally:
        succeed("umount", where, user=nobody)


def read_ahead_kib(where):
    return int(Path(f"/sys/class/bdi/{mount_at(where).device}/read_ahead_kb").read_text())


@needs_root
@pytest.mark.parametrize("flags, kib", [([], 256), (["--readahead", "64K"], 64), (["--readahead", "128K"], 128)])
@pytest.mark.parametrize("form", ["mlx", "bf16"])
def test_what_is_computed_is_asked_for_in_larger_pieces_if_root_mounts(model, tmp_path, form, flags, kib):
    with mounted(model, tmp_path / "mnt", "--as", form, *flags) as root:
        assert read_ahead_kib(root) == kib


@needs_root
def test_a_normal_user_gets_the_kernel_s_pieces_of_what_is_computed_without_a_word(public, nobody):
    model = expert_gguf(public, experts=1)
    where = public / "mnt"
    where.mkdir()
    os.chown(where, nobody.uid, nobody.gid)
    done = odmoe("mount", "--as", "bf16", model, where, user=nobody)
    try:
        assert done.returncode == 0 and done.stderr == "" and read_ahead_kib(where) == 128
    finally:
        succeed("umount", where, user=nobody)


@needs_root
def test_a_read_ahead_beyond_what_requests_may_hold_is_granted_with_a_remark(model, tmp_path):
    (tmp_path / "mnt").mkdir()
    done = odmoe("mount", model, tmp_path / "mnt", "--readahead", "16M")
    succeed("umount", tmp_path / "mnt")
    limit = Path("/proc/sys/fs/fuse/max_pages_limit")
    pages = int(limit.read_text()) if limit.exists() else 256
    assert done.returncode == 0
    assert done.stderr.count("fs.fuse.max_pages_limit=4096") == (pages < 4096)


@pytest.mark.parametrize("size", ["0", "1.5M", "32M", "x", "", "-1", "4095"])
def test_a_read_ahead_that_is_no_size_is_wrong_usage(model, tmp_path, size):
    (tmp_path / "mnt").mkdir()
    fail("mount", model, tmp_path / "mnt", f"--readahead={size}", status=2, naming=["--readahead", "4K to 16M"])


# --- memory ---------------------------------------------------------------------------------------------------------


def pages_after(read, model, where, *flags):
    """What is read of all experts, and what of them and of the model is in memory then."""
    with cold(model, where, *flags) as (root, _), open(model, "rb") as source:
        sizes, ours = zip(*map(read, expert_files(root)), strict=True)
        return sum(sizes), sum(ours), cached(source)


@needs_root
@pytest.mark.parametrize("read", [read_in_order, map_in_order])
@promises("What was read of a model on a disk is in memory once, and what other programs have cached of it stays cached.")
def test_what_was_read_is_in_memory_once(on_disk, tmp_path, read):
    size, ours, source = pages_after(read, on_disk, tmp_path / "mnt")
    assert size <= ours <= size + EXPERTS * 4096
    assert ours + source <= 1.02 * size


@needs_root
def test_the_model_s_pages_stay_if_that_is_wanted(on_disk, tmp_path):
    size, ours, source = pages_after(read_in_order, on_disk, tmp_path / "mnt", "--keep-source-cache")
    assert ours >= size and source >= 0.98 * size


@needs_root
def test_direct_reads_leave_the_model_s_pages_and_none_of_their_own(on_disk, tmp_path):
    size, ours, source = pages_after(read_in_order, on_disk, tmp_path / "mnt", "--cache", "direct")
    assert ours == 0
    assert 0.98 * size <= source <= 1.02 * size + SLACK


@needs_root
def test_what_others_have_cached_of_the_model_stays_cached(on_disk, tmp_path):
    half = EXPERTS // 2 * 1024 * 2048 // 256 * 144  # of the first stack
    with cold(on_disk, tmp_path / "mnt") as (root, _), open(on_disk, "rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(source.fileno(), half, 0)) == half
        before = cached(source)
        assert before >= half
        size = sum(read_in_order(path)[0] for path in expert_files(root))
        assert size > 5 * half
        assert before <= cached(source) <= before + 0.02 * size


@needs_root
@promises("The memory of the daemon does not grow with what is read.")
def test_the_daemon_s_memory_is_bounded_whatever_is_read(model, tmp_path):
    with cold(model, tmp_path / "mnt") as (root, daemon), ThreadPoolExecutor(EXPERTS) as pool:
        reads = [pool.submit(read_in_order, path) for path in expert_files(root)]
        most = 0

        def finished():
            nonlocal most
            most = max(most, anonymous(daemon))
            return all(read.done() for read in reads)

        wait_for(finished)
        assert all(read.result()[0] > 3 * MIB for read in reads)
    assert 0 < most <= 64 * MIB


# --- bytes of the model ---------------------------------------------------------------------------------------------


def look_by_safe_open(path):
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == {"w1.weight", "w2.weight", "w3.weight"}


def look_by_reads(path):
    with open(path, "rb") as file:
        assert b"w3.weight" in file.read(int.from_bytes(file.read(8), "little"))


@needs_root
@pytest.mark.parametrize("look", [look_by_safe_open, look_by_reads])
def test_a_look_at_a_header_reads_little_of_the_model(on_disk, tmp_path, look):
    with cold(on_disk, tmp_path / "mnt") as (root, daemon):
        files = expert_files(root)
        assert all(path.stat().st_size > 3 * MIB for path in files)
        before = counters(daemon)
        for path in files:
            look(path)
        after = counters(daemon)
    for what in ("rchar", "read_bytes"):
        assert after[what] - before[what] <= len(files) * 160 * KIB, what


@needs_root
def test_every_byte_of_the_model_is_read_once(on_disk, tmp_path):
    with cold(on_disk, tmp_path / "mnt") as (root, daemon):
        before = counters(daemon)["read_bytes"]
        size = sum(read_in_order(path)[0] for path in expert_files(root))
        read = counters(daemon)["read_bytes"] - before
    assert 0.98 * size <= read <= 1.02 * size


@needs_root
@promises("Any number of readers may read at once, whatever the number of worker threads.")
def test_many_parallel_readers_get_the_right_bytes(model, tmp_path):
    with cold(model, tmp_path / "mnt") as (root, _):
        shown = Shown([model], root)

        def read(name, quarter):
            """A quarter of a file in order, in blocks of an odd size."""
            path, entries = root / name, shown.layout[name]
            whole = b"".join(shown.bytes[0][e.offset : e.offset + e.nbytes] for e in entries)
            start = path.stat().st_size - len(whole)
            with open(path, "rb", buffering=0) as file:
                for at in range(len(whole) * quarter // 4, len(whole) * (quarter + 1) // 4, 70_000):
                    assert os.pread(file.fileno(), 70_000, start + at) == whole[at : at + 70_000]

        work = [(name, quarter) for name in shown.expert_files() for quarter in range(4)]
        assert len(work) == 64
        barrier = threading.Barrier(len(work))
        _ = shown.bytes, shown.layout
        evict(model)
        with ThreadPoolExecutor(len(work)) as pool:
            list(pool.map(lambda w: (barrier.wait(), read(*w)), work))
