"""GGUF files that only belong to a model: they are shown, and called by their names."""

import gguf
import numpy as np
import pytest

import models
from odmoe import mounted, odmoe, succeed

# What it is called -> general.type, the architecture, its tensors.
FILES = {
    "a multimodal projector": ("mmproj", "clip", ["v.patch_embd.weight", "mm.0.weight"]),
    "an adapter": ("adapter", "llama", ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]),
    "an importance matrix": ("imatrix", "imatrix", ["blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"]),
    "a control vector": (None, "controlvector", ["direction.1"]),
    "a multimodal projector, of an older converter": (None, "clip", ["v.patch_embd.weight"]),
    "a GGUF without tensors": ("model", "llama", []),
}


def write(path, kind, architecture, tensors):
    writer = gguf.GGUFWriter(path, architecture)
    if kind:
        writer.add_type(kind)
    for name in tensors:
        writer.add_tensor(name, np.ones(8, np.float32))
    models.finish(writer)
    return path


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_only_belongs_to_a_model_is_called_by_its_name(what, tmp_path):
    path = write(tmp_path / "file.gguf", *FILES[what])
    done = odmoe("inspect", path)
    words = f'"{path}" is {what.split(",")[0]}, not a model; give the model that it belongs to'
    assert done.returncode == 0 and words in done.stderr
    with mounted(path, tmp_path / "mnt") as root:
        assert (root / "base_model/attention_layers.safetensors").exists() == bool(FILES[what][2])


def test_the_keys_of_a_tree_given_as_a_model(small, tmp_path):
    with mounted(small[0], tmp_path / "mnt") as root:
        assert "is a GGUF without tensors" in odmoe("inspect", root / "base_model/metadata.gguf").stderr


@pytest.mark.parametrize("kind", ["model", "something new", None])
def test_a_model_is_nothing_to_warn_of(kind, tmp_path):
    path = write(tmp_path / "file.gguf", kind, "llama", ["token_embd.weight"])
    assert odmoe("inspect", path).stderr == ""


def test_a_part_without_tensors_is_a_part_of_a_model(tmp_path):
    parts = models.write_small(tmp_path, split_max_tensors=3, small_first_shard=True)
    assert odmoe("inspect", parts[0]).stderr == ""
    succeed("verify", parts[0])
