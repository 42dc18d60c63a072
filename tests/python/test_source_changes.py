"""What readers get when the model changes under the mount: section 1.6 of the contract."""

import errno
import os
import resource

import pytest

import models
from odmoe import KIB, MIB, ask, evict, expert_gguf, foreground, mounted, needs_root, promises, sparse_gguf
from reference import Shown


@pytest.fixture
def large(tmp_path):
    """A mounted model of two parts, one layer in each, none of whose experts has been read yet."""
    paths = models.write_small(tmp_path, rows=2000, split_max_tensors=6)
    assert len(paths) == 2
    with mounted(paths[0], tmp_path / "mnt") as root:
        yield Shown(paths, root)


def expert(layer, number):
    return f"experts/layer_{layer:02}_expert_{number:03}.safetensors"


def pieces(shown, name):
    """(place in the file, length, the bytes of the model) of each tensor of a file."""
    at = (shown.root / name).stat().st_size - sum(e.nbytes for e in shown.layout[name])
    for e in shown.layout[name]:
        yield at, e.nbytes, shown.bytes[e.part][e.offset : e.offset + e.nbytes]
        at += e.nbytes


def read(path, offset, length):
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def assert_reads_well(shown, name):
    for at, length, wanted in pieces(shown, name):
        assert read(shown.root / name, at, length) == wanted, name


