"""A disk beneath the model that fails, hangs or reads short: who asked for those bytes learns it, and nobody else."""

import concurrent.futures
import contextlib
import errno
import os
import re
import signal
import subprocess
import sys

import pytest

from odmoe import (
    KIB,
    MIB,
    daemon_of,
    expert_gguf,
    fail,
    failing_blocks,
    failing_disk,
    files_of,
    mount_at,
    mounted,
    needs_root,
    odmoe,
    promises,
    succeed,
    wait_for,
)
from reference import Shown

pytestmark = needs_root  # the disk lets everybody in

BROKEN = "experts/layer_00_expert_001.safetensors"


@pytest.fixture(params=["page", "direct"])
def cache(request):
    return request.param


@pytest.fixture
def model(tmp_path):
    (tmp_path / "store").mkdir()
    return expert_gguf(tmp_path / "store", experts=4)


@pytest.fixture
def disk(model, tmp_path):
    """A file system of another program that fails."""
    with failing_disk(model.parent, tmp_path) as disk:
        yield disk


@pytest.fixture(params=["below", "blocks"])
def either_disk(request, model, tmp_path):
    """The same, or a disk whose blocks fail, which is read ahead past the page cache."""
    make = {"below": lambda: failing_disk(model.parent, tmp_path), "blocks": lambda: failing_blocks(model, tmp_path)}
    with make[request.param]() as disk:
        yield disk


@contextlib.contextmanager
def showing(model, disk, tmp_path, cache):
    with mounted(disk.at / model.name, tmp_path / "mnt", "--cache", cache, "--threads", "4") as root:
        yield Shown([model], root)


@pytest.fixture
def shown(model, disk, tmp_path, cache):
    """The mount of a model on the failing disk, and what its files hold."""
    with showing(model, disk, tmp_path, cache) as shown:
        yield shown


@pytest.fixture
def either_shown(model, either_disk, tmp_path, cache):
    with showing(model, either_disk, tmp_path, cache) as shown:
        yield shown


def expected(shown, name):
    """The payload of a file, and where it starts."""
    entries = shown.layout[name]
    payload = b"".join(bytes(shown.bytes[e.part][e.offset : e.offset + e.nbytes]) for e in entries)
    return (shown.root / name).stat().st_size - len(payload), payload


def read(path, offset, length):
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def read_whole(path):
    """In pieces, as loaders do; buffered reads would hand over what came before an error."""
    size = path.stat().st_size
    return b"".join(read(path, at, 64 * KIB) for at in range(0, size, 64 * KIB))


def assert_reads_well(shown, name):
    start, payload = expected(shown, name)
    assert read_whole(shown.root / name)[start:] == payload


def middle(shown, name, index=1):
    """A page of the model in the middle of a tensor of a file: its first byte there, and in the file."""
    start, _ = expected(shown, name)
    entries = shown.layout[name]
    place = start + sum(e.nbytes for e in entries[:index]) + entries[index].nbytes // 2
    offset = entries[index].offset + entries[index].nbytes // 2
    return offset, place


@promises("A read error of the disk is EIO for the reader of that range, and for nobody else.")
def test_a_read_error_is_eio_for_its_range_alone(either_shown, either_disk):
    shown, disk = either_shown, either_disk
    offset, place = middle(shown, BROKEN)
    disk.fails(("eio", offset, offset + 1))
    with pytest.raises(OSError) as caught:
        read(shown.root / BROKEN, place, 4096)
    assert caught.value.errno == errno.EIO
    for name in shown.expert_files():
        if name != BROKEN:
            assert_reads_well(shown, name)
    # And of the broken file, what is far from it.
    start, payload = expected(shown, BROKEN)
    assert read(shown.root / BROKEN, start, 64 * KIB) == payload[: 64 * KIB]
    assert read(shown.root / BROKEN, start + len(payload) - KIB, KIB) == payload[-KIB:]


