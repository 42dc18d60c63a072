"""What `--as` refuses, and what to do instead; types whose numbers are not known are in test_forms_promises.py."""

import json

import pytest
from gguf import GGMLQuantizationType as Type

import models
from odmoe import BINARY, fail, file_system, needs_root, odmoe, run, sparse_gguf, succeed

COMMANDS = ["mount", "materialize", "inspect"]


def refused(command, model, tmp_path, *flags, naming, **options):
    (tmp_path / "mnt").mkdir(exist_ok=True)
    directory = [] if command == "inspect" else [tmp_path / "mnt"]
    return fail(command, model, *directory, *flags, naming=naming, **options)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", [["--scales", "bf16"], ["--scales", "f32"], ["--requant"]])
@pytest.mark.parametrize("form", [[], ["--as", "raw"], ["--as", "f32"], ["--as", "bf16"]])
def test_options_of_mlx_mean_nothing_elsewhere(form, option, command, model, tmp_path):
    said = refused(command, model, tmp_path, *form, *option, naming=[], status=2)
    name = form[-1] if form else "raw"
    assert said.startswith(f"error: {option[0]} means nothing with --as {name}\nhint: add --as mlx, or leave it out\n")


def test_options_of_a_table_mean_nothing_elsewhere_either(model, tmp_path):
    for options in ("scales=bf16", "requant", "as=f16,scales=f16"):
        refused("mount", model, tmp_path, "-o", options, naming=["means nothing with --as", "--as mlx"], status=2)


def test_they_are_a_wrong_call_of_the_helper_of_mount_and_have_a_code(model, tmp_path):
    helper = tmp_path / "mount.fuse.odmoe"
    helper.symlink_to(BINARY)
    (tmp_path / "mnt").mkdir()
    done = run(helper, model, tmp_path / "mnt", "-o", "rw,requant")
    assert done.returncode == 1 and "--requant means nothing with --as raw" in done.stderr
    done = odmoe("inspect", model, "--requant", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "usage")


@pytest.mark.parametrize("words", [["--as", "q4_k"], ["--as", "mlx", "--scales", "q8_0"]])
def test_forms_that_do_not_exist_are_refused_with_those_that_do(words, model):
    said = fail("inspect", model, *words, status=2)
    assert words[-1] in said and "bf16" in said


def clash(folder, weight, *others):
    """A model with a packed tensor, and one that has the name of its scales or biases."""
    tensors = [(name, models.blocks(kind, *shape), kind) for name, kind, *shape in (weight, *others)]
    return models.write(folder / "clash.gguf", tensors, models.counts(1))[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("suffix", ["scales", "biases"])
@pytest.mark.parametrize("stem", ["blk.0.attn_q", "blk.0.ffn_gate_exps", "output"])
def test_two_arrays_of_one_name_are_refused_where_they_would_meet(stem, suffix, command, tmp_path):
    """The names of both tensors are told; other forms show both of them."""
    experts = [models.EXPERTS] if "exps" in stem else []
    # What has one number for each expert is sliced, too.
    second = (f"{stem}.{suffix}", Type.F32, *(experts or [4]))
    model = clash(tmp_path, (f"{stem}.weight", Type.Q4_0, *experts, 4, 64), second)
    if stem == "output":  # which is no output.bias, so it lies in another file
        succeed("inspect", model, "--as", "mlx")
        return
    shown = f"w1.{suffix}" if experts else f"{stem}.{suffix}"
    said = refused(command, model, tmp_path, "--as", "mlx", naming=[f'"{stem}.weight"', f'"{second[0]}"'])
    assert f"would both be shown as {shown}; use another form, or --as raw" in said
    for form in ("raw", "f32", "f16", "bf16"):
        succeed("inspect", model, "--as", form)


def test_such_a_name_beside_a_type_without_that_array_is_no_clash(tmp_path):
    """MXFP4 has no biases, Q6_K no arrays, and F32 is what it is."""
    for number, (kind, suffix) in enumerate(((Type.MXFP4, "biases"), (Type.Q6_K, "scales"), (Type.F32, "scales"))):
        (tmp_path / str(number)).mkdir()
        model = clash(tmp_path / str(number), ("blk.0.attn_q.weight", kind, 4, 256), (f"blk.0.attn_q.{suffix}", Type.F32, 4))
        succeed("inspect", model, "--as", "mlx")
    both = ("blk.0.attn_q.weight", Type.MXFP4, 4, 256), ("blk.0.attn_q.scales", Type.F32, 4)
    refused("inspect", clash(tmp_path, *both), tmp_path, "--as", "mlx", naming=["would both be shown as blk.0.attn_q.scales"])


@needs_root
def test_a_file_that_no_file_system_could_hold_is_refused(tmp_path):
    """2^61 weights of little more than a bit each: as F32, eight exbibytes."""
    with file_system("tmpfs", tmp_path, "16m") as folder:
        table = tmp_path / "table.json"
        tensors = [["blk.0.attn_q.weight", [1 << 30, 1 << 31], "Q1_0"]]
        table.write_text(json.dumps({"kv": {"general.architecture": "moe"}, "tensors": tensors}))
        model = sparse_gguf(table, folder / "model.gguf")[0]
        said = fail("inspect", model, "--as", "f32", naming=["base_model/attention_layers.safetensors"])
        assert "shown as f32" in said and "larger than any file system can hold; use --as raw" in said
        for form in ("raw", "f16", "mlx"):
            succeed("inspect", model, "--as", form)
        forms = json.loads(odmoe("inspect", model, "--json").stdout)["forms"]
        assert "f32" not in [form["form"] for form in forms] or forms[1]["bytes"] > 1 << 62
