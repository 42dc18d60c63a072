"""What the README says to type does what it says."""

import re
import subprocess
import sys

import pytest

from odmoe import REPO, mounted, succeed

README = (REPO / "README.md").read_text()
# PyTorch is a download of gigabytes: its few lines are not worth that at every run.
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "torch" not in code]


@pytest.fixture(scope="module")
def beside_a_mount(tmp_path_factory):
    """A folder where `mnt` is the toy model that the README makes."""
    folder = tmp_path_factory.mktemp("readme")
    succeed("toy", folder / "toy.gguf", "--type", "q4_k")
    with mounted(folder / "toy.gguf", folder / "mnt"):
        yield folder


def test_the_readme_has_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("code", SNIPPETS)
def test_the_snippets_of_the_readme_run_as_they_stand(code, beside_a_mount):
    done = subprocess.run([sys.executable, "-c", code], cwd=beside_a_mount, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in sorted(done.stdout.splitlines())] == ["w1.weight", "w2.weight", "w3.weight"]


def test_the_options_that_the_readme_names_exist():
    helps = "".join(succeed(c, "--help") for c in ("mount", "umount", "status", "materialize", "verify", "inspect", "toy", "demo"))
    for option in set(re.findall(r"`(--[a-z-]+)", README)):
        assert option in helps, option
