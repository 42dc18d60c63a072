"""`mount`: what it promises, and what it says when it cannot."""

import fcntl
import os
import select
import subprocess
from pathlib import Path

import pytest

import models
from odmoe import (
    BINARY,
    LISTING,
    ME,
    NO_FUSE,
    ask,
    contents,
    daemon_of,
    detach,
    fail,
    in_private_mounts,
    mount_at,
    mounted,
    needs_root,
    odmoe,
    promises,
    succeed,
    wait_for,
)


# --- mounting -------------------------------------------------------------------------------------------------------


def test_mount_returns_when_the_tree_answers_and_says_where_what_and_how_to_unmount(person, model, folder):
    said = succeed("mount", model, folder, user=person)
    assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
    assert str(folder) in said
    assert f"{2 * models.EXPERTS} experts" in said
    assert f"odmoe-fs umount {folder}" in said


def test_a_background_mount_keeps_nothing_of_its_caller(person, model, folder):
    """Else a caller that waits for the end of a pipe, or for a lock, would wait as long as the mount lives."""
    ours, theirs = os.pipe()
    with mounted(model, folder, user=person, pass_fds=[theirs]):
        os.close(theirs)
        assert select.select([ours], [], [], 10)[0], "the daemon holds the pipe open"
        os.close(ours)
        process = Path(f"/proc/{daemon_of(folder)}")
        assert [os.readlink(process / "fd" / fd) for fd in "012"] == ["/dev/null"] * 3
        assert os.readlink(process / "cwd") == "/"
        assert os.getsid(int(process.name)) != os.getsid(0)


def test_of_many_mounts_on_one_folder_at_once_one_wins(person, model, folder):
    arguments = [person.binary, "mount", model, folder]
    rivals = [subprocess.Popen(arguments, stdout=-3, stderr=subprocess.PIPE, **person.switch()) for _ in range(8)]
    answers = [rival.communicate()[1].decode() for rival in rivals]
    assert sorted(rival.returncode for rival in rivals) == [0] + [1] * 7
    assert all("already mounted" in answer for answer in answers if answer)
    succeed("umount", folder, user=person)
    assert mount_at(folder) is None


def test_a_folder_that_somebody_else_has_locked_is_not_waited_for_for_ever(model, folder):
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fail("mount", model, folder, naming=[folder, "locked"])
    finally:
        os.close(lock)


def test_links_to_parts_are_not_hidden_by_the_mount(public):
    """Else a daemon that opens a part again by its name would wait for its own answer."""
    (public / "store").mkdir()
    (public / "hub").mkdir()
    parts = models.write_small(public / "store", split_max_tensors=2)
    for part in parts:
        (public / "hub" / part.name).symlink_to(part)
    fail("mount", public / "hub" / parts[0].name, public / "hub", "--nonempty", naming=["hide", parts[0].name])


def test_what_cannot_be_said_does_not_undo_what_was_done(model, public):
    (public / "mnt").mkdir()
    with open("/dev/full", "w") as full:
        subprocess.run([BINARY, "mount", model, public / "mnt"], stdout=full, stderr=full, check=True)
        try:
            assert sorted(os.listdir(public / "mnt")) == ["base_model", "experts"]
        finally:
            subprocess.run([BINARY, "umount", public / "mnt"], stdout=full, stderr=full, check=True)
        subprocess.run([BINARY, "materialize", model, public / "out"], stdout=full, stderr=full, check=True)


def test_the_log_tells_of_the_mount_and_must_not_lie_below_it(model, public):
    folder, log = public / "mnt", public / "log"
    folder.mkdir()
    fail("mount", model, folder, "--log-file", folder / "log", naming=["log"])
    assert os.listdir(folder) == []
    with mounted(model, folder, "--log-file", log):
        pass
    wait_for(lambda: "has ended" in log.read_text())


def test_a_mount_needs_no_open_descriptors(model, public):
    """As a service manager may start it: with standard input, output and error closed."""
    (public / "mnt").mkdir()
    try:
        subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", BINARY, "mount", model, public / "mnt"], check=True)
        assert sorted(os.listdir(public / "mnt")) == ["base_model", "experts"]
        assert contents(public / "mnt")["base_model/metadata.gguf"].startswith(b"GGUF")
    finally:
        detach(public / "mnt")


def test_relative_paths_are_those_of_the_caller(person, model, folder):
    succeed("mount", model.name, folder.name, user=person, cwd=folder.parent)
    assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
    succeed("umount", folder.name, user=person, cwd=folder.parent)


@pytest.mark.parametrize(
    "name", ["a name with spaces", "line\nbreak", "back\\slash", "\\040", "ünï", os.fsdecode(b"\xff")]
)
def test_folders_and_models_may_have_any_name(person, public, model, name):
    model = model.rename(public / f"{name}.gguf")
    with mounted(model, public / name, user=person) as root:
        assert ask(person, LISTING, root=root) == ["base_model", "experts"]


