"""Small checkpoints as Hugging Face has them, and the GGUFs that llama.cpp's converter makes of them.

What a directory shows is compared with the checkpoint, so all of it is written down here once more: the tensors of each
architecture, its config.json, and what becomes of both in a GGUF, by the names of gguf-py.
"""

import dataclasses
import json
import sys
from unittest import mock

import gguf
import numpy as np
import safetensors.numpy
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from models import finish

HIDDEN, VOCABULARY, LAYERS = 64, 96, 3
HEADS, KEY_VALUES, HEAD = 4, 2, 16
EXPERTS, USED, WIDTH, DENSE = 4, 2, 32, 96
THETA, EPSILON, CONTEXT = 50_000.0, 1e-5, 512


@dataclasses.dataclass
class Kind:
    """One architecture: its name in GGUF, the keys of its GGUF, its config.json, and the shapes of its checkpoint."""

    arch: str
    config: dict
    keys: dict
    shapes: dict
    heads: tuple = (HEADS, KEY_VALUES)
    permuted: bool = False
    # Queries, keys and values are one tensor of the GGUF, and so are gate and up of experts.
    fused: bool = False
    layers: int = dataclasses.field(default_factory=lambda: LAYERS)
    # Of MLA: the widths of a head without positions, of its values, and of the latent vector.
    latent: tuple = dataclasses.field(default_factory=lambda: (NOPE, VALUE, RANK))


def common(model, heads=HEADS, key_values=KEY_VALUES, head=None, tied=False, **more):
    """What every config.json says."""
    head = head or HEAD
    return {
        "model_type": model, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": heads,
        "num_key_value_heads": key_values, "head_dim": head, "vocab_size": VOCABULARY, "rms_norm_eps": EPSILON,
        "rope_theta": THETA, "rope_scaling": None, "max_position_embeddings": CONTEXT, "tie_word_embeddings": tied,
        "hidden_act": "silu", **more,
    }  # fmt: skip


def keys(heads=HEADS, key_values=KEY_VALUES, head=None, **more):
    """What every GGUF says."""
    head = head or HEAD
    return {
        "block_count": LAYERS, "context_length": CONTEXT, "embedding_length": HIDDEN, "attention.head_count": heads,
        "attention.head_count_kv": key_values, "attention.key_length": head, "attention.value_length": head,
        "rope.dimension_count": head, "rope.freq_base": THETA, "attention.layer_norm_rms_epsilon": EPSILON, **more,
    }  # fmt: skip


def attention(layer, heads=HEADS, key_values=KEY_VALUES, head=None, biases=(), norms=None):
    head = head or HEAD
    at = f"model.layers.{layer}.self_attn"
    sizes = {"q_proj": (heads * head, HIDDEN), "k_proj": (key_values * head, HIDDEN)}
    sizes |= {"v_proj": (key_values * head, HIDDEN), "o_proj": (HIDDEN, heads * head)}
    shapes = {f"{at}.{name}.weight": shape for name, shape in sizes.items()}
    shapes |= {f"{at}.{name}.bias": sizes[name][:1] for name in biases}
    if norms:
        shapes |= {f"{at}.q_norm.weight": (norms[0],), f"{at}.k_norm.weight": (norms[1],)}
    return shapes


def mlp(at, width, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (f"{at}.{name}.weight" for name in names)
    return {gate: (width, HIDDEN), up: (width, HIDDEN), down: (HIDDEN, width)}


def experts(at, names=("gate_proj", "up_proj", "down_proj")):
    shapes = {}
    for expert in range(EXPERTS):
        shapes |= mlp(f"{at}.experts.{expert}", WIDTH, names)
    return shapes


def whole(layer_shapes, tied=False, extra=0):
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS + extra):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= layer_shapes(layer, at)
    return shapes


def moe():
    return {"num_experts": EXPERTS, "num_experts_per_tok": USED, "moe_intermediate_size": WIDTH}


