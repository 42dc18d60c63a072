"""`status`, and mounts whose process is dead or stopped: found out without hanging, and repaired."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import models
from odmoe import (
    LISTING,
    ME,
    PATIENCE,
    User,
    ask,
    daemon_of,
    detach,
    fail,
    holding,
    mount_at,
    mounted,
    mounts,
    needs_root,
    odmoe,
    promises,
    run,
    succeed,
    wait_for,
)

EXPERT = "experts/layer_00_expert_000.safetensors"
KILLED = "A daemon that is killed leaves readers an error, never wrong bytes; `status` calls its mount stale."
REPAIRED = "`umount` removes a stale mount, and the next `mount` on its directory repairs it."
STOPPED = (
    "`status` says within two seconds that a stopped daemon does not answer; `mount` and `umount` do not hang on it."
)


def status(where, user=ME):
    """What `status --json` says of a mount; the table for people must say the same."""
    (line,) = [line for line in json.loads(succeed("status", "--json", user=user)) if line["directory"] == str(where)]
    row = next(row for row in succeed("status", user=user).splitlines() if str(where) in row)
    assert row.split("  ", 1)[1].strip().startswith(line["state"])
    return line


@contextlib.contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill(folder, person):
    os.kill(daemon_of(folder), signal.SIGKILL)
    wait_for(lambda: ask(person, "os.listdir(root)", root=folder) != 0)


# --- alive ----------------------------------------------------------------------------------------------------------


def test_a_mount_is_listed_with_its_model_and_process(person, model, folder):
    with mounted(model, folder, user=person):
        expected = {"directory": str(folder), "model": str(model), "pid": daemon_of(folder), "state": "alive"}
        assert status(folder, person) == expected
    listed = json.loads(succeed("status", "--json", user=person))
    assert str(folder) not in [line["directory"] for line in listed]


@needs_root
def test_without_mounts_status_says_so():
    done = run("unshare", "-m", "sh", "-c", 'umount -l -a -t fuse.odmoe; "$0" status; "$0" status --json', ME.binary)
    assert done.stdout == "no odmoe-fs mounts\n[]\n"


@needs_root
def test_the_mount_of_another_user_is_listed_as_not_readable(model, public, nobody):
    with mounted(model, public / "mine"), mounted(model, public / "theirs", user=nobody):
        assert status(public / "mine", nobody) | {"model": None} == {
            "directory": str(public / "mine"),
            "model": None,
            "pid": None,
            "state": "not readable",
        }
        # Root may look at the process, but not into the mount.
        assert status(public / "theirs") == {
            "directory": str(public / "theirs"),
            "model": str(model),
            "pid": daemon_of(public / "theirs"),
            "state": "not readable",
        }


@needs_root
def test_names_cannot_break_the_table(model, public):
    where = public / "a\nb \x1b[2J"
    where.mkdir()
    with mounted(model, where):
        lines = succeed("status").split("\n\n")[0].splitlines()  # a second table is of models elsewhere
        assert len([line for line in lines if r"a\nb \u{1b}[2J" in line]) == 1
        # Each line but the heading begins with a directory, whatever else is mounted meanwhile.
        assert all(line.startswith("/") for line in lines[1:])
        assert str(where) in [line["directory"] for line in json.loads(succeed("status", "--json"))]


def touched(part):
    os.utime(part)


def truncated(part):
    os.truncate(part, part.stat().st_size - 1)


def appended(part):
    with part.open("ab") as file:
        file.write(b"more")


def renamed(part):
    part.rename(part.with_name("renamed.gguf"))


def replaced(part):
    shutil.copy(part, part.with_name("new"))
    os.replace(part.with_name("new"), part)


CHANGED = "`status` calls a mount changed when a part of its model has been written to since it was mounted."


@promises(CHANGED)
@pytest.mark.parametrize("change", [touched, truncated, appended])
@pytest.mark.parametrize("flags", [[], ["--cache", "direct"], ["--stats"]], ids=str)
def test_a_mount_whose_model_has_changed_is_not_called_alive(change, flags, person, public, folder):
    parts = models.write_small(public, split_max_tensors=4)
    with mounted(parts[0], folder, *flags, user=person):
        assert status(folder, person)["state"] == "alive"
        change(parts[-1])
        assert status(folder, person)["state"] == "changed"
        if change != truncated:  # which is no model any more
            fail("mount", parts[0], folder, user=person, naming=["already mounted"])


@promises(CHANGED)
@pytest.mark.parametrize("change", [renamed, replaced])
def test_a_mount_whose_model_has_another_name_is_alive(change, person, public, folder):
    parts = models.write_small(public, split_max_tensors=4)
    with mounted(parts[0], folder, user=person):
        change(parts[-1])
        assert status(folder, person)["state"] == "alive"


def test_paths_that_lead_out_of_a_mount_are_those_of_the_caller(person, model, folder, public):
    """The working directory lies in a mount, which need not answer."""
    other = public / "other"
    other.mkdir()
    shutil.chown(other, person.uid, person.gid)

    def from_within(*arguments):
        script = 'cd "$1"; shift; exec "$@"'
        return run("sh", "-c", script, "sh", folder / "experts", person.binary, *arguments, user=person)

    with mounted(model, folder, user=person):
        assert from_within("mount", f"../../{model.name}", "../../other").returncode == 0
        assert mount_at(other)
        assert from_within("umount", "../../other").returncode == 0
        assert mount_at(other) is None
        done = from_within("verify", f"../../{model.name}", "..")
        assert done.returncode == 0, done.stderr
        done = from_within("mount", f"../../{model.name}", "../base_model")
        assert done.returncode == 1 and "lies inside the odmoe-fs mount" in done.stderr
        script = f'cd "{folder}/experts"; "{person.binary}" umount ..'
        done = run("sh", "-c", script, user=person)
        assert done.returncode == 1 and "is in use by sh (process " in done.stderr
    succeed("mount", model, folder, user=person)
    # What stands there itself is not in its own way.
    assert from_within("umount", "..").returncode == 0
    assert mount_at(folder) is None


# --- dead -----------------------------------------------------------------------------------------------------------


@promises(KILLED, REPAIRED)
def test_a_mount_whose_daemon_was_killed_is_stale_and_umount_removes_it(person, model, folder):
    succeed("mount", model, folder, user=person)
    kill(folder, person)
    reading = "answer = len(open(path, 'rb').read())"
    assert ask(person, reading, path=folder / EXPERT) in (errno.ENOTCONN, errno.EIO)
    fail("verify", model, folder, user=person, naming=[folder, "mount it again"])
    assert status(folder, person) == {
        "directory": str(folder),
        "model": str(model),
        "pid": None,
        "state": "stale",
    }
    succeed("umount", folder, user=person)
    assert mount_at(folder) is None


@promises(REPAIRED)
def test_the_next_mount_repairs_one_whose_daemon_was_killed(person, model, folder):
    for _ in range(2):
        succeed("mount", model, folder, user=person)
        kill(folder, person)
    done = odmoe("mount", model, folder, user=person)
    assert done.returncode == 0, done.stderr
    assert "process is dead; unmounted it" in done.stderr
    assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
    assert [m.at for m in mounts()].count(str(folder)) == 1


def test_of_many_who_repair_a_stale_mount_at_once_one_wins(person, model, folder):
    for _ in range(5):
        succeed("mount", model, folder, user=person)
        kill(folder, person)
        command = [person.binary, "mount", model, folder]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        rivals = [subprocess.Popen(command, **silent, **person.switch()) for _ in range(4)]
        assert sorted(rival.wait(PATIENCE) for rival in rivals) == [0, 1, 1, 1]
        assert [m.at for m in mounts()].count(str(folder)) == 1
        assert status(folder, person)["state"] == "alive"
        succeed("umount", folder, user=person)


def test_a_stale_mount_that_is_busy_is_repaired_all_the_same(person, model, folder):
    succeed("mount", model, folder, user=person)
    with holding(person, folder / EXPERT):
        kill(folder, person)
        succeed("mount", model, folder, user=person)
        assert status(folder, person)["state"] == "alive"


@needs_root
@promises("Only mounts of our own are ever unmounted.")
def test_the_dead_mount_of_another_file_system_is_left_alone(model, public):
    where = public / "mnt"
    where.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    try:
        subprocess.run(["mount", "-i", "-t", "fuse.other", "-o", options, "none", where], check=True, pass_fds=[device])
        os.close(device)
        assert ask(ME, "os.listdir(root)", root=where) == errno.ENOTCONN
        for command in (["mount", model, where], ["umount", where], ["umount", "--lazy", where]):
            fail(*command, naming=[where])
        assert mount_at(where).kind == "fuse.other"
        assert str(where) not in succeed("status")
    finally:
        detach(where)


# Mounts as what its second argument says, takes requests, and answers none but the first.
SILENT = """
import os, struct, subprocess, sys
device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
subprocess.run(["mount", "-i", "-t", sys.argv[2], "-o", options, "none", sys.argv[1]], check=True, pass_fds=[device])
while True:
    _, opcode, unique = struct.unpack_from("<IIQ", os.read(device, 1 << 18))
    if opcode == 26:  # FUSE_INIT
        os.write(device, struct.pack("<IiQII56x", 16 + 64, 0, unique, 7, 31))
        print("mounted", flush=True)