@promises("A range that failed is read again when it is asked for again.")
def test_a_range_that_failed_is_read_again(either_shown, either_disk):
    shown, disk = either_shown, either_disk
    offset, place = middle(shown, BROKEN)
    disk.fails(("eio", offset, offset + 1))
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            read(shown.root / BROKEN, place, 4096)
    disk.fails()
    assert_reads_well(shown, BROKEN)


@promises("An error in bytes that were only read ahead reaches nobody who does not ask for them.")
def test_an_error_in_bytes_that_were_read_ahead_is_told_to_whoever_asks_for_them(either_shown, either_disk):
    """A sequential reader, far behind whom the disk fails: read ahead, it has failed long before it is asked for."""
    shown, disk = either_shown, either_disk
    offset, place = middle(shown, BROKEN, index=2)
    disk.fails(("eio", offset, offset + 1))
    start, payload = expected(shown, BROKEN)
    far = place - 256 * KIB
    for at in range(0, far, 128 * KIB):
        got = read(shown.root / BROKEN, at, 128 * KIB)
        assert len(got) == 128 * KIB
        if at >= start:
            assert got == payload[at - start : at - start + 128 * KIB]
    with pytest.raises(OSError, match="Input/output"):
        read(shown.root / BROKEN, place, 4096)
    disk.fails()
    assert read(shown.root / BROKEN, place, 4096) == payload[place - start : place - start + 4096]


@promises(
    "The log names the file, the range and the part of a read that failed; of a part that goes on failing it tells every ten seconds at most."
)
@pytest.mark.parametrize("flags", [[], ["--stats"], ["--cache", "direct"]])
def test_the_log_of_a_dying_disk_names_files_and_ranges_and_is_short(model, disk, tmp_path, flags):
    log, reads = tmp_path / "log", 300
    with mounted(disk.at / model.name, tmp_path / "mnt", *flags, "--log-file", log) as root:
        offset, place = middle(Shown([model], root), BROKEN)
        disk.fails(("eio", 0, 1 << 40))
        for _ in range(reads):
            with pytest.raises(OSError, match="Input/output"):
                read(root / BROKEN, place, 4096)
        disk.fails()
    errors = [line.split("ERROR ")[1] for line in log.read_text().splitlines() if " ERROR " in line]
    request = rf'read "{BROKEN}": (\d+) bytes at (\d+)'
    found = re.match(rf'{request}: "{disk.at / model.name}" cannot be read at byte \d+: Input/output error', errors[0])
    length, start = int(found[1]), int(found[2])
    assert start <= place < start + length
    # One, one for each ten seconds that it took, and one at the end.
    assert len(errors) < 30
    told = sum(int(n) for line in errors for n in re.findall(r"(?<=\(and )\d+|\d+(?= more reads? ha)", line))
    assert told + sum(line.startswith("read ") for line in errors) >= reads


@promises("A read gives all bytes that it asks for, up to the end of the file, or an error; never a short answer.")
@pytest.mark.parametrize("length", [1, 4096, 70_000, MIB])
def test_a_disk_that_reads_short_gives_whole_answers(shown, disk, length):
    disk.fails(("short", 0, 1 << 40))
    start, payload = expected(shown, BROKEN)
    with open(shown.root / BROKEN, "rb", buffering=0) as file:
        for at in range(start, start + len(payload), 3 * length + 123_457):
            got = os.pread(file.fileno(), length, at)
            assert got == payload[at - start : at - start + length]


@promises("A read gives all bytes that it asks for, up to the end of the file, or an error; never a short answer.")
def test_a_disk_that_reads_nothing_is_an_error(shown, disk):
    offset, place = middle(shown, BROKEN)
    disk.fails(("empty", offset, offset + 1))
    with pytest.raises(OSError, match="Input/output"):
        read(shown.root / BROKEN, place, 4096)
    disk.fails()
    assert_reads_well(shown, BROKEN)


