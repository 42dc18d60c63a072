"""A model that was never written to its end is not called sound: holes are counted, and what downloads leave beside it is named."""

import json
import os
import shutil
import subprocess

import pytest

import models
from odmoe import (
    MIB,
    expert_gguf,
    fail,
    failing_disk,
    file_system,
    mount_at,
    mounted,
    needs_root,
    odmoe,
    promises,
    public_copy,
    run,
    sparse_gguf,
    succeed,
)
from reference import read_part

PAGE = 4096
INCOMPLETE = "the name of an incomplete download"


def verified(model, **options):
    """What `verify --json` says of a model; exit status and text must say the same."""
    done = odmoe("verify", model, "--json", **options)
    said = json.loads(done.stdout)
    assert done.returncode == (0 if said["sound"] else 3), done.stderr
    text = odmoe("verify", model, **options)
    assert text.returncode == done.returncode
    assert (" is sound: " in text.stdout) == said["sound"]
    assert (" may be incomplete" in text.stdout) == (not said["sound"])
    assert ("never written (holes" in text.stdout) == (said["unwritten_bytes"] > 0)
    assert all(f'"{name}" has {INCOMPLETE}' in text.stdout for name in said["download_files"])
    return said


def warned(*arguments, **options):
    """Whether a command that succeeds warns of a model that may be incomplete."""
    done = odmoe(*arguments, **options)
    assert done.returncode == 0, done.stderr
    assert "WARN" in done.stderr or "may be incomplete" not in done.stderr
    return "may be incomplete" in done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return expert_gguf(tmp_path_factory.mktemp("model"), experts=4)


@pytest.fixture(scope="module")
def tensors(model):
    """Name, first byte and end of each tensor, in the order of the file."""
    return [(t.name, t.offset, t.offset + t.nbytes) for t in read_part(model, 0).tensors]


def beyond(tensors, place):
    """What of tensors lies behind a place: bytes, tensors, the first name."""
    cut = [(name, end - max(start, place)) for name, start, end in tensors if end > place]
    return sum(size for _, size in cut), len(cut), cut[0][0] if cut else None


def unwritten(said):
    return said["unwritten_bytes"], said["unwritten_tensors"], said["first_unwritten_tensor"]


# --- holes ----------------------------------------------------------------------------------------------------------


