"""`materialize` while things go wrong: whatever has its name is complete, and the same command finishes the work."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest

import models
from odmoe import (
    BINARY,
    KIB,
    MIB,
    PATIENCE,
    contents,
    expert_gguf,
    fail,
    failing_disk,
    file_system,
    files_of,
    needs_root,
    odmoe,
    promises,
    run,
    succeed,
    wait_for,
)

KILLED = (
    "A run that is killed, or whose machine loses its power, at any moment leaves no wrong file, and the same command "
    "finishes the work."
)
COMPLETE = "A file has its name only when it is complete and on the disk."
ONE_AT_A_TIME = "Two runs into one target at the same time never mix: the second is refused."
ERRORS = "A full disk, a quota, or an error of the model or of the target ends the run with an error, and costs no complete file."
LINKS = "A folder of the target that is, or becomes, a link is never written through."
FOREIGN = "Files that are there and are not what would be written are an error, and stay untouched without `--force`."


def assert_holds_no_wrong_file(model, out):
    """Whatever has its name holds the right bytes; documents, and what is to come, may be missing."""
    if not out.is_dir():
        return
    done = odmoe("verify", model, out, "--json")
    for difference in json.loads(done.stdout)["differences"]:
        leftover = difference["kind"] == "extra" and re.search(r"/\.odmoe-\w+\.tmp$", difference["path"])
        assert leftover or difference["kind"] == "missing", difference


def assert_is_finished_by_the_same_command(model, out, *flags):
    succeed("materialize", model, out, *flags)
    said = json.loads(succeed("verify", model, out, "--json"))
    assert said["identical"] and said["whole"]


# --- killed ---------------------------------------------------------------------------------------------------------


@needs_root
@promises(KILLED, COMPLETE)
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_run_that_is_killed_at_a_random_moment_is_finished_by_the_same_command(tmp_path, kind, times):
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    print("seed", seed)
    model = tmp_path / "toy.gguf"
    succeed("toy", model, "--experts", 24, "--layers", 3, "--ffn-dim", 512)
    with file_system(kind, tmp_path, 700 * MIB) as at:
        out = at / "out"
        if kind != "ext4":  # where blocks can be shared
            model = shutil.copy(model, at)
        began = time.monotonic()
        succeed("materialize", model, out)
        takes = time.monotonic() - began
        kills, wanted, tries = 0, times(8, long=67), 0
        while kills < wanted:
            tries += 1
            assert tries < 20 * wanted, "it is always too fast, or too slow"
            if chance.random() < 0.7:
                shutil.rmtree(out)
            else:  # a tree that lacks some files
                for path in chance.sample(sorted(files_of(out).values()), 20):
                    path.unlink()
            command = [BINARY, "materialize", model, out]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                time.sleep(takes * chance.random() ** 2)
                process.kill()
            kills += process.returncode == -signal.SIGKILL
            assert_holds_no_wrong_file(model, out)
            assert_is_finished_by_the_same_command(model, out)


@needs_root
@promises(KILLED, COMPLETE)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_cut_at_a_random_moment_leaves_no_wrong_file(tmp_path, kind, times):
    """What a disk held at one moment: its image lies on a file system that shares blocks, and is cloned at once."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    print("seed", seed)
    model = tmp_path / "toy.gguf"
    succeed("toy", model, "--experts", 24, "--layers", 3, "--ffn-dim", 512)
    with file_system("xfs", tmp_path, 3000 * MIB) as outer:
        (outer / "disk").mkdir()
        named = 0
        for _ in range(times(4, long=30)):
            with file_system(kind, outer / "disk", 400 * MIB) as at:
                subprocess.run(["sync", "-f", at], check=True)
                process = subprocess.Popen(
                    [BINARY, "materialize", model, at / "out"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                # Most of the work, the flush and the names come within the first moments.
                time.sleep(chance.uniform(0, 0.6))
                subprocess.run(
                    ["cp", "--reflink=always", at.with_suffix(".img"), outer / "cut.img"], check=True
                )
                process.kill()
                process.wait()
            cut = outer / "cut"
            cut.mkdir()
            try:
                subprocess.run(["mount", "-o", "loop", outer / "cut.img", cut], check=True)
                named += sum(name.endswith(".safetensors") for name in files_of(cut / "out"))
                assert_holds_no_wrong_file(model, cut / "out")
                assert_is_finished_by_the_same_command(model, cut / "out")
            finally:
                subprocess.run(["umount", cut], check=False)
                cut.rmdir()
        print(named, "files had their names")


# --- held up in the middle ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_up(tmp_path, out, *flags, after=0.6, preexec_fn=None):
    """A run whose disk hangs in the middle of the model; yields the model, the process, and what lets it go on."""
    (tmp_path / "store").mkdir()
    model = expert_gguf(tmp_path / "store", experts=12)
    with failing_disk(model.parent, tmp_path) as disk:
        place = int(model.stat().st_size * after)
        disk.fails(("hang", place, place + 1))
        process = subprocess.Popen(
            [BINARY, "materialize", disk.at / model.name, out, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec_fn,
        )
        try:
            # Then all files but the one that hangs are complete, and none has its name.
            files = 12 + 2
            wait_for(lambda: len(list(out.rglob(".odmoe-*.tmp"))) == files or process.poll() is not None)
            assert process.poll() is None, process.stderr.read()

            def go_on():
                disk.fails()
                _, errors = process.communicate(timeout=PATIENCE)
                return process.returncode, errors

            yield model, process, go_on
        finally:
            disk.fails()
            process.kill()
            process.communicate()


@needs_root
@promises(ONE_AT_A_TIME)
@pytest.mark.parametrize("flags", [[], ["--base-only"], ["--force"], ["--experts", "1"]], ids=str)
def test_a_second_run_into_the_same_target_is_refused(tmp_path, flags):
    out = tmp_path / "out"
    with held_up(tmp_path, out) as (model, _, go_on):
        fail("materialize", model, out, *flags, naming=[out, "another odmoe-fs"])
        assert go_on()[0] == 0
    assert_is_finished_by_the_same_command(model, out)


@needs_root
@promises(ERRORS)
@pytest.mark.parametrize("what", ["", "experts"])
def test_a_folder_that_is_removed_meanwhile_ends_the_run(tmp_path, what):
    out = tmp_path / "out"
    with held_up(tmp_path, out) as (model, _, go_on):
        shutil.rmtree(out / what)
        status, errors = go_on()
        assert status == 1 and str(out) in errors, errors
        assert not (out / "experts").exists()
    assert_is_finished_by_the_same_command(model, out)


@needs_root
@promises(LINKS)
def test_a_folder_that_becomes_a_link_is_not_written_through(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with held_up(tmp_path, out) as (model, _, go_on):
        (out / "experts").rename(out / "moved")
        (out / "experts").symlink_to(elsewhere)
        status, errors = go_on()
        assert status == 1 and "was moved or replaced" in errors, errors
        assert os.listdir(elsewhere) == []
        # Nothing unfinished has a name in the folder that was moved.
        assert not [name for name in os.listdir(out / "moved") if name.endswith(".safetensors")]
    shutil.rmtree(out)
    assert_is_finished_by_the_same_command(model, out)


@needs_root
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
@promises(
    "Materialized files get the modes that the umask gives new files.",
    "Temporary files have random names, are made anew, and are never followed through a link.",
)
def test_temporary_files_in_a_shared_folder_have_random_names_and_the_right_modes(public, tmp_path, umask):
    out = public / "out"  # everybody may write there

    def shared():
        os.umask(umask)

    names = set()
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        with held_up(tmp_path / str(number), out, preexec_fn=shared) as (_, _, go_on):
            found = {path.name for path in out.rglob(".odmoe-*")}
            assert found and not found & names
            assert all(re.fullmatch(r"\.odmoe-\w{6,}\.tmp", name) for name in found)
            assert {path.stat().st_mode & 0o777 for path in out.rglob(".odmoe-*")} == {0o666 & ~umask}
            names |= found
            assert go_on()[0] == 0
            assert not list(out.rglob(".odmoe-*"))
            shutil.rmtree(out)
    succeed("materialize", models.write_small(tmp_path)[0], public / "other", umask=umask)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (public / "other").rglob("*")}
    assert modes == {True: 0o777 & ~umask, False: 0o666 & ~umask}


# --- a target that cannot be written to -----------------------------------------------------------------------------


@needs_root
@promises(ERRORS)
def test_a_quota_that_is_exceeded_ends_the_run(tmp_path):
    model = expert_gguf(tmp_path, experts=12)
    with file_system("btrfs", tmp_path, 400 * MIB) as at:
        out = at / "out"

        def btrfs(*arguments):
            subprocess.run(["btrfs", *arguments], check=True, capture_output=True)

        btrfs("subvolume", "create", out)
        btrfs("quota", "enable", at)
        btrfs("qgroup", "limit", "10M", out)
        said = fail("materialize", model, out, naming=[out])
        assert "Disk quota exceeded" in said
        assert not [name for name in files_of(out) if ".tmp" in name]
        assert_holds_no_wrong_file(model, out)
        btrfs("qgroup", "limit", "none", out)
        assert_is_finished_by_the_same_command(model, out)


@needs_root
@promises(ERRORS)
def test_a_target_that_becomes_read_only_ends_the_run(tmp_path):
    """As ext4 does by itself when it finds itself damaged."""
    with file_system("ext4", tmp_path, 200 * MIB) as at:
        subprocess.run(["mount", "-o", "remount,errors=remount-ro", at], check=True)
        device = run("findmnt", "-n", "-o", "SOURCE", at).stdout.strip().removeprefix("/dev/")
        out = at / "out"
        with held_up(tmp_path, out) as (model, _, go_on):
            with open(f"/sys/fs/ext4/{device}/trigger_fs_error", "w") as trigger:
                trigger.write("tests")
            status, errors = go_on()
            assert status == 1 and str(out) in errors, errors
            assert_holds_no_wrong_file(model, out)


@needs_root
def test_a_read_only_target_is_an_error_before_anything_is_tried(public, nobody):
    (model,) = models.write_small(public)
    with file_system("tmpfs", public, "10m") as at:
        subprocess.run(["mount", "-o", "remount,ro", at], check=True)
        for flags in [], ["--dry-run"]:
            assert "Read-only file system" in fail("materialize", model, at / "out", *flags, naming=[at])
    (public / "closed").mkdir(mode=0o755)
    for flags in [], ["--dry-run"]:
        said = fail("materialize", model, public / "closed/out", *flags, user=nobody, naming=[public / "closed"])
        assert "Permission denied" in said
    assert os.listdir(public / "closed") == []


def test_a_target_that_is_a_file_or_lies_below_one_is_an_error(small, tmp_path):
    (tmp_path / "file").write_text("theirs")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        fail("materialize", small[0], out, naming=[tmp_path / "file", "is not a directory"])
    (tmp_path / "out/experts").parent.mkdir()
    (tmp_path / "out/experts").write_text("theirs")
    fail("materialize", small[0], tmp_path / "out", naming=["experts", "is not a directory"])
    assert (tmp_path / "file").read_text() == (tmp_path / "out/experts").read_text() == "theirs"


@promises(ERRORS)
def test_a_file_beyond_what_the_user_may_write_is_an_error_and_leaves_nothing(tmp_path):
    model = expert_gguf(tmp_path, experts=2)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    fail("materialize", model, tmp_path / "out", "--reflink", "never", preexec_fn=small_files, naming=["File too large"])
    assert not [name for name in files_of(tmp_path / "out") if "tmp" in name or "expert_" in name]
    assert_is_finished_by_the_same_command(model, tmp_path / "out")


@needs_root
def test_room_for_old_and_new_files_is_asked_for_in_words_with_force(tmp_path):
    model = expert_gguf(tmp_path, experts=8)
    other = tmp_path / "other.gguf"
    data = bytearray(model.read_bytes())
    for at in range(64 * KIB, len(data), 64 * KIB):  # some of every expert
        data[at] ^= 1
    other.write_bytes(data)
    with file_system("tmpfs", tmp_path, "40m") as at:
        succeed("materialize", other, at / "out")
        fail("materialize", model, at / "out", "--force", naming=["room for", "--force"])
        succeed("verify", other, at / "out")


# --- what is in the way ---------------------------------------------------------------------------------------------


@promises(LINKS)
@pytest.mark.parametrize("name", ["experts", "base_model"])
@pytest.mark.parametrize("flags", [[], ["--force"]], ids=str)
def test_a_folder_that_is_a_link_is_refused(small, tmp_path, name, flags):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for leads_to in (elsewhere, tmp_path / "nothing"):
        elsewhere.mkdir(exist_ok=True)
        out.mkdir()
        (out / name).symlink_to(leads_to)
        fail("materialize", small[0], out, *flags, naming=[out / name, "is a link"])
        assert os.listdir(elsewhere) == [] and os.listdir(out) == [name]
        shutil.rmtree(out)


def test_a_target_that_is_a_link_to_a_folder_is_that_folder(small, tmp_path):
    """What a user names is followed."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    succeed("materialize", small[0], tmp_path / "link")
    assert json.loads(succeed("verify", small[0], tmp_path / "real", "--json"))["identical"]


IN_THE_WAY = {
    "a link": lambda path: path.symlink_to("/dev/null"),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a file": lambda path: path.write_text("theirs"),
}


@promises(FOREIGN)
@pytest.mark.parametrize("name", ["experts/layer_00_expert_001.safetensors", "experts/registry.json", "base_model/metadata.gguf"])
@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_is_in_the_way_is_an_error_and_stays(small, tmp_path, what, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    IN_THE_WAY[what](path)
    before = os.lstat(path)
    fail("materialize", small[0], tmp_path / "out", naming=[path])
    assert os.path.samestat(os.lstat(path), before)
    assert not (path.with_name("nothing")).exists()
    if what != "a folder":
        succeed("materialize", small[0], tmp_path / "out", "--force")
        assert json.loads(succeed("verify", small[0], tmp_path / "out", "--json"))["identical"]


@promises(FOREIGN)
def test_a_finished_tree_of_another_model_of_the_same_shape_is_never_taken_for_done(tmp_path):
    ours = expert_gguf(tmp_path, experts=2)
    other = tmp_path / "other.gguf"
    other.write_bytes(ours.read_bytes()[:-5000] + bytes(5000))
    out = tmp_path / "out"
    succeed("materialize", other, out)
    before = contents(out)
    fail("materialize", ours, out, naming=[out, "other bytes"])
    assert contents(out) == before
    succeed("materialize", ours, out, "--force")
    succeed("verify", ours, out)
