"""How mounts end: by `umount`, by a signal, by force; and what they leave to others."""

import contextlib
import errno
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from odmoe import (
    BINARY,
    LISTING,
    ME,
    PYTHON,
    ask,
    daemon_of,
    detach,
    fail,
    foreground,
    holding,
    is_running,
    mount_at,
    mounts,
    needs_root,
    odmoe,
    promises,
    run,
    succeed,
    wait_for,
)

EXPERT = "experts/layer_00_expert_000.safetensors"
RELEASED = (
    "When `umount` has unmounted a mount that answers, its daemon has ended, and the disk of the model can be unmounted; "
    "or it says that the daemon goes on, and why."
)


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


# --- while somebody looks at it, or uses it --------------------------------------------------------------------------


LOOKS = {
    "status": [BINARY, "status"],
    "stat": [PYTHON, "-c", "import os, sys, contextlib\nwith contextlib.suppress(OSError): os.listdir(sys.argv[1])"],
    "df": ["df"],
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_passing_look_does_not_keep_a_mount(look, model, folder, public, times):
    go_on = public / "go-on"
    go_on.touch()
    loop = ["sh", "-c", 'while [ -e "$0" ]; do "$@" >/dev/null 2>&1; done', go_on, *LOOKS[look], folder]
    with subprocess.Popen([str(word) for word in loop]):
        try:
            for _ in range(times(20, long=200)):
                succeed("mount", model, folder)
                succeed("umount", folder)
        finally:
            go_on.unlink()


def test_of_many_who_unmount_at_once_those_who_come_late_say_so(person, model, folder, times):
    for _ in range(times(10, long=100)):
        succeed("mount", model, folder, user=person)
        command = [person.binary, "umount", folder]
        rivals = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=-3, **person.switch()) for _ in range(6)]
        said = [rival.communicate()[1].decode() for rival in rivals]
        assert mount_at(folder) is None
        assert any(rival.returncode == 0 for rival in rivals)
        for rival, words in zip(rivals, said, strict=True):
            assert rival.returncode in (0, 1)
            assert (rival.returncode == 0) == (words == ""), words
            assert not words or f'"{folder}" is not an odmoe-fs mount' in words


def test_a_daemon_that_does_not_answer_is_told_from_a_user(person, model, folder):
    with mounted_until(model, folder, user=person):
        daemon = daemon_of(folder)
        os.kill(daemon, signal.SIGSTOP)
        reader = subprocess.Popen(["cat", folder / EXPERT], stdout=-3, **person.switch())
        try:
            wait_for(lambda: " S " in Path(f"/proc/{reader.pid}/stat").read_text())
            hints = [f"process {daemon} does not answer", f"kill -CONT {daemon}", "--lazy"]
            fail("umount", folder, user=person, naming=[folder, *hints])
        finally:
            os.kill(daemon, signal.SIGCONT)
        assert reader.wait(60) == 0


@needs_root
def test_a_hidden_mount_is_told_from_none(model, folder):
    with mounted_until(model, folder):
        for above in (folder, folder.parent):
            subprocess.run(["mount", "-t", "tmpfs", "none", above], check=True)
            try:
                fail("umount", folder, naming=[f'"{folder}" lies under another mount'])
            finally:
                subprocess.run(["umount", above], check=True)
        succeed("umount", folder)


@pytest.mark.parametrize("name", ["it's a b", "new\nline", "\x1b[2J'\\", b"\xff\xfe", "\u202e\u200bx", "größe"], ids=repr)
def test_the_command_that_unmounts_can_be_pasted(name, model, folder):
    where = os.path.join(os.fsencode(folder), os.fsencode(name))
    os.mkdir(where)
    done = subprocess.run([BINARY, "mount", model, where], capture_output=True, check=True)
    command = done.stdout.decode().split("unmount with: odmoe-fs ")[1]
    assert command.removesuffix("\n").isprintable()
    subprocess.run(["bash", "-c", f"{BINARY} {command}"], check=True)


