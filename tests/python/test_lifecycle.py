"""A mount's life as a person or a service meets it: options of fstab, `--replace`, who keeps it busy, logs, systemd."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

import models
from odmoe import (
    LISTING,
    ME,
    USES,
    User,
    ask,
    daemon_of,
    detach,
    fail,
    foreground,
    holding,
    in_private_mounts,
    is_running,
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

REPLACED = (
    "`mount --replace` removes our mount on the directory, whatever its state, once everything else is known to work; "
    "programs that have files of it open keep it."
)
EXPERT = "experts/layer_00_expert_000.safetensors"


# --- busy -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use", USES)
def test_a_busy_unmount_names_who_is_in_the_way_and_offers_lazy(use, person, model, folder):
    with mounted(model, folder, user=person):
        with holding(person, folder / EXPERT, use) as holder:
            fail("umount", folder, user=person, naming=[f"python3 (process {holder.pid})", "--lazy"])
            assert mount_at(folder)


def test_who_unmounts_is_not_in_its_own_way(person, model, folder):
    """A shell that stands in the mount is."""
    with mounted(model, folder, user=person):
        script = f'cd "{folder}" && "{person.binary}" umount "{folder}"'
        done = run("sh", "-c", script, user=person)
        assert done.returncode == 1 and "sh (process " in done.stderr and "odmoe-fs (process" not in done.stderr


def test_several_directories_are_unmounted_at_once_and_each_that_fails_is_named(person, model, public, folder):
    other = public / "other"
    other.mkdir()
    shutil.chown(other, person.uid, person.gid)
    for where in (folder, other):
        succeed("mount", model, where, user=person)
    done = odmoe("umount", folder, public / "nothing", other, public, user=person)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 2 and "nothing" in done.stderr
    assert mount_at(folder) is None and mount_at(other) is None


# --- replaced -------------------------------------------------------------------------------------------------------


@promises(REPLACED)
def test_replace_puts_another_model_in_the_place_of_one_that_is_used(person, model, folder, public):
    other = public / "other"
    other.mkdir()
    dense = models.write_dense(other)[0]
    with mounted(model, folder, user=person):
        fail("mount", dense, folder, user=person, naming=["--replace"])
        with holding(person, folder / EXPERT):
            done = odmoe("mount", "--replace", dense, folder, user=person)
            assert done.returncode == 0 and "keep it" in done.stderr, done.stderr
            assert [m.source for m in mounts() if m.at == str(folder)] == [str(dense)]


def test_a_model_that_the_mount_table_cannot_name_is_named(person, model, folder, public):
    odd = public / "a,b.gguf"
    shutil.copy(model, odd)
    with mounted(odd, folder, user=person):
        fail("mount", model, folder, user=person, naming=[f'"{odd}" is already mounted'])
        done = odmoe("mount", "--replace", model, folder, user=person)
        assert done.returncode == 0 and f'was a mount of "{odd}"' in done.stderr


@promises(REPLACED)
def test_replace_does_not_hang_on_a_daemon_that_is_stopped(person, model, folder):
    with mounted(model, folder, user=person):
        stopped = daemon_of(folder)
        os.kill(stopped, signal.SIGSTOP)
        try:
            succeed("mount", "--replace", model, folder, user=person)
            assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
        finally:
            os.kill(stopped, signal.SIGCONT)
        wait_for(lambda: not is_running(stopped))


@needs_root
@promises("Only mounts of our own are ever unmounted.")
def test_replace_never_takes_away_another_file_system(model, public):
    where = public / "mnt"
    where.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "theirs", where], check=True)
        (where / "file").touch()
        fail("mount", "--replace", model, where, naming=["not empty"])
        assert mount_at(where).source == "theirs"
    finally:
        detach(where)


@promises(REPLACED)
def test_a_mount_that_cannot_be_made_replaces_nothing(person, model, folder, public):
    with mounted(model, folder, user=person):
        fail("mount", "--replace", public / "nothing.gguf", folder, user=person)
        if person != ME:
            fail("mount", "--replace", "--allow-other", model, folder, user=person, naming=["user_allow_other"])
        assert ask(person, LISTING, root=folder) == ["base_model", "experts"]


def test_of_many_who_replace_at_once_the_last_one_stays_and_nobody_is_told_to_replace(person, model, folder, times):
    for _ in range(times(4, long=40)):
        command = [person.binary, "mount", "--replace", model, folder]
        rivals = [subprocess.Popen(command, stdout=-3, stderr=subprocess.PIPE, **person.switch()) for _ in range(6)]
        said = [rival.communicate()[1].decode() for rival in rivals]
        assert [rival.returncode for rival in rivals] == [0] * 6, said
        assert not [words for words in said if "--replace" in words]
        assert [m.at for m in mounts()].count(str(folder)) == 1
        assert ask(person, LISTING, root=folder) == ["base_model", "experts"]
        succeed("umount", folder, user=person)


@needs_root
def test_what_another_user_has_mounted_is_not_called_dead_when_it_cannot_be_replaced(model, public, nobody):
    where = public / "mnt"
    where.mkdir()
    where.chmod(0o777)
    with mounted(model, where):
        said = fail("mount", "--replace", model, where, user=nobody, naming=["cannot be replaced", "another user"])
        assert "dead" not in said
        assert mount_at(where)


# --- fstab ----------------------------------------------------------------------------------------------------------


def test_options_can_be_said_as_in_fstab(person, model, folder):
    options = "rw,noauto,x-systemd.automount,uid=7,gid=8,cache=direct,keep_source_cache"
    with mounted(model, folder, "-o", options, "-o", "threads=2", user=person):
        owner = ask(person, "s = os.stat(path); answer = [s.st_uid, s.st_gid]", path=folder / EXPERT)
        assert owner == [7, 8]
        assert set(mount_at(folder).options.split(",")) >= {"ro"}


def test_an_option_that_does_not_exist_is_wrong_usage(model, folder):
    for option in ("frobnicate", "uid=you", "threads=0"):
        said = fail("mount", model, folder, "-o", f"ro,{option}", status=2)
        assert option.split("=")[0] in said
    assert mount_at(folder) is None


def test_an_option_of_another_file_system_is_refused_with_what_to_do_instead(model, folder):
    for option, words in (("allow_root", "allow_other"), ("loop", "loop device"), ("direct_io", "cache=direct")):
        said = fail("mount", model, folder, "-o", option, status=2)
        assert f"-o {option}: there is no such option" in said and words in said.split("hint: ")[1]
    assert mount_at(folder) is None


# What mount(8) lists for every file system, and may hand to the helper of one.
EVERY_FILE_SYSTEMS = (
    "async,atime,context=system_u:object_r:container_file_t:s0,defaults,dev,diratime,dirsync,exec,group,iversion,lazytime,"
    "loud,mand,noatime,nodev,nodiratime,noexec,nofail,noiversion,nolazytime,nomand,norelatime,nostrictatime,nosuid,"
    'nosymfollow,nouser,owner,relatime,ro,rw,silent,strictatime,suid,sync,user,users,_netdev,fscontext="a:b:c:s0:c1,c2",'
    "defcontext=d,rootcontext=@target,X-mount.mkdir=0755,x-systemd.requires=b,comment=c,uhelper=udisks2"
)


def test_every_option_of_every_file_system_is_accepted(helper, person, model, folder):
    done = run(helper, model, folder, "-o", EVERY_FILE_SYSTEMS, user=person)
    if not os.path.exists("/sys/fs/selinux/enforce"):  # where the labels are real ones
        assert done.returncode == 0, done.stderr
        assert mount_at(folder).kind == "fuse.odmoe"
        succeed("umount", folder, user=person)


@needs_root
def test_where_selinux_is_on_its_labels_reach_the_kernel(model, folder, public):
    """The kernel of this machine does not know them, and says so."""
    selinux = 'mount -t tmpfs none /sys/fs && mkdir /sys/fs/selinux && touch /sys/fs/selinux/enforce; : "$1"'
    label = 'context="system_u:object_r:removable_t:s0:c1,c2"'
    done = in_private_mounts(selinux, public, "mount", model, folder, "-o", f"ro,{label}")
    assert done.returncode == 1 and "Invalid argument" in done.stderr
    assert mount_at(folder) is None


@pytest.fixture
def helper(person, public):
    """The name by which mount(8) calls the program."""
    link = public / "mount.fuse.odmoe"
    link.symlink_to(person.binary)
    return link


def test_the_helper_of_mount_mounts_checks_and_refuses(helper, person, model, folder):
    call = [helper, model, folder, "-t", "fuse.odmoe"]
    assert run(*call, "-f", "-o", "rw,noexec", user=person).returncode == 0
    assert mount_at(folder) is None
    assert run(*call, "-s", "-o", "rw,of_another", user=person).returncode == 0
    done = run(*call, "-o", "rw", user=person)
    assert done.returncode == 32 and "already mounted" in done.stderr
    succeed("umount", folder, user=person)
    done = run(*call, "-o", "of_another", user=person)
    assert done.returncode == 1 and "of_another" in done.stderr
    assert run(helper, model, user=person).returncode == 1


def test_a_faked_mount_changes_nothing(helper, person, model, folder, public):
    fake = [helper, model, folder, "-f", "-o", f"replace,log_file={public / 'log'}"]
    with mounted(model, folder, user=person):
        serving = daemon_of(folder)
        assert run(*fake, user=person).returncode == 0
        assert daemon_of(folder) == serving
        os.kill(serving, signal.SIGKILL)
        wait_for(lambda: not is_running(serving))
        assert run(*fake, user=person).returncode == 0
        assert mount_at(folder) is not None
    assert not (public / "log").exists()
    done = run(helper, public / "nothing.gguf", folder, "-f", user=person)
    assert done.returncode == 32 and "nothing.gguf" in done.stderr


# --- logs -----------------------------------------------------------------------------------------------------------


def test_the_log_is_never_the_model_a_pipe_or_a_folder(person, model, folder, public):
    before = model.read_bytes()
    pipe = public / "pipe"
    os.mkfifo(pipe, 0o666)
    pipe.chmod(0o666)
    if person == ME:
        fail("mount", model, folder, "--log-file", model, user=person, naming=["is the model itself"])
        link = public / "link.gguf"
        os.link(model, link)
        fail("mount", model, folder, "--log-file", link, user=person, naming=["is the model itself"])
    fail("mount", model, folder, "--log-file", pipe, user=person, naming=["pipe", "is not a regular file"])
    fail("mount", model, folder, "--log-file", public, user=person, naming=["is not a regular file"])
    assert mount_at(folder) is None
    assert model.read_bytes() == before


def test_a_log_can_be_read_by_programs(person, model, folder, public):
    log = public / "log"
    log.touch()
    log.chmod(0o666)
    with mounted(model, folder, "--log-file", log, "--log-format", "json", user=person):
        os.truncate(model, 100)
        reading = "answer = len(open(path, 'rb').read())"
        ask(person, reading, path=folder / EXPERT)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["level"] for line in lines} >= {"INFO", "ERROR"}
    assert any("has changed" in line["message"] for line in lines)
    assert all(line["timestamp"] for line in lines)


def test_each_request_is_logged_if_that_is_asked_for(model, folder, public):
    for flags, is_logged in {("-v",): False, ("-vv",): True, ("-v", "-v"): True}.items():
        log = public / f"log{len(flags)}{flags[0]}"
        with mounted(model, folder, *flags, "--log-file", log) as root:
            size = len((root / EXPERT).read_bytes())
            assert not (root / "experts" / "no\nthing").exists()
            assert os.statvfs(root).f_bavail == 0
        said = log.read_text()
        read = re.findall(rf'read "{EXPERT}": (\d+) bytes at (\d+)\n', said)
        requests = [r'lookup "no\nthing" in "experts"', 'lookup "experts" in "."', f'open "{EXPERT}"', 'statfs "."']
        assert [request in said for request in requests] == [is_logged] * 4
        if is_logged:
            assert min(int(start) for _, start in read) == 0
            assert max(int(start) + int(length) for length, start in read) >= size
        else:
            assert not read


def test_what_is_logged_does_not_reach_the_terminal(model, folder, public):
    done = odmoe("mount", model, folder, "--log-file", public / "log")
    assert (done.returncode, done.stderr) == (0, "")
    succeed("umount", folder)


@needs_root
def test_without_a_log_file_messages_go_to_the_journal(model, public):
    """What listens is no journald, but the socket and the protocol are its."""
    where = public / "mnt"
    listener = public / "listener.py"
    listener.write_text(f"""
