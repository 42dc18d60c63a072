"""`verify`: a tree that is the model's is told from every other, and each difference is named; section 2 of the contract."""

import json
import os
import resource
import shutil

import pytest
from safetensors.numpy import load_file, save_file

import models
from odmoe import expert_gguf, files_of, mounted, needs_root, odmoe, promises, sparse_gguf, succeed
from reference import read_header

EXPERT = "experts/layer_00_expert_001.safetensors"
EMBEDDINGS = "base_model/embeddings.safetensors"
REGISTRY = "experts/registry.json"
METADATA = "base_model/metadata.json"


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    succeed("materialize", small[0], out)
    return out


@pytest.fixture
def tree(whole, tmp_path):
    """A copy of a materialized tree that a test may damage."""
    return shutil.copytree(whole, tmp_path / "tree")


def report(model, tree, *flags, **options):
    """What `verify --json` says; its exit status must say the same, and so must the text for people."""
    done = odmoe("verify", model, tree, "--json", *flags, **options)
    said = json.loads(done.stdout)
    assert done.returncode == (0 if said["identical"] else 3), done.stderr
    assert said["identical"] == (said["differences"] == [])
    text = odmoe("verify", model, tree, *flags, **options)
    assert text.returncode == done.returncode
    *lines, summary = text.stdout.splitlines()
    assert lines == [f"{d['path']} {d['message']}" for d in said["differences"]]
    assert (" is identical to the model" in summary) == said["identical"]
    return said


def differences(model, tree, *flags, **options):
    return [(d["path"], d["kind"]) for d in report(model, tree, *flags, **options)["differences"]]