def moe_keys():
    return {"expert_count": EXPERTS, "expert_used_count": USED, "expert_feed_forward_length": WIDTH}


def dense_keys():
    return {"feed_forward_length": DENSE}


BIASES = ("q_proj", "k_proj", "v_proj")


def qwen3moe():
    def layer(n, at):
        return attention(n, norms=(HEAD, HEAD)) | {f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN)} | experts(f"{at}.mlp")

    config = common("qwen3_moe", intermediate_size=DENSE, norm_topk_prob=True, decoder_sparse_step=1, **moe())
    config["mlp_only_layers"] = []
    return Kind("qwen3moe", config, keys(**moe_keys(), **dense_keys()), whole(layer))


def qwen2moe():
    def layer(n, at):
        shapes = attention(n, biases=BIASES) | {f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN)} | experts(f"{at}.mlp")
        shapes |= mlp(f"{at}.mlp.shared_expert", 2 * WIDTH)
        return shapes | {f"{at}.mlp.shared_expert_gate.weight": (1, HIDDEN)}

    more = {"shared_expert_intermediate_size": 2 * WIDTH, "norm_topk_prob": False, "mlp_only_layers": []}
    config = common("qwen2_moe", intermediate_size=DENSE, decoder_sparse_step=1, **more, **moe())
    shared = {"expert_shared_feed_forward_length": 2 * WIDTH}
    return Kind("qwen2moe", config, keys(**moe_keys(), **dense_keys(), **shared), whole(layer))


def olmoe():
    def layer(n, at):
        shapes = attention(n, key_values=4, norms=(4 * HEAD, 4 * HEAD)) | {f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN)}
        return shapes | experts(f"{at}.mlp")

    config = common("olmoe", key_values=4, intermediate_size=WIDTH, norm_topk_prob=False)
    config |= {"num_experts": EXPERTS, "num_experts_per_tok": USED}
    moe = {"expert_count": EXPERTS, "expert_used_count": USED, "feed_forward_length": WIDTH}
    return Kind("olmoe", config, keys(key_values=4, **moe), whole(layer), (4, 4))


LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.5}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}


def llama(tied=False, scaling=None, biased=False, key_values=KEY_VALUES, **more):
    biases = (*BIASES, "o_proj") if biased else ()

    def layer(n, at):
        shapes = attention(n, key_values=key_values, biases=biases)
        made = mlp(f"{at}.mlp", DENSE)
        if biased:
            made |= {name.replace("weight", "bias"): shape[:1] for name, shape in made.items()}
        return shapes | made

    config = common("llama", key_values=key_values, tied=tied, intermediate_size=DENSE)
    config |= {"rope_scaling": scaling, "attention_bias": biased, "mlp_bias": biased}
    return Kind(
        "llama", config, keys(key_values=key_values, **dense_keys(), **more), whole(layer, tied), (HEADS, key_values), permuted=True
    )  # fmt: skip


def with_yarn(kind):
    """The same kind for a longer context."""
    kind.config["rope_scaling"] = YARN
    kind.keys |= YARN_KEYS
    return kind


def mixtral():
    def layer(n, at):
        at = f"{at}.block_sparse_moe"
        return attention(n) | {f"{at}.gate.weight": (EXPERTS, HIDDEN)} | experts(at, ("w1", "w3", "w2"))

    config = common("mixtral", intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=USED)
    moe = {"expert_count": EXPERTS, "expert_used_count": USED, "feed_forward_length": WIDTH}
    return Kind("llama", config, keys(**moe), whole(layer), permuted=True)


def qwen2():
    def layer(n, at):
        return attention(n, biases=BIASES) | mlp(f"{at}.mlp", DENSE)

    return Kind("qwen2", common("qwen2", tied=True, intermediate_size=DENSE), keys(**dense_keys()), whole(layer, True))


