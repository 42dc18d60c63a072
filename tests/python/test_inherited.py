"""What a caller hands down: ignored and blocked signals, a umask, a process group by which an automounter knows it."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
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
    is_running,
    mount_at,
    mounted,
    needs_root,
    odmoe,
    promises,
    run,
    wait_for,
)


def ignoring(*arguments, user=ME):
    """Runs `odmoe-fs` as a program does that never waits for its children."""
    script = 'trap "" CHLD; exec "$@"'
    return run("sh", "-c", script, "sh", user.binary, *arguments, user=user)


@promises("What a caller has made of signals before, ignored or blocked, does not change what commands do or say.")
def test_callers_that_ignore_the_end_of_children_change_nothing(person, model, folder):
    mount = ignoring("mount", model, folder, user=person)
    assert mount.returncode == 0, mount.stderr
    listed = json.loads(ignoring("status", "--json", user=person).stdout)
    assert [line["state"] for line in listed if line["directory"] == str(folder)] == ["alive"]
    os.kill(daemon_of(folder), signal.SIGKILL)
    wait_for(lambda: ask(person, "os.listdir(root)", root=folder) != 0)
    listed = json.loads(ignoring("status", "--json", user=person).stdout)
    assert [line["state"] for line in listed if line["directory"] == str(folder)] == ["stale"]
    repaired = ignoring("mount", model, folder, user=person)
    assert repaired.returncode == 0 and "process is dead; unmounted it" in repaired.stderr
    assert ignoring("umount", folder, user=person).returncode == 0
    assert mount_at(folder) is None
    assert "mounts work here" in ignoring("doctor", user=person).stdout
    assert ignoring("demo", user=person).returncode == 0


@promises("What a caller has made of signals before, ignored or blocked, does not change what commands do or say.")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_callers_that_block_signals_change_nothing(number, person, model, folder):
    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))

    command = [str(word) for word in (person.binary, "mount", "-f", model, folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=block, **person.switch()) as process:
        try:
            assert process.stdout.readline().startswith(b"mounted on")
            process.send_signal(number)
            assert process.wait(60) == 0
            assert mount_at(folder) is None
        finally:
            detach(folder)
            process.kill()


STAY_IGNORED = (
    "Only SIGHUP and SIGINT stay ignored if they were, as with `nohup` and with `&` in a script, and only in the command "
    "itself: the daemon obeys them. SIGTERM is always obeyed."
)
# How callers make a command ignore signals.
IGNORERS = {
    "all": [PYTHON, "-c", """
import os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])
"""],
    "nohup": ["nohup"],
    "&": ["sh", "-c", '"$@" & wait $!', "sh"],
    "trap": ["sh", "-c", 'trap "" HUP INT TERM USR1; exec "$@"', "sh"],
}


def started_by(ignorer, *arguments, user=ME):
    command = [str(word) for word in (*IGNORERS[ignorer], user.binary, *arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes, **user.switch())


def is_pending(pid, number):
    status = dict(re.findall(r"^(SigPnd|ShdPnd):\s*(.+)$", Path(f"/proc/{pid}/status").read_text(), re.M))
    return any(int(mask, 16) >> number - 1 & 1 for mask in status.values())


@promises(STAY_IGNORED)
@pytest.mark.parametrize("ignorer", IGNORERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_daemon_obeys_signals_that_its_caller_ignored(ignorer, number, person, model, folder):
    with started_by(ignorer, "mount", model, folder, user=person) as mount:
        assert mount.wait(60) == 0, mount.stderr.read()
    daemon = daemon_of(folder)
    os.kill(daemon, number)
    wait_for(lambda: mount_at(folder) is None and not is_running(daemon))


@promises(STAY_IGNORED)
@pytest.mark.parametrize(
    "ignorer,numbers",
    [("all", [signal.SIGHUP, signal.SIGINT]), ("nohup", [signal.SIGHUP]), ("trap", [signal.SIGHUP, signal.SIGINT])],
    ids=str,
)
def test_a_foreground_mount_ignores_what_its_caller_ignored_and_obeys_sigterm(ignorer, numbers, person, model, folder):
    with started_by(ignorer, "mount", "-f", model, folder, user=person) as process:
        try:
            assert process.stdout.readline().startswith("mounted on")
            for number in numbers * 2:  # a second one would end it at once
                process.send_signal(number)
                wait_for(lambda number=number: not is_pending(process.pid, number))
                assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert mount_at(folder) is None
        finally:
            detach(folder)
            process.kill()


@promises(STAY_IGNORED)
@pytest.mark.parametrize("ignorer", ["all", "trap"])
def test_a_command_ignores_what_its_caller_ignored_and_obeys_sigterm(ignorer, tmp_path):
    with started_by(ignorer, "-q", "toy", tmp_path / "big.gguf", "--layers", "60") as process:
        try:
            wait_for(lambda: os.listdir(tmp_path))
            for number in [signal.SIGHUP, signal.SIGINT] * 2:
                process.send_signal(number)
                wait_for(lambda number=number: not is_pending(process.pid, number))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
            assert os.listdir(tmp_path) == []
        finally:
            process.kill()


@promises(STAY_IGNORED)
@pytest.mark.parametrize("ignorer", ["all", "trap"])
def test_a_mount_whose_model_hangs_obeys_sigterm_whatever_its_caller_ignored(ignorer, person, model, folder, public):
    with mounted(model, public / "lower", user=person) as lower:
        (public / "mnt").mkdir(exist_ok=True)
        stopped = daemon_of(lower)
        os.kill(stopped, signal.SIGSTOP)
        try:
            with started_by(ignorer, "mount", lower / "base_model/metadata.gguf", folder, user=person) as process:
                wait_for(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert mount_at(folder) is None


@promises("Temporary folders are for their user alone, whatever the umask.")
@pytest.mark.parametrize("command", ["demo", "doctor"])
def test_a_careless_umask_opens_no_temporary_folder(command, public, nobody):
    """The mount helper, which everybody may replace for himself, looks at the folder that the mount lies in."""
    if ME.uid != 0:
        pytest.skip("root mounts without the helper")
    helper, seen = public / "fusermount3", public / "seen"
    seen.touch()
    seen.chmod(0o666)
    real = shutil.which("fusermount3")
    helper.write_text(f'#!/bin/sh\nfor last; do :; done\nstat -c %a "${{last%/*}}" >>{seen}\nexec {real} "$@"\n')
    helper.chmod(0o755)
    environment = {**os.environ, "FUSERMOUNT_PATH": str(helper)}
    done = odmoe(command, user=nobody, umask=0, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(seen.read_text().split()) - {""} == {"700"}


@promises("Temporary folders are for their user alone, whatever the umask.")
@pytest.mark.parametrize("command", ["demo", "doctor"])
@pytest.mark.parametrize("umask", [0o777, 0o400], ids=oct)
def test_a_umask_that_denies_us_our_own_files_leaves_nothing_behind(command, umask, public, nobody):
    if ME.uid != 0:
        pytest.skip("root makes the folder for another user")
    folder = public / "tmp"
    folder.mkdir()
    folder.chmod(0o777)
    done = odmoe(command, user=nobody, umask=umask, env={**os.environ, "TMPDIR": str(folder)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(folder) == []


def test_a_careless_umask_lets_nobody_write_to_the_log(model, public):
    log = public / "log"
    with mounted(model, public / "mnt", "--log-file", log, umask=0):
        assert stat.S_IMODE(log.stat().st_mode) == 0o644


# --- automounts -----------------------------------------------------------------------------------------------------

# Sets a trap on the folder of its first argument; each touch makes it run the rest of them. The protocol is that of the
# kernel's Documentation/filesystems/autofs.rst and linux/auto_dev-ioctl.h.
AUTOMOUNTER = """
import ctypes, fcntl, os, struct, subprocess, sys
folder, command = sys.argv[1], sys.argv[2:]
OPEN_MOUNT, READY, FAIL = 0x74, 0x76, 0x77
libc = ctypes.CDLL(None, use_errno=True)
ours, theirs = os.pipe2(os.O_DIRECT)
options = f"fd={theirs},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
if libc.mount(b"trap", folder.encode(), b"autofs", 0, options.encode()) != 0:
    sys.exit(os.strerror(ctypes.get_errno()))
