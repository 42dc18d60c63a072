"""Computed files of a model that changes, or lies on a disk that fails: the right numbers or EIO, never anything else."""

import errno
import os

import pytest

from forms import loaded
from odmoe import KIB, MIB, contents, evict, expert_gguf, failing_disk, mounted, needs_root, promises, succeed
from reference import layout, read_gguf, read_header

FORMS = [["--as", "bf16"], ["--as", "mlx"]]
STEP = 64 * KIB


@pytest.fixture(params=FORMS, ids=" ".join)
def form(request):
    return request.param


@pytest.fixture(params=["page", "direct"])
def cache(request):
    return request.param


@pytest.fixture
def model(tmp_path):
    (tmp_path / "store").mkdir()
    return expert_gguf(tmp_path / "store", experts=3)


@pytest.fixture
def wholes(model, form, tmp_path):
    """Every file as it must be."""
    succeed("materialize", model, tmp_path / "out", *form)
    return contents(tmp_path / "out")


def name(expert):
    return f"experts/layer_00_expert_{expert:03}.safetensors"


def pread(path, offset, length=STEP):
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def outcomes(path, whole):
    """Reads a file in steps: whether each was right. Anything but the right bytes or EIO ends the test."""
    found = []
    for at in range(0, len(whole), STEP):
        try:
            got = pread(path, at)
        except OSError as e:
            assert e.errno == errno.EIO
            found.append(False)
        else:
            # Where a later page fails, the kernel first hands over the pages before it.
            assert whole[at : at + STEP].startswith(got), (path.name, at)
            found.append(len(got) == len(whole[at : at + STEP]))
    return found


def touch(path):
    os.utime(path, ns=(0, 0))


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path):
    with path.open("r+b") as file:
        file.write(b"\x5a" * path.stat().st_size)


def cut(path):
    os.truncate(path, path.stat().st_size - MIB)


@pytest.mark.parametrize("change", [touch, grow, rewrite, cut])
@promises("A part whose size or modification time changes in place answers EIO from then on, and the log says so once.")
def test_a_model_that_changed_in_place_gives_no_more_numbers(model, wholes, form, cache, change, tmp_path):
    with mounted(model, tmp_path / "mnt", *form, "--cache", cache) as root:
        assert outcomes(root / name(0), wholes[name(0)]).count(False) == 0
        change(model)
        # The header is our own; all else comes of the model.
        assert not any(outcomes(root / name(2), wholes[name(2)])[1:])
        assert sorted(os.listdir(root)) == ["base_model", "experts"]
        if cache == "page":  # what the kernel has stays
            assert all(outcomes(root / name(0), wholes[name(0)]))
        else:
            assert not any(outcomes(root / name(0), wholes[name(0)])[1:])


@pytest.mark.parametrize("change", [touch, grow, rewrite, cut])
def test_a_model_that_changes_while_it_is_read_gives_no_mixture(model, wholes, form, cache, change, tmp_path):
    """Also of scales, which were computed with the weights, before the change."""
    with mounted(model, tmp_path / "mnt", *form, "--cache", cache) as root:
        path, whole = root / name(1), wholes[name(1)]
        header = read_header(path)
        first = header.tensors["w1.weight"]["data_offsets"][1] + header.start
        for at in range(0, first, 128 * KIB):
            pread(path, at, 128 * KIB)
        change(model)
        if cache == "direct" and "mlx" in form:
            scales = header.tensors["w1.scales"]["data_offsets"][1] + header.start
            with pytest.raises(OSError, match="Input/output"):
                pread(path, scales - 4 * KIB, 4 * KIB)
        beyond = outcomes(path, whole)[-(-(first + MIB) // STEP) :]
        assert beyond and not any(beyond)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
@promises("A part that is renamed, deleted, replaced by rename, or made unreadable is still read as it was.")
def test_a_model_that_is_moved_away_still_gives_its_numbers(model, wholes, form, cache, change, tmp_path):
    with mounted(model, tmp_path / "mnt", *form, "--cache", cache) as root:
        assert pread(root / name(0), 0) == wholes[name(0)][:STEP]
        if change == "replaced":
            other = model.with_suffix(".new")
            other.write_bytes(b"\xee" * model.stat().st_size)
            other.replace(model)
        else:
            model.unlink()
        for expert in range(3):
            assert all(outcomes(root / name(expert), wholes[name(expert)]))


@needs_root
@promises(
    "A read error of the disk is EIO for the reader of that range, and for nobody else.",
    "A range that failed is read again when it is asked for again.",
)
def test_a_disk_that_fails_costs_the_numbers_of_its_range_and_no_others(model, wholes, form, cache, tmp_path):
    (part,) = read_gguf([model])
    entry = layout([part])[name(1)][1]
    broken = entry.offset + entry.nbytes // 2
    with failing_disk(model.parent, tmp_path) as disk:
        with mounted(disk.at / model.name, tmp_path / "mnt", *form, "--cache", cache) as root:
            disk.fails(("eio", broken, broken + 1))
            right = outcomes(root / name(1), wholes[name(1)])
            assert right[0] and right[-1] and not all(right)
            # The weight, or numbers, around the byte, and scales and biases of the same blocks.
            assert right.count(False) <= (8 if form == FORMS[0] else 16)
            for expert in (0, 2):
                assert all(outcomes(root / name(expert), wholes[name(expert)]))
            disk.fails()
            assert all(outcomes(root / name(1), wholes[name(1)]))
            assert set(loaded(root / name(1))) if "mlx" in form else True
            disk.fails(("short", 0, 1 << 40))
            evict(model)
            for expert in range(3):
                assert all(outcomes(root / name(expert), wholes[name(expert)]))
            disk.fails()