def change(path, offset):
    """Makes one byte of a file another one, at a place that may be counted from its end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    return offset % len(data)


# --- nothing is different -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 8])
def test_a_materialized_tree_is_identical(small, whole, jobs):
    said = report(small[0], whole, "--jobs", jobs)
    assert said["whole"] and not said["quick"]
    sizes = [path.stat().st_size for path in files_of(whole).values()]
    assert (said["files"], said["bytes"]) == (len(sizes), sum(sizes))


def test_a_mounted_tree_is_identical(shown):
    said = report(shown.paths[0], shown.root)
    assert said["identical"] and said["whole"]
    assert said["bytes"] == sum(path.stat().st_size for path in files_of(shown.root).values())


@pytest.mark.parametrize(
    "chosen",
    [["--base-only"], ["--experts-only"], ["--layers", "0"], ["--experts", "1,2"], ["--experts-only", "--experts", "0"]],
    ids=" ".join,
)
def test_of_a_part_that_was_materialized_what_it_lists_is_compared(small, tmp_path, chosen):
    succeed("materialize", small[0], tmp_path / "out", *chosen)
    said = report(small[0], tmp_path / "out")
    assert said["identical"] and not said["whole"]
    assert said["files"] == len(files_of(tmp_path / "out"))
    assert "; it lists " in succeed("verify", small[0], tmp_path / "out")
    # And what it lists must be there.
    path = next(path for name, path in files_of(tmp_path / "out").items() if name.endswith(".safetensors"))
    path.unlink()
    assert [kind for _, kind in differences(small[0], tmp_path / "out")] == ["missing"]


def test_a_model_beside_its_tree_is_not_extra(tmp_path):
    parts = models.write_small(tmp_path, split_max_tensors=3)
    succeed("materialize", parts[0], tmp_path)
    assert report(parts[0], tmp_path)["identical"]


def test_a_sparse_model_of_full_size_is_compared_quickly_by_its_headers(tmp_path):
    (model,) = sparse_gguf("qwen3-30b-a3b-q4_k_m", tmp_path / "model.gguf")
    with mounted(model, tmp_path / "mnt") as root:
        said = report(model, root, "--quick")
    assert said["identical"] and said["quick"] and said["files"] > 6000


# --- something is different -----------------------------------------------------------------------------------------


@promises("`verify` names each difference by file, tensor and offset, and ends with status 3.")
def test_a_byte_of_each_tensor_is_named_by_file_tensor_and_offset(small, tree):
    header = read_header(tree / EXPERT)
    expected = []
    for name, info in header.tensors.items():
        begin, end = (header.start + at for at in info["data_offsets"])
        # Only the first of several in one tensor is named.
        change(tree / EXPERT, end - 1)
        if len(expected) % 2:
            change(tree / EXPERT, begin)
        expected.append((EXPERT, "payload", name, begin if len(expected) % 2 else end - 1))
    assert len(expected) == 3
    said = report(small[0], tree)["differences"]
    assert [(d["path"], d["kind"], d["tensor"], d["offset"]) for d in said] == expected
    assert {d["gguf_name"] for d in said} == {f"blk.0.ffn_{m}_exps.weight" for m in ("gate", "down", "up")}
    assert differences(small[0], tree, "--quick") == []


@pytest.mark.parametrize("offset", [0, 8, 300, "last"])
def test_a_byte_of_a_header_is_named(small, tree, offset):
    at = change(tree / EXPERT, read_header(tree / EXPERT).start - 1 if offset == "last" else offset)
    for flags in [], ["--quick"]:
        (only,) = report(small[0], tree, *flags)["differences"]
        assert (only["path"], only["kind"], only["offset"], only["tensor"]) == (EXPERT, "header", at, None)


@pytest.mark.parametrize("name", [REGISTRY, METADATA, "base_model/metadata.gguf"])
@pytest.mark.parametrize("offset", [5, -3])
def test_a_byte_of_a_document_is_named(small, tree, name, offset):
    at = change(tree / name, offset)
    for flags in [], ["--quick"]:
        said = report(small[0], tree, *flags)["differences"]
        assert (name, "document", at) in [(d["path"], d["kind"], d["offset"]) for d in said]


@pytest.mark.parametrize("bytes_more", [-1, -100, 1, 4096])
def test_a_file_of_another_size_is_named(small, tree, bytes_more):
    size = (tree / EXPERT).stat().st_size
    os.truncate(tree / EXPERT, size + bytes_more)
    (only,) = report(small[0], tree)["differences"]
    assert (only["path"], only["kind"], only["offset"]) == (EXPERT, "size", min(size, size + bytes_more))
    assert (only["tensor"] is None) == (bytes_more > 0)
    assert f"has {size + bytes_more} bytes instead of {size}" in only["message"]


@pytest.mark.parametrize("name", [EXPERT, EMBEDDINGS, REGISTRY, METADATA, "base_model/metadata.gguf"])
def test_a_missing_file_is_named(small, tree, name):
    (tree / name).unlink()
    assert differences(small[0], tree) == [(name, "missing")]


EXTRA = ["note.txt", "experts/layer_99_expert_000.safetensors", "base_model/.odmoe-abc.tmp", "base_model/a\x1b[2J\n"]


@pytest.mark.parametrize("name", EXTRA)
def test_an_extra_file_is_named(small, tree, name):
    (tree / name).write_bytes(b"")
    done = odmoe("verify", small[0], tree)
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 2 and "\x1b" not in done.stdout
    (only,) = json.loads(odmoe("verify", small[0], tree, "--json").stdout)["differences"]
    assert (only["path"], only["kind"]) == (name, "extra")


def test_a_file_that_the_registry_does_not_list_is_extra(small, tree, tmp_path):
    succeed("materialize", small[0], tmp_path / "part", "--layers", "0")
    moved = next(path for name, path in files_of(tree).items() if "layer_01" in name)
    shutil.copy2(moved, tmp_path / "part/experts")
    assert differences(small[0], tmp_path / "part") == [(f"experts/{moved.name}", "extra")]


def as_link(path):
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")
    return [("elsewhere", "extra")]


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)
    return []


def as_folder(path):
    path.unlink()
    path.mkdir()
    return []


@pytest.mark.parametrize("name", [EXPERT, REGISTRY])
@pytest.mark.parametrize("make", [as_link, as_pipe, as_folder])
def test_what_is_no_regular_file_is_named_and_never_waited_for(small, tree, name, make):
    also = make(tree / name)
    assert differences(small[0], tree) == sorted([*also, (name, "kind")])


def test_a_folder_that_is_a_link_is_named(small, tree):
    os.rename(tree / "experts", tree.parent / "elsewhere")
    (tree / "experts").symlink_to("../elsewhere")
    assert differences(small[0], tree) == [(METADATA, "document"), ("experts", "kind"), (REGISTRY, "missing")]


def test_what_is_there_is_compared_when_the_documents_are_not(small, tree):
    """As after a run of `materialize` that was killed: the documents are written last."""
    (tree / REGISTRY).unlink()
    (tree / METADATA).write_text("no JSON")
    change(tree / EXPERT, -1)
    change(tree / EMBEDDINGS, -1)
    assert differences(small[0], tree) == [
        (EMBEDDINGS, "payload"),
        (METADATA, "document"),
        (EXPERT, "payload"),
        (REGISTRY, "missing"),
    ]


# --- another header -------------------------------------------------------------------------------------------------


def parts_of(path):
    """The tensors of a safetensors file: name, entry of the header, bytes."""
    header = read_header(path)
    data = path.read_bytes()
    cut = lambda info: data[header.start + info["data_offsets"][0] : header.start + info["data_offsets"][1]]  # noqa: E731
    return [(name, info, cut(info)) for name, info in header.tensors.items()]


def write_tensors(path, tensors, metadata=None, padding=0, gap=0):
    """A safetensors file as another program may write it; returns where each tensor begins."""
    entries, payload = {"__metadata__": metadata} if metadata else {}, b""
    starts = {}
    for name, info, data in tensors:
        payload += bytes(gap)
        starts[name] = len(payload)
        entries[name] = info | {"data_offsets": [len(payload), len(payload) + len(data)]}
        payload += data
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8 + padding)
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return {name: 8 + len(text) + start for name, start in starts.items()}


REWRITTEN = {
    "without metadata": {},
    "with other metadata": {"metadata": {"format": "np", "by": "another program"}},
    "with more padding": {"padding": 4096},
    "with gaps": {"gap": 64},
    "all of it": {"metadata": {"x": "y" * 5000}, "padding": 64, "gap": 8},
}


@pytest.mark.parametrize("order", ["the same order", "reversed"])
@pytest.mark.parametrize("how", REWRITTEN)
@pytest.mark.parametrize("name", [EXPERT, EMBEDDINGS, "base_model/norms.safetensors"])
def test_a_file_that_another_program_has_written_anew_only_has_another_header(small, tree, name, how, order):
    tensors = parts_of(tree / name)
    starts = write_tensors(tree / name, tensors if order != "reversed" else tensors[::-1], **REWRITTEN[how])
    for flags in [], ["--quick"]:
        (only,) = report(small[0], tree, *flags)["differences"]
        assert (only["path"], only["kind"], only["tensor"]) == (name, "header", None)
        assert only["message"].startswith("has another header, from byte ")
    # And a byte of it that is wrong, too, is found where it is now.
    victim, _, data = tensors[-1]
    at = change(tree / name, starts[victim] + len(data) - 1)
    said = report(small[0], tree)["differences"]
    assert [(d["kind"], d["tensor"], d["offset"]) for d in said] == [("header", None, 0), ("payload", victim, at)]


def test_a_file_that_the_reference_writes_anew_only_has_another_header(small, tree):
    save_file(load_file(tree / EXPERT), tree / EXPERT)
    assert [kind for _, kind in differences(small[0], tree)] == ["header"]


def test_tensors_that_another_header_lacks_adds_or_cuts_are_named(small, tree):
    tensors = parts_of(tree / EXPERT)
    (first, info, data), second, third = tensors
    write_tensors(tree / EXPERT, [("new", info, data), (second[0], second[1], second[2][:-4]), third])
    for flags in [], ["--quick"]:
        said = report(small[0], tree, *flags)["differences"]
        found = {(d["kind"], d["tensor"], d["gguf_name"] is None) for d in said}
        assert found == {
            ("header", None, True),
            ("tensor_missing", first, False),
            ("tensor_extra", "new", True),
            ("tensor_size", second[0], False),
        }
        texts = "\n".join(d["message"] for d in said)
        assert f'lacks tensor "{first}" ("blk.0.' in texts and 'holds tensor "new", which does not belong there' in texts
        assert f'holds {len(second[2]) - 4} bytes instead of {len(second[2])} of tensor "{second[0]}"' in texts


def test_a_file_that_was_written_anew_and_cut_is_too_short_and_no_more(small, tree):
    write_tensors(tree / EXPERT, parts_of(tree / EXPERT), {"a": "b"})
    size = (tree / EXPERT).stat().st_size
    os.truncate(tree / EXPERT, size - 10)
    said = report(small[0], tree)["differences"]
    assert sorted((d["kind"], d["offset"]) for d in said) == [("header", 0), ("size", size - 10)]
    assert any(f"has {size - 10} bytes instead of {size}" in d["message"] for d in said)


WORDS = {
    "longer than the file": lambda length, size: size,
    "of all ones": lambda length, size: (1 << 64) - 1,
    "a byte longer": lambda length, size: length + 1,
    "a byte shorter": lambda length, size: length - 1,
    "shorter": lambda length, size: length - 8,
    "nothing": lambda length, size: 0,
}


@pytest.mark.parametrize("word", WORDS)
def test_a_wrong_length_of_the_header_is_no_difference_of_the_tensors(small, tree, word):
    data = bytearray((tree / EXPERT).read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[:8] = WORDS[word](length, len(data)).to_bytes(8, "little")
    (tree / EXPERT).write_bytes(data)
    assert [kind for _, kind in differences(small[0], tree)] == ["header"]
    change(tree / EXPERT, -1)
    assert [kind for _, kind in differences(small[0], tree)] == ["header", "payload"]


NONSENSE = {
    "no JSON": b"{" * 50,
    "deep": b"[" * 100_000,
    "of another kind": b"[1, 2]",
    "offsets beyond all": b'{"w1.weight":{"data_offsets":[18446744073709551615,18446744073709551615]}}',
    "offsets that turn": b'{"w1.weight":{"data_offsets":[9,3]}}',
    "offsets that are no numbers": b'{"w1.weight":{"data_offsets":["a",-1]}}',
    "twice the same": b'{"w1.weight":{"data_offsets":[0,1]},"w1.weight":{"data_offsets":[0,2]}}',
    "huge": b" " * 70_000_000 + b"{}",
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_in_the_place_of_a_header_does_no_harm(small, tree, what):
    text = NONSENSE[what]
    data = (tree / EXPERT).read_bytes()
    (tree / EXPERT).write_bytes(len(text).to_bytes(8, "little") + text + data[read_header(tree / EXPERT).start :])
    limit = 400 << 20
    held = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))}
    said = report(small[0], tree, **held)["differences"]
    assert "header" in {d["kind"] for d in said} and {d["path"] for d in said} == {EXPERT}


def test_a_document_that_is_too_long_is_not_read(small, tree):
    os.truncate(tree / REGISTRY, 1 << 40)
    assert differences(small[0], tree) == [(REGISTRY, "size")]


def test_another_model_of_the_same_shape_is_told_though_it_looks_finished(tmp_path):
    """`materialize` goes by size, time and header, which such a model shares; `verify` reads the bytes."""
    ours = expert_gguf(tmp_path, experts=2)
    other = shutil.copy2(ours, tmp_path / "other.gguf")
    change(other, -1)
    shutil.copystat(ours, other)
    succeed("materialize", other, tmp_path / "out")
    assert "nothing to write" in succeed("materialize", ours, tmp_path / "out")
    assert [kind for _, kind in differences(ours, tmp_path / "out")] == ["payload"]


@needs_root
def test_a_file_that_cannot_be_read_is_named(small, tree, nobody, tmp_path):
    tmp_path.chmod(0o755)
    (tree / EXPERT).chmod(0)
    public = tree.parent
    while public != public.parent:
        public.chmod(public.stat().st_mode | 0o111)
        public = public.parent
    model = shutil.copy(small[0], tmp_path / small[0].name)
    assert differences(model, tree, user=nobody) == [(EXPERT, "unreadable")]
