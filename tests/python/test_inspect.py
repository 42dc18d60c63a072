"""`inspect` as a person sees it, whole screens, and as programs read it."""

import json
import re

import pytest

from odmoe import DATA, ME, MIB, REPO, fail, mounted, odmoe, sparse_gguf, succeed
from screens import compare, screen_of, terminal

# What is of this machine.
MASKS = [(r"memory here: .*", "memory here: MASKED"), (r"(  \d[\d.,]* \wi?B)  (fits.*|does not fit)\n", r"\1  MASKED\n")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "toy.gguf"
    succeed("toy", path, "--type", "q4_k", "--dim", 256, "--ffn-dim", 256, "--vocab", 300, "--split", 2)
    return path.with_name("toy-00001-of-00002.gguf")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return {
        table: sparse_gguf(table, folder / f"{table}.gguf", *flags)[0]
        for table, flags in (("kimi-k2.5-q4_k_m", ["--splits", 9]), (OTHER, []))
    }


OTHER = next(p.stem for p in sorted((DATA / "models").glob("*.json")) if "gpt-oss" in p.stem)


def test_the_screen_of_a_toy(toy):
    compare("inspect-toy-80", screen_of(ME.binary, "inspect", toy, NO_COLOR="1"), *MASKS)


@pytest.mark.parametrize("columns", [60, 120])
def test_the_screen_of_a_large_model_fits_its_terminal(tables, columns):
    said = screen_of(ME.binary, "inspect", tables["kimi-k2.5-q4_k_m"], columns=columns, NO_COLOR="1")
    compare(f"inspect-kimi-{columns}", said, *MASKS)
    assert len(said.splitlines()) <= 48
    # No line was broken by the terminal: it is as many as in a pipe.
    assert len(said.splitlines()) == len(succeed("inspect", tables["kimi-k2.5-q4_k_m"]).splitlines())


def test_the_screen_of_another_model(tables):
    compare("inspect-gpt-oss-100", screen_of(ME.binary, "inspect", tables[OTHER], columns=100, NO_COLOR="1"), *MASKS)


def test_colours_and_blocks_are_for_terminals_that_have_them(toy):
    plain = screen_of(ME.binary, "inspect", toy, LANG="C", NO_COLOR="1")
    assert "####" in plain and plain.isascii()
    with terminal(ME.binary, "inspect", toy) as shown:
        assert shown.wait() == 0
        assert b"\x1b[38;5;14m" in shown.raw or b"\x1b[36m" in shown.raw or b"\x1b[96m" in shown.raw
    piped = succeed("inspect", toy, "--tensors")
    assert "\x1b" not in piped and "█" not in piped


def test_tensors_fit_the_terminal_and_are_whole_in_a_pipe(tables):
    kimi = tables["kimi-k2.5-q4_k_m"]
    said = screen_of(ME.binary, "inspect", kimi, "--tensors", columns=72, lines=1200, NO_COLOR="1")
    rows = said[said.index("name\n") :].splitlines()
    assert all(len(row) <= 72 for row in rows) and any("…" in row for row in rows)
    piped = succeed("inspect", kimi, "--tensors")
    report = json.loads(succeed("inspect", kimi, "--tensors", "--json"))
    for tensor in report["tensors"]:
        assert re.search(rf"^ *{tensor['bytes']} +{tensor['offset']} .* {re.escape(tensor['name'])}$", piped, re.M)


def test_one_expert_is_found_in_its_part(toy):
    compare("inspect-expert", screen_of(ME.binary, "inspect", toy, "--expert", "1,2", columns=100, NO_COLOR="1"))
    report = json.loads(succeed("inspect", toy, "--expert", "1,2", "--json"))
    assert report["path"] == "experts/layer_01_expert_002.safetensors"
    assert report["bytes"] == report["header_bytes"] + sum(t["bytes"] for t in report["tensors"])
    assert [t["name"] for t in report["tensors"]] == ["w1.weight", "w2.weight", "w3.weight"]
    fail("inspect", toy, "--expert", "1,9", naming=["layer 1 has no expert 9", "0-3"])
    fail("inspect", toy, "--expert", "7,0", naming=["layer 7 has no experts", "0-1"])
    fail("inspect", toy, "--expert", "seven", status=2)


def test_numbers_add_up(tables):
    for model in tables.values():
        report = json.loads(succeed("inspect", model, "--json"))
        experts, active = report["experts"], report["active"]
        assert sum(layer["expert_bytes"] for layer in report["layers"]) == experts["bytes"]
        assert sum(c["bytes"] for c in report["components"].values()) == active["base_bytes"]
        used = experts["used_per_token"]
        assert active["expert_bytes"] == sum(layer["bytes"] * used // layer["experts"] for layer in experts["layers"])
        assert active["bytes"] == active["base_bytes"] + active["expert_bytes"]
        tree = report["tree"]
        # Of each array that is congruent, a part of a block at either end cannot be shared.
        neither = experts["bytes"] + active["base_bytes"] - tree["sharable_bytes"] - tree["incongruent_bytes"]
        assert 0 <= neither < 2 * 4096 * (report["tensor_count"] + 9 * experts["files"])


def test_a_model_needs_memory_once_whatever_is_shown(tmp_path):
    model = tmp_path / "toy.gguf"
    succeed("toy", model, "--arch", "qwen3moe", "--type", "q6_k")
    for form in ("f32", "mlx"):
        said = succeed("inspect", model, "--show", "base,experts,hf,joined", "--as", form)
        needed = json.loads(succeed("inspect", model, "--json"))["forms"]
        needed = next(f["bytes"] for f in needed if f["form"] == form and not f["requant"])
        assert re.search(r"whole model +(\S+) MiB", said)[1] == f"{needed / MIB:.2f}"


def test_the_model_s_numbers_are_those_of_its_metadata(tables, toy, tmp_path):
    """What a program asks first, without mounting."""
    succeed("materialize", toy, tmp_path / "out", "--base-only")
    shown = json.loads((tmp_path / "out/base_model/metadata.json").read_text())
    report = json.loads(succeed("inspect", toy, "--json"))
    for key in ("architecture", "block_count", "embedding_length", "vocab_size", "expert_count"):
        assert report[key] == shown[key]
    kimi = json.loads(succeed("inspect", tables["kimi-k2.5-q4_k_m"], "--json"))
    assert [kimi[key] for key in ("block_count", "embedding_length", "vocab_size", "expert_count")] == [61, 7168, 163840, 384]


def test_numbers_that_a_model_does_not_tell_are_null(tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"kv": {"general.architecture": "x"}, "tensors": [["output_norm.weight", [8], "F32"]]}))
    report = json.loads(succeed("inspect", sparse_gguf(table, tmp_path / "model.gguf")[0], "--json"))
    assert [report[key] for key in ("block_count", "embedding_length", "vocab_size", "expert_count")] == [None, None, None, 0]