@promises("`verify` calls no model sound if the file system shows that bytes of its tensors were never written.")
@pytest.mark.parametrize("pages", [1, 10, 1000, 2000, -1])
def test_a_download_that_was_cut_is_told_by_its_hole(model, tensors, tmp_path, pages):
    cut = tmp_path / "cut.gguf"
    whole = model.read_bytes()
    place = (pages if pages > 0 else len(whole) // PAGE + pages) * PAGE
    cut.write_bytes(whole[:place])
    os.truncate(cut, len(whole))
    said = verified(cut)
    assert unwritten(said) == beyond(tensors, place)
    assert said["tensor_bytes"] == beyond(tensors, 0)[0]
    text = odmoe("verify", cut).stdout
    assert said["first_unwritten_tensor"] in text and f" of {len(tensors)} tensors" in text
    # Its end is missing, however little that is.
    (tmp_path / "mnt").mkdir()
    try:
        assert warned("mount", cut, tmp_path / "mnt")
        assert mount_at(tmp_path / "mnt"), "it is usable all the same"
    finally:
        succeed("umount", tmp_path / "mnt")
    assert warned("materialize", cut, tmp_path / "out")
    assert json.loads(succeed("verify", cut, tmp_path / "out", "--json"))["identical"]


def test_pieces_that_are_missing_in_the_middle_are_counted(model, tensors, tmp_path):
    """As of a torrent."""
    torn = shutil.copy(model, tmp_path)
    holes = [(MIB, 2 * MIB), (3 * MIB, 3 * MIB + PAGE), (5 * MIB, 7 * MIB)]
    for start, end in holes:
        subprocess.run(["fallocate", "-p", "-o", str(start), "-l", str(end - start), torn], check=True)
    expected = sum(end - start for start, end in holes)
    said = verified(torn)
    assert said["unwritten_bytes"] == expected
    assert said["unwritten_tensors"] == sum(
        any(start < hole_end and hole < end for hole, hole_end in holes) for _, start, end in tensors
    )


@needs_root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_room_that_was_reserved_and_never_written_is_a_hole(model, tensors, tmp_path, kind):
    """As aria2 does with --file-allocation=falloc."""
    whole = model.read_bytes()
    with file_system(kind, tmp_path, 400 * MIB if kind in ("xfs", "btrfs") else 100 * MIB) as at:
        reserved = at / "reserved.gguf"
        subprocess.run(["fallocate", "-l", str(len(whole)), reserved], check=True)
        with reserved.open("r+b") as file:
            file.write(whole[:MIB])
        assert reserved.stat().st_blocks * 512 >= len(whole)
        for sync in (False, True):
            if sync:
                subprocess.run(["sync", "-f", at], check=True)
            assert unwritten(verified(reserved)) == beyond(tensors, MIB)
        (at / "mnt").mkdir()
        with mounted(reserved, at / "mnt"):
            pass
        assert warned("materialize", reserved, at / "out", "--dry-run")
        # Once the rest has come, nothing is left to say.
        reserved.write_bytes(whole)
        assert verified(reserved)["sound"]
        assert not warned("materialize", reserved, at / "out", "--dry-run")


def test_zeros_that_were_written_are_no_hole(model, tmp_path):
    zeros = tmp_path / "zeros.gguf"
    whole = model.read_bytes()
    zeros.write_bytes(whole[: MIB] + bytes(len(whole) - MIB))
    assert verified(zeros)["sound"] and not warned("materialize", zeros, tmp_path / "out")
    (tmp_path / "zeros.gguf.aria2").touch()  # --file-allocation=prealloc
    said = verified(zeros)
    assert not said["sound"] and said["unwritten_bytes"] == 0
    assert warned("materialize", zeros, tmp_path / "out")


def test_a_sparse_copy_of_zeros_that_belong_to_the_model_is_told_and_mounted_without_a_warning(model, tensors, tmp_path):
    """Nothing tells it from a piece that never came; the text says what holes are, and what to compare."""
    name, start, end = tensors[1]
    start, end = start + -start % PAGE, end - end % PAGE
    data = bytearray(model.read_bytes())
    data[start:end] = bytes(end - start)
    (tmp_path / "zeros.gguf").write_bytes(data)
    assert verified(tmp_path / "zeros.gguf")["sound"]
    sparse = tmp_path / "sparse.gguf"
    subprocess.run(["cp", "--sparse=always", tmp_path / "zeros.gguf", sparse], check=True)
    said = verified(sparse)
    assert said["unwritten_tensors"] == 1 and said["first_unwritten_tensor"] == name
    assert 0 < said["unwritten_bytes"] <= end - start
    text = odmoe("verify", sparse).stdout
    assert "which read as zeros" in text and "checksum" in text
    with mounted(sparse, tmp_path / "mnt") as root:
        assert json.loads(succeed("verify", sparse, root, "--json"))["identical"]


def test_padding_between_tensors_may_be_a_hole(tmp_path):
    kv = {"general.architecture": "moe", "moe.block_count": 1, "moe.expert_count": 2, "moe.expert_used_count": 1}
    stacks = [[f"blk.0.ffn_{name}_exps.weight", [64, 4, 2], "F32"] for name in ("gate", "up", "down")]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": stacks}))
    (model,) = sparse_gguf(table, tmp_path / "model.gguf", "--alignment", 65536, "--fill-words")
    before = model.stat().st_blocks
    ends = [t.offset + t.nbytes for t in read_part(model, 0).tensors]
    for end in ends[:-1]:
        first = end + -end % PAGE
        subprocess.run(["fallocate", "-p", "-o", str(first), "-l", str(65536 - PAGE), model], check=True)
    assert model.stat().st_blocks < before - 200
    assert verified(model)["sound"]


def test_a_full_size_model_of_holes_is_told_and_stays_usable(tmp_path):
    parts = sparse_gguf("kimi-k2.5-q4_k_m", tmp_path / "kimi.gguf", "--splits", 9)
    said = verified(parts[4])
    assert said["unwritten_bytes"] > 0.999 * said["tensor_bytes"] > 500 << 30
    assert said["unwritten_tensors"] == said["tensors"]
    (tmp_path / "mnt").mkdir()
    assert warned("mount", parts[0], tmp_path / "mnt")
    succeed("umount", tmp_path / "mnt")
    assert odmoe("-q", "mount", parts[0], tmp_path / "mnt").stderr == ""
    succeed("umount", tmp_path / "mnt")


# --- split sets -----------------------------------------------------------------------------------------------------


def test_of_a_split_set_every_part_is_looked_at(tmp_path):
    parts = models.write_small(tmp_path, rows=4000, split_max_tensors=3)
    assert verified(parts[0])["sound"]
    size = parts[2].stat().st_size
    os.truncate(parts[2], PAGE)
    os.truncate(parts[2], size)
    third = [(t.name, t.offset, t.offset + t.nbytes) for t in read_part(parts[2], 2).tensors]
    for given in parts:
        assert unwritten(verified(given)) == beyond(third, PAGE)
    (tmp_path / f"{parts[1].name}.aria2").touch()
    assert verified(parts[0])["download_files"] == [f"{parts[1]}.aria2"]
    assert warned("materialize", parts[0], tmp_path / "out", "--dry-run")


# --- file systems that cannot tell ----------------------------------------------------------------------------------


@needs_root
def test_where_holes_are_not_told_the_room_that_is_taken_speaks(model, tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(model, folder / "whole.gguf")
    size = model.stat().st_size
    for name, share in {"tenth.gguf": 10, "most.gguf": 1.5}.items():
        (folder / name).write_bytes(model.read_bytes()[: int(size / share)])
        os.truncate(folder / name, size)
    with failing_disk(folder, tmp_path) as disk:
        assert verified(disk.at / "whole.gguf")["sound"]
        said = verified(disk.at / "tenth.gguf")
        assert not said["sound"] and said["unwritten_bytes"] == 0
        assert said["stored_bytes"] == (folder / "tenth.gguf").stat().st_blocks * 512 and said["part_bytes"] == size
        assert "take room, and the file system does not show" in odmoe("verify", disk.at / "tenth.gguf").stdout
        # A compressed file takes less room, too.
        assert verified(disk.at / "most.gguf")["sound"]
    (folder / "whole.gguf.crdownload").touch()
    (tmp_path / "disk").rmdir()
    with failing_disk(folder, tmp_path) as disk:
        assert verified(disk.at / "whole.gguf")["download_files"] == [f"{disk.at}/whole.gguf.crdownload"]


@needs_root
@pytest.mark.parametrize("kind", ["exfat", "btrfs"])
def test_a_whole_model_is_sound_on_file_systems_without_holes_and_on_those_that_compress(tmp_path, kind):
    with file_system(kind, tmp_path, 400 * MIB) as at:
        if kind == "btrfs":
            subprocess.run(["mount", "-o", "remount,compress-force=zstd", at], check=True)
        model = at / "model.gguf"
        source = expert_gguf(tmp_path, experts=4)
        data = bytearray(source.read_bytes())
        data[2 * MIB : 8 * MIB] = b"compress me" * (6 * MIB // 11) + bytes(6 * MIB % 11)
        model.write_bytes(data)
        subprocess.run(["sync", "-f", at], check=True)
        assert verified(model)["sound"]


# --- what lies beside it --------------------------------------------------------------------------------------------

MARKS = [".aria2", ".part", ".partial", ".incomplete", ".crdownload", ".opdownload", ".download", ".downloading"]
MARKS += [".downloadInProgress", "-partial", ".!qB", ".!ut", ".!bt", ".!bc", ".bc!", ".az!", ".fdmdownload", ".filepart"]
MARKS += [".lftp-pget-status"]


@pytest.mark.parametrize("mark", MARKS)
def test_what_a_download_leaves_beside_a_model_is_named(small, tmp_path, mark):
    model = shutil.copy(small[0], tmp_path / "model.gguf")
    assert verified(model)["sound"]
    control = tmp_path / f"model.gguf{mark}"
    control.mkdir() if mark == ".download" else control.touch()
    assert verified(model)["download_files"] == [str(control)]
    (tmp_path / "mnt").mkdir()
    assert warned("mount", model, tmp_path / "mnt")
    succeed("umount", tmp_path / "mnt")
    # A model of such a name is itself one.
    named = shutil.copy(small[0], tmp_path / f"other.gguf{mark}")
    assert verified(named)["download_files"] == [str(named)]


@pytest.mark.parametrize("name", ["other.gguf.aria2", "model.gguf.sha256", "model.gguf.bak", "model.aria2", ".part", "model.gguf.part.txt"])
def test_other_files_beside_a_model_say_nothing(small, tmp_path, name):
    shutil.copy(small[0], tmp_path / "model.gguf")
    (tmp_path / name).touch()
    assert verified(tmp_path / "model.gguf")["sound"]
    assert not warned("materialize", tmp_path / "model.gguf", tmp_path / "out")


def test_a_link_into_a_download_cache_is_followed_to_what_lies_there(small, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shutil.copy(small[0], blobs / "0123abc")
    (snapshot / "model.gguf").symlink_to("../../blobs/0123abc")
    assert verified(snapshot / "model.gguf")["sound"]
    (blobs / "0123abc.incomplete").touch()
    assert verified(snapshot / "model.gguf")["download_files"] == [str(blobs / "0123abc.incomplete")]


def test_a_name_that_is_no_utf8_is_no_hindrance(small, tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    model = os.fsdecode(folder + b"/m\xfe.gguf")
    shutil.copy(small[0], model)
    assert verified(model)["sound"]
    open(os.fsencode(model) + b".aria2", "x").close()
    assert odmoe("verify", model).returncode == 3


@needs_root
def test_a_folder_that_cannot_be_listed_is_no_hindrance(small, public, nobody):
    folder = public / "closed"
    folder.mkdir()
    shutil.copy(small[0], folder / "model.gguf")
    (folder / "model.gguf").chmod(0o644)
    folder.chmod(0o711)
    assert run("ls", folder, user=nobody).returncode != 0
    assert verified(folder / "model.gguf", user=nobody)["sound"]
    assert public_copy(public).exists()


def test_a_model_that_is_not_well_formed_is_still_an_error(model, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-5000])
    (tmp_path / "cut.gguf.aria2").touch()
    fail("verify", cut, naming=[cut.name, "the file has only"])
