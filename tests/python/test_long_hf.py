"""hf/ against llama.cpp's own converter, tools and test vectors, and against transformers: only in the long form."""

import json

import gguf
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from mlx_lm import utils

from hf_models import KINDS, VOCABULARY, in_gguf, qwen3moe, sized, value_type, weights, write_gguf
from llama_cpp import convert, dequantised, llama_cpp, logits, quantised, tool
from models import finish
from odmoe import REPO, odmoe, succeed
from test_hf import tensors_of

CLASSES = {
    "qwen3_moe": "Qwen3MoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM", "glm4_moe": "Glm4MoeForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM", "minimax_m2": "MiniMaxM2ForCausalLM",
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


@pytest.fixture(autouse=True)
def long_form(times):
    if times(0, long=1) == 0:
        pytest.skip("llama.cpp is only built in the long form")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    """A checkpoint as Hugging Face has it, with its tensors."""
    folder = tmp_path_factory.mktemp("long") / "checkpoint"
    folder.mkdir()
    kind = KINDS[request.param]()
    tensors = weights(kind)
    config = dict(kind.config)
    if config["model_type"] == "minimax":
        config["model_type"] = "minimax_m2"
    config["architectures"] = [CLASSES[config["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, kind, tensors


@pytest.mark.parametrize("outtype", ["f32", "bf16"])
@pytest.mark.parametrize("split", [(), ("--split-max-tensors", "7")], ids=["whole", "split"])
def test_what_the_converter_makes_comes_back_bit_by_bit(checkpoint, outtype, split, tmp_path):
    folder, kind, tensors = checkpoint
    out = tmp_path / "model.gguf"
    convert(folder, out, outtype, *split)
    first = out if out.exists() else min(tmp_path.glob("model-*.gguf"))
    succeed("materialize", "--show", "hf", "--as", outtype, first, tmp_path / "out")
    found = tensors_of(tmp_path / "out/hf")
    assert set(found) == set(tensors)
    for name, expected in tensors.items():
        if outtype == "bf16" and not name.endswith("e_score_correction_bias"):
            expected = expected.astype(ml_dtypes.bfloat16)
        assert found[name].shape == expected.shape, name
        assert found[name].tobytes() == expected.tobytes(), name
    config = json.loads((tmp_path / "out/hf/config.json").read_text())
    for name, value in kind.config.items():
        if name == "rope_scaling" and value is not None:
            assert config[name].items() >= value.items()
        elif name not in ("model_type", "head_dim", "n_group", "topk_group") or name in config:
            assert config[name] == value or name == "model_type", name


def test_transformers_computes_the_same(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, _, _ = checkpoint
    convert(folder, tmp_path / "model.gguf", "f32")
    succeed("materialize", "--show", "hf", "--as", "f32", tmp_path / "model.gguf", tmp_path / "out")
    prompt = torch.tensor([[5, 17, 3, 60, 41, 8, 2]])

    def computed(directory):
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        assert not info["missing_keys"], info
        return model(prompt).logits.detach().numpy()

    # The same weights; sums of threads differ in their last bits from run to run.
    assert np.allclose(computed(folder), computed(tmp_path / "out/hf"), rtol=1e-5, atol=1e-5)


PROMPTS = np.random.default_rng(1).integers(0, VOCABULARY - 2, (64, 12)).tolist()


def mlx_logits(model, out):
    """What mlx-lm computes, on the numbers of the model as they are: with scales of F32 nothing is rounded."""
    succeed("materialize", "--show", "hf", "--as", "mlx", "--scales", "f32", model, out)
    loaded, _ = utils.load_model(out / "hf")
    return np.array(loaded(mx.array(PROMPTS)).astype(mx.float32))


def apart(found, expected):
    """How far apart logits are, for each token, as a share of the largest."""
    return np.abs(found - expected).max(-1) / np.abs(expected).max(-1)


def choices(computed):
    """The tokens that follow the prompts."""
    return computed[:, -1].argmax(-1)


# llama.cpp tells V2-Lite, whose queries are one matrix, by the number of layers.
LITE = 27


# mlx-lm does not scale the positions of this one, which is a warning.
UNSCALED = {"qwen3moe-yarn"}


# llama.cpp reads stacks of gate and up in one tensor of other architectures only.
APART = {"glm4moe-fused", "qwen2moe-fused"}


@pytest.mark.parametrize("name", sorted(KINDS.keys() - UNSCALED - APART))
def test_mlx_lm_computes_what_llama_cpp_computes(name, tmp_path):
    kind = sized(name, LAYERS=LITE) if name == "deepseek_v2-lite" else KINDS[name]()
    (model,) = write_gguf(tmp_path / "m.gguf", kind, weights(kind))
    found, expected = mlx_logits(model, tmp_path / "out"), logits(model, PROMPTS)
    assert np.array_equal(choices(found), choices(expected))
    # A few of 768 tokens may choose another expert, where two have nearly the same score.
    layers = 10 if kind.layers == LITE else 1
    assert np.median(apart(found, expected)) < layers * 1e-5
    assert np.quantile(apart(found, expected), 0.98) < layers * 1e-4


# K-quants need rows of 256.
WIDE = {"HIDDEN": 256, "HEAD": 64, "WIDTH": 256, "DENSE": 512, "QUERY_RANK": 256, "RANK": 256, "NOPE": 64, "VALUE": 64}
FILE_TYPES = {"Q4_K_M": "Q4_K", "Q8_0": "Q8_0", "MXFP4_MOE": "MXFP4", "IQ2_XXS": "IQ2_XXS"}


def quantised_runs(name, file_type, folder):
    """The logits of a quantised model: of mlx-lm, and of llama.cpp in four ways."""
    kind = sized(name, **WIDE)
    (whole,) = write_gguf(folder / "m.gguf", kind, weights(kind, deviation=0.1))
    model, numbers = folder / "q.gguf", folder / "f.gguf"
    quantised(whole, model, file_type)
    dequantised(model, numbers)
    assert FILE_TYPES[file_type] in {tensor.tensor_type.name for tensor in gguf.GGUFReader(model).tensors}
    return {
        "mlx": mlx_logits(model, folder / "out"),
        "f32": logits(numbers, PROMPTS),
        "f32 by tokens": logits(numbers, PROMPTS, n_batch=1),
        "blocks": logits(model, PROMPTS),
        "blocks, other kernels": logits(model, PROMPTS, flash_attn=True),
    }


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("name", ["qwen3moe", "mixtral", "gpt-oss", "deepseek_v3", "glm4moe", "minimax-m2"])
def test_mlx_lm_computes_on_quantised_models_what_llama_cpp_computes(name, file_type, tmp_path):
    """llama.cpp rounds activations to 8 bits before it multiplies them by blocks, and mlx-lm does not.

    So the numbers of the model are compared on llama.cpp's matrices of F32, and the blocks by what that rounding does.
    """
    runs = quantised_runs(name, file_type, tmp_path)

    def between(first, second):
        return np.median(apart(runs[first], runs[second]))

    assert np.array_equal(choices(runs["mlx"]), choices(runs["f32"]))
    assert between("mlx", "f32") < 1e-5
    assert between("mlx", "f32") < 8 * between("f32 by tokens", "f32")

    assert between("mlx", "blocks") < 1.01 * between("f32", "blocks")
    assert between("mlx", "blocks") < 2 * between("blocks, other kernels", "blocks")


@pytest.mark.parametrize("flags", [["--split-max-tensors", "7"], ["--split-max-tensors", "20", "--no-tensor-first-split"]])
@pytest.mark.parametrize("kind", ["qwen3moe", "gpt-oss"])
def test_joined_parts_are_what_llama_gguf_split_makes_of_them(kind, flags, tmp_path):
    kind = KINDS[kind]()
    (whole,) = write_gguf(tmp_path / "whole.gguf", kind, weights(kind))
    tool("llama-gguf-split", "--split", *flags, whole, tmp_path / "part")
    parts = sorted(tmp_path.glob("part-*.gguf"))
    tool("llama-gguf-split", "--merge", parts[0], tmp_path / "merged.gguf")
    succeed("materialize", "--show", "joined", parts[-1], tmp_path / "out")
    assert (tmp_path / "out/model.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()


# transformers takes these sizes from its own defaults rather than from the GGUF.
DEFAULTS = {"HEAD": 128, "WIDTH": 768}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-multi-query", "qwen2", "qwen3moe"])
def test_transformers_reads_joined_parts_as_a_gguf(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = sized(name, **DEFAULTS) if name == "qwen3moe" else KINDS[name]()
    parts = write_gguf(tmp_path / "m.gguf", kind, weights(kind), split_max_tensors=9)
    assert len(parts) > 2
    load = transformers.AutoModelForCausalLM.from_pretrained
    succeed("materialize", "--show", "joined,hf", "--as", "f32", parts[0], tmp_path / "out")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, info = load(tmp_path / "out", gguf_file="model.gguf", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = load(tmp_path / "out/hf", **options)
    prompt = torch.tensor([[5, 17, 3, 60, 41, 8, 2]])
    assert torch.allclose(model(prompt).logits, expected(prompt).logits, rtol=1e-5, atol=1e-5)


VOCABULARIES = (
    "aquila baichuan bert-bge command-r deepseek-coder deepseek-llm falcon gemma-4 gpt-2 gpt-neox llama-bpe llama-spm mpt "
    "nomic-bert-moe phi-3 qwen2 qwen35 refact starcoder"
).split()
NOT_KNOWN = {"aquila", "bert-bge", "gemma-4", "gpt-neox", "nomic-bert-moe"}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_ids_of_every_line_are_those_of_llama_cpp(name, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    source = llama_cpp() / f"models/ggml-vocab-{name}.gguf"
    kind = qwen3moe()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind.arch)
    for key, value in kind.keys.items():
        writer.add_key_value(f"{kind.arch}.{key}", value, value_type(value))
    for field in gguf.GGUFReader(source).fields.values():
        if field.name.startswith("tokenizer."):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], of)
    for tensor, data in in_gguf(kind, weights(kind)).items():
        writer.add_tensor(tensor, data)
    finish(writer)
    done = odmoe("materialize", "--show", "hf", tmp_path / "model.gguf", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "out/hf/tokenizer.json"
    if name in NOT_KNOWN:
        assert not made.exists() and "there is no tokenizer.json" in done.stderr
        return
    tokenizer = tokenizers.Tokenizer.from_file(str(made))
    vectors = source.with_name(f"{source.name}.inp")
    if not vectors.exists():
        assert name == "baichuan"
        return
    texts = vectors.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = source.with_name(f"{source.name}.out").read_text().split("\n")
    assert len(texts) > 30
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text, add_special_tokens=False).ids == [int(word) for word in line.split()], text


def test_the_page_says_which_vocabularies_are_not_known():
    page = (REPO / "docs/MODELS.md").read_text()
    for kind in ("bert", "t5", "gemma4"):
        assert f"`{kind}`" in page
    assert VOCABULARY < 100
