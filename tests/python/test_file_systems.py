"""`materialize` on real file systems: sharing, holes, full disks, caches and memory, by what the kernel itself counts."""

import contextlib
import fcntl
import filecmp
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from odmoe import (
    BINARY,
    DOCUMENTS,
    MIB,
    cached,
    counters,
    evict,
    expert_gguf,
    fail,
    file_system,
    files_of,
    needs_root,
    odmoe,
    promises,
    sparse_gguf,
    succeed,
    wait_for,
)

pytestmark = needs_root

SHARING = ["xfs", "btrfs"]
# Bytes of one matrix of an expert of `expert_gguf`, 288 pages: all of an expert can be shared, but the pages that two
# matrices meet in.
MATRIX = 1024 * 2048 // 256 * 144


@pytest.fixture
def room_for(tmp_path):
    """Makes file systems that last as long as the test."""
    with contextlib.ExitStack() as stack:
        yield lambda kind, size=400 * MIB: stack.enter_context(file_system(kind, tmp_path, size))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return expert_gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model):
    """The tree, copied."""
    out = model.with_name("whole")
    succeed("materialize", model, out, "--reflink", "never")
    return out


def assert_same(out, whole):
    assert set(files_of(out)) == set(files_of(whole))
    _, different, unread = filecmp.cmpfiles(out, whole, files_of(whole), shallow=False)
    assert not different and not unread


def free(at):
    """Free bytes when all is written."""
    fd = os.open(at, os.O_RDONLY)
    try:
        subprocess.run(["sync", "-f", at], check=True)
        stat = os.fstatvfs(fd)
        return stat.f_bfree * stat.f_frsize
    finally:
        os.close(fd)


def payload(whole):
    return sum(path.stat().st_size for path in files_of(whole).values())


def incongruent(model):
    return json.loads(succeed("inspect", model, "--json"))["tree"]["incongruent_bytes"]


@pytest.mark.parametrize("how", ["auto", "always"])
@pytest.mark.parametrize("kind", SHARING)
def test_sharing_takes_only_the_bytes_that_no_page_of_the_model_holds(model, whole, room_for, kind, how):
    at = room_for(kind)
    here = shutil.copy(model, at)
    before = free(at)
    succeed("materialize", here, at / "out", "--reflink", how)
    taken = before - free(at)
    assert_same(at / "out", whole)
    files = len(files_of(whole))
    # Pages of data, then an inode each; folders, and trees of the file system that grow, once.
    assert taken <= incongruent(model) + files * (16384 + 512) + 256 * 1024
    assert taken < payload(whole) / 20


@pytest.mark.parametrize("show", ["base", "base,experts", "base,experts,hf,joined"])
def test_inspect_says_what_would_be_shared_of_the_tree_that_is_shown(show, room_for):
    at = room_for("xfs")
    succeed("toy", at / "toy.gguf", "--arch", "qwen3moe", "--type", "q4_k")
    said = succeed("inspect", at / "toy.gguf", "--show", show)
    planned = odmoe("materialize", at / "toy.gguf", at / "out", "--show", show, "--dry-run")
    planned = planned.stdout + planned.stderr
    shared, copied = re.search(r"it shares (\S+ \S+)\s+with the model, and (\S+ \S+) are copied", said).groups()
    assert f"{shared} share disk blocks" in planned and f" {copied} are copied" in planned


@pytest.mark.parametrize("kind", SHARING)
def test_where_sharing_is_not_wanted_every_byte_is_copied(model, whole, room_for, kind):
    at = room_for(kind)
    here = shutil.copy(model, at)
    before = free(at)
    succeed("materialize", here, at / "out", "--reflink", "never")
    assert before - free(at) >= payload(whole)
    assert_same(at / "out", whole)


def test_sharing_that_is_demanded_but_impossible_is_an_error_with_the_reason(model, room_for, tmp_path):
    xfs, tmpfs = room_for("xfs"), room_for("tmpfs")
    on_tmpfs = shutil.copy(model, tmpfs)
    for source, out, reason in [
        (model, tmp_path / "out", "as XFS and btrfs do"),
        (on_tmpfs, tmpfs / "out", "as XFS and btrfs do"),
        (model, xfs / "out", "another file system"),
    ]:
        for dry in [[], ["--dry-run"]]:
            fail("materialize", source, out, "--reflink", "always", *dry, naming=[out, reason])
            assert not out.exists()


def test_what_cannot_be_shared_is_copied(model, whole, room_for):
    xfs, tmpfs = room_for("xfs"), room_for("tmpfs")
    succeed("materialize", model, xfs / "out")
    assert_same(xfs / "out", whole)
    # Within tmpfs the kernel copies by itself, if it may; there is no way past a cache there.
    for how in ("auto", "never"):
        succeed("materialize", shutil.copy(model, tmpfs), tmpfs / how, "--reflink", how)
        assert_same(tmpfs / how, whole)