def test_experts_without_a_matrix_are_named(tmp_path):
    kv = {"general.architecture": "moe", "moe.block_count": 2, "moe.expert_count": 4}
    stacks = [[f"blk.{n}.ffn_{name}_exps.weight", [32, 32, 4], "F32"] for n in (0, 1) for name in ("down", "gate", "up")]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": [s for s in stacks if s[0] != "blk.1.ffn_up_exps.weight"]}))
    model = sparse_gguf(table, tmp_path / "model.gguf")[0]
    assert "4 without up matrix, the first in layer 1: 0" in succeed("inspect", model)
    report = json.loads(succeed("inspect", model, "--json"))
    assert report["experts"]["incomplete"] == [{"missing": ["w3.weight"], "experts": 4, "first": [1, 0]}]


def keys(value, path=""):
    """The names of all fields, as docs/JSON.md writes them."""
    if isinstance(value, list):
        return {key for one in value for key in keys(one, f"{path}[]")}
    if not isinstance(value, dict):
        return set()
    found = set()
    for name, inner in value.items():
        # Maps by type, component or operation.
        name = "*" if path in ("ggml_types", "components", "not_packed", "stats.requests") else name
        field = f"{path}.{name}" if path else name
        found |= {field} | keys(inner, field)
    return found


def test_every_field_of_json_is_documented_and_no_other(toy, tables, tmp_path):
    said = (REPO / "docs/JSON.md").read_text()
    documented = {
        section.split("\n", 1)[0]: set(re.findall(r"^\| `([^`]+)` \|", section, re.M)) for section in said.split("\n## ")[1:]
    }
    report = json.loads(succeed("inspect", tables["kimi-k2.5-q4_k_m"], "--tensors", "--json"))
    report["experts"]["incomplete"] = [{"missing": [], "experts": 0, "first": [0, 0]}]
    assert keys(report) == documented["inspect"]
    report = json.loads(succeed("inspect", toy, "--as", "bf16", "--expert", "0,0", "--json"))
    assert keys(report) == documented["inspect --expert"]
    assert keys(json.loads(succeed("verify", toy, "--json"))) == documented["verify MODEL"]
    succeed("materialize", toy, tmp_path / "out")
    (tmp_path / "out/experts/registry.json").write_text("{}")
    report = json.loads(odmoe("verify", toy, tmp_path / "out", "--json").stdout)
    assert report["differences"] and keys(report) == documented["verify MODEL DIR"]
    here = lambda section: {field for field in documented[section] if "remote" not in field}  # noqa: E731
    with mounted(toy, tmp_path / "mnt", "--stats") as root:
        (ours,) = [line for line in json.loads(succeed("status", "--json")) if line["directory"] == str(root)]
        assert keys([ours]) == {f"[].{key}" for key in here("status")}
        assert keys(json.loads(succeed("top", root, "--once", "--json"))) == here("top")
    report = json.loads(succeed("doctor", tables["kimi-k2.5-q4_k_m"], "--json"))
    assert keys(report) == documented["doctor"]
    of_a_model = {field for field in documented["doctor"] if field.startswith(("forms", "not_packed", "memory"))}
    assert keys(json.loads(succeed("doctor", "--json"))) == documented["doctor"] - of_a_model
    assert keys(json.loads(odmoe("inspect", tmp_path / "no", "--json").stdout)) == documented["Errors"]

