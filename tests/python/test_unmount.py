"""How mounts end: by `umount`, by a signal, by force; and what they leave to others."""

import errno
import os
import signal
import subprocess

import pytest

from odmoe import (
    BINARY,
    LISTING,
    ask,
    daemon_of,
    detach,
    fail,
    foreground,
    holding,
    is_running,
    mount_at,
    needs_root,
    promises,
    succeed,
    wait_for,
)

EXPERT = "experts/layer_00_expert_000.safetensors"
RELEASED = "When `umount` of a mount that answers is done, its daemon has ended, and the disk of the model can be unmounted."


# --- by `umount` ----------------------------------------------------------------------------------------------------


@promises(RELEASED)
def test_nothing_runs_on_after_an_unmount(person, model, folder):
    for _ in range(10):
        succeed("mount", model, folder, user=person)
        daemon = daemon_of(folder)
        succeed("umount", folder, user=person)
        assert mount_at(folder) is None
        assert not is_running(daemon)


@needs_root
@promises(RELEASED)
def test_the_disk_of_the_model_can_be_unmounted_after_it(model, folder, public):
    disk = public / "disk"
    disk.mkdir()
    try:
        for _ in range(10):
            subprocess.run(["mount", "--bind", model.parent, disk], check=True)
            succeed("mount", disk / model.name, folder)
            succeed("umount", folder)
            subprocess.run(["umount", disk], check=True)
    finally:
        detach(folder)
        detach(disk)


def test_unmount_is_another_name(person, model, folder):
    succeed("mount", model, folder, user=person)
    succeed("unmount", folder, user=person)
    assert mount_at(folder) is None


def test_a_busy_mount_stays_unless_lazily_unmounted_and_then_serves_to_the_end(person, model, folder):
    succeed("mount", model, folder, user=person)
    daemon = daemon_of(folder)
    size = ask(person, "answer = os.stat(path).st_size", path=folder / EXPERT)
    with holding(person, folder / EXPERT) as holder:
        fail("umount", folder, user=person, naming=[folder, "--lazy"])
        assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
        succeed("umount", "--lazy", folder, user=person)
        assert mount_at(folder) is None
        assert holder.read() == size
        assert is_running(daemon)
    wait_for(lambda: not is_running(daemon))


@needs_root
@promises("Only mounts of our own are ever unmounted.")
def test_only_our_own_mounts_are_unmounted(public, person):
    plain, other = public / "plain", public / "other"
    for path in (plain, other):
        path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True)
    try:
        for where in (plain, other, public / "missing"):
            for flags in ((), ("--lazy",)):
                fail("umount", *flags, where, user=person, naming=[where])
        assert mount_at(other).kind == "tmpfs"
    finally:
        subprocess.run(["umount", other], check=True)


def test_a_folder_of_the_tree_is_no_mount(person, model, folder):
    succeed("mount", model, folder, user=person)
    fail("umount", folder / "experts", user=person, naming=[folder / "experts"])
    assert mount_at(folder)


# --- by a signal ----------------------------------------------------------------------------------------------------


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
DETACHED = (
    "SIGINT, SIGTERM and SIGHUP detach the mount at once; open files and maps stay readable, and the daemon ends with "
    "the last of them."
)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_foreground_mount_stays_until_it_is_told_to_end(person, model, folder, number):
    with foreground(model, folder, user=person) as process:
        assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
        process.send_signal(number)
        assert process.wait(60) == 0
        assert mount_at(folder) is None


@promises(DETACHED)
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_busy_foreground_mount_that_is_told_to_end_serves_its_readers_first(person, model, folder, number, how):
    with foreground(model, folder, user=person) as process:
        size = ask(person, "answer = os.stat(path).st_size", path=folder / EXPERT)
        with holding(person, folder / EXPERT, how) as holder:
            process.send_signal(number)
            wait_for(lambda: mount_at(folder) is None)
            assert holder.read() == size
        assert process.wait(60) == 0


@promises(DETACHED)
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_busy_background_mount_that_is_told_to_end_serves_its_readers_first(person, model, folder, number, how):
    succeed("mount", model, folder, user=person)
    daemon = daemon_of(folder)
    size = ask(person, "answer = os.stat(path).st_size", path=folder / EXPERT)
    with holding(person, folder / EXPERT, how) as holder:
        os.kill(daemon, number)
        wait_for(lambda: mount_at(folder) is None)
        assert holder.read() == size
        assert is_running(daemon)
    wait_for(lambda: not is_running(daemon))


@promises("A second signal ends the daemon at once.")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_a_busy_mount_and_its_readers_get_an_error(person, model, folder, number):
    with foreground(model, folder, user=person) as process, holding(person, folder / EXPERT) as holder:
        process.send_signal(number)
        wait_for(lambda: mount_at(folder) is None)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert -holder.read() in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)


def test_a_foreground_mount_ends_when_it_is_unmounted(person, model, folder):
    with foreground(model, folder, user=person) as process:
        succeed("umount", folder, user=person)
        assert process.wait(60) == 0


def test_signals_that_the_caller_ignores_stay_ignored(model, public):
    """As under nohup: the end of a terminal must not end the mount."""
    folder = public / "mnt"
    folder.mkdir()
    script = 'trap "" HUP; exec "$0" mount -f "$1" "$2"'
    with subprocess.Popen(["sh", "-c", script, BINARY, model, folder], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            process.send_signal(signal.SIGHUP)
            assert os.listdir(folder)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            detach(folder)


def test_a_background_daemon_that_is_told_to_end_takes_the_mount_with_it(person, model, folder):
    succeed("mount", model, folder, user=person)
    daemon = daemon_of(folder)
    os.kill(daemon, signal.SIGTERM)
    wait_for(lambda: mount_at(folder) is None and not is_running(daemon))


# --- and what is left alone -----------------------------------------------------------------------------------------


def by_umount(folder):
    succeed("umount", folder)


def by_signal(folder):
    os.kill(daemon_of(folder), signal.SIGTERM)


@needs_root
@pytest.mark.parametrize("end", [by_umount, by_signal])
def test_a_mount_takes_nothing_with_it_that_lay_below(model, public, end):
    """The daemon must not unmount by path what the kernel has already unmounted: there may be something else now."""
    folder = public / "mnt"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "below", folder], check=True)
    try:
        (folder / "file").touch()
        succeed("mount", model, folder, "--nonempty")
        daemon = daemon_of(folder)
        end(folder)
        wait_for(lambda: not is_running(daemon))
        assert mount_at(folder) and mount_at(folder).source == "below"
        assert os.listdir(folder) == ["file"]
    finally:
        detach(folder)


def test_the_end_of_an_old_daemon_leaves_a_new_mount_alone(person, model, folder):
    daemons = []
    for _ in range(10):
        succeed("mount", model, folder, user=person)
        daemons.append(daemon_of(folder))
        succeed("umount", folder, user=person)
    succeed("mount", model, folder, user=person)
    wait_for(lambda: not any(is_running(daemon) for daemon in daemons))
    assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
