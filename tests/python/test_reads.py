"""Ways of reading: whatever calls a program makes, it gets the same bytes, all that it asked for and that the file has."""

import contextlib
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

import models
from odmoe import DOCUMENTS, MIB, evict, file_system, mounted, needs_root, promises, read_direct, read_on
from reference import Shown, read_header

OPTIONS = {
    "by default": [],
    "direct": ["--cache", "direct"],
    "direct with one thread": ["--cache", "direct", "--threads", "1"],
    "with one thread": ["--threads", "1"],
    "with the source kept": ["--keep-source-cache"],
}


def write_large(folder):
    """Experts of a megabyte, in two parts: large enough for reads that the kernel cuts up."""
    return models.write_small(folder, rows=1201, split_max_tensors=6)


@pytest.fixture(scope="module", params=OPTIONS)
def large(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    paths = write_large(folder)
    with mounted(paths[0], folder / "mnt", *OPTIONS[request.param]) as root:
        yield Shown(paths, root)


def expected(shown, name):
    """What a file must hold: its own header, then the model's bytes."""
    path = shown.root / name
    header = path.read_bytes()[: read_header(path).start]
    return header + b"".join(shown.bytes[e.part][e.offset : e.offset + e.nbytes] for e in shown.layout[name])


def one_expert(shown):
    return next(iter(shown.expert_files()))


def read_by_safe_open(path):
    """The tensors, in the order of the file."""
    places = read_header(path).tensors
    with safe_open(path, framework="np") as file:
        keys = sorted(file.keys(), key=lambda key: places[key]["data_offsets"])
        return b"".join(file.get_tensor(key).tobytes() for key in keys)


def read_by_mlx(path):
    places, loaded = read_header(path).tensors, mx.load(str(path))
    keys = sorted(loaded, key=lambda key: places[key]["data_offsets"])
    return b"".join(np.array(loaded[key].flatten().view(mx.uint8)).tobytes() for key in keys)


WAYS = {
    "shared map": lambda path: np.memmap(path, mode="r").tobytes(),
    "direct": read_direct,
    "by blocks of the kernel": lambda path: read_on(path, 128 << 10),
    "by odd blocks": lambda path: read_on(path, 70_000),
    "safe_open": read_by_safe_open,
    "MLX": read_by_mlx,
}


def assert_all_ways_agree(shown):
    """Each file is first read in another way, so that each way meets what nobody has read yet."""
    ways = list(WAYS.items())
    for n, name in enumerate(shown.expert_files()):
        for part in shown.paths:
            evict(part)
        whole, start = expected(shown, name), read_header(shown.root / name).start
        for way, read in ways[n % len(ways) :] + ways[: n % len(ways)]:
            got = read(shown.root / name)
            assert got == (whole[start:] if read in (read_by_safe_open, read_by_mlx) else whole), f"{name}: {way}"


def test_all_ways_of_reading_agree(large):
    assert_all_ways_agree(large)


@contextlib.contextmanager
def read_only(folder):
    """What was put into a folder, where nothing can be written."""
    at = folder / "read-only"
    at.mkdir()
    subprocess.run(["mount", "--bind", folder / "store", at], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", at], check=True)
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@contextlib.contextmanager
def overlay(folder):
    """What was put into a folder, as a container shows it."""
    at, upper, work = (folder / name for name in ("overlay", "upper", "work"))
    for path in (at, upper, work):
        path.mkdir()
    options = f"lowerdir={folder / 'store'},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@contextlib.contextmanager
def in_memory(folder):
    with file_system("tmpfs", folder, 64 * MIB) as at:
        for path in (folder / "store").iterdir():
            shutil.copy(path, at)
        yield at


@needs_root
@pytest.mark.parametrize("options", ["by default", "direct"])
@pytest.mark.parametrize("place", [read_only, overlay, in_memory])
def test_all_ways_of_reading_agree_wherever_the_model_lies(tmp_path, place, options):
    (tmp_path / "store").mkdir()
    paths = write_large(tmp_path / "store")
    with place(tmp_path) as at:
        paths = [at / path.name for path in paths]
        with mounted(paths[0], tmp_path / "mnt", *OPTIONS[options]) as root:
            assert_all_ways_agree(Shown(paths, root))


def test_maps_direct_reads_and_plain_reads_agree_on_every_file(shown):
    for name in shown.layout:
        path = shown.root / name
        whole = expected(shown, name)
        assert np.memmap(path, mode="r").tobytes() == whole, f"{name}: shared map"
        assert read_direct(path) == whole, f"{name}: direct"
        assert read_on(path, 4099) == whole, f"{name}: read"


def test_direct_reads_of_an_uncached_file_agree(large):
    for name in large.expert_files():
        assert read_direct(large.root / name) == expected(large, name), name


@promises("A read gives all bytes that it asks for, up to the end of the file, or an error; never a short answer.")
def test_odd_sized_reads_get_all_they_ask_for(large):
    name = one_expert(large)
    path = large.root / name
    whole, start, size = expected(large, name), read_header(path).start, path.stat().st_size
    joints = [start + end for info in read_header(path).tensors.values() for end in info["data_offsets"]]
    reads = [
        (0, 70_000),  # across the header's end and several pages
        (start - 1, 2),
        (start, 70_000),
        *((joint - 35_001, 70_000) for joint in joints if 35_001 < joint < size),  # across two tensors
        (4095, 2),
        (12_345, 1),
        (size - 1, 70_000),  # short because the file ends
        (size, 70_000),
        (size + 4096, 1),
        (0, 0),
        (1, size),
    ]
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset, length in reads:
            assert os.pread(fd, length, offset) == whole[offset : offset + length], f"{length} bytes at {offset}"
    finally:
        os.close(fd)


def test_scattered_reads_of_many_threads_get_their_own_bytes(large):
    names = list(large.expert_files())
    wholes = {name: expected(large, name) for name in names}

    def reader(seed):
        rng = random.Random(seed)
        for _ in range(200):
            name = rng.choice(names)
            offset, length = rng.randrange(len(wholes[name])), rng.choice([1, 511, 70_000, 1 << 20])
            with open(large.root / name, "rb", buffering=0) as file:
                assert os.pread(file.fileno(), length, offset) == wholes[name][offset : offset + length]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reader, range(8)))


def test_documents_read_the_same_in_pieces_and_whole(shown):
    for name in DOCUMENTS:
        path = shown.root / name
        assert read_on(path, 1000) == path.read_bytes(), name
        assert len(path.read_bytes()) == path.stat().st_size, name
