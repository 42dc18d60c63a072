"""Models that are not there yet, or not there: downloads that have not finished, directories, links that lead nowhere."""

import os
import resource
import signal
import socket

import pytest

import models
from odmoe import User, failing_disk, fail, needs_root, odmoe, public_copy

UNWRITTEN = "nothing was ever written there: wait for the download or copy of the file to end, or start it again"
CUT = ["the file has only 10000 bytes", "%)"]


@pytest.fixture
def whole(small):
    return small[0].read_bytes()


def refused(path, tmp_path, *words):
    (tmp_path / "mnt").mkdir(exist_ok=True)
    said = fail("inspect", path, naming=words)
    assert fail("mount", path, tmp_path / "mnt") == said
    assert "checksum" not in said
    return said


# --- downloads --------------------------------------------------------------------------------------------------------


def test_a_truncated_file_says_how_much_of_it_is_there(whole, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:10_000])
    refused(path, tmp_path, *CUT, f"({10_000 * 100 // len(whole)} %)", "the file is not complete")


ENDINGS = [".part", ".incomplete", ".crdownload", ".tmp", "-partial", ".downloadInProgress", ".aria2__temp", ".!qB"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_name_that_a_download_has_until_it_ends_is_recognised(whole, tmp_path, ending):
    path = tmp_path / f"model.gguf{ending}"
    path.write_bytes(whole[:10_000])
    refused(path, tmp_path, *CUT, f'"{path.name}" is what programs call a download that has not finished')


@pytest.mark.parametrize("ending", [".aria2", ".part", ".crdownload", ".downloadInProgress"])
def test_a_file_that_a_download_lays_beside_is_recognised(whole, tmp_path, ending):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:10_000])
    (tmp_path / f"model.gguf{ending}").write_bytes(b"")
    refused(path, tmp_path, *CUT, f'"model.gguf{ending}" beside it shows')


