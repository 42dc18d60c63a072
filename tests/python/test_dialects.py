"""Models of other writers than llama.cpp: read where they say the same in other words, refused by their names where they do not."""

import struct

import pytest

from odmoe import contents, fail, mounted
from test_refusals import I32, STRING, U16, gguf, pair, tensor

F32, OLLAMAS, MXFP4 = 0, 4, 39
HINT = "take llama.cpp's file of the model, whose general.architecture is \"gpt-oss\""
NIBBLES = "type 4 is Ollama's own MXFP4 here (general.architecture is \"gptoss\"), which has its nibbles in another order; " + HINT
REMOVED = "type 4 is Q4_2, which is not supported; quantise the model again, llama.cpp removed it"
WIDTH, ROWS, EXPERTS = 32, 4, 2


def architecture(name):
    return pair("general.architecture", STRING, name)


def stacks(fused, down=F32, layer=0, suffix="weight"):
    return [
        tensor(f"blk.{layer}.ffn_gate_up_exps.{suffix}", [WIDTH, 2 * ROWS, EXPERTS], fused),
        tensor(f"blk.{layer}.ffn_down_exps.{suffix}", [WIDTH, WIDTH, EXPERTS], down, 4 * WIDTH * 2 * ROWS * EXPERTS),
    ]


def write(path, *arguments):
    path.write_bytes(gguf(*arguments) + bytes(1 << 14))
    return path


def refused(path, tmp_path, words):
    (tmp_path / "mnt").mkdir(exist_ok=True)
    said = fail("inspect", path, naming=[words])
    assert fail("mount", path, tmp_path / "mnt") == said
    assert fail("materialize", path, tmp_path / "out") == said
    return said


# --- gpt-oss as Ollama writes it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.gguf", "sha256-b112a5"])
def test_rows_that_alternate_are_not_mixed(tmp_path, name):
    path = write(tmp_path / name, [architecture("gptoss")], stacks(F32))
    words = 'tensor "blk.0.ffn_gate_up_exps.weight" [32, 8, 2] F32 holds gate and up rows in turn, as Ollama writes gpt-oss'
    refused(path, tmp_path, f'{words} (general.architecture is "gptoss"); {HINT}')


def test_rows_that_alternate_show_by_the_sinks_too(tmp_path):
    sinks = tensor("blk.0.attn_sinks", [8], F32, 4 * WIDTH * 2 * ROWS * EXPERTS + 4 * WIDTH * WIDTH * EXPERTS)
    path = write(tmp_path / "model.gguf", [architecture("gpt-oss")], [*stacks(F32), sinks])
    refused(path, tmp_path, f'as Ollama writes gpt-oss ("blk.0.attn_sinks" has no suffix); {HINT}')


@pytest.mark.parametrize("tensors", [stacks(OLLAMAS), stacks(F32, OLLAMAS), [tensor("blk.0.ffn_down_exps.weight", [32, 8, 2], OLLAMAS)]], ids=["both", "down", "only down"])
def test_the_type_of_ollama_is_called_by_its_name(tmp_path, tensors):
    said = refused(write(tmp_path / "model.gguf", [architecture("gptoss")], tensors), tmp_path, NIBBLES)
    assert "Q4_2" not in said


@pytest.mark.parametrize("name", ["gpt-oss", "llama", None])
def test_the_same_type_of_another_architecture_is_the_removed_one(tmp_path, name):
    pairs = [architecture(name)] if name else []
    refused(write(tmp_path / "model.gguf", pairs, stacks(OLLAMAS)), tmp_path, REMOVED)


@pytest.mark.parametrize("name", ["gpt-oss", "gemma4"])
def test_a_fused_stack_of_llama_cpp_is_halved(tmp_path, name):
    with mounted(write(tmp_path / "model.gguf", [architecture(name)], stacks(F32)), tmp_path / "mnt") as root:
        assert b'"w3.weight"' in (root / "experts/layer_00_expert_001.safetensors").read_bytes()