@needs_root
def test_what_no_process_holds_is_found_as_well(model, folder, public):
    image = folder / EXPERT
    with mounted_until(model, folder):
        subprocess.run(["mount", "-t", "tmpfs", "none", folder / "experts"], check=True)
        fail("umount", folder, naming=[f'what is mounted on "{folder}/experts"', "unmount what is mounted on it"])
        subprocess.run(["umount", folder / "experts"], check=True)
        device = run("losetup", "--find", "--show", "--read-only", image).stdout.strip()
        try:
            fail("umount", folder, naming=[device, "end that"])
        finally:
            subprocess.run(["losetup", "-d", device], check=True)
        wait_for(lambda: odmoe("umount", folder).returncode == 0)


@contextlib.contextmanager
def mounted_until(model, folder, *flags, user=ME):
    """A mount that the test itself unmounts."""
    succeed("mount", model, folder, *flags, user=user)
    try:
        yield
    finally:
        detach(folder)


@needs_root
def test_a_user_is_not_told_more_than_is_known(model, public, nobody):
    """Root has a file of the mount open, which the user cannot see."""
    where = public / "mnt"
    where.mkdir()
    os.chown(where, nobody.uid, nobody.gid)
    options = "allow_other"
    conf = public / "fuse.conf"
    conf.write_text("user_allow_other\n")
    run("mount", "--bind", conf, "/etc/fuse.conf")
    try:
        with mounted_until(model, where, "-o", options, user=nobody), holding(ME, where / EXPERT):
            said = fail("umount", where, user=nobody, naming=["but not by a process that you may look into", "sudo"])
            assert "only its owner" not in said
    finally:
        run("umount", "/etc/fuse.conf")


# --- what goes on after it ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_another_namespace(folder, public):
    """A process with a copy of every mount, as a container has it."""
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo there; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            yield f"in the mount namespace of sleep (process {process.pid})"
        finally:
            process.kill()


@contextlib.contextmanager
def bound_elsewhere(folder, public):
    other = public / "other"
    other.mkdir()
    subprocess.run(["mount", "--bind", folder, other], check=True)
    try:
        yield f'still mounted on "{other}"'
    finally:
        subprocess.run(["umount", other], check=True)


@contextlib.contextmanager
def below_an_overlay(folder, public):
    over = public / "over"
    over.mkdir()
    lower = f"lowerdir={folder}/experts:{folder}/base_model"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", lower, over], check=True)
    try:
        yield "goes on serving"
    finally:
        subprocess.run(["umount", over], check=True)


@needs_root
@promises(RELEASED)
@pytest.mark.parametrize("keeper", [in_another_namespace, bound_elsewhere, below_an_overlay])
def test_a_daemon_that_goes_on_after_an_unmount_is_told_of(keeper, model, folder, public):
    succeed("mount", model, folder)
    daemon = daemon_of(folder)
    with keeper(folder, public) as reason:
        said = succeed("umount", folder)
        assert mount_at(folder) is None and is_running(daemon)
        assert said.startswith(f"unmounted {folder}, but process {daemon} goes on serving the model")
        assert reason in said
    wait_for(lambda: not is_running(daemon))


@needs_root
def test_a_mount_that_gets_the_number_of_one_that_ends_is_not_taken_for_a_copy_of_it(model, folder, public):
    """The kernel gives the number of a device to the next mount at once, while a daemon may still be ending."""
    new = public / "new"
    new.mkdir()
    succeed("mount", model, folder)
    daemon = daemon_of(folder)
    os.kill(daemon, signal.SIGSTOP)
    try:
        with subprocess.Popen([BINARY, "umount", folder], stdout=subprocess.PIPE, text=True) as umount:
            wait_for(lambda: mount_at(folder) is None)
            succeed("mount", model, new)
            said = umount.communicate()[0]
        assert f"process {daemon} goes on serving the model, and has not ended within a second" in said
        assert str(new) not in said
    finally:
        os.kill(daemon, signal.SIGCONT)
        detach(new)
    wait_for(lambda: not is_running(daemon))


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


def test_a_background_daemon_that_is_told_to_end_takes_the_mount_with_it(person, model, folder):
    succeed("mount", model, folder, user=person)
    daemon = daemon_of(folder)
    os.kill(daemon, signal.SIGTERM)
    wait_for(lambda: mount_at(folder) is None and not is_running(daemon))


