"""Reading trees of numbers: any range, in any way, by any number of readers, is that range of the whole."""

import mmap
import multiprocessing
import os
import random
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import forms
from blocks import TYPES, random_blocks
from forms import OPTIONS, write_mixed
from odmoe import MIB, contents, expert_gguf, files_of, mounted, promises, read_direct, read_on, succeed
from reference import read_header

CACHES = ["page", "direct"]
FORMS = [["--as", "bf16"], ["--as", "f32"], ["--as", "mlx"], ["--as", "mlx", "--scales", "f32", "--requant"]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_mixed(tmp_path_factory.mktemp("mixed") / "mixed.gguf")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Experts of 3.4 MiB of Q4_K, every byte of them random."""
    return expert_gguf(tmp_path_factory.mktemp("large"), experts=3)


def forget(path):
    """Drops the pages of a file of a mount, so that the daemon is asked again."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pread(path, offset, length):
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


@pytest.fixture(params=FORMS, ids=" ".join)
def form(request):
    return request.param


@pytest.fixture(params=CACHES)
def cache(request):
    return request.param


# --- any range --------------------------------------------------------------------------------------------------------


@promises("A read gives all bytes that it asks for, up to the end of the file, or an error; never a short answer.")
def test_random_ranges_are_slices_of_the_whole(mixed, form, cache, tmp_path, times):
    succeed("materialize", mixed, tmp_path / "out", *form)
    wholes = {name: data for name, data in contents(tmp_path / "out").items() if name.endswith(".safetensors")}
    with mounted(mixed, tmp_path / "mnt", *form, "--cache", cache) as root:

        @settings(
            max_examples=times(60, long=3000),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        @given(st.data())
        def check(data):
            name = data.draw(st.sampled_from(sorted(wholes)))
            whole = wholes[name]
            offset = data.draw(st.integers(0, len(whole) + 10))
            length = data.draw(st.one_of(st.integers(0, 300), st.integers(0, 2 * len(whole))))
            forget(root / name)
            assert pread(root / name, offset, length) == whole[offset : offset + length]

        check()


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_mount_and_what_materialize_writes_are_the_same(mixed, options, cache, tmp_path):
    succeed("materialize", mixed, tmp_path / "out", *options)
    with mounted(mixed, tmp_path / "mnt", *options, "--cache", cache) as root:
        assert set(files_of(root)) == set(files_of(tmp_path / "out"))
        for name, path in files_of(root).items():
            done = subprocess.run(["cmp", path, tmp_path / "out" / name], capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name
        assert contents(root) == contents(tmp_path / "out")
        for tree in (root, tmp_path / "out"):
            assert "identical" in succeed("verify", mixed, tree)


@promises("A read gives all bytes that it asks for, up to the end of the file, or an error; never a short answer.")
def test_reads_of_odd_sizes_at_odd_places_get_all_they_ask_for(large, form, cache, tmp_path):
    with mounted(large, tmp_path / "other", *form) as root:
        path = sorted((root / "experts").glob("*.safetensors"))[1]
        whole, header = path.read_bytes(), read_header(path)
    joints = sorted({header.start + end for info in header.tensors.values() for end in info["data_offsets"]})
    with mounted(large, tmp_path / "mnt", *form, "--cache", cache) as root:
        path = root / "experts" / path.name
        reads = [(joint - before, 70_000) for joint in joints for before in (0, 1, 35_001) if joint >= before]
        reads += [(header.start - 1, 2), (0, 0), (len(whole) - 1, 70_000), (len(whole), 1), (12_345, 1), (1, len(whole))]
        for offset, length in reads:
            assert pread(path, offset, length) == whole[offset : offset + length], (offset, length)


def backwards(path):
    """As no loader reads."""
    size, step = path.stat().st_size, 70_001
    starts = range(0, size, step)
    return b"".join(reversed([pread(path, at, step) for at in reversed(starts)]))


def by_arrays(path, keys):
    """Each array by safetensors, in some order; in the order of the file then."""
    with safe_open(path, framework="np") as file:
        arrays = {key: file.get_tensor(key).tobytes() for key in keys}
    return path.read_bytes()[: read_header(path).start] + b"".join(arrays[key] for key in sorted(keys, key=place(path)))


def place(path):
    tensors = read_header(path).tensors
    return lambda key: tensors[key]["data_offsets"]


def by_mlx(path):
    loaded = mx.load(str(path))
    keys = sorted(loaded, key=place(path))
    data = b"".join(np.array(loaded[key].flatten().view(mx.uint8)).tobytes() for key in keys)
    return path.read_bytes()[: read_header(path).start] + data


WAYS = {
    "shared map": lambda path: np.memmap(path, mode="r").tobytes(),
    "direct": read_direct,
    "by blocks of the kernel": lambda path: read_on(path, 128 << 10),
    "by odd blocks": lambda path: read_on(path, 70_000),
    "backwards": backwards,
    "arrays, the last first": lambda path: by_arrays(path, list(read_header(path).tensors)[::-1]),
    "arrays by name": lambda path: by_arrays(path, sorted(read_header(path).tensors)),
    "MLX": by_mlx,
}


def test_all_ways_of_reading_agree(large, form, cache, tmp_path):
    """Each way meets what nobody has read yet."""
    with mounted(large, tmp_path / "other", *form) as root:
        names = sorted(path.name for path in (root / "experts").glob("*.safetensors"))
        wholes = [(root / "experts" / name).read_bytes() for name in names]
    with mounted(large, tmp_path / "mnt", *form, "--cache", cache) as root:
        for n, (way, read) in enumerate(WAYS.items()):
            name, whole = names[n % len(names)], wholes[n % len(names)]
            forget(root / "experts" / name)
            assert read(root / "experts" / name) == whole, way


# --- many readers -----------------------------------------------------------------------------------------------------


def touch(path, whole, seed, barrier):
    """Pages of a map, here and there; a process of its own, since Python waits for a fault with all its threads."""
    chance = random.Random(seed)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        barrier.wait()
        for _ in range(40):
            at = chance.randrange(len(whole))
            if mapped[at : at + 5000] != whole[at : at + 5000]:
                os._exit(1)
    os._exit(0)


@promises("Any number of readers may read at once, whatever the number of worker threads.")
def test_64_readers_that_fault_get_the_right_bytes(large, form, cache, tmp_path):
    fork = multiprocessing.get_context("fork")
    with mounted(large, tmp_path / "other", *form) as root:
        paths = sorted((root / "experts").glob("*.safetensors"))
        wholes = [path.read_bytes() for path in paths]
    with mounted(large, tmp_path / "mnt", *form, "--cache", cache, "--threads", "3") as root:
        barrier = fork.Barrier(64)
        work = [(root / "experts" / paths[n % 3].name, wholes[n % 3], n, barrier) for n in range(64)]
        readers = [fork.Process(target=touch, args=args) for args in work]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert [reader.exitcode for reader in readers] == [0] * 64


def test_every_type_is_computed_alike_in_any_piece(tmp_path):
    """Pages of a file whose arrays begin and end within blocks' units."""
    tensors = []
    for layer, ggml_type in enumerate(TYPES):
        block, _ = forms.SIZES[ggml_type]
        tensors.append((f"blk.{layer}.x.weight", random_blocks(ggml_type, 6 * 1280 // block), ggml_type, (6, 1280)))
    model = forms.write_table(tmp_path / "m.gguf", tensors)
    for form in FORMS:
        with mounted(model, tmp_path / "mnt", *form, "--cache", "direct") as root:
            path = root / "base_model/attention_layers.safetensors"
            whole = read_on(path, MIB)
            assert b"".join(pread(path, at, 997) for at in range(0, len(whole), 997)) == whole