def test_separate_stacks_of_ollama_are_shown(tmp_path):
    """As its newer converter writes them."""
    size = 17 * ROWS * EXPERTS
    padded = -(-size // 32) * 32
    names = [f"blk.0.ffn_{slot}_exps.weight" for slot in ("gate", "up", "down")]
    tensors = [tensor(name, [WIDTH, ROWS, EXPERTS], MXFP4, n * padded) for n, name in enumerate(names)]
    tensors.append(tensor("blk.0.attn_sinks", [8], F32, 3 * padded))
    with mounted(write(tmp_path / "model.gguf", [architecture("gptoss")], tensors), tmp_path / "mnt") as root:
        assert len(contents(root / "experts")) == 1 + EXPERTS


# --- in parts, of which only the first knows the architecture ---------------------------------------------------------


def write_parts(folder, name, *tensors):
    count = sum(map(len, tensors))
    for no, some in enumerate(tensors):
        pairs = [pair("split.no", U16, no), pair("split.count", U16, len(tensors)), pair("split.tensors.count", I32, count)]
        if no == 0 and name:
            pairs.append(architecture(name))
        yield write(folder / f"m-{no + 1:05}-of-{len(tensors):05}.gguf", pairs, some)


def test_the_architecture_of_the_first_part_holds_for_all(tmp_path):
    ollamas = [tensor("blk.0.ffn_down_exps.weight", [32, 8, 2], OLLAMAS)]
    parts = list(write_parts(tmp_path, "gptoss", [tensor("a", [8])], ollamas, [tensor("b", [8])]))
    for path in parts:
        refused(path, tmp_path, f'"{parts[1]}": tensor 0 "blk.0.ffn_down_exps.weight", type, at byte')
        refused(path, tmp_path, NIBBLES)


def test_a_fused_stack_in_a_later_part_is_not_mixed(tmp_path):
    parts = list(write_parts(tmp_path, "gptoss", [], stacks(F32)))
    for path in parts:
        refused(path, tmp_path, "holds gate and up rows in turn, as Ollama writes gpt-oss")


def test_both_parts_of_ollamas_type_are_called_so(tmp_path):
    first = [tensor("blk.0.ffn_down_exps.weight", [32, 8, 2], OLLAMAS)]
    second = [tensor("blk.1.ffn_down_exps.weight", [32, 8, 2], OLLAMAS)]
    for path in list(write_parts(tmp_path, "gptoss", first, second)):
        refused(path, tmp_path, NIBBLES)


@pytest.mark.parametrize("name", ["llama", None])
def test_parts_of_another_architecture_have_the_removed_type(tmp_path, name):
    parts = list(write_parts(tmp_path, name, [tensor("a", [8])], [tensor("b", [32], OLLAMAS)]))
    refused(parts[1], tmp_path, REMOVED)


def test_a_part_without_the_first_has_the_removed_type(tmp_path):
    parts = list(write_parts(tmp_path, "gptoss", [tensor("a", [8])], [tensor("b", [32], OLLAMAS)]))
    parts[0].unlink()
    refused(parts[1], tmp_path, REMOVED)
    parts[0].mkdir()
    refused(parts[1], tmp_path, REMOVED)


# --- NVFP4 with scales that are called those of the weight ------------------------------------------------------------


def nvfp4(*scales):
    """One stack, and scales of other names; each scale is a row of two numbers."""
    tensors, offset = [tensor("blk.0.ffn_down_exps.weight", [64, 8, EXPERTS], 40)], 36 * 8 * EXPERTS
    for name in scales:
        tensors.append(tensor(f"blk.0.ffn_down_exps.{name}", [EXPERTS], F32, offset))
        offset += 32
    return tensors


@pytest.mark.parametrize("scale", ["scale", "input_scale"])
def test_both_dialects_of_scales_give_the_same_names(tmp_path, scale):
    shown = []
    for n, name in enumerate((scale, f"weight.{scale}")):
        path = write(tmp_path / f"{n}.gguf", [architecture("moe")], nvfp4(name))
        at = len(gguf([architecture("moe")], nvfp4(name))) + 36 * 8 * EXPERTS
        with path.open("r+b") as file:
            file.seek(at)
            file.write(struct.pack("<2f", 1.5, 2.5))
        with mounted(path, tmp_path / "mnt") as root:
            expert = (root / "experts/layer_00_expert_001.safetensors").read_bytes()
            assert not (root / "base_model/attention_layers.safetensors").exists()
        assert expert.endswith(struct.pack("<f", 2.5)) and f'"w2.{scale}"'.encode() in expert
        shown.append(expert[-36 * 8 - 4 :])
    assert shown[0] == shown[1]


def test_a_scale_under_both_names_is_an_error_that_names_them(tmp_path):
    path = write(tmp_path / "model.gguf", [architecture("moe")], nvfp4("scale", "weight.scale"))
    said = refused(path, tmp_path, "w2.scale of the same expert comes from both")
    assert "ffn_down_exps.scale" in said and "ffn_down_exps.weight.scale" in said


# --- tables that no token needs whole ---------------------------------------------------------------------------------


def test_tables_of_engrams_are_embeddings(tmp_path):
    path = write(tmp_path / "model.gguf", [architecture("moe")], [tensor("blk.1.engram_embd.weight", [8, 4]), tensor("blk.1.engram_q.weight", [8], F32, 128)])
    with mounted(path, tmp_path / "mnt") as root:
        assert b"engram_embd" in (root / "base_model/embeddings.safetensors").read_bytes()
        assert b"engram_q" in (root / "base_model/attention_layers.safetensors").read_bytes()
