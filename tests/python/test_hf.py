"""hf/: what transformers and mlx-lm open, compared with the checkpoint that the GGUF was made from."""

import json
import re

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from mlx_lm import utils
from safetensors import safe_open

from hf_models import (
    KINDS, LAYERS, LLAMA_3, MODEL_TYPES, VOCABULARY, factors, llama, weights, write_checkpoint, write_gguf,
)  # fmt: skip
from odmoe import REPO, promises, succeed

PAGE = (REPO / "docs/MODELS.md").read_text()
PROMPT = mx.array([[5, 17, 3, 60, 41, 8, 2]])


def shown(path, target, *flags):
    succeed("materialize", "--show", "hf", *flags, path, target)
    return target / "hf"


def tensors_of(directory):
    found = {}
    for path in sorted(directory.glob("model-*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                assert name not in found
                found[name] = file.get_tensor(name)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    for name, file in index["weight_map"].items():
        with safe_open(directory / file, framework="numpy") as opened:
            assert name in opened.keys()
    return found


def logits(directory):
    model, _ = utils.load_model(directory)
    return np.array(model(PROMPT).astype(mx.float32))


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A checkpoint, and the GGUF that is made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = KINDS[request.param]()
    tensors = weights(kind)
    write_checkpoint(folder / "checkpoint", kind.config, tensors)
    write_gguf(folder / "model.gguf", kind, tensors)
    return folder, kind, tensors


@promises(
    "Every row of every tensor of the model is in exactly one tensor of `hf/`, or its tensor is listed as left out with the reason; where mlx-lm needs a head of its own, one that is tied to the embeddings is there again."
)
@pytest.mark.parametrize("form", ["f32", "f16", "bf16"])
def test_every_tensor_of_the_checkpoint_comes_back(made, form, tmp_path):
    folder, _, tensors = made
    directory = shown(folder / "model.gguf", tmp_path / "out", "--as", form)
    found = tensors_of(directory)
    assert set(found) == set(tensors)
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[form]
    for name, expected in tensors.items():
        expected = expected if name.endswith("e_score_correction_bias") else expected.astype(dtype)
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape, name
        assert found[name].tobytes() == expected.tobytes(), name


def test_the_config_builds_the_same_model(made, tmp_path):
    folder, kind, _ = made
    directory = shown(folder / "model.gguf", tmp_path / "out", "--as", "f32")
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = config["model_type"].replace("minimax_m2", "minimax")
    for name, value in kind.config.items():
        if name == "rope_scaling" and value is not None:
            assert config[name].items() >= value.items()
        elif name == "head_dim" and name not in config:
            assert value * config["num_attention_heads"] == config["hidden_size"]
        else:
            # transformers wants a float where it has one.
            assert config[name] == value and isinstance(config[name], type(value)), name
    again = tmp_path / "again"
    write_checkpoint(again, config, tensors_of(directory))
    assert np.array_equal(logits(folder / "checkpoint"), logits(again))
    if kind.arch != "gpt-oss":
        assert np.array_equal(logits(folder / "checkpoint"), logits(directory))


def test_mlx_computes_the_same_from_stacks(made, tmp_path):
    folder, _, _ = made
    stacked = shown(folder / "model.gguf", tmp_path / "mlx", "--as", "mlx", "--scales", "f32")
    assert np.allclose(logits(folder / "checkpoint"), logits(stacked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("original", [2048, 4096])
def test_scaling_of_llama_3_with_hardly_a_wave_between_its_bounds_is_computed(original, tmp_path):
    scaling = LLAMA_3 | {"factor": 3.5, "low_freq_factor": 2.0, "original_max_position_embeddings": original}
    kind = llama(scaling=scaling)
    between = [f for f in factors(scaling) if 1 < f < scaling["factor"]]
    assert len(between) == (original == 4096)
    write_checkpoint(tmp_path / "checkpoint", kind.config, weights(kind))
    write_gguf(tmp_path / "m.gguf", kind, weights(kind))
    directory = shown(tmp_path / "m.gguf", tmp_path / "out", "--as", "f32")
    assert np.allclose(logits(tmp_path / "checkpoint"), logits(directory), rtol=1e-5, atol=1e-6)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert not np.allclose(logits(tmp_path / "checkpoint"), logits(directory), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_mlx_loads_heads_that_are_tied_to_the_embeddings(name, tmp_path):
    """Some of its classes have a head of their own all the same."""
    kind = MODEL_TYPES[name]()
    tensors, words = weights(kind), "model.embed_tokens.weight"
    tensors[words] = gguf.quants.dequantize(gguf.quants.quantize(tensors[words], Type.Q8_0), Type.Q8_0)
    untied = tensors | {"lm_head.weight": tensors[words]}
    write_checkpoint(tmp_path / "checkpoint", kind.config | {"tie_word_embeddings": False}, untied)
    tensors.pop("lm_head.weight", None)
    for ggml_type in (None, Type.Q8_0):
        path, out = tmp_path / f"{ggml_type}.gguf", tmp_path / f"{ggml_type}"
        write_gguf(path, kind, tensors, lambda name: ggml_type if name == "token_embd.weight" else None)
        tied = shown(path, out, "--as", "mlx", "--scales", "f32")
        assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True
        assert np.allclose(logits(tmp_path / "checkpoint"), logits(tied), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ggml_type", [Type.Q8_0, Type.Q4_0, Type.MXFP4], ids=lambda t: t.name)
def test_mlx_computes_on_quantised_arrays_what_it_computes_on_their_numbers(made, ggml_type, tmp_path):
    _, kind, tensors = made
    keeps = ("ffn_gate_inp", "token_embd", "k_b", "v_b", "nextn", "exp_probs_b")
    path = tmp_path / "q.gguf"
    write_gguf(path, kind, tensors, lambda name: None if any(word in name for word in keeps) else ggml_type)
    numbers = shown(path, tmp_path / "f32", "--as", "f32")
    packed = shown(path, tmp_path / "mlx", "--as", "mlx", "--scales", "f32")
    config = json.loads((packed / "config.json").read_text())
    modes = [module for module in config["quantization"].values() if isinstance(module, dict)]
    assert len(modes) > LAYERS
    write_checkpoint(tmp_path / "again", json.loads((numbers / "config.json").read_text()), tensors_of(numbers))
    assert np.allclose(logits(tmp_path / "again"), logits(packed), rtol=1e-3, atol=1e-4)
    assert logits(packed).shape[-1] == VOCABULARY


def test_raw_directories_hold_blocks_under_the_names_of_mlx(made, tmp_path):
    _, kind, tensors = made
    keeps = ("ffn_gate_inp", "k_b", "v_b", "exp_probs_b")
    path = tmp_path / "q.gguf"
    write_gguf(path, kind, tensors, lambda name: None if any(word in name for word in keeps) else Type.Q4_0)
    raw = shown(path, tmp_path / "raw", "--as", "raw")
    numbers = tensors_of(shown(path, tmp_path / "mlx", "--as", "mlx", "--scales", "f32"))
    blocks = tensors_of(raw)
    quantization = json.loads((raw / "config.json").read_text())["quantization"]
    assert quantization["mode"] == "kquant" and set(quantization["per_tensor"].values()) == {"q4_0"}
    for module in quantization["per_tensor"]:
        codes, scales = numbers[f"{module}.weight"], numbers[f"{module}.scales"]
        found = blocks[f"{module}.weight"]
        assert blocks[f"{module}.scales"].shape == (1,)
        # A block of Q4_0 is a scale and 16 bytes of codes.
        assert found.dtype == np.uint8 and found.shape == (*codes.shape[:-1], codes.shape[-1] // 4 * 18)
        dequantised = gguf.quants.dequantize(found, Type.Q4_0)
        biases = mx.array(numbers[f"{module}.biases"])
        again = mx.dequantize(mx.array(codes), mx.array(scales), biases, group_size=32, bits=4)
        assert np.array_equal(dequantised, np.array(again))


def test_every_architecture_of_the_page_is_tested_and_every_tested_one_is_there():
    rows = set(re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|", PAGE, re.MULTILINE))
    kinds = [KINDS[name]() for name in KINDS]
    tested = {(kind.arch, kind.config["model_type"].replace("minimax", "minimax_m2")) for kind in kinds}
    assert rows == tested
    code = "".join(path.read_text() for path in (REPO / "src/hf/architectures").glob("*.rs"))
    known = set(zip(re.findall(r'gguf: "(.*)"', code), re.findall(r'model_type: "(.*)"', code), strict=True))
    assert rows == known


def test_every_pre_tokenizer_of_the_page_is_known_and_every_known_one_is_there():
    code = (REPO / "src/hf/tokenizer/pre.rs").read_text()
    table = code[code.index("static PRES") :]
    names = set(re.findall(r'"([a-z0-9-]+)"', re.sub(r'r#*".*?"#*', "", table)))
    (row,) = re.findall(r"^\| BPE \| (.*) \|$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(.*?)`", row)) == names
