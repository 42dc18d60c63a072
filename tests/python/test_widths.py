"""Every screen fits its terminal, however narrow, wide characters counted as two columns, and asks no more of it than it has."""

import json
import re

import pytest
from wcwidth import wcswidth

from odmoe import ME, mounted, sparse_gguf, succeed
from screens import terminal

WIDTHS = [40, 60, 80, 100, 132]
# Names of four kinds: wide characters, combining marks, and neither.
NAMES = ["模型模型模型模型模型模型模型模型.weight", "e\u0301" * 15 + ".weight", "한국어" * 5, "plain_" * 10]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose file, architecture and tensors have such names."""
    folder = tmp_path_factory.mktemp("wide")
    kv = {"general.architecture": "模型", "模型.block_count": 2, "模型.expert_count": 4, "模型.expert_used_count": 2}
    stacks = [[f"blk.{n}.ffn_{name}_exps.weight", [256, 256, 4], "Q4_K"] for n in (0, 1) for name in ("down", "gate", "up")]
    table = folder / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": stacks + [[name, [64, 64], "F32"] for name in NAMES]}))
    name = "模型-" * 12 + "e\u0301-a-name-that-is-longer-than-any-terminal-is-wide-" * 2 + ".gguf"
    return sparse_gguf(table, folder / name)[0]


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    return sparse_gguf("kimi-k2.5-q4_k_m", tmp_path_factory.mktemp("kimi") / "kimi-k2.5.gguf", "--splits", 9)[0]


def shown(*command, columns, status=0, **environment):
    """What a command prints on a terminal, without its colours."""
    with terminal(ME.binary, *command, columns=columns, lines=400, **environment) as screen:
        assert screen.wait() == status, screen.text()
        text = screen.raw.decode().replace("\r\n", "\n")
    assert "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", text), "moves the cursor"
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def assert_fits(text, columns):
    for line in text.splitlines():
        assert wcswidth(line) <= columns, (columns, line)


@pytest.mark.parametrize("columns", WIDTHS)
def test_inspect_fits(columns, wide, kimi):
    for model in (wide, kimi):
        for options in ([], ["--tensors"], ["--expert", "1,2"]):
            text = shown("inspect", model, *options, columns=columns)
            # A path in a table is not cut.
            assert_fits(text if options[:1] != ["--expert"] else text.replace(model.name, "PART"), columns)
    assert "bytes by component" in shown("inspect", kimi, columns=columns)


def test_names_are_cut_in_the_middle_and_lines_of_a_pipe_are_not(wide):
    text = shown("inspect", wide, "--tensors", columns=80)
    assert "…" in text and NAMES[0] not in text
    piped = succeed("inspect", wide, "--tensors")
    assert all(name in piped for name in NAMES) and wide.name in piped


@pytest.mark.parametrize("columns", WIDTHS)
def test_columns_stand_below_one_another(columns, wide):
    """Of a chart: sizes end at one column, whatever the labels are made of."""
    text = shown("inspect", wide, columns=columns)
    chart = text.split("bytes by component\n")[1].split("\n\n")[0].splitlines()
    ends = {wcswidth(re.match(r"(.* [KMG]?i?B)(  |$)", line)[1]) for line in chart}
    assert len(ends) == 1, chart


@pytest.mark.parametrize("columns", WIDTHS)
def test_demo_and_doctor_fit(columns):
    text = shown("demo", columns=columns)
    assert_fits(text, columns)
    assert re.sub(r"\s+", " ", text).count("the same as toy.gguf at") == 3
    text = shown("doctor", columns=columns)
    # A cure is a command, to be copied.
    assert_fits("\n".join(line for line in text.splitlines() if "cure: " not in line), columns)


@pytest.mark.parametrize("columns", WIDTHS)
def test_what_materialize_would_do_and_what_verify_has_done_fit(columns, tmp_path):
    model, out = tmp_path / "toy.gguf", tmp_path / "out"
    succeed("toy", model, "--dim", 64, "--ffn-dim", 64, "--vocab", 64)
    assert_fits(shown("materialize", model, out, "--dry-run", columns=columns), columns)
    succeed("materialize", model, out)
    (out / "experts/layer_00_expert_001.safetensors").unlink()
    for words, status in ([model], 0), ([model, out], 3):
        text = shown("-q", "verify", *words, columns=columns, status=status)  # without the bar
        assert_fits(text.replace(str(tmp_path), ""), columns)


@pytest.mark.parametrize("columns", WIDTHS)
def test_status_and_top_fit(columns, wide, tmp_path):
    directory = tmp_path / "模型"
    with mounted(wide, directory, "--stats") as root:
        (root / "experts/layer_01_expert_002.safetensors").read_bytes()
        text = shown("status", columns=columns)
        for path in (str(root), str(wide)):  # whole: they are copied from here
            assert path in text
        assert_fits(re.sub(r"/\S+", "PATH", text), columns)  # also those of other mounts
        text = shown("top", root, "--once", columns=columns)
        assert "hottest experts" in text
        assert_fits(text.replace(str(root), "PATH"), columns)


def test_a_dumb_terminal_gets_ascii_without_colours(kimi, tmp_path):
    for name in ("dumb", ""):
        for options in ([], ["--tensors"]):
            text = shown("inspect", kimi, *options, columns=80, TERM=name)
            assert text.isascii() and "…" not in text
        with terminal(ME.binary, "inspect", kimi, columns=80, TERM=name) as screen:
            assert screen.wait() == 0
            assert b"\x1b" not in screen.raw and b"####" in screen.raw
    with terminal(ME.binary, "inspect", tmp_path / "nothing.gguf", columns=80, TERM="dumb") as screen:
        assert screen.wait() == 1
        assert b"\x1b" not in screen.raw


def test_top_on_a_dumb_terminal_is_ascii_and_has_no_live_view(kimi, tmp_path):
    with mounted(kimi, tmp_path / "mnt", "--stats") as root:
        (root / "experts/layer_01_expert_002.safetensors").read_bytes()
        text = shown("top", root, "--once", columns=80, TERM="dumb")
        assert text.isascii() and "#" in text and " us" in text
        with terminal(ME.binary, "top", root, columns=80, TERM="dumb") as screen:
            assert screen.wait() == 1
            assert b"\x1b" not in screen.raw and "--once" in screen.text()