import socket, subprocess, sys
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/run/systemd/journal/socket")
journal.settimeout(30)
subprocess.run([{str(ME.binary)!r}, "mount", {str(model)!r}, {str(where)!r}], check=True)
said = b""
while b"mounted on" not in said:
    said += journal.recv(1 << 16)
subprocess.run([{str(ME.binary)!r}, "umount", {str(where)!r}], check=True)
sys.stdout.buffer.write(said)
""")
    where.mkdir()
    script = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && exec python3 \"$1\""
    done = run("unshare", "-m", "sh", "-euc", script, "sh", listener)
    assert done.returncode == 0, done.stderr
    assert "SYSLOG_IDENTIFIER\n" in done.stdout and "worker threads" in done.stdout


# --- systemd --------------------------------------------------------------------------------------------------------


def test_systemd_is_told_when_the_tree_answers(model, public, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(public / "notify"))
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(public / "notify"))
        with foreground(model, public / "mnt") as process:
            assert manager.recv(100) == b"READY=1\n"
            assert (public / "mnt" / EXPERT).stat().st_size
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


# --- what is lacking ------------------------------------------------------------------------------------------------


# Reads every file of the folder `root` whole, then lists it again.
READING = """
import pathlib
total = sum(len(path.read_bytes()) for path in pathlib.Path(root).rglob("*") if path.is_file())
answer = [total > 0, os.listdir(root) != []]
"""


def mounts_soundly_or_not_at_all(limit, threads, model, folder, person):
    """Mounts under a limit; says whether it worked."""
    before = {"preexec_fn": lambda: resource.setrlimit(*limit)}
    done = odmoe("mount", model, folder, *threads, user=person, **before)
    if done.returncode != 0:
        assert "error: " in done.stderr and mount_at(folder) is None
        return False
    daemon = daemon_of(folder)
    for _ in range(2):
        assert ask(person, READING, root=folder) == [True, True]
    assert is_running(daemon)
    succeed("umount", folder, user=person)
    return True


@promises("`mount` reports success only if the mount is served by all its workers, and has the memory to go on.")
@pytest.mark.parametrize("threads", [[], ["--threads", 3], ["--threads", 16]], ids=str)
def test_little_address_space_is_enough_or_an_error(threads, person, model, folder):
    outcomes = [
        mounts_soundly_or_not_at_all((resource.RLIMIT_AS, (mib << 20, mib << 20)), threads, model, folder, person)
        for mib in (60, *range(100, 701, 60))
    ]
    assert set(outcomes) == {False, True}


@needs_root
@promises("`mount` reports success only if the mount is served by all its workers, and has the memory to go on.")
@pytest.mark.parametrize("threads", [1, 3])
def test_few_processes_are_enough_or_an_error(threads, model, public, nobody):
    where = public / "mnt"
    where.mkdir()
    # Users of no other processes; those that have ended count until somebody has waited for them.
    user = User(54320 + threads, 54320, nobody.binary)
    shutil.chown(where, user.uid, user.gid)
    flags = ["--threads", threads]
    with known_by_name(user.uid):
        outcomes = [
            mounts_soundly_or_not_at_all((resource.RLIMIT_NPROC, (count, count)), flags, model, where, user)
            for count in range(1, 15)
        ]
    assert set(outcomes) == {False, True}


@contextlib.contextmanager
def known_by_name(uid):
    """The mount helper asks for the name of its user."""
    passwd = Path("/etc/passwd")
    before = passwd.read_text()
    passwd.write_text(f"{before.rstrip()}\nodmoe-test:x:{uid}:{uid}::/:/bin/sh\n")
    try:
        yield
    finally:
        passwd.write_text(before)


@needs_root
def test_a_mount_that_fails_says_what_is_wrong_with_the_machine(model, public, nobody):
    (public / "mnt").mkdir()
    closed = "cp -a /dev/fuse \"$1/fuse\" && chmod 600 \"$1/fuse\" && mount --bind \"$1/fuse\" /dev/fuse"
    scratch = public / "scratch"
    scratch.mkdir()
    done = in_private_mounts(closed, scratch, "mount", model, public / "mnt", user=nobody)
    assert done.returncode == 1 and "sudo chmod 0666 /dev/fuse" in done.stderr