def test_a_link_to_a_folder_stands_for_the_folder(person, model, folder):
    link = folder.parent / "link"
    link.symlink_to(folder.name)
    succeed("mount", model, link, user=person)
    assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
    succeed("umount", f"{link}/", user=person)
    assert mount_at(folder) is None


def test_a_model_can_be_mounted_twice(model, public):
    with mounted(model, public / "one") as one, mounted(model, public / "two") as two:
        assert contents(one) == contents(two)


def test_a_folder_that_is_not_empty_needs_a_flag(person, model, folder):
    (folder / "file").touch()
    fail("mount", model, folder, user=person, naming=[folder, "not empty", "--nonempty"])
    with mounted(model, folder, "--nonempty", user=person):
        assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
    assert os.listdir(folder) == ["file"]


def test_a_model_without_experts_is_mounted_with_a_warning(public):
    (model,) = models.write_dense(public)
    (public / "mnt").mkdir()
    done = odmoe("mount", model, public / "mnt")
    try:
        assert done.returncode == 0
        assert "expert" in done.stderr
        assert (public / "mnt/experts/registry.json").read_text() == "{}"
    finally:
        detach(public / "mnt")


# --- what cannot be mounted -----------------------------------------------------------------------------------------


def test_a_place_that_is_no_folder_is_refused(person, model, public):
    fail("mount", model, public / "missing", user=person, naming=[public / "missing"])
    (public / "file").touch()
    fail("mount", model, public / "file", user=person, naming=[public / "file", "not a directory"])
    fail("mount", model, model, user=person, naming=[model, "not a directory"])


def test_what_is_no_model_is_refused_and_not_waited_for(person, folder, public):
    (public / "empty.gguf").touch()
    (public / "text.gguf").write_text("no model at all, but long enough for a header")
    (public / "folder.gguf").mkdir()
    os.mkfifo(public / "fifo.gguf")
    for name in ("missing.gguf", "empty.gguf", "text.gguf", "folder.gguf", "fifo.gguf"):
        fail("mount", public / name, folder, user=person, naming=[name])
    fail("mount", "/dev/zero", folder, user=person, naming=["/dev/zero"])
    if person != ME:
        (public / "closed.gguf").touch(mode=0o600)
        fail("mount", public / "closed.gguf", folder, user=person, naming=["closed.gguf", "permission denied"])
    assert mount_at(folder) is None


def test_a_folder_is_not_mounted_twice(person, model, folder):
    with mounted(model, folder, user=person):
        for flags in ((), ("--nonempty",)):
            fail("mount", model, folder, *flags, user=person, naming=[folder, "already"])
        assert ask(person, LISTING, root=folder) == ["base_model", "experts"]


def test_a_mount_inside_a_mount_or_over_its_own_model_is_refused(person, model, folder):
    with mounted(model, folder, user=person):
        fail("mount", model, folder / "experts", user=person, naming=[folder / "experts"])
    fail("mount", model, model.parent, "--nonempty", user=person, naming=[model.parent, model.name])
    assert mount_at(model.parent) is None


def test_a_wrong_command_line_is_told_apart_from_a_failure():
    fail("mount", status=2, naming=["usage"])
    fail("mount", "model.gguf", "mnt", "--no-such-flag", status=2, naming=["--no-such-flag"])


@needs_root
def test_a_machine_without_fuse_is_told_so(person, model, folder):
    done = in_private_mounts(NO_FUSE, folder.parent, "mount", model, folder, user=person)
    assert done.returncode == 1
    assert "/dev/fuse" in done.stderr


@pytest.fixture
def nobody_s_folder(public, nobody):
    path = public / "mnt"
    path.mkdir()
    os.chown(path, nobody.uid, nobody.gid)
    return path


@needs_root
def test_a_user_without_the_right_to_fuse_is_told_so(nobody, model, nobody_s_folder):
    closed = """
        mkdir "$1/dev" && mount -t tmpfs none "$1/dev" && mknod -m 0600 "$1/dev/fuse" c 10 229
        mount --bind "$1/dev/fuse" /dev/fuse
    """
    done = in_private_mounts(closed, model.parent, "mount", model, nobody_s_folder, user=nobody)
    assert done.returncode == 1
    assert "/dev/fuse" in done.stderr


@needs_root
def test_a_user_without_fusermount3_is_told_the_package(nobody, model, nobody_s_folder):
    nowhere = {"PATH": str(model.parent), "FUSERMOUNT_PATH": str(model.parent / "fusermount3")}
    fail("mount", model, nobody_s_folder, user=nobody, naming=["fusermount3", "fuse3"], env=nowhere)


@needs_root
@promises("A user needs `user_allow_other` in `/etc/fuse.conf` to let others in.")
def test_a_user_may_allow_others_only_where_the_machine_permits_it(nobody, model, nobody_s_folder):
    unset = 'touch "$1/fuse.conf" && mount --bind "$1/fuse.conf" /etc/fuse.conf'
    done = in_private_mounts(unset, model.parent, "mount", "--allow-other", model, nobody_s_folder, user=nobody)
    assert done.returncode == 1
    assert "user_allow_other" in done.stderr and "/etc/fuse.conf" in done.stderr
