"""Arrays of `hf/` in another order than the model's, at the size that real ones have: memory, and bytes that are read."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

import blocks
from hf_models import in_gguf, sized, value_type
from models import finish
from odmoe import anonymous, counters, daemon_of, evict, mounted, needs_root, promises, wait_for

MIB = 1 << 20
SIDE = 2048


def write(path, kind, quantised, ggml_type):
    """A GGUF of zeros, but for the matrices whose names end so: random blocks."""
    writer = gguf.GGUFWriter(path, kind.arch)
    for key, value in kind.keys.items():
        writer.add_key_value(f"{kind.arch}.{key}", value, value_type(value))
    zeros = {name: np.zeros(shape, np.float32) for name, shape in kind.shapes.items()}
    block, size = gguf.GGML_QUANT_SIZES[Type[ggml_type]]
    for name, tensor in in_gguf(kind, zeros).items():
        if name.endswith(quantised):
            stored = blocks.model_blocks(ggml_type, tensor.size // block)
            stored = stored.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * size)
            writer.add_tensor(name, stored, raw_dtype=Type[ggml_type])
        else:
            writer.add_tensor(name, tensor)
    finish(writer)
    return path


@pytest.fixture(scope="module")
def transposed(tmp_path_factory):
    """Five experts of gpt-oss, whose matrices the checkpoint has transposed, the rows of gate and up in turn."""
    kind = sized("gpt-oss", HIDDEN=SIDE, WIDTH=SIDE, EXPERTS=5, LAYERS=1, HEAD=64)
    return write(tmp_path_factory.mktemp("transposed") / "m.gguf", kind, "_exps.weight", "MXFP4")


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A llama, of which the checkpoint has the rows of each head of queries and keys in another order."""
    kind = sized("llama", HIDDEN=SIDE, DENSE=256, HEAD=512, LAYERS=3)
    attention = tuple(f"attn_{name}.weight" for name in ("q", "k", "v", "output"))
    return write(tmp_path_factory.mktemp("apart") / "m.gguf", kind, attention, "Q4_K")


def files(root):
    return sorted((root / "hf").glob("*.safetensors"))


def read(path, start=0, step=1):
    """Reads every `step`th MiB of a file, from a place on."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return sum(len(os.pread(file.fileno(), MIB, at)) for at in range(start, size, step * MIB))


@needs_root
@promises("The memory of the daemon does not grow with what is read.")
@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_matrices_that_are_transposed_are_read_once_and_need_little_memory(transposed, form, tmp_path):
    evict(transposed)
    with mounted(transposed, tmp_path / "mnt", "--show", "hf", "--as", form) as root:
        daemon, before = daemon_of(root), counters(daemon_of(root))
        most = 0
        with ThreadPoolExecutor(12) as pool:
            # Each begins within another matrix.
            wants = [(path, n * path.stat().st_size // 12) for path in files(root) for n in range(12)]
            reads = [pool.submit(read, path, start, 12) for path, start in wants]

            def finished():
                nonlocal most
                most = max(most, anonymous(daemon))
                return all(read.done() for read in reads)

            wait_for(finished)
        assert sum(read.result() for read in reads) > 0
        after = counters(daemon)
    assert 0 < most <= 96 * MIB
    assert after["rchar"] - before["rchar"] <= 1.1 * transposed.stat().st_size + MIB


@needs_root
@pytest.mark.parametrize("form", ["mlx", "bf16", "raw"])
def test_rows_in_another_order_are_read_once_for_all_arrays_of_their_tensor(apart, form, tmp_path):
    evict(apart)
    with mounted(apart, tmp_path / "mnt", "--show", "hf", "--as", form) as root:
        before = counters(daemon_of(root))
        assert sum(map(read, files(root))) > 0.5 * apart.stat().st_size
        after = counters(daemon_of(root))
    assert after["rchar"] - before["rchar"] <= 1.1 * apart.stat().st_size + MIB


@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_columns_of_gate_and_up_come_in_turn(transposed, form, tmp_path):
    reader = gguf.GGUFReader(transposed)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    expected = np.empty((SIDE, SIDE, 2), np.float32)
    for n, name in enumerate(("gate", "up")):
        matrix = stored[f"blk.0.ffn_{name}_exps.weight"].data[4]
        expected[:, :, n] = gguf.dequantize(matrix, Type.MXFP4).T
    with mounted(transposed, tmp_path / "mnt", "--show", "hf", "--as", form) as root:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        (path,) = (path for path in files(root) if name in safe_open(path, "np").keys())
        ours = mx.load(str(path))[name][4].astype(mx.float32)
        assert np.array_equal(np.array(ours).reshape(SIDE, SIDE, 2), expected)


@promises("A part that is truncated answers EIO, never zeros and never a short answer.")
def test_what_is_kept_of_a_matrix_is_not_given_out_once_its_model_has_changed(transposed, tmp_path):
    model = tmp_path / "m.gguf"
    shutil.copy(transposed, model)
    with mounted(model, tmp_path / "mnt", "--show", "hf", "--as", "bf16", "--cache", "direct") as root:
        path = max(files(root), key=lambda path: path.stat().st_size)
        with open(path, "rb", buffering=0) as file:
            middle = path.stat().st_size // 2
            assert len(os.pread(file.fileno(), 4096, middle)) == 4096
            os.truncate(model, 1000)
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 4096, middle + 3 * MIB)