@promises("A disk that hangs holds up the readers of that range; others are served as long as worker threads are left.")
def test_a_disk_that_hangs_holds_up_only_who_reads_there(shown, disk):
    offset, place = middle(shown, BROKEN)
    _, payload = expected(shown, BROKEN)
    disk.fails(("hang", offset, offset + 1))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, shown.root / BROKEN, place, 4096)
        for name in shown.expert_files():
            if name != BROKEN:
                assert_reads_well(shown, name)
        assert sorted(os.listdir(shown.root)) == ["base_model", "experts"]
        assert not waiting.done()
        disk.fails()
        start, _ = expected(shown, BROKEN)
        assert waiting.result(60) == payload[place - start : place - start + 4096]


@promises("A reader that is killed in the middle of a read leaves nothing behind.")
def test_a_reader_that_is_killed_in_mid_read_leaves_nothing_behind(shown, disk):
    offset, place = middle(shown, BROKEN)
    daemon = daemon_of(shown.root)
    descriptors = len(os.listdir(f"/proc/{daemon}/fd"))
    disk.fails(("hang", offset, offset + 1))
    code = f"import os; os.pread(os.open({str(shown.root / BROKEN)!r}, os.O_RDONLY), 4096, {place})"
    # As many as there are workers would hold up the others.
    readers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    wait_for(lambda: all("S" in state(r.pid) or "D" in state(r.pid) for r in readers))
    for reader in readers:
        reader.kill()
    assert_reads_well(shown, "experts/layer_00_expert_003.safetensors")
    disk.fails()
    assert [reader.wait(60) for reader in readers] == [-signal.SIGKILL] * 3
    assert_reads_well(shown, BROKEN)
    assert len(os.listdir(f"/proc/{daemon}/fd")) <= descriptors + 1  # opened for reading past the cache


def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_map_of_a_broken_range_is_sigbus_for_its_reader_alone(shown, disk):
    offset, place = middle(shown, BROKEN)
    disk.fails(("eio", offset, offset + 1))
    code = f"import mmap; f = open({str(shown.root / BROKEN)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); m[{place}]"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGBUS
    disk.fails()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert_reads_well(shown, BROKEN)


def test_a_model_whose_header_cannot_be_read_is_an_error_that_names_it(model, disk, tmp_path):
    disk.fails(("eio", 0, 100))
    hint = "check the disk; `sudo dmesg` lists its errors"
    (tmp_path / "mnt").mkdir()
    for command in (["inspect"], ["verify"], ["mount", tmp_path / "mnt"], ["materialize", tmp_path / "out"]):
        fail(command[0], disk.at / model.name, *command[1:], naming=[model.name, "Input/output error", hint])
    assert mount_at(tmp_path / "mnt") is None and not (tmp_path / "out").exists()


def test_materialize_ends_with_an_error_that_names_the_place_and_goes_on_when_the_disk_does(model, disk, tmp_path):
    out = tmp_path / "out"
    offset = model.stat().st_size // 2
    disk.fails(("eio", offset, offset + 1))
    fail("materialize", disk.at / model.name, out, naming=[model.name, "at byte", "Input/output error"])
    done = [path for name, path in files_of(out).items() if name.endswith(".safetensors")]
    for path in done:  # complete, or not there
        assert path.stat().st_size > 0
    assert not [name for name in files_of(out) if ".tmp" in name]
    disk.fails(("short", 0, 1 << 40))
    succeed("materialize", disk.at / model.name, out)
    disk.fails()
    succeed("verify", model, out)


def test_verify_tells_a_tree_that_cannot_be_read_from_a_model_that_cannot(model, disk, tmp_path):
    out = tmp_path / "out"
    succeed("materialize", model, out)
    offset = model.stat().st_size // 2
    disk.fails(("eio", offset, offset + 1))
    fail("verify", disk.at / model.name, out, naming=[model.name, "Input/output error"])
    with mounted(disk.at / model.name, tmp_path / "mnt") as root:
        done = odmoe("verify", model, root)
        assert done.returncode == 3
        assert "cannot be read (Input/output error" in done.stdout and " of the model)" in done.stdout
