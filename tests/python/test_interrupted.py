"""Commands that are interrupted: either they have done what they say, or they leave nothing behind."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from odmoe import BINARY, ME, detach, is_running, mount_at, mounts, needs_root, promises, wait_for

NEITHER = (
    "`mount` that is interrupted or killed has either mounted and said so, or leaves neither a mount nor a process."
)
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def processes_of(folder):
    """Processes of ours that were started with a path in that folder, and run."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # they come and go
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if os.fsencode(folder) in file.read() and is_running(int(pid)):
                    found.append(int(pid))
    return found


def start(person, *arguments, **options):
    """A command in a process group of its own, as a shell starts it."""
    command = [str(word) for word in (person.binary, *arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, process_group=0, **pipes, **person.switch(), **options)


def interrupt(process, number, whom):
    with contextlib.suppress(ProcessLookupError):
        if whom == "group":  # Ctrl-C reaches all of them
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def check_that_nothing_or_all_is_left(process, folder, person):
    said, _ = process.communicate(timeout=60)
    is_done = process.returncode == 0
    if process.returncode == -signal.SIGKILL and said.endswith(f"umount {folder}\n"):
        # It was killed after its last words. The mount may stay, or go because nobody waited for it any more.
        end = time.monotonic() + 1
        while processes_of(folder) and time.monotonic() < end:
            time.sleep(0.01)
        is_done = mount_at(folder) is not None
    if is_done:
        assert mount_at(folder), "success was reported, but nothing is mounted"
        subprocess.run([person.binary, "umount", folder], check=True, **person.switch())
    wait_for(lambda: not processes_of(folder))
    assert mount_at(folder) is None, f"a mount is left behind by exit status {process.returncode}"


@promises(NEITHER)
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["group", "process"])
def test_a_mount_that_is_interrupted_leaves_all_or_nothing(number, whom, person, model, folder, times):
    if number == signal.SIGKILL and whom == "group":
        pytest.skip("the daemon is killed as well, and leaves a mount that `status` calls stale")
    delays = random.Random(number)
    for _ in range(times(12, long=100)):
        process = start(person, "mount", model, folder)
        time.sleep(delays.uniform(0, 0.06))
        interrupt(process, number, whom)
        check_that_nothing_or_all_is_left(process, folder, person)
        assert process.returncode in (0, 128 + number, -number)


@pytest.fixture
def slow_helper(public, nobody):
    """A mount helper that takes its time before it mounts and after it."""
    helper = public / "fusermount3"
    real = shutil.which("fusermount3")
    helper.write_text(f'#!/bin/sh\ncase "$1" in -u) exec {real} "$@";; esac\nsleep 0.4\n{real} "$@"\nstatus=$?\nsleep 0.4\nexit $status\n')
    helper.chmod(0o755)
    return {"env": {**os.environ, "FUSERMOUNT_PATH": str(helper)}}


@needs_root
@promises(NEITHER)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["group", "process"])
def test_a_slow_mount_helper_leaves_nothing_to_who_has_gone(number, whom, model, public, nobody, slow_helper):
    if number == signal.SIGKILL and whom == "group":
        pytest.skip("nobody is left to clean up")
    folder = public / "mnt"
    folder.mkdir()
    os.chown(folder, nobody.uid, nobody.gid)
    try:
        for delay in (0.1, 0.3, 0.5, 0.7, 0.9):
            process = start(nobody, "mount", model, folder, **slow_helper)
            time.sleep(delay)
            interrupt(process, number, whom)
            check_that_nothing_or_all_is_left(process, folder, nobody)
    finally:
        detach(folder)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_foreground_mount_that_is_interrupted_at_any_moment_leaves_nothing(number, person, model, folder, times):
    delays = random.Random(number)
    for _ in range(times(10, long=100)):
        process = start(person, "mount", "-f", model, folder)
        time.sleep(delays.uniform(0, 0.06))
        interrupt(process, number, "process")
        process.communicate(timeout=60)
        # 0: it was mounted already, and was unmounted because of the signal.
        assert process.returncode in (0, 128 + number, -number)
        assert mount_at(folder) is None


@needs_root
def test_a_second_signal_ends_a_mount_whose_helper_hangs(model, public, nobody):
    folder = public / "mnt"
    folder.mkdir()
    os.chown(folder, nobody.uid, nobody.gid)
    helper = public / "fusermount3"
    helper.write_text("#!/bin/sh\nsleep 1000\n")
    helper.chmod(0o755)
    process = start(nobody, "mount", model, folder, env={**os.environ, "FUSERMOUNT_PATH": str(helper)})
    try:
        wait_for(lambda: b"sleep" in b"".join(commands_of(process.pid)))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        detach(folder)


def commands_of(group):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.getpgid(int(pid)) == group:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    yield file.read()


# --- commands that mount on the way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["doctor", "demo"])
@pytest.mark.parametrize("whom", ["group", "process"])
def test_doctor_and_demo_that_are_interrupted_leave_neither_folders_nor_mounts(command, whom, person, public, times):
    delays = random.Random(command)
    temporary = public / "tmp"
    temporary.mkdir()
    temporary.chmod(0o777)
    for number in SIGNALS * times(3, long=20):
        process = start(person, command, env={**os.environ, "TMPDIR": str(temporary)})
        time.sleep(delays.uniform(0, 0.3))
        interrupt(process, number, whom)
        process.communicate(timeout=60)
        assert process.returncode in (0, 128 + number, -number)
        wait_for(lambda: not processes_of(temporary))
        assert not [m.at for m in mounts() if m.at.startswith(str(temporary))]
        assert os.listdir(temporary) == []


def test_a_signal_that_came_before_the_work_began_is_obeyed(public):
    """As when a caller has blocked signals, and one is pending: both are handed down through exec."""
    script = f"""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getpid(), signal.SIGTERM)
os.execv({str(BINARY)!r}, ["odmoe-fs", "toy", {str(public / "toy.gguf")!r}])
"""
    done = subprocess.run(["python3", "-c", script], timeout=60, check=False, **ME.switch())
    assert done.returncode == -signal.SIGTERM
    assert os.listdir(public) == []