os.close(theirs)
control = os.open("/dev/autofs", os.O_RDONLY)

def ask(what, descriptor, *numbers, path=b""):
    fixed = struct.pack("<IIIi2I", 1, 1, 24 + len(path), descriptor, *numbers)
    request = bytearray(fixed + path)
    fcntl.ioctl(control, 3 << 30 | 24 << 16 | 0x93 << 8 | what, request)
    return struct.unpack_from("<i", request, 12)[0]

device = os.stat(folder).st_dev
minor = os.minor(device)
encoded = minor & 0xff | os.major(device) << 8 | (minor & ~0xff) << 12
trap = ask(OPEN_MOUNT, -1, encoded, 0, path=folder.encode() + bytes(1))
print("waiting", flush=True)
while packet := os.read(ours, 4096):
    (token,) = struct.unpack_from("<I", packet, 8)
    failed = subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0
    ask(FAIL if failed else READY, trap, token, 2**32 - 2 if failed else 0)
"""


@contextlib.contextmanager
def automounter(folder, *command):
    """What systemd does for `x-systemd.automount`. Whoever is in its process group passes the trap; everybody else waits."""
    arguments = ["python3", "-c", AUTOMOUNTER, str(folder), *(str(word) for word in command)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0) as process:
        try:
            assert process.stdout.readline() == b"waiting\n", process.stderr.read().decode()
            yield
        finally:
            process.kill()
            detach(folder)


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/autofs"), reason="this kernel has no autofs")
@promises("A mount can be made by an automounter, such as `x-systemd.automount`: it never waits for itself.")
@pytest.mark.parametrize("flags", [[], ["--stats"], ["--replace"]], ids=str)
def test_a_touch_of_an_automount_point_brings_the_mount_up(flags, model, public):
    folder = public / "mnt"
    folder.mkdir()
    with automounter(folder, BINARY, "mount", *flags, model, folder):
        assert ask(ME, LISTING, root=folder) == ["base_model", "experts"]
        daemon = daemon_of(folder)
        assert os.getsid(daemon) == daemon
        assert run(BINARY, "umount", folder).returncode == 0
        wait_for(lambda: not is_running(daemon))
        # And once more.
        assert ask(ME, LISTING, root=folder) == ["base_model", "experts"]
        assert run(BINARY, "umount", folder).returncode == 0


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/autofs"), reason="this kernel has no autofs")
def test_an_automount_that_fails_is_reported_as_failed(public):
    folder = public / "mnt"
    folder.mkdir()
    with automounter(folder, BINARY, "mount", public / "nothing.gguf", folder):
        assert ask(ME, LISTING, root=folder) == errno.ENOENT
