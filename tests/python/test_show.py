"""--show: model.gguf and hf/ beside base_model/ and experts/, in every combination, mounted and materialized."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import models
from hf_models import KINDS, in_gguf, qwen3moe, value_type, weights, write_gguf
from odmoe import REPO, fail, mounted, odmoe, promises, succeed

ALL = "base,experts,joined,hf"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of a known architecture in four parts."""
    folder = tmp_path_factory.mktemp("show")
    kind = qwen3moe()
    parts = write_gguf(folder / "model.gguf", kind, weights(kind), lambda name: Type.Q8_0, split_max_tensors=12)
    assert len(parts) > 3
    return parts


def top(root):
    return sorted(path.name for path in root.iterdir())


# --- joined ---------------------------------------------------------------------------------------------------------


def of_reader(path):
    reader = gguf.GGUFReader(path)
    values = {f.name: (f.types, f.contents()) for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    return values, {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}, reader


@promises(
    "`model.gguf` is, byte for byte, what `llama-gguf-split --merge` makes of the same parts; of a model of one part, it is that file."
)
def test_joined_parts_have_the_metadata_and_the_tensors_of_all(model, tmp_path):
    succeed("materialize", "--show", "joined", model[2], tmp_path / "out")
    assert top(tmp_path / "out") == ["model.gguf"]
    values, tensors, reader = of_reader(tmp_path / "out/model.gguf")
    expected, _, _ = of_reader(model[0])
    assert values.pop("split.count")[1] == 0 and expected.pop("split.count")[1] == len(model)
    assert values == expected
    assert list(values) == list(expected)  # the count comes last
    parts = [of_reader(part)[1] for part in model]
    assert tensors == {name: tensor for part in parts for name, tensor in part.items()}
    assert all(int(t.data_offset) % 32 == 0 for t in reader.tensors)


@pytest.mark.parametrize("split", models.SPLITS)
def test_a_whole_file_that_is_split_comes_back(split, tmp_path):
    """But for the keys of the split itself, which the joined file keeps as llama-gguf-split does."""
    values = models.counts(3)
    whole = models.write(tmp_path / "whole.gguf", list(models.oddities()), values)[0]
    tensors = [(t.name, t.data, t.tensor_type) for t in gguf.GGUFReader(whole).tensors]
    parts = models.write(tmp_path / "cut.gguf", tensors, values, **models.SPLITS[split])
    succeed("materialize", "--show", "joined", parts[0], tmp_path / "out")
    joined = tmp_path / "out/model.gguf"
    if len(parts) == 1:
        assert joined.read_bytes() == parts[0].read_bytes()
        return
    start = gguf.GGUFReader(whole).tensors[0].data_offset
    begin = gguf.GGUFReader(joined).tensors[0].data_offset
    assert joined.read_bytes()[begin:] == whole.read_bytes()[start:]


def test_a_model_of_one_part_is_shown_as_it_is(tmp_path):
    succeed("toy", tmp_path / "toy.gguf", "--dim", 64, "--ffn-dim", 64, "--vocab", 50)
    with mounted(tmp_path / "toy.gguf", tmp_path / "mnt", "--show", "joined,experts") as root:
        assert top(root) == ["experts", "model.gguf"]
        assert (root / "model.gguf").read_bytes() == (tmp_path / "toy.gguf").read_bytes()
        inner = [path.name for path in (root / "experts").iterdir()]
        assert len(inner) == 9
        # It can be mounted in turn.
        with mounted(root / "model.gguf", tmp_path / "again") as again:
            assert top(again) == ["base_model", "experts"]


@pytest.mark.parametrize("form", ["bf16", "mlx", "raw"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "deepseek_v3", "deepseek_v2"])
def test_any_range_of_a_file_that_is_not_in_the_order_of_the_model_is_that_of_the_whole(kind, form, tmp_path):
    """Rows that were reordered, and matrices that were transposed."""
    kind = KINDS[kind]()
    parts = write_gguf(tmp_path / "m.gguf", kind, weights(kind), lambda name: Type.Q8_0, split_max_tensors=20)
    succeed("materialize", "--show", "hf", "--as", form, parts[0], tmp_path / "out")
    random = np.random.default_rng(3)
    flags = ["--show", "hf", "--as", form, "--cache", "direct"]
    with mounted(parts[0], tmp_path / "mnt", *flags) as root:
        for path in sorted((tmp_path / "out/hf").glob("*.safetensors")):
            whole = path.read_bytes()
            file = os.open(root / "hf" / path.name, os.O_RDONLY)
            try:
                for step in (997, 4096, 70_001):
                    read = [os.pread(file, step, at) for at in range(0, len(whole), step)]
                    assert b"".join(read) == whole
                for _ in range(100):
                    at, size = int(random.integers(len(whole))), int(random.integers(1, 9000))
                    assert os.pread(file, size, at) == whole[at : at + size]
            finally:
                os.close(file)


# --- combinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", ["base", "experts", "hf", "joined", "base,hf", "experts,joined", ALL])
def test_a_tree_shows_what_was_asked_for_and_verify_finds_out_what(model, shown, tmp_path):
    directories = {"base": "base_model", "experts": "experts", "joined": "model.gguf", "hf": "hf"}
    expected = sorted(directories[word] for word in shown.split(","))
    out = tmp_path / "out"
    succeed("materialize", "--show", shown, "--as", "mlx", model[0], out)
    assert top(out) == expected
    assert "is identical" in succeed("verify", model[0], out)
    assert "is identical" in succeed("verify", "--quick", model[0], out)
    # The same command finds everything done, and a mount shows the same bytes.
    assert "nothing to write" in succeed("materialize", "--show", shown, "--as", "mlx", model[0], out)
    with mounted(model[0], tmp_path / "mnt", "--show", shown, "--as", "mlx") as root:
        assert top(root) == expected
        assert subprocess.run(["diff", "-r", out, root], check=False).returncode == 0
        assert root.stat().st_nlink == 2 + len([path for path in root.iterdir() if path.is_dir()])


@pytest.mark.parametrize("name", ["model.gguf", "hf/config.json", "hf/model-00002-of-00005.safetensors"])
def test_verify_finds_a_changed_byte_in_what_no_document_lists(model, name, tmp_path):
    out = tmp_path / "out"
    succeed("materialize", "--show", ALL, model[0], out)
    data = bytearray((out / name).read_bytes())
    data[-2] ^= 1
    (out / name).write_bytes(data)
    done = odmoe("verify", model[0], out)
    assert done.returncode == 3 and name in done.stdout
    if name == "model.gguf":
        return  # without it, the tree is one that shows no such file
    (out / name).unlink()
    done = odmoe("verify", model[0], out)
    assert done.returncode == 3 and f"{name} is missing" in done.stdout


@promises("A tree shows what `--show` lists and nothing else; what is not listed does not change what is.")
def test_without_show_nothing_changes(model, tmp_path):
    succeed("materialize", model[0], tmp_path / "usual")
    succeed("materialize", "--show", "base,experts", model[0], tmp_path / "asked")
    assert top(tmp_path / "usual") == ["base_model", "experts"]
    assert subprocess.run(["diff", "-r", tmp_path / "usual", tmp_path / "asked"], check=False).returncode == 0
    succeed("materialize", "--show", ALL, model[0], tmp_path / "all")
    for name in ("base_model", "experts"):
        same = subprocess.run(["diff", "-r", tmp_path / "usual" / name, tmp_path / "all" / name], check=False)
        assert same.returncode == 0


def test_mount_options_show_too(model, tmp_path):
    with mounted(model[0], tmp_path / "mnt", "-o", 'show="hf,joined",as=bf16') as root:
        assert top(root) == ["hf", "model.gguf"]
        assert json.loads((root / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_unknown_word_is_refused(model, tmp_path):
    for words in ("everything", "base,,hf", ""):
        fail("mount", "--show", words, model[0], tmp_path, status=2, naming=["base", "experts", "joined", "hf"])


# --- what has no directory ------------------------------------------------------------------------------------------


def write(path, kind, keys=None, tensors=None, more=None):
    """Writes a GGUF whose keys or tensors are changed by functions of a dictionary; `more` is given the writer."""
    writer = gguf.GGUFWriter(path, kind.arch)
    if more:
        more(writer)
    all_keys = dict(kind.keys)
    all_tensors = in_gguf(kind, weights(kind))
    if keys:
        keys(all_keys)
    if tensors:
        tensors(all_tensors)
    for key, value in all_keys.items():
        writer.add_key_value(f"{kind.arch}.{key}", value, value_type(value))
    for name, tensor in all_tensors.items():
        writer.add_tensor(name, tensor)
    models.finish(writer)
    return path


def test_an_unknown_architecture_is_named_and_the_known_ones_are_listed(tmp_path):
    succeed("toy", tmp_path / "toy.gguf", "--dim", 64, "--ffn-dim", 64, "--vocab", 50)
    said = fail("mount", "--show", "base,hf", tmp_path / "toy.gguf", tmp_path, naming=["toy-moe", "--show"])
    for arch in {KINDS[name]().arch for name in KINDS}:
        assert arch in said
    succeed("materialize", tmp_path / "toy.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    "key", ["block_count", "attention.head_count", "expert_count", "expert_used_count", "attention.layer_norm_rms_epsilon"]
)
def test_a_missing_key_is_named(key, tmp_path):
    path = write(tmp_path / "m.gguf", qwen3moe(), keys=lambda keys: keys.pop(key))
    fail("inspect", "--show", "hf", path, naming=[f"qwen3moe.{key} is missing"])
    succeed("materialize", path, tmp_path / "out")


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "output_norm.weight", "blk.2.ffn_up_exps.weight"])
def test_a_missing_tensor_is_named(name, tmp_path):
    path = write(tmp_path / "m.gguf", qwen3moe(), tensors=lambda tensors: tensors.pop(name))
    fail("inspect", "--show", "hf", path, naming=[f'"{name}" is missing'])


def test_a_tensor_without_a_name_there_is_named(tmp_path):
    def add(tensors):
        tensors["blk.1.attn_gate.weight"] = tensors["blk.1.attn_norm.weight"]

    path = write(tmp_path / "m.gguf", qwen3moe(), tensors=add)
    fail("mount", "--show", "hf", path, tmp_path, naming=['no name for tensor "blk.1.attn_gate.weight"'])


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_numbers_are_refused_and_never_panic(kind, tmp_path):
    """Every key of every architecture with values that no model has."""
    kind = KINDS[kind]()
    hostile = [0, 1, 3, 2**31, 2**32 - 1]
    for at, (key, value) in enumerate(kind.keys.items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        for number in hostile if at % 3 == 0 else hostile[:1] + hostile[-1:]:
            path = tmp_path / "m.gguf"
            write(path, kind, keys=lambda keys, key=key, number=number: keys.update({key: number}))
            done = odmoe("inspect", "--json", "--show", "hf", path)
            assert done.returncode in (0, 1), done.stderr


@promises(
    "Every row of every tensor of the model is in exactly one tensor of `hf/`, or its tensor is listed as left out with the reason; where mlx-lm needs a head of its own, one that is tied to the embeddings is there again."
)
def test_what_a_directory_leaves_out_is_listed_with_the_reason(tmp_path):
    kind = KINDS["llama-scaled"]()
    write_gguf(tmp_path / "m.gguf", kind, weights(kind))
    succeed("materialize", "--show", "hf", "--as", "bf16", tmp_path / "m.gguf", tmp_path / "out")
    index = json.loads((tmp_path / "out/hf/model.safetensors.index.json").read_text())
    assert "rope_scaling" in index["metadata"]["odmoe.left_out"]["rope_freqs.weight"]
    kind = KINDS["glm4moe"]()
    write_gguf(tmp_path / "g.gguf", kind, weights(kind))
    succeed("materialize", "--show", "hf", "--as", "mlx", tmp_path / "g.gguf", tmp_path / "mlx")
    index = json.loads((tmp_path / "mlx/hf/model.safetensors.index.json").read_text())
    left_out = index["metadata"]["odmoe.left_out"]
    assert left_out and all(name.startswith("blk.3.") for name in left_out)


def test_a_tokenizer_that_is_not_known_is_said_to_be_missing(tmp_path):
    path = write(tmp_path / "m.gguf", qwen3moe())
    done = odmoe("materialize", "--show", "hf", path, tmp_path / "out")
    assert done.returncode == 0 and "there is no tokenizer.json" in done.stderr
    assert not (tmp_path / "out/hf/tokenizer.json").exists()


def test_a_score_that_is_not_a_number_is_not_taken_for_0(tmp_path):
    def sentence_piece(scores):
        def add(writer):
            writer.add_tokenizer_model("llama")
            writer.add_token_list(["<unk>", "a", "b", "ab"])
            writer.add_token_types([2, 1, 1, 1])
            writer.add_token_scores(scores)

        return add

    for n, (last, is_known) in enumerate([(-1.0, True), (float("nan"), False)]):
        path = write(tmp_path / f"{n}.gguf", qwen3moe(), more=sentence_piece([0.0, -3.0, -2.0, last]))
        said = odmoe("materialize", "--show", "hf", path, tmp_path / f"{n}").stderr
        assert (tmp_path / f"{n}/hf/tokenizer.json").exists() == is_known
        assert ("no tokenizer.json: tokenizer.ggml.scores" in said) != is_known


def test_chat_templates_beside_the_default_one_are_said_to_be_missing(tmp_path):
    templates = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    path = write(tmp_path / "m.gguf", qwen3moe(), more=lambda writer: writer.add_chat_template(templates))
    said = odmoe("materialize", "--show", "hf", path, tmp_path / "out").stderr
    assert (tmp_path / "out/hf/chat_template.jinja").read_text() == "D"
    assert "the default chat template alone, not" in said and "tool_use" in said and "rag" in said


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_says_whether_a_directory_can_be_shown(model, tmp_path):
    assert "hf/: " in succeed("inspect", model[0])
    report = json.loads(succeed("inspect", "--json", model[0]))
    assert report["hf"] == {"possible": True, "reason": None}
    succeed("toy", tmp_path / "toy.gguf", "--dim", 64, "--ffn-dim", 64, "--vocab", 50)
    report = json.loads(succeed("inspect", "--json", tmp_path / "toy.gguf"))
    assert report["hf"]["possible"] is False and "toy-moe" in report["hf"]["reason"]
    assert "hf/: " in succeed("inspect", tmp_path / "toy.gguf")


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["q4_0", "q8_0"])
def generating(request, tmp_path_factory):
    """A toy of a real architecture, mounted for mlx-lm."""
    folder = tmp_path_factory.mktemp("generating")
    flags = ["--arch", "qwen3moe", "--type", request.param, "--dim", 128, "--ffn-dim", 64, "--vocab", 600, "--experts", 8]
    succeed("toy", folder / "toy.gguf", *flags, "--layers", 3, "--seed", 5)
    with mounted(folder / "toy.gguf", folder / "mnt", "--show", "base,experts,hf", "--as", "mlx") as root:
        yield root


def test_mlx_lm_generates_from_a_mount(generating):
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", generating / "hf", "--prompt", "hello", "-m", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Generation: 4 tokens" in done.stdout


def test_experts_read_on_demand_give_the_same_tokens(generating):
    from mlx_lm import load, stream_generate

    program = [sys.executable, REPO / "examples/mlx_generate.py", generating, "--prompt", "hello world", "--json"]
    # Room for three of 24 experts.
    expert = next((generating / "experts").glob("layer*")).stat().st_size
    done = subprocess.run(
        [*map(str, program), "--budget", str(3 * expert), "--max-tokens", "4"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    model, tokenizer = load(str(generating / "hf"))
    expected = [answer.token for answer in stream_generate(model, tokenizer, "hello world", max_tokens=4)]
    assert figures["tokens"] == expected and len(expected) == 4
    assert 0 < figures["bytes_kept"] <= 3 * expert
    assert figures["bytes_read"] > figures["bytes_kept"]


@pytest.mark.parametrize(
    "view, flags, status, words",
    [("hf", [], 1, "there is no experts/"), ("hf,experts", ["--budget", "foo"], 2, "'foo' is no size, such as 8G")],
)
def test_generating_says_what_it_lacks(view, flags, status, words, tmp_path):
    succeed("toy", tmp_path / "toy.gguf", "--arch", "qwen3moe")
    program = [sys.executable, REPO / "examples/mlx_generate.py", tmp_path / "mnt", "--prompt", "hello", *flags]
    with mounted(tmp_path / "toy.gguf", tmp_path / "mnt", "--show", view, "--as", "mlx"):
        done = subprocess.run([*map(str, program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status and words in done.stderr


def test_the_tokenizer_of_the_toy_knows_every_byte(generating):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(generating / "hf"))
    for text in ("hello world", "Grüße, 世界 \U0001f40d\n\t x", "".join(map(chr, range(1, 256)))):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < 600
    assert len(tokenizer(" hello")["input_ids"]) < 6
    assert tokenizer.eos_token == "<|endoftext|>"


def test_a_toy_of_a_real_architecture_refuses_what_it_has_not(tmp_path):
    out = tmp_path / "toy.gguf"
    fail("toy", out, "--arch", "qwen3moe", "--naming", "reference", naming=["qwen3moe", "--naming"])
    fail("toy", out, "--arch", "qwen3moe", "--vocab", 200, naming=["--vocab 200", "257"])
    fail("toy", out, "--arch", "qwen3moe", "--dim", 33, naming=["--dim 33", "multiple of 2"])
    for naming in ("fused", "per-expert"):
        path = tmp_path / f"{naming}.gguf"
        succeed("toy", path, "--arch", "qwen3moe", "--naming", naming, "--dim", 64, "--ffn-dim", 32)
        succeed("materialize", "--show", "hf", "--as", "mlx", path, tmp_path / naming)
