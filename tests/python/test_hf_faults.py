"""Keys that no model has: hf/ is refused, or says what it leaves out, and the other views do not mind."""

import json
from contextlib import nullcontext

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Kind
from mlx_lm import utils

from hf_models import KINDS, LAYERS, MODEL_TYPES, in_gguf, sized, value_type, weights
from models import finish
from odmoe import fail, odmoe, succeed


def write(path, kind, change=None, without=(), tensors=None):
    """Writes a GGUF with other keys: `change` gives the arguments of `add_key_value` by their names."""
    writer = gguf.GGUFWriter(path, kind.arch)
    values = {key: (value, value_type(value)) for key, value in kind.keys.items()}
    values |= change or {}
    for key, arguments in values.items():
        if key not in without:
            writer.add_key_value(f"{kind.arch}.{key}", *arguments)
    for name, tensor in (tensors or in_gguf(kind, weights(kind))).items():
        writer.add_tensor(name, tensor)
    finish(writer)
    return path


HOSTILE = {
    "negative": (-1, Kind.INT32),
    "zero": (0, Kind.UINT32),
    "large": (2**32 - 1, Kind.UINT32),
    "too large": (2**64 - 1, Kind.UINT64),
    "a fraction": (0.5, Kind.FLOAT32),
    "not a number": (float("nan"), Kind.FLOAT32),
    "infinite": (float("inf"), Kind.FLOAT64),
    "a text": ("seven", Kind.STRING),
    "a flag": (True, Kind.BOOL),
    "different layers": ([1, 2, 3], Kind.ARRAY, Kind.UINT32),
    "texts": (["seven"], Kind.ARRAY, Kind.STRING),
    "a long array": ([4] * 5000, Kind.ARRAY, Kind.UINT32),
}
MORE_KEYS = {
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier", "nextn_predict_layers", "expert_gating_func",
    "attention.sliding_window", "attention.sliding_window_pattern", "attention.clamp_kqv",
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_any_value_of_any_key_is_taken_or_refused_and_never_panics(name, tmp_path, times):
    kind = MODEL_TYPES[name]()
    tensors = in_gguf(kind, weights(kind))
    names = list(HOSTILE)
    for at, key in enumerate(sorted(kind.keys.keys() | MORE_KEYS)):
        # The short form tries another few values with each key.
        for value in np.roll(names, -5 * at)[: times(5, long=len(names))]:
            path = write(tmp_path / "m.gguf", kind, {key: HOSTILE[value]}, tensors=tensors)
            done = odmoe("inspect", "--json", "--show", "hf", path)
            assert done.returncode in (0, 1), (key, value, done.stderr)
            if done.returncode == 1:
                assert f"{kind.arch}." in done.stderr or '"blk.' in done.stderr, (key, value, done.stderr)


def count(number):
    return number, Kind.UINT32


def real(number):
    return number, Kind.FLOAT32


def text(words):
    return words, Kind.STRING


def scaled(kind, factor=4.0, **more):
    return {"rope.scaling.type": text(kind), "rope.scaling.factor": real(factor)} | more


WINDOW = {"rope.scaling.original_context_length": count(128)}
REFUSED = {
    "no width": ("llama", {"embedding_length": count(0)}, ["llama.embedding_length is 0"]),
    "another width": (
        "qwen2", {"embedding_length": count(65)}, ["token_embd.weight", "qwen2.embedding_length is 65"]
    ),
    "no heads": ("llama", {"attention.head_count": count(0)}, ["llama.attention.head_count is 0"]),
    "other heads": (
        "qwen3", {"attention.head_count_kv": count(1)}, ["attn_k.weight", "qwen3.attention.head_count_kv is 1"]
    ),
    "more used than there are": (
        "qwen3moe", {"expert_used_count": count(5)}, ["qwen3moe.expert_used_count is 5", "4 experts"]
    ),
    "too many of one layer": (
        "mixtral", {"expert_used_count": count(400)}, ["llama.expert_used_count is 400"]
    ),
    "a negative epsilon": (
        "olmoe", {"attention.layer_norm_rms_epsilon": real(-1e-5)}, ["layer_norm_rms_epsilon must not be neg"]
    ),
    "a negative scale": (
        "glm4moe", {"expert_weights_scale": real(-2.5)}, ["glm4moe.expert_weights_scale must not be negative"]
    ),
    "other shared experts": (
        "deepseek_v3", {"expert_shared_count": count(1)}, ["ffn_down_shexp.weight", "expert_shared_count is 1"]
    ),
    "no shared experts": (
        "glm4moe", {"expert_shared_count": count(0)}, ["ffn_down_shexp.weight", "expert_shared_count is 0"]
    ),
    "corrections of softmax": (
        "deepseek_v3", {"expert_gating_func": count(1)}, ["no name for", "exp_probs_b.bias"]
    ),
    "gates of a text": (
        "deepseek_v2", {"expert_gating_func": text("softmax")}, ["deepseek2.expert_gating_func must be"]
    ),
    "weights of V2 that add up to 1": (
        "deepseek_v2", {"expert_weights_norm": (True, Kind.BOOL)}, ["deepseek2.expert_weights_norm is true"]
    ),
    "gates of V2": ("deepseek_v2", {"expert_gating_func": count(3)}, ["deepseek2.expert_gating_func is 3"]),
    "another dense width": (
        "llama", {"feed_forward_length": count(95)}, ["ffn_gate.weight", "llama.feed_forward_length is 95"]
    ),
    "a dense width of qwen": (
        "qwen3", {"feed_forward_length": count(1)}, ["ffn_gate.weight", "qwen3.feed_forward_length is 1"]
    ),
    "experts in words": (
        "mixtral", {"expert_count": text("eight")}, ["llama.expert_count must be a whole number"]
    ),
    "no experts but their tensors": ("mixtral", {"expert_count": count(0)}, ["llama.expert_count is 0"]),
    "keys of no width": ("qwen2", {"attention.key_length": count(0)}, ["qwen2.attention.key_length is 0"]),
    "values of another width": (
        "qwen2", {"attention.value_length": count(8)}, ["value_length is 8", "key_length is 16"]
    ),
    "no groups used": (
        "deepseek_v3", {"expert_group_used_count": count(0)}, ["deepseek2.expert_group_used_count is 0"]
    ),
    "unknown gates": ("glm4moe", {"expert_gating_func": count(7)}, ["glm4moe.expert_gating_func is 7"]),
    "layers that predict": (
        "qwen3moe", {"nextn_predict_layers": count(1)}, ["qwen3moe.nextn_predict_layers is 1"]
    ),
    "only such layers": (
        "glm4moe", {"nextn_predict_layers": count(4)}, ["nextn_predict_layers is 4", "only 4 layers"]
    ),
    "scaling of an unknown kind": ("llama", scaled("longrope"), ['llama.rope.scaling.type is "longrope"']),
    "scaling of a kind to come": ("qwen3moe", scaled("dynamic"), ['qwen3moe.rope.scaling.type is "dynamic"']),
    "scaling without a factor": (
        "llama", {"rope.scaling.type": text("linear")}, ["llama.rope.scaling.factor is missing"]
    ),
    "scaling down": ("qwen2", scaled("linear", -2.0), ["qwen2.rope.scaling.factor must not be negative"]),
    "factors and a factor": ("llama-scaled", scaled("linear"), ["rope_freqs.weight", "llama.rope.scaling.factor is 4"]),
    "yarn without a length": (
        "qwen2", scaled("yarn"), ["qwen2.rope.scaling.original_context_length is missing"]
    ),
    "yarn of no factor": (
        "qwen3", scaled("yarn", **WINDOW, **{"rope.scaling.yarn_attn_factor": real(0.0)}),
        ["yarn_attn_factor must be above 0"]
    ),
    "yarn of a negative ramp": (
        "gpt-oss", {"rope.scaling.yarn_beta_fast": real(-32.0)}, ["gpt-oss.rope.scaling.yarn_beta_fast must be above 0"]
    ),
    "a type that is a number": (
        "llama", {"rope.scaling.type": count(2)}, ["llama.rope.scaling.type must be a text"]
    ),
    "waves of no length": ("llama", {"rope.freq_base": real(0.0)}, ["llama.rope.freq_base must be above 0"]),
    "positions of another width": (
        "qwen3moe", {"rope.dimension_count": count(8)}, ["qwen3moe.rope.dimension_count is 8"]
    ),
    "more positions than a head": (
        "glm4moe", {"rope.dimension_count": count(32)}, ["glm4moe.rope.dimension_count is 32"]
    ),
    "a head for each layer": (
        "qwen3", {"attention.head_count": ([4, 4, 2], Kind.ARRAY, Kind.UINT32)}, ["qwen3.attention.head_count differs"]
    ),
    "groups of no size": (
        "deepseek_v3", {"expert_group_count": count(3)}, ["deepseek2.expert_group_count is 3"]
    ),
    "a window for each layer": (
        "gpt-oss", {"attention.sliding_window_pattern": ([True], Kind.ARRAY, Kind.BOOL)},
        ["sliding_window_pattern must say yes or no"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_config_can_say_is_named_and_the_experts_are_shown_all_the_same(case, tmp_path):
    name, change, naming = REFUSED[case]
    path = write(tmp_path / "m.gguf", KINDS[name](), change)
    fail("mount", "--show", "base,experts,hf", path, tmp_path, naming=["hf", *naming])
    report = json.loads(succeed("inspect", "--json", path))
    assert report["hf"]["possible"] is False
    succeed("materialize", path, tmp_path / "out")
    assert (tmp_path / "out/base_model").is_dir()


def with_biases(*names):
    return lambda tensors: tensors | {f"{name}.bias": np.zeros(len(tensors[f"{name}.weight"]), np.float32) for name in names}


def of_layers(*names):
    return [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in names]


def in_all_layers(*names):
    return with_biases(*of_layers(*names))


def missing(word):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if word not in name}


def longer(axis, *names):
    """Twice as long along one axis."""
    return lambda tensors: tensors | {name: np.concatenate([tensors[name]] * 2, axis) for name in names}


QKV = "attn_q", "attn_k", "attn_v"
MISFITS = {
    # Classes without such a bias, or with all of them or none.
    "biases of qwen2's output": ("qwen2", in_all_layers("attn_output"), ["blk.0.attn_output.bias", "Qwen2ForCausalLM has"]),
    "a bias of the head": ("qwen3", with_biases("output"), ["output.bias", "Qwen3ForCausalLM has no such bias"]),
    "biases of mixtral": ("mixtral", in_all_layers(*QKV), ["blk.0.attn_q.bias", "MixtralForCausalLM has no such bias"]),
    "biases of minimax": ("minimax-m2", in_all_layers(*QKV), ["blk.0.attn_q.bias", "MiniMaxM2ForCausalLM has no"]),
    "biases of some of llama": (
        "llama", in_all_layers(*QKV), ["blk.0.attn_output.weight", 'no bias, but there is "blk.0.attn_q.bias"', "attention_bias"]
    ),
    "biases of a layer of llama": ("llama", with_biases("blk.1.ffn_down"), ["blk.0.ffn_gate.weight", "mlp_bias"]),
    "biases of some of qwen3moe": ("qwen3moe", in_all_layers(*QKV), ["blk.0.attn_output.weight", "attention_bias"]),
    "biases of glm4moe's output": ("glm4moe", in_all_layers("attn_output"), ["blk.0.attn_output.bias", "Glm4MoeForCausalLM"]),
    "a part of the biases of qwen2moe": ("qwen2moe", missing("blk.2.attn_k.bias"), ["blk.2.attn_k.weight", "qkv_bias"]),
    "biases that qwen2 needs": ("qwen2", missing("bias"), ['"blk.0.attn_q.bias" is missing']),
    "a part of the biases of experts": ("gpt-oss", missing("blk.1.ffn_up_exps.bias"), ['"blk.1.ffn_up_exps.bias" is missing']),
    # Layers that differ.
    "a wider layer": (
        "llama", lambda t: longer(0, "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight")(longer(1, "blk.1.ffn_down.weight")(t)),
        ["blk.1.ffn_gate.weight", "[64, 96]", "llama.feed_forward_length is 96"]
    ),
    "more queries": (
        "qwen3", longer(0, "blk.1.attn_q.weight"), ["blk.1.attn_q.weight", "qwen3.attention.head_count is 4"]
    ),
    "a longer bias": ("qwen2", longer(0, "blk.2.attn_k.bias"), ["blk.2.attn_k.bias", "qwen2.attention.head_count_kv is 2"]),
    "a longer norm": ("qwen3", longer(0, "blk.1.attn_norm.weight"), ["blk.1.attn_norm.weight", "qwen3.embedding_length is 64"]),
    "a norm of all heads": ("qwen3moe", longer(0, "blk.2.attn_k_norm.weight"), ["blk.2.attn_k_norm.weight", "key_length is 16"]),
    "a norm of more heads": ("olmoe", longer(0, "blk.2.attn_k_norm.weight"), ["blk.2.attn_k_norm.weight", "head_count_kv is 4"]),
    "wider experts": (
        "qwen3moe", longer(2, "blk.1.ffn_down_exps.weight"),
        ["blk.1.ffn_down_exps.weight", "qwen3moe.expert_feed_forward_length is 32"]
    ),
    "a gate of more rows": (
        "mixtral", longer(1, "blk.0.ffn_gate_exps.weight"), ["blk.0.ffn_gate_exps.weight", "llama.feed_forward_length is 32"]
    ),
    "fused experts": ("qwen2moe-fused", longer(1, "blk.2.ffn_gate_up_exps.weight"), ["blk.2.ffn_gate_up_exps.weight", "[64, 64]"]),
    "shared experts": ("glm4moe", longer(0, "blk.2.ffn_up_shexp.weight"), ["blk.2.ffn_up_shexp.weight", "expert_shared_count is 1"]),
    "an output of more rows": ("qwen3", longer(0, "blk.0.attn_output.weight"), ["blk.0.attn_output.weight", "[96, 64]"]),
    "a head of more tokens": ("qwen3", longer(0, "output.weight"), ["output.weight", "it should be [64, 96]"]),
    "a latent vector": ("deepseek_v3", longer(0, "blk.2.attn_kv_a_norm.weight"), ["attn_kv_a_norm", "kv_lora_rank is 64"]),
    "latent queries": ("deepseek_v2", longer(0, "blk.2.attn_q_b.weight"), ["attn_q_b", "key_length_mla is 48"]),
    "norms in some layers": ("glm4moe", missing("blk.1.attn_q_norm"), ['"blk.1.attn_q_norm.weight" is missing']),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_contradicts_config_json_is_named_in_any_layer(case, tmp_path):
    name, change, naming = MISFITS[case]
    kind = KINDS[name]()
    path = write(tmp_path / "m.gguf", kind, tensors=change(in_gguf(kind, weights(kind))))
    for form in ("f32", "mlx"):
        fail("inspect", "--show", "hf", "--as", form, path, naming=["hf", *naming])
    succeed("materialize", path, tmp_path / "out")


@pytest.mark.parametrize("key", ["attention.head_count", "embedding_length", "context_length", "attention.layer_norm_rms_epsilon"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt-oss"])
def test_a_key_that_every_config_needs_is_named_when_it_is_missing(name, key, tmp_path):
    kind = KINDS[name]()
    path = write(tmp_path / "m.gguf", kind, without=[key])
    fail("inspect", "--show", "hf", path, naming=[f"{kind.arch}.{key}"])
    succeed("materialize", path, tmp_path / "out")


def test_inspect_tells_of_the_form_that_it_is_given(tmp_path):
    kind = KINDS["qwen3"]()
    tensors = in_gguf(kind, weights(kind))
    name = "blk.1.attn_output.weight"
    path = write(tmp_path / "m.gguf", kind, tensors=tensors | {name: tensors[name].astype(np.float64)})
    for form, is_possible in (("raw", True), ("f32", False), ("mlx", False)):
        report = json.loads(succeed("inspect", "--json", "--as", form, path))["hf"]
        assert report["possible"] is is_possible
        assert is_possible or (name in report["reason"] and "numbers are not known" in report["reason"])
    # A new conversion would write the same.
    said = odmoe("mount", "--show", "hf", "--as", "mlx", path, tmp_path).stderr
    assert name in said and "leave hf out" in said and "convert" not in said


def config_of(path, out, *flags):
    done = odmoe("materialize", "--show", "hf", *flags, path, out)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "hf/config.json").read_text()), done.stderr


def test_scaling_that_llama_cpp_takes_to_be_linear_is_linear(tmp_path):
    """Without a type it is; files of 2023 have another key; a factor of 0 is none."""
    for n, (change, factor) in enumerate([
        ({"rope.scaling.factor": real(4.0)}, 4.0),
        ({"rope.scale_linear": real(2.0)}, 2.0),
        ({"rope.scaling.factor": real(0.0)}, None),
        (scaled("none"), None),
    ]):  # fmt: skip
        path = write(tmp_path / f"{n}.gguf", KINDS["qwen2"](), change)
        config, _ = config_of(path, tmp_path / f"{n}")
        expected = factor and {"type": "linear", "rope_type": "linear", "factor": factor}
        assert config["rope_scaling"] == expected


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "qwen2-yarn"])
def test_a_log_multiplier_that_llama_cpp_does_not_read_is_not_in_config_json(name, tmp_path):
    """It takes 0 for none, and reads it for DeepSeek alone."""
    key, kind = "rope.scaling.yarn_log_multiplier", KINDS[name]()
    is_read = kind.arch == "deepseek2"
    stated = write(tmp_path / "m.gguf", kind, {key: real(0.0 if is_read else 1.0)})
    config, said = config_of(stated, tmp_path / "stated")
    assert config == config_of(write(tmp_path / "n.gguf", kind, without=[key]), tmp_path / "without")[0]
    assert (f"has no place for {kind.arch}.{key}" in said) != is_read


def test_experts_chosen_by_0_are_chosen_as_if_nothing_were_said(tmp_path):
    for name, function in (("glm4moe", "sigmoid"), ("deepseek_v2", "softmax")):
        path = write(tmp_path / f"{name}.gguf", KINDS[name](), {"expert_gating_func": count(0)})
        assert config_of(path, tmp_path / name)[0]["scoring_func"] == function


@pytest.mark.parametrize("name", ["glm4moe", "deepseek_v3"])
def test_a_model_without_layers_of_experts_may_say_how_many_would_be_shared(name, tmp_path):
    kind = KINDS[name]()
    change = {"block_count": count(1), "nextn_predict_layers": count(0), "expert_shared_count": count(2)}
    tensors = {name: t for name, t in in_gguf(kind, weights(kind)).items() if ".1." not in name and ".2." not in name and ".3." not in name}
    path = write(tmp_path / "m.gguf", kind, change, tensors=tensors)
    config, _ = config_of(path, tmp_path / "out", "--as", "mlx", "--scales", "f32")
    assert config["n_shared_experts"] == 2
    utils.load_model(tmp_path / "out/hf")


@pytest.mark.parametrize(("width", "rotary"), [(88, 60), (88, 30), (104, 30), (104, 60), (224, 122)])
def test_a_share_of_a_head_gives_the_same_number_of_dimensions_when_it_is_cut_off(width, rotary, tmp_path):
    kind = sized("glm4moe", HEAD=width)
    config, _ = config_of(write(tmp_path / "m.gguf", kind, {"rope.dimension_count": count(rotary)}), tmp_path / "out")
    assert int(config["head_dim"] * config["partial_rotary_factor"]) == rotary


def test_experts_scaled_by_0_are_not_scaled_as_in_llama_cpp(tmp_path):
    path = write(tmp_path / "m.gguf", KINDS["deepseek_v2"](), {"expert_weights_scale": real(0.0)})
    config, _ = config_of(path, tmp_path / "out")
    assert config["routed_scaling_factor"] == 1.0


def test_keys_that_a_config_has_no_place_for_are_named(tmp_path):
    change = {"attention.sliding_window": count(4096), "attention.key_length_swa": text("seven")}
    path = write(tmp_path / "m.gguf", KINDS["deepseek_v3"](), change)
    _, said = config_of(path, tmp_path / "out")
    assert "deepseek2.attention.sliding_window" in said and "deepseek2.attention.key_length_swa" in said


# The model, keys or tensors that make it so, and what is said of it.
ELSEWHERE = {
    "no scaling": ("deepseek_v2", scaled("none"), None, "fails to load deepseek_v2 without rope_scaling"),
    "linear scaling": ("deepseek_v2", scaled("linear"), None, "takes the linear rope_scaling of deepseek_v2 for yarn"),
    "yarn": (
        "qwen2moe", scaled("yarn", **WINDOW), None, "fails to load qwen2_moe with a rope_scaling of the type yarn"
    ),
    "a clamp": ("olmoe", {"attention.clamp_kqv": real(8.0)}, None, "computes olmoe without the clip_qkv"),
    "a factor of yarn": (
        "qwen2-yarn", {"rope.scaling.yarn_attn_factor": real(2.0)}, None, "computes qwen2 without the attention_factor"
    ),
    "wide heads": (
        "mixtral", {"attention.key_length": count(32), "attention.value_length": count(32), "rope.dimension_count": count(32)},
        lambda t: longer(0, *of_layers(*(f"{name}.weight" for name in QKV)))(longer(1, *of_layers("attn_output.weight"))(t)),
        "fails to load mixtral whose heads are"
    ),
    "no corrections": ("deepseek_v3", {}, missing("exp_probs_b"), "fails to load deepseek_v3 without e_score_correction_bias"),
    "biases of qwen3": (
        "qwen3", {}, in_all_layers(*QKV, "attn_output"), "fails to load qwen3 with biases of attention"
    ),
    "biases of qwen3moe": (
        "qwen3moe", {}, in_all_layers(*QKV, "attn_output"), "fails to load qwen3_moe with biases of attention"
    ),
    "no biases of qwen2moe": ("qwen2moe", {}, missing(".bias"), "fails to load qwen2_moe without biases of attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_mlx_lm_does_not_load_or_compute_is_a_warning_there(case, tmp_path):
    name, change, tensors, words = ELSEWHERE[case]
    kind = KINDS[name]()
    path = write(tmp_path / "m.gguf", kind, change, tensors=tensors and tensors(in_gguf(kind, weights(kind))))
    _, said = config_of(path, tmp_path / "mlx", "--as", "mlx", "--scales", "f32")
    assert words in said and said.count("mlx-lm") == 1
    with pytest.raises((ValueError, AttributeError)) if "fails" in words else nullcontext():
        utils.load_model(tmp_path / "mlx/hf")
    _, said = config_of(path, tmp_path / "f32", "--as", "f32")
    assert "mlx-lm" not in said
    _, said = config_of(write(tmp_path / "p.gguf", kind), tmp_path / "plain", "--as", "mlx")
    assert "mlx-lm" not in said


@pytest.mark.parametrize("name", ["qwen3moe-yarn", "qwen2moe", "mixtral", "glm4moe", "minimax-m2"])
def test_scaling_that_mlx_lm_does_not_compute_is_a_warning(name, tmp_path):
    kind = KINDS[name]()
    path = write(tmp_path / "m.gguf", kind, scaled("linear"))
    _, said = config_of(path, tmp_path / "mlx", "--as", "mlx")
    assert "without the rope_scaling" in said
    _, said = config_of(path, tmp_path / "f32", "--as", "f32")
    assert "without the rope_scaling" not in said
    _, said = config_of(write(tmp_path / "p.gguf", kind, scaled("none")), tmp_path / "plain", "--as", "mlx")
    assert "without the rope_scaling" not in said
