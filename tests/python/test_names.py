"""Names and values are data, whatever is in them: no path, no broken header, nothing that a terminal or a log obeys."""

import json
import random
import unicodedata

import pytest
from safetensors import safe_open

from odmoe import contents, foreground, mounted, odmoe, promises, succeed, wait_for
from test_refusals import STRING, gguf, pair, tensor

DATA = (
    "Names and values in a model are data: they never become a path, and never reach a terminal or a log as control "
    "characters."
)

NAMES = [
    "../../x",
    "/etc/passwd",
    "..",
    "a\nb",
    "\r\t\v\f",
    '"quotes"',
    "back\\slash\\",
    "it's",
    "\x1b[2J\x1b]0;title\x07",
    "\x7f\x80\x9b31m",
    "\u202eright to left\u2066",
    "\u2028\u2029\ufeff\u200b",
    "$(touch x)`touch y`",
    "%s%n{}{0}",
    "blk.0.\n.weight",
    "norm\x1b[31m",
    "token_embd\n",
    "experts/layer_00_expert_000.safetensors",
    "😀" * 15,
    "x" * 63,
    " ",
    "é́́",
]


def any_name(chance):
    """63 bytes of anything that is UTF-8 and has no NUL."""
    text = ""
    while len(text.encode()) < 60:
        number = chance.choice([chance.randrange(1, 0x100), chance.randrange(0x100, 0x3000), chance.randrange(0xE000, 0x110000)])
        text += chr(number)
    return text


@pytest.fixture
def model(tmp_path):
    chance = random.Random(7)
    names = NAMES + [any_name(chance) for _ in range(60)]
    assert len(set(names)) == len(names)
    pairs = [pair("general.architecture", STRING, "moe\x1b[2J\n"), pair('a\n"key\x1b', STRING, "../../x\x1b\n" * 9)]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(pairs, [tensor(name, [8], offset=32 * n) for n, name in enumerate(names)]) + bytes(32 * len(names)))
    return path, names


def assert_is_harmless(text):
    """Only what can be seen, and ends of lines."""
    for c in set(text) - {"\n"}:
        assert unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp"), repr(c)


def said_by(*arguments):
    done = odmoe(*arguments)
    assert done.returncode == 0, done.stderr
    assert_is_harmless(done.stdout)
    assert_is_harmless(done.stderr)
    return done.stdout


@promises(DATA)
def test_every_name_is_shown_and_harmless(model, tmp_path):
    path, names = model
    out = tmp_path / "out"
    out.mkdir()
    said_by("-vv", "inspect", path)
    lines = said_by("inspect", path, "--tensors").splitlines()
    assert len([line for line in lines if " F32   [8]" in line]) == len(names)
    report = json.loads(odmoe("inspect", path, "--tensors", "--json").stdout)
    assert [t["name"] for t in report["tensors"]] == names
    said_by("verify", path)
    said_by("-vv", "materialize", path, out, "--verify")
    (tmp_path / "mnt").mkdir()
    with mounted(path, tmp_path / "mnt", "--log-file", tmp_path / "log") as root:
        shown = contents(root)
        found = set()
        for file in {f"base_model/{f}" for f in json.loads(shown["base_model/metadata.json"])["weight_map"].values()}:
            with safe_open(root / file, framework="np") as opened:
                found |= set(opened.keys())
        assert found == set(names)
    assert shown == contents(out)
    assert {name.count("/") for name in shown} == {1} and all(name.isascii() for name in shown)
    assert_is_harmless((tmp_path / "log").read_text())
    # What differs is named, too.
    for file in out.glob("base_model/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-2500] + bytes([1]) * 2500)
    done = odmoe("verify", path, out)
    assert done.returncode == 3
    assert_is_harmless(done.stdout)
    assert all(line.startswith(("base_model/", str(out))) for line in done.stdout.splitlines())


@promises(DATA)
def test_a_log_has_a_line_for_each_message_whatever_the_model_is_called(small, tmp_path):
    odd = tmp_path / "a\nERROR \x1b[2J.gguf"
    odd.write_bytes(b"".join(path.read_bytes() for path in small))
    with foreground(odd, tmp_path / "mnt") as process:
        odd.write_bytes(odd.read_bytes() + b"more")
        for path in (tmp_path / "mnt/experts").iterdir():
            try:
                path.read_bytes()
            except OSError:
                break
        process.terminate()
        output, errors = process.communicate(timeout=60)
        assert_is_harmless(output)
        assert_is_harmless(errors)
        assert "has changed" in errors and errors.count("\n") == 1
    wait_for(lambda: process.poll() is not None)
    (tmp_path / "dir \x1b[2J\n").mkdir()
    for command in (["inspect", odd / "x"], ["mount", odd, odd], ["umount", tmp_path / "dir \x1b[2J\n"]):
        assert_is_harmless(odmoe(*command).stderr)
    assert_is_harmless(succeed("materialize", odd, tmp_path / "dir \x1b[2J\n"))
    assert_is_harmless(odmoe("mount", tmp_path / b"\xff\xfe\x1b.gguf".decode(errors="surrogateescape"), tmp_path).stderr)
