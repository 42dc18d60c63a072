"""What the README says to type does what it says."""

import os
import re
import subprocess
import sys

import pytest

from odmoe import BINARY, REPO, detach, mount_at, run, succeed

README = (REPO / "README.md").read_text()


def blocks(text, language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


SNIPPETS = blocks(README, "python")
# Blocks of commands, by the section that they are in.
COMMANDS = {section.split("\n", 1)[0]: blocks(section) for section in README.split("\n## ")[1:]}


@pytest.fixture(scope="module")
def beside_a_mount(tmp_path_factory):
    """A folder where the first commands of "A model in a few lines" were typed; the last ones are typed at the end."""
    folder = tmp_path_factory.mktemp("readme")
    mount, umount = COMMANDS["A model in a few lines"]
    (folder / "bin").mkdir()
    (folder / "bin/odmoe-fs").symlink_to(BINARY)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    try:
        done = run("bash", "-euc", mount, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        assert mount_at(folder / "mnt")
        yield folder
        done = run("bash", "-euc", umount, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        assert mount_at(folder / "mnt") is None
    finally:
        detach(folder / "mnt")


def test_the_first_screen_generates_text_as_it_stands(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/odmoe-fs").symlink_to(BINARY)
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (commands,) = COMMANDS["Try it"][1:]
    try:
        command = ["bash", "-euc", commands]  # loading mlx-lm takes its time
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "Generation: " in done.stdout
        assert mount_at(tmp_path / "qwen") is None
    finally:
        detach(tmp_path / "qwen")


def test_the_readme_has_snippets():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("code", SNIPPETS, ids=["loop", "mlx", "torch"])
def test_the_snippets_of_the_readme_run_as_they_stand(code, beside_a_mount):
    if "torch" in code:
        # A download of gigabytes, and so only there in the long form.
        pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code], cwd=beside_a_mount, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = sorted(done.stdout.splitlines())
    if code == SNIPPETS[0]:
        assert [re.match(r"layer (\d) reads experts \[\d \d\] norm \d", line)[1] for line in said] == ["0", "1"]
    else:
        assert [line.split()[0] for line in said] == ["w1.weight", "w2.weight", "w3.weight"]


def test_the_loop_of_the_readme_computes_what_the_gguf_says(beside_a_mount):
    """The same from the GGUF itself, without a mount."""
    code = f"""
import gguf, numpy as np
t = {{t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader("toy.gguf").tensors}}
x = np.random.default_rng(0).standard_normal(512, dtype=np.float32)
for n in range(2):
    for e in np.argsort(t[f"blk.{{n}}.ffn_gate_inp.weight"] @ x)[-2:]:
        gate = t[f"blk.{{n}}.ffn_gate_exps.weight"][e] @ x
        up = t[f"blk.{{n}}.ffn_up_exps.weight"][e] @ x
        x = x + t[f"blk.{{n}}.ffn_down_exps.weight"][e] @ (gate / (1 + np.exp(-gate)) * up)
expected = np.linalg.norm(x)
{SNIPPETS[0]}
assert np.isclose(np.linalg.norm(x), expected, rtol=1e-5), (np.linalg.norm(x), expected)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=beside_a_mount, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_for_a_fresh_machine_are_there():
    assert COMMANDS["Try it"][0] == "cargo run --release -- demo\n"
    (tests,) = COMMANDS["Run the tests"]
    assert tests.endswith("&& tests/run.sh\n")
    assert README.index("## Install") < README.index("## Run the tests")


def test_every_command_of_the_readme_is_one_of_the_program():
    """Each line in a block that calls it, with options that exist."""
    lines = [line for blocks in COMMANDS.values() for block in blocks for line in block.splitlines()]
    calls = [line.split("#")[0].split()[1:] for line in lines if line.startswith("odmoe-fs ")]
    assert len(calls) > 8
    for command, *rest in calls:
        helped = succeed(command, "--help")
        assert all(word in helped for word in rest if word.startswith("-")), (command, rest)


def test_the_options_that_the_readme_names_exist():
    helps = "".join(succeed(c, "--help") for c in ("mount", "umount", "status", "materialize", "verify", "inspect", "toy", "demo"))
    for option in set(re.findall(r"`(--[a-z-]+)", README)):
        assert option in helps, option


def test_the_readme_has_one_line_width():
    # But for tables, the picture, and a line of JSON.
    lines = [line for line in README.splitlines() if not line.startswith(("|", "!", '"w1.weight"'))]
    assert max(map(len, lines)) <= 100