def assert_reads_fail(shown, name):
    for at, length, _ in pieces(shown, name):
        with pytest.raises(OSError) as caught:
            read(shown.root / name, at + length // 2, 4096)
        assert caught.value.errno == errno.EIO


def assert_lives(shown):
    assert sorted(os.listdir(shown.root)) == ["base_model", "experts"]
    assert (shown.root / "experts/registry.json").read_text().startswith("{")


@promises("A part that is truncated answers EIO, never zeros and never a short answer.")
def test_a_truncated_source_makes_reads_fail_and_leaves_the_mount_alive(large):
    os.truncate(large.paths[1], large.parts[1].tensors[0].offset + 1000)
    assert_reads_fail(large, expert(1, 1))
    assert_reads_fail(large, expert(1, 2))
    assert_lives(large)
    assert_reads_well(large, expert(0, 0))  # the other part


@promises(
    "A part whose size or modification time changes in place answers EIO from then on, and the log says so once.",
    "Pages that the kernel has cached stay readable, and the mount stays alive and can be unmounted.",
)
def test_a_source_whose_mtime_changed_in_place_is_read_no_more(large):
    assert_reads_well(large, expert(1, 0))
    now = large.paths[1].stat()
    os.utime(large.paths[1], ns=(now.st_atime_ns, now.st_mtime_ns + 1))
    assert_reads_fail(large, expert(1, 1))
    assert_reads_well(large, expert(1, 0))  # what is cached stays
    assert_lives(large)
    assert_reads_well(large, expert(0, 1))


def test_a_source_that_grew_is_read_no_more(large):
    with open(large.paths[1], "ab") as file:
        file.write(b"more")
    assert_reads_fail(large, expert(1, 1))
    assert_reads_well(large, expert(0, 1))


@promises(
    "A part whose size or modification time changes in place answers EIO from then on, and the log says so once.",
)
def test_a_change_is_said_once(tmp_path):
    (model,) = models.write_small(tmp_path, rows=2000)
    with foreground(model, tmp_path / "mnt") as process:
        os.utime(model, ns=(0, 0))
        for number in range(models.EXPERTS):
            for layer in range(2):
                with pytest.raises(OSError, match="Input/output"):
                    read(tmp_path / "mnt" / expert(layer, number), 500_000, 70_000)
        process.terminate()
        assert process.communicate()[1].count(str(model)) == 1


@pytest.mark.parametrize("change", ["deleted", "renamed", "replaced", "closed to all"])
@promises("A part that is renamed, deleted, replaced by rename, or made unreadable is still read as it was.")
def test_a_source_that_is_moved_away_is_read_as_before(large, change):
    _ = large.bytes, large.parts  # before they change
    for path in large.paths:
        if change == "deleted":
            path.unlink()
        elif change == "renamed":
            path.rename(path.with_suffix(".old"))
        elif change == "replaced":
            other = path.with_suffix(".new")
            other.write_bytes(bytes(path.stat().st_size))
            other.replace(path)
        else:
            path.chmod(0)
    for name in large.expert_files():
        assert_reads_well(large, name)


@pytest.fixture
def in_mid_stream(tmp_path):
    """A mounted model, and one of its experts, of 8 MiB, whose first MiB was just read in order: more was read ahead."""
    model = expert_gguf(tmp_path, experts=2, rows=5120)
    with mounted(model, tmp_path / "mnt") as root:
        shown = Shown([model], root)
        _ = shown.bytes, shown.layout  # before they change
        evict(model)
        with open(root / expert(0, 1), "rb", buffering=0) as file:
            for at in range(0, MIB, 128 * KIB):
                assert len(os.pread(file.fileno(), 128 * KIB, at)) == 128 * KIB
            yield shown, model, file.fileno()


def payload(shown, name):
    """Where the payload of a file starts, and its bytes."""
    found = list(pieces(shown, name))
    return found[0][0], b"".join(wanted for _, _, wanted in found)


def touch(model):
    os.utime(model, ns=(0, 0))


def cut(model):
    os.truncate(model, model.stat().st_size - MIB)


def grow(model):
    with open(model, "ab") as file:
        file.write(b"more")


def rewrite(model):
    size = model.stat().st_size
    with open(model, "r+b") as file:
        file.write(b"\xee" * size)


@pytest.mark.parametrize("change", [touch, cut, grow, rewrite])
@promises("Pages that the kernel has cached stay readable, and the mount stays alive and can be unmounted.")
def test_a_reader_in_mid_stream_is_told_of_a_change_in_place(in_mid_stream, change):
    shown, model, fd = in_mid_stream
    start, whole = payload(shown, expert(0, 1))
    change(model)
    # The kernel has a little more than was read, in its own cache; what we have read ahead goes on behind that.
    for at in range(MIB + 512 * KIB, len(whole), 512 * KIB):
        with pytest.raises(OSError) as caught:
            os.pread(fd, 4096, at)
        assert caught.value.errno == errno.EIO
    assert os.pread(fd, MIB - start, start) == whole[: MIB - start]  # what is cached stays
    assert_lives(shown)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_reader_in_mid_stream_reads_on_when_the_source_is_moved_away(in_mid_stream, change):
    shown, model, fd = in_mid_stream
    if change == "deleted":
        model.unlink()
    else:
        other = model.with_suffix(".new")
        other.write_bytes(b"\xee" * model.stat().st_size)
        other.replace(model)
    start, whole = payload(shown, expert(0, 1))
    for at in range(0, len(whole), 128 * KIB):
        assert os.pread(fd, 128 * KIB, start + at) == whole[at : at + 128 * KIB]
    assert_reads_well(shown, expert(0, 0))
    assert_lives(shown)


@promises("A part that must be opened again is never taken from another file.")
def test_a_part_that_must_be_opened_again_is_never_taken_from_another_file(tmp_path):
    """With more parts than descriptors, some are closed meanwhile: their bytes, or an error, but never others."""
    paths = sparse_gguf("torture-small", tmp_path / "t.gguf", "--fill-words", "--one-per-part")

    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(paths) // 2, len(paths) // 2))

    with mounted(paths[0], tmp_path / "mnt", preexec_fn=few) as root:
        shown = Shown(paths, root)
        _ = shown.bytes, shown.layout  # before they change
        for path in paths:
            other = path.with_suffix(".new")
            other.write_bytes(b"\xee" * path.stat().st_size)
            other.replace(path)
        failed = 0
        for name in shown.layout:
            for at, length, wanted in pieces(shown, name):
                try:
                    got = read(root / name, at, length)
                except OSError as e:
                    assert e.errno == errno.EIO
                    got = b""
                # Where a later page fails, the kernel first hands over the pages before it.
                assert wanted.startswith(got), name
                failed += len(got) < length
        assert failed
        assert_lives(shown)


@needs_root
def test_a_normal_user_s_source_that_is_closed_to_all_is_read_as_before(public, nobody):
    """Root may open anything, so only a normal user's daemon can lose its right."""
    (model,) = models.write_small(public)
    before = model.read_bytes()
    with mounted(model, public / "mnt", user=nobody) as root:
        model.chmod(0)
        path = root / "experts/layer_01_expert_002.safetensors"
        last = ask(nobody, "answer = open(path, 'rb').read()[-64:].hex()", path=path)
    assert bytes.fromhex(last) in before