def test_a_disk_with_room_for_nothing_but_sharing_is_enough(model, whole, room_for):
    xfs = room_for("xfs")
    here = shutil.copy(model, xfs)
    subprocess.run(["fallocate", "-l", str(free(xfs) - payload(whole) // 2), xfs / "filler"], check=True)
    fail("materialize", here, xfs / "out", "--reflink", "never", naming=["room"])
    assert not (xfs / "out").exists()
    succeed("materialize", here, xfs / "out")
    assert_same(xfs / "out", whole)


@contextlib.contextmanager
def held_before_it_writes(*arguments):
    """A run that waits after its plan was made, until the end of the block: nobody listens to what it has to say."""
    reads, writes = os.pipe()
    size = fcntl.fcntl(writes, fcntl.F_GETPIPE_SZ)
    os.write(writes, b"." * size)
    process = subprocess.Popen([BINARY, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=writes)
    os.close(writes)
    try:
        wait_for(lambda: "pipe_write" in Path(f"/proc/{process.pid}/wchan").read_text())
        yield process
        with os.fdopen(reads, "rb") as said:
            process.said = said.read()[size:].decode()
        process.wait()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs"])
def test_a_disk_that_fills_up_meanwhile_costs_no_file_its_truth(model, whole, room_for, kind):
    at = room_for(kind)
    out, filler = at / "out", at / "filler"
    with held_before_it_writes("materialize", model, out) as process:
        subprocess.run(["fallocate", "-l", str(free(at) - payload(whole) // 2), filler], check=True)
    assert process.returncode == 1
    assert "No space left" in process.said and str(out) in process.said, process.said
    written = files_of(out)
    assert not set(written) - set(files_of(whole)), "temporary files are left"
    assert not filecmp.cmpfiles(out, whole, written, shallow=False)[1]
    fail("materialize", model, out, naming=["room"])
    filler.unlink()
    succeed("materialize", model, out)
    assert_same(out, whole)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs"])
def test_what_a_killed_run_has_left_does_not_stand_in_the_way_of_the_next(model, whole, room_for, kind):
    at = room_for(kind)
    out = at / "out"
    leftover = out / "experts" / ".odmoe-killed.tmp"
    leftover.parent.mkdir(parents=True)
    subprocess.run(["fallocate", "-l", str(free(at) - payload(whole) // 2), leftover], check=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        fail("materialize", model, out, naming=["another odmoe-fs"])
        assert leftover.exists(), "it may be of the run that holds the lock"
    finally:
        os.close(folder)
    succeed("materialize", model, out)
    assert_same(out, whole)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_holes_of_the_model_stay_holes(room_for, kind):
    at = room_for(kind)
    sparse = expert_gguf(at)
    # Odd places, so that holes end within pages of the files.
    for start, length in [(MIB, 5 * MIB + 4096), (MATRIX * 9, MATRIX), (MATRIX * 20, 3 * MATRIX)]:
        start -= start % 4096
        subprocess.run(["fallocate", "-p", "-o", str(start), "-l", str(length), sparse], check=True)
    dense = at / "dense.gguf"
    subprocess.run(["cp", "--sparse=never", "--reflink=never", sparse, dense], check=True)
    os.utime(dense, ns=(sparse.stat().st_mtime_ns,) * 2)
    before = free(at)
    succeed("materialize", sparse, at / "out", "--reflink", "never")
    taken = before - free(at)
    succeed("materialize", dense, at / "expected", "--reflink", "never")
    assert_same(at / "out", at / "expected")
    assert taken <= sparse.stat().st_blocks * 512 + 32768 * len(files_of(at / "out"))
    succeed("materialize", sparse, at / "shared")
    assert_same(at / "shared", at / "expected")


def test_a_model_of_hundreds_of_gigabytes_of_holes_takes_memory_and_disk_for_none_of_them(tmp_path):
    kimi = sparse_gguf("kimi-k2.5-q4_k_m", tmp_path / "kimi.gguf", "--tokenizer", "--splits", 9)
    limit = 100 * MIB
    out = tmp_path / "out"
    held = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))}
    succeed("materialize", kimi[0], out, "--jobs", 8, **held)
    assert sum(1 for _ in (out / "experts").iterdir()) == 23041
    sizes = [(path.stat().st_size, path.stat().st_blocks * 512) for path in files_of(out).values()]
    assert sum(size for size, _ in sizes) > 500 << 30
    assert sum(stored for _, stored in sizes) < 300 * MIB
    shutil.rmtree(out)


def test_memory_does_not_grow_with_what_is_copied(tmp_path):
    model = expert_gguf(tmp_path, experts=64)
    limit = 100 * MIB
    held = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))}
    succeed("materialize", model, tmp_path / "out", "--jobs", 8, "--verify", **held)


def bytes_read(*arguments):
    """What a run has read by system calls, of whatever file."""
    process = subprocess.Popen([BINARY, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    read = counters(process.pid)["rchar"]
    assert process.wait() == 0
    return read


def resident(path):
    with path.open("rb") as file:
        return cached(file)


def headers(whole):
    """Bytes in front of the payload of each safetensors file, and of the other files all."""

    def header(path):
        if path.suffix == ".safetensors":
            return 8 + int.from_bytes(path.read_bytes()[:8], "little")
        return path.stat().st_size

    return {name: header(path) for name, path in files_of(whole).items()}


def test_a_finished_tree_is_recognised_without_reading_payload(model, whole):
    before = headers(whole)
    for path in files_of(whole).values():
        evict(path)
    read = bytes_read("materialize", model, whole)
    # Besides them the binary's own libraries, and the header of the model.
    assert read <= 3 * sum(before.values()) + 512 * 1024 < payload(whole) / 10
    for name, path in files_of(whole).items():
        if name not in DOCUMENTS:
            assert resident(path) <= -(-before[name] // 4096) * 4096, "payload was read ahead"


@pytest.mark.parametrize("kind", ["ext4", "xfs"])  # btrfs reads megabytes ahead of the header
@promises("What was read of a model on a disk is in memory once, and what other programs have cached of it stays cached.")
def test_what_others_have_cached_of_the_model_stays_and_nothing_is_added(model, whole, room_for, kind):
    at = room_for(kind)
    here, out = Path(shutil.copy(model, at)), at / "out"
    evict(here)
    with here.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 4 * MIB, 10 * MIB)
    before = resident(here)
    assert before >= 4 * MIB
    succeed("materialize", here, out, "--reflink", "never")
    # Opening a model reads a little ahead of its header.
    assert before <= resident(here) <= before + MIB
    assert sum(resident(path) for path in files_of(out).values()) <= MIB


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_run_that_is_killed_again_and_again_leaves_no_wrong_file(model, whole, room_for, kind):
    at = room_for(kind)
    here, out = shutil.copy(model, at), at / "out"
    os.utime(here, ns=(model.stat().st_mtime_ns,) * 2)
    dice = random.Random(1)
    for _ in range(15):
        process = subprocess.Popen(
            [BINARY, "materialize", here, out, "--reflink", "never"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = [name for name in files_of(out) if name in files_of(whole)]
        documents = [name for name in found if name in DOCUMENTS]
        assert not filecmp.cmpfiles(out, whole, found, shallow=False)[1], documents
        if dice.random() < 0.3:
            shutil.rmtree(out, ignore_errors=True)
    succeed("materialize", here, out)
    assert_same(out, whole)


def test_verify_finds_one_wrong_bit_and_says_where(model, tmp_path):
    out = tmp_path / "out"
    assert "verified" in succeed("materialize", model, out, "--verify")
    victim = out / "experts/layer_00_expert_003.safetensors"
    before = victim.stat()
    offset = headers(out)["experts/layer_00_expert_003.safetensors"] + MATRIX + 12345
    with victim.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    succeed("materialize", model, out)
    fail("materialize", model, out, "--verify", naming=[victim, '"w1.weight"', f"byte {offset}"])
    victim.unlink()
    succeed("materialize", model, out, "--verify")


def test_force_replaces_what_is_in_the_way(model, whole, tmp_path):
    out = tmp_path / "out"
    names = [f"experts/layer_00_expert_{n:03}.safetensors" for n in range(3)]
    (out / "experts").mkdir(parents=True)
    (out / names[0]).write_text("a user's own file")
    (out / names[1]).symlink_to(tmp_path / "elsewhere")
    (out / "experts/registry.json").write_text("{}, but not of this model")
    fail("materialize", model, out, naming=["--force"])
    succeed("materialize", model, out, "--force")
    assert_same(out, whole)
    assert not (out / names[1]).is_symlink() and not (tmp_path / "elsewhere").exists()
    # A folder is not replaced by a file.
    (out / names[2]).unlink()
    (out / names[2]).mkdir()
    fail("materialize", model, out, "--force", naming=[names[2]])


def test_a_dry_run_says_what_is_shared_copied_and_left_out(model, room_for):
    def figures(*arguments):
        done = odmoe("materialize", *arguments, "--dry-run")
        assert done.returncode == 0, done.stderr
        return done.stdout

    xfs = room_for("xfs")
    here = shutil.copy(model, xfs)
    names = sorted(os.listdir(xfs))
    shares, copies = figures(here, xfs / "out"), figures(here, xfs / "out", "--reflink", "never")
    assert "MiB share disk blocks" in shares and " 0 B share disk blocks" in copies
    assert " 0 B are holes" in shares
    assert sorted(os.listdir(xfs)) == names
    holes = expert_gguf(xfs, "--alignment", 32)
    assert "MiB are holes" in figures(holes, xfs / "out")
