"""Split sets: any part stands for all, and a set that does not belong together is refused."""

import os
import resource
import shutil

import pytest

import models
from odmoe import contents, fail, mounted, promises, sparse_gguf, succeed


@pytest.fixture
def parts(tmp_path):
    return models.write_small(tmp_path, split_max_tensors=2)


def tree(model, folder):
    with mounted(model, folder) as root:
        return contents(root)


def refused(model, folder, *naming):
    """Both commands refuse it with the same words."""
    folder.mkdir(exist_ok=True)
    assert fail("inspect", model, naming=naming) == fail("mount", model, folder, naming=naming)


def test_any_part_stands_for_the_whole_set(parts, tmp_path):
    trees = [tree(part, tmp_path / "mnt") for part in parts]
    assert len(trees) > 3 and all(t == trees[0] for t in trees)


@promises(
    "The same model gives the same names, inode numbers, sizes and bytes, whatever its parts are called and wherever they lie.",
)
def test_a_renamed_set_gives_the_same_tree(parts, tmp_path):
    before = tree(parts[0], tmp_path / "mnt")
    renamed = [path.rename(path.with_name(path.name.replace("small", "an odd-00001-of-00009 name"))) for path in parts]
    assert tree(renamed[1], tmp_path / "mnt") == before


# Prefixes of names as old archives and network shares leave them, and as nobody should name files.
PREFIXES = {
    "latin-1": b"mod\xe8le",
    "shift-jis": "模型".encode("shift-jis"),
    "no character at all": b"\xff\xfe\x80",
    "cut in the middle of a character": "modèle".encode()[:4],
    "nothing": b"",
    "terminal escapes": b"a\x1b[2J\nb; c",
    "like another part": b"m-00002-of-00003.gguf",
}


def renamed(parts, prefix):
    """The parts under another prefix, which need not be text."""
    folder = os.fsencode(parts[0].parent)
    paths = [os.path.join(folder, prefix + b"-%05d-of-%05d.gguf" % (n, len(parts))) for n in range(1, len(parts) + 1)]
    for old, new in zip(parts, paths, strict=True):
        os.rename(old, new)
    return [os.fsdecode(path) for path in paths]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_parts_need_not_be_text(parts, tmp_path, prefix):
    before = tree(parts[0], tmp_path / "mnt")
    paths = renamed(parts, PREFIXES[prefix])
    for path in (paths[0], paths[1], paths[-1]):
        assert tree(path, tmp_path / "mnt") == before
    assert "sound" in succeed("verify", paths[1])


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_missing_part_is_named_whatever_its_name_is(parts, tmp_path, prefix):
    paths = renamed(parts, PREFIXES[prefix])
    os.unlink(paths[1])
    said = fail("inspect", paths[0], naming=[f"1 of {len(paths)} parts", f"-00002-of-{len(paths):05}.gguf"])
    assert said.count("\n") == 1 and said.strip().isprintable()


def test_a_raw_cut_is_recognised_whatever_its_name_is(small, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"mod\xe8le.gguf.part1of2")
    with open(path, "wb") as file:
        file.write(small[0].read_bytes()[:1000])
    refused(os.fsdecode(path), tmp_path / "mnt", r"mod\xe8le.gguf.part1of2", "join all pieces")


def test_parts_that_are_links_into_a_cache_are_found_beside_the_link(parts, tmp_path):
    """As a download cache keeps them: the names are links, the files are called by their hash."""
    before = tree(parts[0], tmp_path / "mnt")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    links = []
    for n, path in enumerate(parts):
        path.rename(tmp_path / "blobs" / f"{n:064x}")
        links.append(tmp_path / "snapshot" / path.name)
        links[-1].symlink_to(f"../blobs/{n:064x}")
    assert tree(links[2], tmp_path / "mnt") == before


def test_a_missing_part_is_named(parts, tmp_path):
    parts[2].unlink()
    refused(parts[0], tmp_path / "mnt", parts[2].name)
    refused(parts[-1], tmp_path / "mnt", parts[2].name)


def test_a_part_that_is_not_a_regular_file_is_refused_at_once(parts, tmp_path):
    parts[2].unlink()
    os.mkfifo(parts[2])
    refused(parts[0], tmp_path / "mnt", parts[2].name)


def test_swapped_parts_are_refused(parts, tmp_path):
    between = tmp_path / "between"
    parts[1].rename(between)
    parts[2].rename(parts[1])
    between.rename(parts[2])
    refused(parts[0], tmp_path / "mnt", "split.no", parts[1].name)


def test_a_part_of_another_count_is_refused(parts, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(models.write_small(folder, layers=3, split_max_tensors=2)[1], parts[1])
    refused(parts[0], tmp_path / "mnt", "split.count", parts[1].name)


def test_a_part_that_holds_other_tensors_is_refused(parts, tmp_path):
    """Same number of parts and tensors, so that only the names can tell: one is there twice, another is missing."""
    folder = tmp_path / "other"
    folder.mkdir()
    other = models.write(
        folder / "small.gguf", reversed(list(tensors_of_small())), models.counts(2), split_max_tensors=2
    )
    assert len(other) == len(parts)
    shutil.copy(other[-1], parts[-1])
    refused(parts[0], tmp_path / "mnt", "token_embd.weight")


def tensors_of_small():
    yield from models.globals_()
    for layer in range(2):
        yield from models.expert_tensors("stacked", layer, models.Type.Q4_0)


def test_a_split_part_under_another_name_is_refused(parts, tmp_path):
    lone = parts[1].rename(tmp_path / "lone.gguf")
    refused(lone, tmp_path / "mnt", "lone.gguf", "-00002-of-")


def test_a_whole_model_may_have_the_name_of_a_part(small, tmp_path):
    model = tmp_path / "model-00002-of-00005.gguf"
    shutil.copy(small[0], model)
    assert tree(model, tmp_path / "mnt") == tree(small[0], tmp_path / "mnt")


@pytest.mark.parametrize(
    "names", [("m.gguf.part1of2", "m.gguf.part2of2"), ("m.gguf-split-a", "m.gguf-split-b")], ids=" ".join
)
def test_raw_cuts_of_a_file_must_be_joined_first(small, tmp_path, names):
    data = small[0].read_bytes()
    half = len(data) // 2
    for name, piece in zip(names, (data[:half], data[half:]), strict=True):
        (tmp_path / name).write_bytes(piece)
        refused(tmp_path / name, tmp_path / "mnt", name, "join")


def test_a_thousand_parts_fit_under_a_low_descriptor_limit(tmp_path):
    paths = sparse_gguf("kimi-k2.5-q2_k.real", tmp_path / "k.gguf", "--one-per-part")
    assert len(paths) == 1097

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    with mounted(paths[500], tmp_path / "mnt", preexec_fn=limit) as root:
        names = os.listdir(root / "experts")
        assert len(names) == 23_041
        for layer in range(1, 61):  # every part of the experts is read, three per layer
            path = root / f"experts/layer_{layer:02}_expert_383.safetensors"
            fd = os.open(path, os.O_RDONLY)
            size = os.fstat(fd).st_size
            for offset in range(size - 14_450_688, size, 4_000_000):
                assert os.pread(fd, 100, offset) == bytes(100)
            os.close(fd)
        for name in ("attention_layers", "norms"):  # and those of the base
            with open(root / f"base_model/{name}.safetensors", "rb") as file:
                assert len(file.read(1 << 20)) == 1 << 20