"""


@contextlib.contextmanager
def silent_mount(where, kind):
    """A mount that never answers; who has asked it cannot even be killed, before its process is."""
    with subprocess.Popen([sys.executable, "-c", SILENT, where, kind], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"mounted\n"
            yield
        finally:
            process.kill()
            detach(where)


@needs_root
@promises("Only mounts of our own are ever unmounted.")
@pytest.mark.parametrize("state", ["alive", "dead"])
def test_a_mount_that_was_moved_over_ours_is_left_alone(model, public, state):
    """The mount table is in the order of making, not of lying on each other."""
    first, where = public / "first", public / "mnt"
    first.mkdir()
    where.mkdir()
    # What is moved must not be shared.
    run("mount", "--bind", public, public)
    run("mount", "--make-private", public)
    try:
        if state == "alive":
            subprocess.run(["mount", "-t", "tmpfs", "theirs", first], check=True)
        else:
            device = os.open("/dev/fuse", os.O_RDWR)
            options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
            command = ["mount", "-i", "-t", "fuse.other", "-o", options, "theirs", first]
            subprocess.run(command, check=True, pass_fds=[device])
            os.close(device)
        succeed("mount", model, where)
        subprocess.run(["mount", "--move", first, where], check=True)
        for command in (["umount", where], ["umount", "--lazy", where]):
            fail(*command, naming=[where, "under another mount"])
        if state == "dead":
            fail("mount", model, where, naming=[where])
        assert sorted(m.source for m in mounts() if m.at == str(where)) == sorted([str(model), "theirs"])
        (line,) = [x for x in json.loads(succeed("status", "--json")) if x["directory"] == str(where)]
        assert line["state"] == "hidden"
        subprocess.run(["umount", "-l", where], check=True)
        succeed("umount", where)
    finally:
        detach(public)


@needs_root
def test_who_waits_for_the_output_of_status_does_not_wait_for_a_mount(public):
    where = public / "mnt"
    where.mkdir()
    with silent_mount(where, "fuse.odmoe"):
        assert status(where)["state"] == "not answering"  # read to the end of its output


@needs_root
@promises(REPAIRED)
def test_the_dead_mount_of_another_user_is_only_repaired_by_root(model, public, nobody):
    where = public / "mnt"
    where.mkdir(mode=0o777)
    where.chmod(0o777)
    succeed("mount", model, where)
    kill(where, ME)
    stranger = User(65533, 65533, nobody.binary)
    for user in (nobody, stranger):
        fail("umount", where, user=user, naming=[where])
        fail("mount", model, where, user=user, naming=[where])
        assert mount_at(where)
    succeed("umount", where)
    # The other way round, root may.
    shutil.chown(where, nobody.uid, nobody.gid)
    succeed("mount", model, where, user=nobody)
    kill(where, nobody)
    fail("umount", where, user=stranger, naming=[where])
    succeed("umount", where)


# --- stopped --------------------------------------------------------------------------------------------------------


def test_status_asks_all_mounts_at_the_same_time(public, model):
    with contextlib.ExitStack() as stack:
        for number in range(12):
            where = stack.enter_context(mounted(model, public / f"mnt{number}"))
            stack.enter_context(stopped(daemon_of(where)))
        began = time.monotonic()
        states = [line["state"] for line in json.loads(succeed("status", "--json")) if str(public) in line["directory"]]
        # Far less than a second for each.
        assert time.monotonic() - began < 10
        assert states == ["not answering"] * 12


@promises(STOPPED)
def test_a_stopped_daemon_does_not_answer_and_nothing_hangs_on_it(person, model, folder, public):
    succeed("mount", model, folder, user=person)
    daemon = daemon_of(folder)
    with stopped(daemon):
        took = []
        for _ in range(3):  # the machine may be busy
            began = time.monotonic()
            (line,) = [x for x in json.loads(succeed("status", "--json", user=person)) if x["directory"] == str(folder)]
            took.append(time.monotonic() - began)
        assert min(took) < 2
        assert (line["state"], line["pid"]) == ("not answering", daemon)
        fail("mount", model, folder, user=person, naming=[folder, f"process {daemon} does not answer"])
        # Also on what the kernel does not know yet, and through a link.
        link = public / "link"
        link.symlink_to(folder)
        for below in ("experts", "base_model", "nothing", "experts/x/y"):
            for place in (folder / below, link / below):
                fail("mount", model, place, user=person, naming=[folder])
                fail("umount", place, user=person, naming=[folder])
        succeed("umount", folder, user=person)
        assert mount_at(folder) is None


@promises(STOPPED)
def test_a_stopped_and_busy_daemon_is_unmounted_lazily(person, model, folder):
    succeed("mount", model, folder, user=person)
    with holding(person, folder / EXPERT):
        with stopped(daemon_of(folder)):
            fail("umount", folder, user=person, naming=["--lazy"])
            succeed("umount", "--lazy", folder, user=person)
            assert mount_at(folder) is None


def test_a_stopped_daemon_that_goes_on_is_alive_again(person, model, folder):
    with mounted(model, folder, user=person):
        with stopped(daemon_of(folder)):
            assert status(folder, person)["state"] == "not answering"
        assert status(folder, person)["state"] == "alive"


def test_a_model_whose_path_would_be_taken_for_options_is_found_by_its_process(person, public, folder):
    odd = public / "a,b"
    odd.mkdir()
    path = models.write_small(odd)[0]
    with mounted(path, folder, user=person):
        assert mount_at(folder).source == "odmoe"
        assert status(folder, person)["model"] == str(path)
        kill(folder, person)
        assert status(folder, person)["model"] is None
        succeed("mount", path, folder, user=person)
