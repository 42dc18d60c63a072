"""What reading numbers costs, by counts: blocks are read from the disk once, and stay in no cache."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes  # noqa: F401 (numpy learns of BF16)
import mlx.core as mx
import pytest
from safetensors import safe_open

import forms
from odmoe import (
    KIB,
    MIB,
    cached,
    counters,
    daemon_of,
    evict,
    expert_gguf,
    file_system,
    mounted,
    needs_root,
    promises,
    read_direct,
    read_on,
)
from reference import layout, read_gguf, read_header

pytestmark = needs_root  # mounts file systems

EXPERTS = 4
FORMS = [["--as", "bf16"], ["--as", "mlx"]]
CACHES = ["page", "direct"]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A model of four experts of 3.4 MiB of Q4_K on a file system of a disk."""
    model = expert_gguf(tmp_path_factory.mktemp("model"), experts=EXPERTS)
    with file_system("ext4", tmp_path_factory.mktemp("disk"), 100 * MIB) as at:
        yield Path(shutil.copy(model, at))


@pytest.fixture(params=FORMS, ids=" ".join)
def form(request):
    return request.param


@pytest.fixture(params=CACHES)
def cache(request):
    return request.param


def experts(root):
    return sorted((root / "experts").glob("*.safetensors"))


def blocks_of(model):
    """Bytes of the model in each expert."""
    (part,) = read_gguf([model])
    files = layout([part])
    return [sum(entry.nbytes for entry in files[name]) for name in sorted(files) if name.startswith("experts/")]


def arrays(path, order):
    with safe_open(path, framework="np") as file:
        for key in order(read_header(path).tensors):
            file.get_tensor(key)


def by_mlx(path):
    mx.eval(list(mx.load(str(path)).values()))


def by_threads(path):
    """All arrays side by side, each in order."""
    header = read_header(path)

    def read(info):
        start, end = info["data_offsets"]
        with path.open("rb", buffering=0) as file:
            for at in range(start, end, 128 * KIB):
                os.pread(file.fileno(), min(128 * KIB, end - at), header.start + at)

    with ThreadPoolExecutor(len(header.tensors)) as pool:
        list(pool.map(read, header.tensors.values()))


WAYS = {
    "in order": lambda path: read_on(path, 128 * KIB),
    "at once": lambda path: read_on(path, 16 * MIB),
    "past the cache": read_direct,
    "arrays in order": lambda path: arrays(path, list),
    "arrays, the last first": lambda path: arrays(path, lambda tensors: list(tensors)[::-1]),
    "arrays by name": lambda path: arrays(path, sorted),
    "MLX": by_mlx,
    "side by side": by_threads,
}


# Of arrays that are not read in the order of the file, the first pieces are read for each by itself, before it shows
# that all of the file is wanted: much of an expert of 3 MiB, little of a larger one.
ONCE = ["in order", "at once", "past the cache"]


@pytest.mark.parametrize("way", WAYS)
def test_each_block_of_an_expert_is_read_once(on_disk, form, cache, way, tmp_path):
    wanted = sum(blocks_of(on_disk))
    evict(on_disk)
    with mounted(on_disk, tmp_path / "mnt", *form, "--cache", cache) as root:
        evict(on_disk)
        before = counters(daemon_of(root))["read_bytes"]
        for path in experts(root):
            WAYS[way](path)
        read = counters(daemon_of(root))["read_bytes"] - before
    # Arrays that are asked for one by one may come before their file is known to be wanted whole. On a busy machine each
    # of the three may be read from blocks of its own.
    most = 1.1 if way in ONCE else 3
    assert 0.98 * wanted <= read <= most * wanted, read / wanted


def test_what_was_read_before_is_not_read_over_and_over(on_disk, form, cache, tmp_path):
    """Once its pages are gone, an expert costs about what it did at first."""
    wanted = sum(blocks_of(on_disk))
    with mounted(on_disk, tmp_path / "mnt", *form, "--cache", cache) as root:
        for _ in range(3):
            evict(on_disk)
            before = counters(daemon_of(root))["read_bytes"]
            for path in experts(root):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                read_on(path, 128 * KIB)
            read = counters(daemon_of(root))["read_bytes"] - before
            assert 0.98 * wanted <= read <= 2 * wanted, read / wanted


@promises("What was read of a model on a disk is in memory once, and what other programs have cached of it stays cached.")
def test_blocks_do_not_stay_in_the_page_cache(on_disk, form, tmp_path):
    evict(on_disk)
    with mounted(on_disk, tmp_path / "mnt", *form) as root, on_disk.open("rb") as source:
        evict(on_disk)
        size = 0
        for path in experts(root):
            with path.open("rb", buffering=0) as file:
                while got := len(file.read(128 * KIB)):
                    size += got
                assert cached(file) >= path.stat().st_size
        assert cached(source) <= 0.02 * sum(blocks_of(on_disk)) + 64 * KIB


def test_a_base_file_of_many_tensors_reads_its_blocks_hardly_twice(tmp_path):
    """Smaller arrays than a request, in a file of which no two arrays come of the same blocks."""
    tensors = []
    for layer in range(24):
        tensors.append(forms.tensor(f"blk.{layer}.attn_q.weight", "Q4_K", 256, 512))
        tensors.append(forms.plain(f"blk.{layer}.attn_q.bias", "F32", 256))
        tensors.append(forms.tensor(f"blk.{layer}.attn_k.weight", "Q6_K", 64, 512))
    model = forms.write(tmp_path / "base.gguf", tensors, 24)
    (part,) = read_gguf([model])
    wanted = sum(tensor.nbytes for tensor in part.tensors)
    with file_system("ext4", tmp_path, 100 * MIB) as at:
        model = Path(shutil.copy(model, at))
        for cache in CACHES:
            with mounted(model, tmp_path / "mnt", "--as", "mlx", "--cache", cache) as root:
                for read in ("in order", "arrays by name"):
                    evict(model)
                    path = root / "base_model/attention_layers.safetensors"
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    before = counters(daemon_of(root))["read_bytes"]
                    WAYS[read](path)
                    assert counters(daemon_of(root))["read_bytes"] - before <= 2.2 * wanted, (cache, read)
