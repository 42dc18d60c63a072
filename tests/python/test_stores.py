"""Stores that name files by their content, where the parts of a set are found only through links."""

import hashlib
import os
import shutil

import pytest

import models
from odmoe import contents, fail, mounted

RENAME = "published with"


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "before"
    folder.mkdir()
    return models.write_small(folder, split_max_tensors=3)


def name_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache(parts, folder, below=""):
    """A cache as huggingface_hub lays it out; returns the links to the parts, and the blobs."""
    blobs, links = [], []
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots/5f2a" / below
    snapshot.mkdir(parents=True)
    for part in parts:
        blobs.append(part.rename(folder / "blobs" / name_of(part)))
        links.append(snapshot / part.name)
        links[-1].symlink_to(os.path.relpath(blobs[-1], snapshot))
    return links, blobs


def tree(model, where):
    with mounted(model, where) as root:
        return contents(root)


@pytest.mark.parametrize("below", ["", "Q4_K_M", "a/b"])
def test_a_blob_leads_to_the_link_that_has_its_name(parts, tmp_path, below):
    links, blobs = cache(parts, tmp_path / "models--u--m", below)
    (tmp_path / "mnt").mkdir()
    for link, blob in zip(links, blobs, strict=True):
        said = fail("inspect", blob, naming=[f'give the link that leads to it: "{link}"'])
        assert said.startswith(
            f'error: "{blob}" is part {links.index(link) + 1} of 3 in a store that names files by their content, '
            "so the other parts cannot be found beside it; "
        )
        assert fail("mount", blob, tmp_path / "mnt") == said
    assert tree(links[0], tmp_path / "mnt")


def test_a_link_of_another_name_to_a_blob_leads_there_too(parts, tmp_path):
    links, blobs = cache(parts, tmp_path / "models--u--m")
    mine = tmp_path / "mine.gguf"
    mine.symlink_to(blobs[1])
    said = fail("inspect", mine, naming=[mine.name, str(links[1])])
    assert RENAME not in said


def test_of_several_snapshots_the_complete_one_is_named(parts, tmp_path):
    links, blobs = cache(parts, tmp_path / "models--u--m")
    for revision in ("0000", "ffff"):
        other = links[0].parent.with_name(revision)
        other.mkdir()
        (other / links[0].name).symlink_to(links[0].readlink())
    fail("inspect", blobs[0], naming=[f'"{links[0]}"'])


@pytest.mark.parametrize("below", ["", "Q4_K_M/"])
def test_a_snapshot_that_lacks_parts_is_completed_first(parts, tmp_path, below):
    links, blobs = cache(parts, tmp_path / "models--u--m-GGUF", below)
    links[1].unlink()
    command = f"hf download u/m-GGUF --include '{below}small-*-of-{len(parts):05}.gguf'"
    fail("inspect", blobs[0], naming=[command, f"only {len(parts) - 1}", f'"{links[0]}"'])
    fail("inspect", links[0], naming=["1 of 3 parts missing", links[1].name, f"fetch them with `{command}`"])


def test_a_store_of_another_kind_that_lacks_parts_names_no_command(parts, tmp_path):
    links, blobs = cache(parts, tmp_path / "store")
    links[2].unlink()
    hint = f'fetch the others, since there are only 2, and then give the link that leads to it: "{links[0]}"'
    fail("inspect", blobs[0], naming=[hint])


def test_a_link_whose_blob_is_gone_is_named_with_where_it_leads(parts, tmp_path):
    links, blobs = cache(parts, tmp_path / "models--u--m")
    blobs[1].unlink()
    fail("inspect", links[0], naming=[links[1].name, f'a link to "../../blobs/{blobs[1].name}", which is not there'])
    fail("inspect", links[1], naming=[links[1].name, "which is not there"])
    assert "snapshots" in fail("inspect", blobs[0])


def test_no_command_is_made_of_names_that_a_shell_would_take_apart(parts, tmp_path):
    links, _ = cache(parts, tmp_path / "models--u--m'; rm x; '")
    links[1].unlink()
    assert "hf download" not in fail("inspect", links[0], naming=["missing", "download the whole set into one folder"])


def test_blobs_of_ollama_have_no_link_so_links_must_be_made(parts, tmp_path):
    (tmp_path / "blobs").mkdir()
    for part in parts:
        part.rename(tmp_path / "blobs" / f"sha256-{name_of(part)}")
    blob = next((tmp_path / "blobs").iterdir())
    said = fail("inspect", blob, naming=[blob.name, "ln -s"])
    assert RENAME not in said


def test_a_blob_that_is_a_whole_model_is_shown(small, tmp_path):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs/sha256-00ff"
    shutil.copy(small[0], blob)
    assert tree(blob, tmp_path / "mnt") == tree(small[0], tmp_path / "mnt")


def test_an_object_of_git_annex_leads_to_its_link(parts, tmp_path):
    repository = tmp_path / "repository"
    links = []
    for n, part in enumerate(parts):
        key = f"SHA256E-s7--{n:064x}.gguf"
        place = repository / f".git/annex/objects/a{n}/b{n}" / key
        place.mkdir(parents=True)
        links.append(repository / "models" / part.name)
        links[-1].parent.mkdir(exist_ok=True)
        part.rename(place / key)
        links[-1].symlink_to(os.path.relpath(place / key, links[-1].parent))
    fail("inspect", links[2].resolve(), naming=[f'give the link that leads to it: "{links[2]}"'])


def test_nothing_else_in_a_store_is_opened_or_followed(parts, tmp_path):
    folder = tmp_path / "models--u--m"
    links, blobs = cache(parts, folder)
    snapshot, name = links[0].parent, links[0].name
    os.mkfifo(snapshot / "fifo")
    for n, target in enumerate(["fifo", "../..", "/dev/tty", "loop", f"/nowhere/{blobs[0].name}"]):
        other = snapshot.with_name(f"other-{n}")
        other.mkdir()
        os.mkfifo(other / "fifo")
        (other / "loop").symlink_to("loop")
        (other / name).symlink_to(target)
    (snapshot / "up").symlink_to("../..")
    # A FIFO under a part's name, and a link to it that has the blob's.
    os.mkfifo(folder / "snapshots" / blobs[0].name)
    (folder / "snapshots" / name).symlink_to(folder / "snapshots" / blobs[0].name)
    fail("inspect", blobs[0], naming=[f'"{links[0]}"'])


def test_a_store_with_very_many_files_is_looked_at_in_part(parts, tmp_path):
    links, blobs = cache(parts, tmp_path / "models--u--m")
    crowd = tmp_path / "models--u--m/snapshots/0000"
    crowd.mkdir()
    for n in range(12_000):
        (crowd / f"{n}").touch()
    said = fail("inspect", blobs[0], naming=["in a store that names files by their content"])
    assert str(links[0]) in said or "ln -s" in said
