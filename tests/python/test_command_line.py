"""What somebody types who comes from another program is answered with what to type here."""

import json
import re

import pytest

from odmoe import fail, odmoe

# What is typed, and what the tip names.
MEANT = {
    "convert --input model.gguf --output out": "odmoe-fs materialize MODEL.gguf DIR",
    "extract model.gguf": "odmoe-fs mount MODEL.gguf DIR",
    "serve": "odmoe-fs mount MODEL.gguf DIR",
    "ls mnt": "odmoe-fs inspect MODEL.gguf",
    "download model.gguf": "odmoe-fs fetch URL",
    "check model.gguf": "odmoe-fs verify MODEL.gguf",
    "--input model.gguf": "odmoe-fs mount MODEL.gguf DIR",
    "materialize --input model.gguf --output out": "odmoe-fs mount MODEL.gguf DIR",
    "materialize model.gguf --output out": "odmoe-fs materialize MODEL.gguf DIR",
    "materialize model.gguf out --num-layers 28": "--layers 0-3",
    "materialize model.gguf out --num-layers=28": "--layers 0-3",
    "materialize model.gguf out --num-experts 384": "--experts 0,5",
    "materialize model.gguf out --workers 4": "--jobs N",
    "mount model.gguf mnt --num-layers 28": "the model says how many",
    "mount -m model.gguf mnt": "comes first",
    "mount model.gguf mnt --allow-root": "--allow-other",
    "umount -l mnt": "--lazy",
    "toy --output toy.gguf": "odmoe-fs toy OUT.gguf",
    "toy toy.gguf --num-layers 2": "--layers N",
    # By spelling, which is clap's.
    "materialise model.gguf out": "materialize",
    "mount model.gguf mnt --allow-others": "--allow-other",
}


@pytest.mark.parametrize("line", MEANT)
def test_what_another_program_takes_is_answered_with_what_to_type_here(line):
    said = fail(*line.split(), status=2)
    (tip,) = re.findall(r"^  tip: (.*)$", said, re.M)
    assert MEANT[line] in tip


def test_the_tip_is_the_hint_for_programs():
    done = odmoe("inspect", "--json", "--input", "model.gguf")
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "usage" and error["hint"] in done.stderr and "comes first" in error["hint"]
    done = odmoe("inspect", "--json")
    assert json.loads(done.stdout)["error"]["hint"] == "see --help"


@pytest.mark.parametrize("number", ["nobody", "-1", "4294967295", "0x10", ""])
def test_owners_are_numbers(number):
    for option in ("--uid", "--gid"):
        assert "`id NAME`" in fail("mount", f"{option}={number}", "model.gguf", "mnt", status=2)