def test_the_empty_file_that_a_browser_keeps_for_its_download(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    (tmp_path / "model.gguf.part").write_bytes(b"GGUF")
    refused(path, tmp_path, "an empty file", '"model.gguf.part" beside it shows')


@pytest.mark.parametrize("written", [0, 2], ids=["nothing", "the end only"])
def test_room_that_was_reserved_and_not_written(whole, tmp_path, written):
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(-written, os.SEEK_END)
        file.write(b"x" * written)
    refused(path, tmp_path, "begins with 65536 zeros", UNWRITTEN)


def test_a_header_that_is_written_in_part(whole, tmp_path):
    """A hole behind the first blocks of the header, as where pieces of a download come in any order."""
    model = models.write(tmp_path / "long.gguf", models.globals_(), [*models.counts(1), ("x", "y" * 50_000, models.GGUFValueType.STRING), *long_keys()])[0]
    data = model.read_bytes()
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(data[:131_072])
        file.truncate(len(data))
    refused(path, tmp_path, f"is empty; {UNWRITTEN}")


def long_keys():
    return [(f"key.{n}", n, models.GGUFValueType.UINT32) for n in range(20_000)]


@pytest.mark.parametrize("name", ["model.gguf", "model.gguf.crdownload"])
def test_a_download_that_is_as_long_as_its_file_is_shown_with_a_warning(whole, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(whole)
    if name == "model.gguf":
        (tmp_path / "model.gguf.aria2").write_bytes(b"")
    done = odmoe("materialize", "--dry-run", path, tmp_path / "out")
    assert done.returncode == 0 and f'"{path}" may be incomplete, since ' in done.stderr
    assert odmoe("-q", "materialize", "--dry-run", path, tmp_path / "out").stderr == ""


def test_a_missing_part_whose_download_goes_on_is_named(tmp_path):
    parts = models.write_small(tmp_path, split_max_tensors=3)
    parts[1].rename(f"{parts[1]}.part")
    refused(parts[0], tmp_path, "1 of 3 parts missing", f'"{parts[1].name}.part" has not finished')


def test_a_part_of_a_set_that_is_cut_off_is_named(tmp_path):
    parts = models.write_small(tmp_path, split_max_tensors=3)
    size = parts[2].stat().st_size
    os.truncate(parts[2], size - 1000)
    refused(parts[0], tmp_path, parts[2].name, f"the file has only {size - 1000} bytes")


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_directory_leads_to_the_models_in_it(small, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    refused(folder, tmp_path, "is a directory; give a GGUF file")
    (folder / "readme.md").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub/one.gguf").write_bytes(b"")
    refused(folder, tmp_path, 'is a directory; give the model in it: "sub/one.gguf"')
    for name in ("b.gguf", "a.GGUF", "c-00001-of-00002.gguf", "c-00002-of-00002.gguf", "d-00002-of-00002.gguf"):
        (folder / name).write_bytes(b"")
    said = refused(folder, tmp_path, 'give one of the models in it: "a.GGUF", "b.gguf", "c-00001-of-00002.gguf" and 2 more')
    assert "c-00002" not in said


def test_a_directory_in_the_place_of_a_part_is_named(tmp_path):
    parts = models.write_small(tmp_path, split_max_tensors=3)
    parts[1].unlink()
    parts[1].mkdir()
    refused(parts[0], tmp_path, f'"{parts[1]}" is a directory')


def test_a_directory_with_another_format_leads_to_the_converter(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    refused(
        folder,
        tmp_path,
            f'"{folder}" is a directory; '
            "what is in it is a model in safetensors: convert that to GGUF with llama.cpp's convert_hf_to_gguf.py",
    )


def test_nothing_in_a_directory_is_waited_for(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    os.mkfifo(folder / "a.gguf")
    (folder / "loop").symlink_to(".")
    (folder / "b.gguf").symlink_to("a.gguf")
    said = refused(folder, tmp_path, '"b.gguf"')
    assert '"a.gguf"' not in said


def test_a_mount_in_a_directory_is_not_asked(small, tmp_path):
    """Whatever lies below it may never answer."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "a.gguf").touch()
    with failing_disk(small[0].parent, folder) as disk:
        os.kill(disk.pid, signal.SIGSTOP)
        try:
            fail("inspect", folder, naming=['give the model in it: "a.gguf"'])
        finally:
            os.kill(disk.pid, signal.SIGCONT)


def test_names_in_a_directory_cannot_move_the_cursor(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "a\x1b[2J\nb; c.gguf").touch()
    os.close(os.open(os.path.join(os.fsencode(folder), b"\xff\xfe.gguf"), os.O_CREAT | os.O_WRONLY))
    said = refused(folder, tmp_path, r'"a\u{1b}[2J\nb; c.gguf"', r'"\xFF\xFE.gguf"')
    assert said.strip().isprintable() and said.count("\n") == 1


def test_a_path_that_leads_nowhere(small, tmp_path):
    refused(tmp_path / "none.gguf", tmp_path, "No such file", "check the path")
    (tmp_path / "there.gguf").write_bytes(b"")
    refused(tmp_path / "there", tmp_path, "No such file", f'"{tmp_path}/there.gguf" is there')
    (tmp_path / "link.gguf").symlink_to("gone/x.gguf")
    refused(tmp_path / "link.gguf", tmp_path, 'it is a link to "gone/x.gguf", which is not there')
    refused(tmp_path / "there.gguf/x.gguf", tmp_path, "check the path: it leads through something that is not a directory")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    hint = "a model is read in many places, so save it as a file first"
    for path in (tmp_path / "fifo", "/dev/null"):
        refused(path, tmp_path, "not a regular file", hint)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        refused(tmp_path / "socket", tmp_path, hint)


@needs_root
def test_a_file_that_may_not_be_read(public):
    somebody = User(65534, 65534, public_copy(public))
    (public / "closed").mkdir(mode=0o700)
    (public / "closed/model.gguf").write_bytes(b"")
    (public / "closed.gguf").write_bytes(b"")
    (public / "closed.gguf").chmod(0o600)
    hint = "check the permissions of it and of the directories above it, with `namei -l PATH`"
    for path in (public / "closed.gguf", public / "closed/model.gguf"):
        fail("inspect", path, user=somebody, naming=["Permission denied", hint])


def test_a_limit_on_open_files(tmp_path):
    """Room for one descriptor besides the standard ones, which is all that a program needs to start."""
    parts = models.write_small(tmp_path, split_max_tensors=3)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))}
    fail("inspect", parts[2], naming=["Too many open files", "allow more open files with `ulimit -n`"], **limit)


def test_a_file_on_a_mount_that_is_dead(small, tmp_path):
    with failing_disk(small[0].parent, tmp_path) as disk:
        os.kill(disk.pid, signal.SIGKILL)
        hint = "unmount the file system that it is on and mount that again: the process that served it is dead"
        fail("inspect", disk.at / small[0].name, naming=["cannot open", hint])