# --- by a signal, wherever it is by then ----------------------------------------------------------------------------


def by_renaming_the_folder(public):
    (public / "above").rename(public / "renamed")
    return public / "renamed/mnt"


def by_moving_the_mount(public):
    (public / "elsewhere").mkdir()
    subprocess.run(["mount", "--move", public / "above/mnt", public / "elsewhere"], check=True)
    return public / "elsewhere"


def by_binding_it_twice(public):
    (public / "copy").mkdir()
    subprocess.run(["mount", "--bind", public / "above/mnt", public / "copy"], check=True)
    return public / "copy"


@needs_root
@pytest.mark.parametrize("move", [by_renaming_the_folder, by_moving_the_mount, by_binding_it_twice])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_mount_that_was_moved_is_found_when_a_signal_ends_it(move, number, model, public):
    folder = public / "above/mnt"
    folder.parent.mkdir()
    # What is moved must not be shared.
    run("mount", "--bind", public, public)
    run("mount", "--make-private", public)
    try:
        with foreground(model, folder) as process:
            there = move(public)
            assert os.listdir(there) == ["base_model", "experts"]
            process.send_signal(number)
            assert process.wait(60) == 0, process.stderr.read()
            assert not [m.at for m in mounts() if m.at.startswith(str(public)) and m.kind == "fuse.odmoe"]
    finally:
        detach(public)


def test_a_user_s_mount_whose_folder_was_renamed_ends_with_a_signal(person, model, folder, public):
    above = public / "above"
    above.mkdir()
    os.chown(above, person.uid, person.gid)
    (above / "mnt").mkdir()
    os.chown(above / "mnt", person.uid, person.gid)
    try:
        with foreground(model, above / "mnt", user=person) as process:
            above.rename(public / "renamed")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert not [m.at for m in mounts() if m.at.startswith(str(public))]
    finally:
        detach(public / "renamed/mnt")


@needs_root
def test_what_cannot_be_reached_is_not_called_unmounted(model, folder):
    with foreground(model, folder) as process:
        subprocess.run(["mount", "-t", "tmpfs", "above", folder], check=True)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.readline()
        assert f'"{folder}" lies under another mount' in said and "unmounted" not in said
        assert [m.source for m in mounts() if m.at == str(folder)] == [str(model), "above"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


# --- by an abort ----------------------------------------------------------------------------------------------------


def by_umount_f_of_a_copy(folder):
    subprocess.run(["unshare", "-m", "--propagation", "private", "umount", "-f", folder], check=True)


def by_fusectl(folder):
    with tempfile.TemporaryDirectory() as control:
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
        try:
            connection = mount_at(folder).device.removeprefix("0:")
            Path(control, connection, "abort").write_text("1")
        finally:
            subprocess.run(["umount", control], check=True)


ABORTED = "A mount whose connection is aborted ends with an error, and is removed; so a service that restarts it can."


@needs_root
@promises(ABORTED)
@pytest.mark.parametrize("abort", [by_umount_f_of_a_copy, by_fusectl])
def test_an_aborted_connection_is_no_unmount(abort, person, model, folder):
    with foreground(model, folder, user=person) as process:
        abort(folder)
        assert process.wait(60) == 1
        assert f'the connection of the mount on "{folder}" was aborted' in process.stderr.read()
        assert mount_at(folder) is None


@needs_root
@promises(ABORTED)
def test_the_daemon_of_an_aborted_mount_says_so_in_its_log(model, folder, public):
    log = public / "log"
    succeed("mount", model, folder, "--log-file", log)
    by_fusectl(folder)
    wait_for(lambda: mount_at(folder) is None)
    wait_for(lambda: "was aborted" in log.read_text())
    succeed("mount", model, folder)
    succeed("umount", folder)


@needs_root
def test_an_unmount_by_force_is_an_unmount(person, model, folder):
    with foreground(model, folder, user=person) as process:
        subprocess.run(["umount", "-f", folder], check=True)
        assert process.wait(60) == 0
        assert mount_at(folder) is None


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
