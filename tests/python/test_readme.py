"""What the README says to type does what it says."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from odmoe import BINARY, REPO, detach, mount_at, run, succeed

README = (REPO / "README.md").read_text()


def blocks(text, language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


# Blocks of commands, by the section that they are in.
COMMANDS = {section.split("\n", 1)[0]: blocks(section) for section in README.split("\n## ")[1:]}


LOADERS = README.split("\n## Point a loader at it\n")[1].split("\n## ")[0]


class Typed:
    """What somebody types who follows a section in a folder of their own, one block after the other."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin/odmoe-fs").symlink_to(BINARY)
        self._environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def commands(self, block):
        done = run("bash", "-euc", block, cwd=self.folder, env=self._environment)
        assert done.returncode == 0, done.stderr

    def python(self, code):
        done = subprocess.run([sys.executable, "-c", code], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    try:
        yield Typed(folder)
    finally:
        detach(folder / "mnt")


# The numbers of the expert of the examples, from the GGUF itself, in F64.
FROM_THE_GGUF = """
import gguf, numpy as np
tensors = {t.name: t for t in gguf.GGUFReader("toy.gguf").tensors}
def matrix(word):
    tensor = tensors[f"blk.1.ffn_{word}_exps.weight"]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)[2].astype(np.float64)
def expected(x):
    gate = matrix("gate") @ x
    return matrix("down") @ (gate / (1 + np.exp(-gate)) * (matrix("up") @ x))
def assert_close(y, x, error):
    right = expected(np.array(x, np.float64).ravel())
    assert np.linalg.norm(np.array(y, np.float64).ravel() - right) < error * np.linalg.norm(right)
"""


def test_the_loaders_of_the_readme_compute_what_the_gguf_says(typed):
    """Every block of the section in its order, as it stands: the first in MLX at quantised size, raw blocks last."""
    kinds = re.findall(r"^```(\w*)\n", LOADERS, re.MULTILINE)
    assert [kind for kind in kinds if kind] == ["python", "python", "rust", "python"]
    mount, numbers, raw, umount = blocks(LOADERS)
    mlx, torch, gguf_py = blocks(LOADERS, "python")
    typed.commands(mount)
    assert mount_at(typed.folder / "mnt")
    said = typed.python(f"{mlx}\n{FROM_THE_GGUF}\nassert_close(y, x, 1e-3)")
    assert re.search(r"norm \d", said)
    # 5 bits for each weight, where the model has 4.5.
    typed.python(f"{mlx}\nassert sum(array.nbytes for array in expert.values()) == 3 * 512 * 1024 * 5 // 8")
    typed.commands(numbers)
    code = f"{FROM_THE_GGUF}\nimport ml_dtypes\nfrom safetensors.numpy import load_file\n"
    code += "expert = load_file('mnt/experts/layer_01_expert_002.safetensors')\n"
    code += "assert (expert['w2.weight'] == matrix('down').astype(ml_dtypes.bfloat16)).all()"
    typed.python(code)
    if importlib.util.find_spec("torch"):  # a download of gigabytes, and so only there in the long form
        typed.python(f"{torch}\n{FROM_THE_GGUF}\nassert_close(y.float(), x.float(), 3e-2)")
    typed.commands(raw)
    said = typed.python(f"{gguf_py}\n{FROM_THE_GGUF}\nassert name == 'w3.weight' and (numbers == matrix('up')).all()")
    assert [line.split()[0] for line in said.splitlines()] == ["w1.weight", "w2.weight", "w3.weight"]
    typed.commands(umount)
    assert mount_at(typed.folder / "mnt") is None


def test_the_program_for_candle_of_the_readme_multiplies_by_blocks(times, tmp_path):
    if times(0, long=1) == 0:
        pytest.skip("candle is only built in the long form")
    crate = tmp_path / "crate"
    shutil.copytree(REPO / "examples/candle", crate)
    for manifest in (crate / "Cargo.toml", crate / "Cargo.lock"):  # not the program of the example
        manifest.write_text(manifest.read_text().replace("candle-expert", "candle-readme"))
    (program,) = blocks(LOADERS, "rust")
    # With a vector that is not random.
    assert program.count("Tensor::randn(0f32, 1.0, (1, 512), &Device::Cpu)?") == 1
    ones = program.replace("randn(0f32, 1.0, (1, 512)", "ones((1, 512), candle_core::DType::F32")
    (crate / "src/main.rs").write_text(program)
    (crate / "src/bin").mkdir()
    (crate / "src/bin/ones.rs").write_text(ones.replace('{y}', '{}').replace('");\n    Ok', '", y.sqr()?.sum_all()?.sqrt()?);\n    Ok'))
    environment = os.environ | {"CARGO_TARGET_DIR": str(REPO / "target/candle")}
    build = ["cargo", "build", "--quiet", "--release", "--locked"]
    done = subprocess.run(build, cwd=crate, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    typed = Typed(tmp_path)
    typed.commands(blocks(LOADERS)[0].replace(" --as mlx", ""))
    try:
        for program in ("candle-readme", "ones"):
            done = run(REPO / "target/candle/release" / program, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        norm = float(re.search(r"[\d.]+", done.stdout)[0])
        # candle rounds the vector to 8 bits.
        typed.python(f"{FROM_THE_GGUF}\nassert abs({norm} / np.linalg.norm(expected(np.ones(512))) - 1) < 2e-2")
        typed.commands(blocks(LOADERS)[3])
    finally:
        detach(tmp_path / "mnt")


def test_the_two_commands_for_a_fresh_machine_are_there():
    assert COMMANDS["Try it"] == ["cargo run --release -- demo\n"]
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
