"""Malformed and odd files: each gets one clear error, at once and in little memory."""

import json
import os
import re
import resource

import pytest

from odmoe import DATA, contents, fail, mount_at, mounted, promises, succeed

FOLDER = DATA / "hostile"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())

EXPECTED = {entry["file"]: entry.get("error") for entry in MANIFEST}


def of(verdict):
    return [entry["file"] for entry in MANIFEST if entry["verdict"] == verdict]


def in_little_memory():
    """Files of a few bytes that claim gigabytes must not get them."""
    resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))


def test_every_hostile_file_has_a_verdict():
    assert sorted(entry["file"] for entry in MANIFEST) == sorted(set(os.listdir(FOLDER)) - {"manifest.json"})
    assert len(of("accept")) + len(of("reject")) == len(MANIFEST)


@pytest.mark.parametrize("name", of("reject"))
@promises(
    "A malformed model is one clear error with exit status 1, at once, in memory bounded by a small multiple of its size.",
)
def test_a_malformed_file_is_refused_by_name(name, tmp_path):
    said = fail("inspect", FOLDER / name, naming=[name], preexec_fn=in_little_memory)
    assert said == f'error: "{FOLDER / name}": {EXPECTED[name]}\n'
    assert re.search(r", at byte \d+: ", said), said
    assert fail("mount", FOLDER / name, tmp_path, naming=[name], preexec_fn=in_little_memory) == said
    assert mount_at(tmp_path) is None
    fail("materialize", FOLDER / name, tmp_path / "out", naming=[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", of("accept"))
def test_an_odd_but_valid_file_is_shown(name, tmp_path):
    succeed("inspect", FOLDER / name, preexec_fn=in_little_memory)
    with mounted(FOLDER / name, tmp_path / "mnt") as root:
        shown = contents(root)
    assert shown["base_model/metadata.gguf"].startswith(b"GGUF")
    assert json.loads(shown["experts/registry.json"]) == {}
    metadata = json.loads(shown["base_model/metadata.json"])
    files = {f"base_model/{file}" for file in metadata["weight_map"].values()}
    assert files == {path for path in shown if path.endswith(".safetensors")}
    assert all(path.count("/") == 1 for path in shown)


def test_a_name_is_never_a_path(tmp_path):
    before = sorted(os.listdir(tmp_path.parent))
    succeed("materialize", FOLDER / "name-slash-dotdot.gguf", tmp_path / "a/b/out")
    assert sorted(os.listdir(tmp_path.parent)) == before
    assert sorted(os.listdir(tmp_path)) == ["a"]
