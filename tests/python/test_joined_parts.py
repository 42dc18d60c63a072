"""Parts of a split set in one file, one behind the other, as `cat` leaves them."""

import struct

import pytest

import models
from odmoe import contents, fail, mounted, odmoe

MERGE = "mount the parts as they were published, or join them with `llama-gguf-split --merge FIRST_PART MODEL.gguf`"


@pytest.fixture(params=[{}, {"small_first_shard": True}], ids=["plain", "empty first"])
def parts(request, tmp_path):
    """Three parts, or four of which the first holds no tensor."""
    return models.write_small(tmp_path, split_max_tensors=3, **request.param)


def join(parts, path):
    data = [part.read_bytes() for part in parts]
    for part in parts:
        part.unlink()
    path.write_bytes(b"".join(data))
    return len(data[0])


def refused(path, tmp_path, *words):
    (tmp_path / "mnt").mkdir()
    said = fail("inspect", path, naming=[path.name, "one behind the other", MERGE, *words])
    assert fail("mount", path, tmp_path / "mnt") == said
    assert fail("verify", path) == said
    assert "published with" not in said and "missing" not in said


def test_all_parts_in_their_order(parts, tmp_path):
    count, path = len(parts), tmp_path / "model.gguf"
    at = join(parts, path)
    refused(path, tmp_path, f"holds {count} of the {count} parts", f": part 2 begins at byte {at}")


def test_parts_in_another_order(parts, tmp_path):
    path = tmp_path / "model.gguf"
    at = join([parts[1], parts[0], *parts[2:]], path)
    refused(path, tmp_path, "in the order 2, 1", f"part 1 begins at byte {at}")


def test_some_of_the_parts(parts, tmp_path):
    path = tmp_path / "model.gguf"
    join(parts[:2], path)
    refused(path, tmp_path, f"holds 2 of the {len(parts)} parts")


@pytest.mark.parametrize("number", [1, 2])
def test_under_the_name_of_a_part(parts, tmp_path, number):
    count = len(parts)
    path = tmp_path / f"joined-{number:05}-of-{count:05}.gguf"
    join(parts, path)
    refused(path, tmp_path, f"holds {count} of the {count} parts")


def test_in_the_place_of_the_second_part(parts, tmp_path):
    """The set is complete by its names, but the second file begins with another part."""
    data = b"".join(part.read_bytes() for part in parts)
    parts[1].write_bytes(data)
    said = fail("inspect", parts[0], naming=[parts[1].name, "one behind the other", MERGE])
    assert "split.no" not in said


def test_behind_a_part_where_the_numbers_of_tensors_disagree(parts, tmp_path):
    """Two files that say to be a set with all tensors, of which the second has the others behind its own."""
    data = [part.read_bytes() for part in parts]
    key, value = b"split.count" + struct.pack("<I", 2), struct.pack("<H", len(parts))
    for n in (0, 1):
        assert data[n].count(key + value) == 1
        data[n] = data[n].replace(key + value, key + struct.pack("<H", 2))
    pair = [tmp_path / f"pair-0000{n}-of-00002.gguf" for n in (1, 2)]
    for path, content in zip(pair, (data[0], b"".join(data[1:])), strict=True):
        path.write_bytes(content)
    said = fail("inspect", pair[0], naming=[pair[1].name, "goes on with another GGUF", "keep each GGUF in a file of its own"])
    assert "tensors.count" not in said


def test_a_set_whose_first_file_holds_all_parts_is_shown_with_a_warning(parts, tmp_path):
    with mounted(parts[0], tmp_path / "mnt") as root:
        before = contents(root)
    parts[0].write_bytes(b"".join(part.read_bytes() for part in parts))
    done = odmoe("inspect", parts[0])
    assert done.returncode == 0 and "one behind the other" in done.stderr and "is shown" in done.stderr
    with mounted(parts[-1], tmp_path / "mnt") as root:
        after = contents(root)
    tensors = [name for name in before if name.endswith(".safetensors")]
    assert {name: after[name] for name in tensors} == {name: before[name] for name in tensors}


def test_a_whole_model_before_another_is_shown_with_a_warning(small, tmp_path):
    data = small[0].read_bytes()
    path = tmp_path / "two.gguf"
    path.write_bytes(data + data)
    done = odmoe("inspect", path)
    assert done.returncode == 0
    assert f"goes on with another GGUF at byte {len(data)}; only what its first header describes is shown" in done.stderr


@pytest.mark.parametrize("rest", [b"GGUF", b"GGUF\x03\0\0\0", bytes(100_000), b"GGUX" * 100], ids=["magic", "beginning", "zeros", "words"])
def test_other_bytes_behind_the_tensors_are_nothing_to_warn_of(small, tmp_path, rest):
    path = tmp_path / "model.gguf"
    path.write_bytes(small[0].read_bytes() + rest)
    done = odmoe("inspect", path)
    assert (done.returncode, done.stderr) == (0, "")