def qwen3():
    def layer(n, at):
        return attention(n, head=24, norms=(24, 24)) | mlp(f"{at}.mlp", DENSE)

    config = common("qwen3", head=24, intermediate_size=DENSE)
    return Kind("qwen3", config, keys(head=24, **dense_keys()), whole(layer))


def glm4moe():
    extra = 1  # a layer that predicts one token more

    def layer(n, at):
        shapes = attention(n, biases=BIASES, norms=(HEAD, HEAD))
        if n == 0:
            return shapes | mlp(f"{at}.mlp", DENSE)
        shapes |= {f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN), f"{at}.mlp.gate.e_score_correction_bias": (EXPERTS,)}
        shapes |= experts(f"{at}.mlp") | mlp(f"{at}.mlp.shared_experts", WIDTH)
        if n == LAYERS:
            shapes |= {f"{at}.eh_proj.weight": (HIDDEN, 2 * HIDDEN), f"{at}.shared_head.norm.weight": (HIDDEN,)}
            shapes |= {f"{at}.{norm}.weight": (HIDDEN,) for norm in ("enorm", "hnorm")}
        return shapes

    config = common(
        "glm4_moe", intermediate_size=DENSE, partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=True,
        n_routed_experts=EXPERTS, num_experts_per_tok=USED, moe_intermediate_size=WIDTH, n_shared_experts=1,
        first_k_dense_replace=1, routed_scaling_factor=1.5, norm_topk_prob=True, n_group=1, topk_group=1,
        num_nextn_predict_layers=extra,
    )  # fmt: skip
    more = keys(**moe_keys(), **dense_keys())
    more |= {"block_count": LAYERS + extra, "nextn_predict_layers": extra, "rope.dimension_count": HEAD // 2}
    more |= {"expert_shared_count": 1, "leading_dense_block_count": 1, "expert_weights_scale": 1.5}
    more |= {"expert_weights_norm": True, "expert_gating_func": 2, "expert_group_count": 1, "expert_group_used_count": 1}
    return Kind("glm4moe", config, more, whole(layer, extra=extra))


NOPE, ROPE, VALUE, RANK, QUERY_RANK = 32, 16, 32, 64, 32


def deepseek(version, lite=False):
    heads = 4

    def layer(n, at):
        here = f"{at}.self_attn"
        shapes = {f"{here}.kv_a_proj_with_mqa.weight": (RANK + ROPE, HIDDEN), f"{here}.kv_a_layernorm.weight": (RANK,)}
        shapes[f"{here}.kv_b_proj.weight"] = (heads * (NOPE + VALUE), RANK)
        shapes[f"{here}.o_proj.weight"] = (HIDDEN, heads * VALUE)
        if lite:
            shapes[f"{here}.q_proj.weight"] = (heads * (NOPE + ROPE), HIDDEN)
        else:
            shapes[f"{here}.q_a_proj.weight"] = (QUERY_RANK, HIDDEN)
            shapes[f"{here}.q_a_layernorm.weight"] = (QUERY_RANK,)
            shapes[f"{here}.q_b_proj.weight"] = (heads * (NOPE + ROPE), QUERY_RANK)
        if n == 0:
            return shapes | mlp(f"{at}.mlp", DENSE)
        shapes[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        if version == 3:
            shapes[f"{at}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
        return shapes | experts(f"{at}.mlp") | mlp(f"{at}.mlp.shared_experts", 2 * WIDTH)

    config = common(f"deepseek_v{version}", key_values=heads, intermediate_size=DENSE)
    del config["head_dim"]
    groups = (2, 1) if version == 3 else (1, 1)
    config |= {
        "q_lora_rank": None if lite else QUERY_RANK, "kv_lora_rank": RANK, "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": NOPE, "v_head_dim": VALUE, "n_routed_experts": EXPERTS, "num_experts_per_tok": USED,
        "moe_intermediate_size": WIDTH, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": version == 3, "n_group": groups[0], "topk_group": groups[1],
        "topk_method": "noaux_tc" if version == 3 else "greedy", "attention_bias": False,
        "scoring_func": "sigmoid" if version == 3 else "softmax",
    }  # fmt: skip
    config["rope_scaling"] = {
        "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707,
    }  # fmt: skip
    more = keys(key_values=1, **moe_keys(), **dense_keys())
    more |= {"attention.key_length": RANK + ROPE, "attention.value_length": RANK, "rope.dimension_count": ROPE}
    more |= {"attention.key_length_mla": NOPE + ROPE, "attention.value_length_mla": VALUE}
    more |= {"attention.kv_lora_rank": RANK, "expert_shared_count": 2, "leading_dense_block_count": 1}
    more |= {"expert_weights_scale": 2.5, "expert_weights_norm": version == 3, "vocab_size": VOCABULARY}
    more |= {"expert_gating_func": version - 1, "expert_group_count": groups[0], "expert_group_used_count": groups[1]}
    more |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 128}
    more |= {"rope.scaling.yarn_log_multiplier": 0.0707}
    if not lite:
        more["attention.q_lora_rank"] = QUERY_RANK
    return Kind("deepseek2", config, more, whole(layer), (4, 4))


def gpt_oss():
    def layer(n, at):
        shapes = attention(n, biases=(*BIASES, "o_proj")) | {f"{at}.self_attn.sinks": (4,)}
        shapes |= {f"{at}.mlp.router.weight": (EXPERTS, HIDDEN), f"{at}.mlp.router.bias": (EXPERTS,)}
        at = f"{at}.mlp.experts"
        shapes |= {f"{at}.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH), f"{at}.gate_up_proj_bias": (EXPERTS, 2 * WIDTH)}
        return shapes | {f"{at}.down_proj": (EXPERTS, WIDTH, HIDDEN), f"{at}.down_proj_bias": (EXPERTS, HIDDEN)}

    kinds = ["sliding_attention", "full_attention"] * LAYERS
    config = common("gpt_oss", intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=USED)
    config |= {"sliding_window": 8, "swiglu_limit": 7.0, "layer_types": kinds[:LAYERS]}
    config["rope_scaling"] = {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False,
    }  # fmt: skip
    more = keys(**moe_keys(), **{"attention.sliding_window": 8})
    more |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 128}
    return Kind("gpt-oss", config, more, whole(layer))


def minimax_m2():
    def layer(n, at):
        at = f"{at}.block_sparse_moe"
        shapes = attention(n, norms=(4 * HEAD, 2 * HEAD)) | {f"{at}.gate.weight": (EXPERTS, HIDDEN)}
        return shapes | {f"{at}.e_score_correction_bias": (EXPERTS,)} | experts(at, ("w1", "w3", "w2"))

    config = common("minimax", intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=USED)
    config |= {"rotary_dim": HEAD // 2, "shared_intermediate_size": 0, "use_qk_norm": True, "scoring_func": "sigmoid"}
    more = keys(**moe_keys(), feed_forward_length=WIDTH)
    more |= {"rope.dimension_count": HEAD // 2, "expert_gating_func": 2}
    return Kind("minimax-m2", config, more, whole(layer))


KINDS = {
    "qwen3moe": qwen3moe, "qwen2moe": qwen2moe, "deepseek_v2": lambda: deepseek(2),
    "deepseek_v2-lite": lambda: deepseek(2, lite=True), "deepseek_v3": lambda: deepseek(3),
    "glm4moe": glm4moe, "gpt-oss": gpt_oss, "mixtral": mixtral, "olmoe": olmoe, "minimax-m2": minimax_m2,
    "llama": llama, "llama-tied": lambda: llama(tied=True), "llama-scaled": lambda: llama(scaling=LLAMA_3),
    "llama-linear": lambda: llama(scaling=LINEAR, **LINEAR_KEYS), "llama-biased": lambda: llama(biased=True),
    "llama-multi-query": lambda: llama(key_values=1), "qwen2": qwen2, "qwen3": qwen3,
    "qwen2-yarn": lambda: with_yarn(qwen2()), "qwen3moe-yarn": lambda: with_yarn(qwen3moe()),
    # Rows that are no multiple of 32, which no block fits: nearly all, or only those of two matrices.
    "qwen3moe-odd": lambda: sized("qwen3moe", HIDDEN=72, HEAD=32),
    "qwen2moe-odd": lambda: sized("qwen2moe", WIDTH=20), "mixtral-odd": lambda: sized("mixtral", WIDTH=44),
    "llama-odd": lambda: sized("llama", HIDDEN=40, HEAD=24),
    "llama-fused": lambda: fused(llama(biased=True)), "glm4moe-fused": lambda: fused(glm4moe()),
    "qwen2moe-fused": lambda: fused(qwen2moe()),
}  # fmt: skip


def fused(kind):
    return dataclasses.replace(kind, fused=True)


def sized(name, **sizes):
    """A kind with other sizes, such as `HIDDEN=256`."""
    with mock.patch.multiple(sys.modules[__name__], **sizes):
        return KINDS[name]()


# One of each.
MODEL_TYPES = {kind().config["model_type"]: kind for kind in reversed(KINDS.values())}


def weights(kind, seed=7, deviation=0.2):
    """The tensors of a checkpoint, in F32; norms are about 1."""
    random = np.random.default_rng(seed)
    made = {}
    for name, shape in kind.shapes.items():
        numbers = random.standard_normal(shape, dtype=np.float32)
        made[name] = (1 + 0.1 * numbers) if "norm" in name else (deviation * numbers).astype(np.float32)
        if name.endswith("e_score_correction_bias"):
            # Where a score is negative, mlx-lm takes an expert of a group that is not used rather than one that is.
            made[name] = np.abs(made[name])
    return made


def apart(tensors):
    """The tensors of gpt-oss as mlx-lm has them: it does not read the checkpoint's own, unless they are quantised."""
    made = {}
    for name, tensor in tensors.items():
        stem, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
        if not stem.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            made[name] = tensor
            continue
        tensor, suffix = (tensor, "bias") if is_bias else (tensor.swapaxes(1, 2), "weight")
        for n, part in enumerate(("gate_proj", "up_proj") if "gate_up" in stem else ("down_proj",)):
            step = 2 if "gate_up" in stem else 1
            made[f"{stem.rpartition('.')[0]}.{part}.{suffix}"] = np.ascontiguousarray(tensor[:, n::step])
    return made


def write_checkpoint(folder, config, tensors):
    """A directory that mlx-lm reads; it may lack the layers that predict further tokens."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    extra = f"model.layers.{config['num_hidden_layers']}."
    kept = {name: t for name, t in apart(tensors).items() if not name.startswith(extra)}
    safetensors.numpy.save_file(kept, folder / "model.safetensors", {"format": "pt"})


def permuted(matrix, heads):
    """The rows of queries or keys as llama.cpp has them: the halves of each head in turn."""
    rows = matrix.shape[0] // heads
    halves = matrix.reshape(heads, 2, rows // 2, *matrix.shape[1:])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def factors(scaling, head=HEAD):
    """What llama.cpp divides the frequencies of Llama 3's scaling by."""
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    made = []
    for frequency in 1.0 / THETA ** (np.arange(0, head, 2) / head):
        wave = 2 * np.pi / frequency
        smooth = (scaling["original_max_position_embeddings"] / wave - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        made.append(1 if wave < high else scaling["factor"] if wave > low else between)
    return np.array(made, np.float32)


def in_gguf(kind, tensors):
    """The tensors of a GGUF by their names there, from those of a checkpoint."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.arch)
    names = gguf.get_tensor_name_map(arch, kind.layers + 1)
    stacks, made = {}, {}

    def put(name, tensor):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        made[found] = np.ascontiguousarray(tensor)

    for name, tensor in tensors.items():
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        words = name.split(".")
        if "experts" in words and words[words.index("experts") + 1].isdigit():
            number = words.pop(words.index("experts") + 1)
            stacks.setdefault(".".join(words), {})[int(number)] = tensor
        elif name.endswith("kv_b_proj.weight"):
            plain, value, rank = kind.latent
            parts = tensor.reshape(kind.heads[0], plain + value, rank)
            put(name.replace("kv_b_proj", "k_b_proj"), parts[:, :plain].swapaxes(1, 2))
            put(name.replace("kv_b_proj", "v_b_proj"), parts[:, plain:])
        elif name.endswith((".gate_up_proj", ".gate_up_proj_bias")):
            across = tensor.swapaxes(1, 2) if name.endswith("proj") else tensor
            suffix = ".weight" if name.endswith("proj") else ".bias"
            for n, part in enumerate(("gate_proj", "up_proj")):
                stem = name.split("gate_up_proj")[0]
                put(f"{stem}{part}{suffix}", across[:, n::2])
        elif name.endswith((".experts.down_proj", ".experts.down_proj_bias")):
            across = tensor.swapaxes(1, 2) if name.endswith("proj") else tensor
            put(name.removesuffix("_bias") + (".weight" if name.endswith("proj") else ".bias"), across)
        elif kind.permuted and words[-2] in ("q_proj", "k_proj"):
            put(name, permuted(tensor, kind.heads["k_proj" in name]))
        elif name.endswith("sinks"):
            put(f"{name}.weight", tensor)
        elif name.endswith("shared_expert_gate.weight"):
            put(name, tensor[0])
        else:
            put(name, tensor)
    for name, experts in stacks.items():
        put(name, np.stack([experts[n] for n in range(len(experts))]))
    scaling = kind.config["rope_scaling"] or {}
    if scaling.get("rope_type") == "llama3":
        made["rope_freqs.weight"] = factors(scaling)
    return fuse(made) if kind.fused else made


def fuse(tensors):
    """The same tensors, those of queries, keys and values in one, and those of gate and up, as llama.cpp reads them too."""
    made = {}
    for name, tensor in tensors.items():
        parts = [name]
        if ".attn_q." in name:
            parts = [name.replace("attn_q", part) for part in ("attn_q", "attn_k", "attn_v")]
            name = name.replace("attn_q", "attn_qkv")
        elif ".ffn_gate_exps." in name:
            parts = [name, name.replace("gate", "up")]
            name = name.replace("gate", "gate_up")
        elif any(part in name for part in (".attn_k.", ".attn_v.", ".ffn_up_exps.")):
            continue
        made[name] = np.concatenate([tensors[part] for part in parts], axis=max(0, tensor.ndim - 2))
    return made


def value_type(value):
    if isinstance(value, str):
        return GGUFValueType.STRING
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    return GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32


def byte_level():
    """A tokenizer of single bytes and a few merges, as gpt2's: 256 bytes do not fit the vocabulary, so only letters."""
    letters = [chr(n) for n in range(33, 127)][: VOCABULARY - 4]
    return [*letters, "Ġ", "th", "the", "<|end|>"], ["t h", "th e"]


def write_gguf(path, kind, tensors, quantised=None, **split):
    """Writes a GGUF; `quantised` gives the type of a tensor by its name, F32 if it is None. Returns the parts."""
    writer = gguf.GGUFWriter(path, kind.arch, **split)
    for key, value in kind.keys.items():
        writer.add_key_value(f"{kind.arch}.{key}", value, value_type(value))
    tokens, merges = byte_level()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    for name, tensor in in_gguf(kind, tensors).items():
        fits = tensor.ndim > 1 and tensor.shape[-1] % 32 == 0
        ggml_type = (quantised and fits and quantised(name)) or Type.F32
        data = tensor if ggml_type == Type.F32 else gguf.quants.quantize(tensor, ggml_type)
        writer.add_tensor(name, data, raw_dtype=ggml_type)
    finish(writer)
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))
