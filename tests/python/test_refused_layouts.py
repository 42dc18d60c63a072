"""Models whose files are sound but whose tensors cannot be cut into experts: the errors that name them."""

import json
import os
import re

import pytest

from odmoe import contents, fail, mounted, sparse_gguf
from reference import read_header


def stack(slot, *dims, kind="F32", suffix="weight", layer=7):
    return [f"blk.{layer}.ffn_{slot}_exps.{suffix}", dims, kind]


def single(name, *dims):
    return [f"blk.7.{name}.weight", dims, "F32"]


# Why it cannot be shown -> its tensors, all of which the error must name; dimensions in GGML order.
REFUSED = {
    "stacks that disagree on the number of experts": [stack("gate", 64, 8, 3), stack("up", 64, 8, 4)],
    "fused and plain stacks that disagree": [stack("gate_up", 64, 8, 3), stack("down", 8, 64, 2)],
    "gate both plain and fused": [stack("gate", 64, 8, 3), stack("gate_up", 64, 16, 3)],
    "gate both stacked and by expert": [stack("gate", 64, 8, 3), single("ffn_gate.1", 64, 8)],
    "gate under two names": [single("ffn_gate.1", 64, 8), single("ffn.experts.1.w1", 64, 8)],
    "a fourth dimension": [stack("gate", 64, 8, 3, 2)],
    "an odd number of fused rows": [stack("gate_up", 64, 7, 3)],
    "4 interleaved rows cut": [stack("gate", 256, 6, 3, kind="Q4_K_R4")],
    "8 interleaved rows cut": [stack("gate", 256, 12, 3, kind="IQ4_XS_R8")],
    "16 interleaved rows cut": [stack("gate", 256, 24, 3, kind="BF16_R16")],
    "interleaved rows cut by halving": [stack("gate_up", 256, 12, 3, kind="Q4_K_R4")],
    "a name that safetensors reserves": [["__metadata__", [8], "F32"]],
}

# What looks like it, but can be shown -> the shapes of its first expert.
SHOWN = {
    "interleaved rows kept whole": ([stack("gate", 256, 8, 3, kind="Q4_K_R4")], {"w1.weight": [8, 144]}),
    "interleaved rows halved whole": (
        [stack("gate_up", 256, 8, 3, kind="Q4_K_R4")],
        {"w1.weight": [4, 144], "w3.weight": [4, 144]},
    ),
    "rows with a scale each": ([stack("gate", 256, 8, 3, kind="IQ4_KS")], {"w1.weight": [8, 140]}),
    "layers with different numbers of experts": (
        [stack("gate", 64, 8, 3), stack("gate", 64, 8, 4, layer=8)],
        {"w1.weight": [8, 64]},
    ),
    "a bias of another length": ([stack("gate", 64, 8, 3), stack("gate", 8, 4, suffix="bias")], {"w1.weight": [8, 64]}),
    "any suffix": (
        [stack("gate", 64, 8, 3), stack("gate", 3, 5, suffix="zero_point")],
        {"w1.weight": [8, 64]},
    ),
}


def write(tensors, path):
    table = path.with_suffix(".json")
    table.write_text(json.dumps({"arch": "moe", "kv": {"general.architecture": "moe"}, "tensors": tensors}))
    (model,) = sparse_gguf(table, path)
    return model


@pytest.mark.parametrize("why", REFUSED)
def test_experts_that_cannot_be_cut_out_are_an_error_that_names_the_tensors(why, tmp_path):
    model = write(REFUSED[why], tmp_path / "model.gguf")
    (tmp_path / "mnt").mkdir()
    names = [name for name, _, _ in REFUSED[why]]
    shapes = [] if "reserves" in why else [", ".join(map(str, dims)) for _, dims, _ in REFUSED[why]]
    for command in (["inspect", model], ["mount", model, tmp_path / "mnt"], ["materialize", model, tmp_path / "out"]):
        fail(*command, naming=[model.name, *names, *shapes])
    assert sorted(os.listdir(tmp_path)) == ["mnt", "model.gguf", "model.json"]


def test_a_model_with_too_many_tensors_for_a_header_is_refused(tmp_path):
    """Loaders read no header above 100,000,000 bytes."""
    model = write([[f"{n:x<60}", [1], "I8"] for n in range(330_000)], tmp_path / "model.gguf")
    said = fail("inspect", model, naming=[model.name])
    words = (
        "the model has so many tensors that the header of base_model/attention_layers.safetensors takes {} bytes, but "
        "safetensors allows only 100000000; if this is a real model, report it to odmoe-fs"
    )
    assert re.sub(r"takes \d+", "takes {}", said).endswith(f": {words}\n")


@pytest.mark.parametrize("what", SHOWN)
def test_experts_that_can_be_cut_out_are_shown(what, tmp_path):
    tensors, shapes = SHOWN[what]
    with mounted(write(tensors, tmp_path / "model.gguf"), tmp_path / "mnt") as root:
        header = read_header(root / "experts/layer_07_expert_000.safetensors")
        assert {name: info["shape"] for name, info in header.tensors.items()} == shapes
        assert len(contents(root / "experts")) == 1 + sum(
            dims[2] for name, dims, _ in tensors if name.endswith("weight")
        )


OF_IK_LLAMA = ["IQ4_KS", "IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "IQ2_KS", "Q4_K_R4", "IQ4_XS_R8"]


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "mlx"])
def test_types_whose_numbers_are_not_known_are_refused_by_name_in_every_form_but_raw(form, tmp_path):
    tensors = [[f"blk.{n}.attn_q.weight", [256, 8], kind] for n, kind in enumerate(OF_IK_LLAMA)]
    model = write([*tensors, single("attn_k", 64, 8), stack("up", 256, 8, 2, kind="IQ4_KS")], tmp_path / "model.gguf")
    (tmp_path / "mnt").mkdir()
    named = [f"{kind} ({'2 tensors' if kind == 'IQ4_KS' else '1 tensor'})" for kind in OF_IK_LLAMA]
    words = f"the numbers of these types are not known: {', '.join(named)}; use --as raw, which shows their blocks"
    for command in (["inspect", model], ["mount", model, tmp_path / "mnt"], ["materialize", model, tmp_path / "out"]):
        assert fail(*command, "--as", form, naming=[model.name]).endswith(f": {words}\n")
    assert not (tmp_path / "out").exists() and not os.listdir(tmp_path / "mnt")
    with mounted(model, tmp_path / "mnt", "--as", "raw") as root:
        assert read_header(root / "experts/layer_07_expert_000.safetensors").tensors["w3.weight"]["dtype"] == "U8"


def test_two_arrays_of_one_name_are_refused_in_the_form_that_makes_them(tmp_path):
    model = write([["a.weight", [256, 2], "Q4_K"], ["a.biases", [2], "F32"]], tmp_path / "model.gguf")
    said = fail("inspect", model, "--as", "mlx", naming=[model.name, "use another form"])
    assert '"a.weight" and "a.biases" would both be shown as a.biases' in said
    with mounted(model, tmp_path / "mnt", "--as", "bf16") as root:
        assert set(read_header(root / "base_model/attention_layers.safetensors").tensors) == {"a.weight", "a.biases"}
