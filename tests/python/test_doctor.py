"""`doctor`: what keeps mounts from working is found and its cure named, and exit statuses say whether they work."""

import json
import os
import shutil

import pytest

from odmoe import ME, NO_FUSE, User, fail, in_private_mounts, needs_root, odmoe, run, succeed

CLOSED = 'cp -a /dev/fuse "$1/fuse" && chmod 600 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse'
ANOTHER = 'cp -a /dev/null "$1/fuse" && mount --bind "$1/fuse" /dev/fuse'


def checks(done, status):
    assert done.returncode == status, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["works"] == (status == 0)
    assert all(set(check) == {"name", "verdict", "found", "cure"} for check in report["checks"])
    return {check["name"]: check for check in report["checks"]}


def test_where_mounts_work_doctor_says_so_and_leaves_nothing(person):
    before = set(os.listdir("/tmp"))
    found = checks(odmoe("doctor", "--json", user=person), 0)
    assert found["trial mount"]["verdict"] == found["/dev/fuse"]["verdict"] == "good"
    assert ("fusermount3" in found) == (person != ME)
    said = succeed("doctor", user=person)
    assert said.endswith("\nmounts work here\n")
    assert [line.split()[0] for line in said.splitlines() if line[:4].strip()][:-1] == [
        {"good": "ok", "note": "note"}[check["verdict"]] for check in found.values()
    ]
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("odmoe-doctor")]


@needs_root
@pytest.mark.parametrize(
    ("change", "who", "cure"),
    [
        (NO_FUSE, "root", "docker run --device /dev/fuse"),
        (CLOSED, "nobody", "sudo chmod 0666 /dev/fuse"),
        (ANOTHER, "root", "sudo mknod -m 0666 /dev/fuse c 10 229"),
    ],
)
def test_a_device_that_cannot_be_used_is_named_with_its_cure(change, who, cure, public, nobody, tmp_path):
    # As in a container of docker; on a machine the cure of a missing device is another.
    change += '\n[ -e /.dockerenv ] || { touch "$1/env" && cp "$1/env" /.dockerenv; }' if who == "root" and change == NO_FUSE else ""
    existed = os.path.exists("/.dockerenv")
    try:
        done = in_private_mounts(change, public, "doctor", "--json", user=nobody if who == "nobody" else ME)
    finally:
        if not existed and os.path.exists("/.dockerenv"):
            os.unlink("/.dockerenv")
    found = checks(done, 3)
    assert found["/dev/fuse"]["verdict"] == "failure"
    assert cure in found["/dev/fuse"]["cure"]
    assert found["trial mount"]["verdict"] == "failure"


@needs_root
def test_a_mount_helper_without_its_bit_is_named_with_its_cure(public, nobody, monkeypatch):
    helper = public / "fusermount3"
    shutil.copy(shutil.which("fusermount3"), helper)
    helper.chmod(0o755)
    monkeypatch.setenv("FUSERMOUNT_PATH", str(helper))
    found = checks(odmoe("doctor", "--json", user=nobody), 3)
    assert f"sudo chmod u+s {helper}" in found["fusermount3"]["cure"]


@needs_root
@pytest.mark.parametrize("program", ["nothing", "/bin/cat", "/bin/sh", "/usr/bin/yes"])
def test_a_variable_that_names_another_program_is_to_be_unset(program, public, nobody, monkeypatch):
    """Never: to make that set-user-id."""
    monkeypatch.setenv("FUSERMOUNT_PATH", str(public / program))
    found = checks(odmoe("doctor", "--json", user=nobody), 3)
    assert found["fusermount3"]["cure"] == "unset FUSERMOUNT_PATH"


@needs_root
def test_a_missing_mount_helper_is_to_be_installed(public, nobody):
    hidden = 'touch "$1/nothing"; mount --bind "$1/nothing" "$(command -v fusermount3)"'
    done = in_private_mounts(hidden, public, "doctor", "--json", user=nobody)
    assert "apt install fuse3" in checks(done, 3)["fusermount3"]["cure"]


@needs_root
def test_a_bad_temporary_folder_says_nothing_of_mounts(person, public, monkeypatch):
    (public / "closed").mkdir(mode=0o555)
    for folder in (public / "nothing", public / "closed", "/proc"):
        monkeypatch.setenv("TMPDIR", str(folder))
        assert "mounts work here" in succeed("doctor", user=person)


@needs_root
def test_what_could_not_be_tried_is_not_known(public, nobody, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(public / "nothing"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    closed = 'chmod 755 "$1"; mkdir "$1/empty"; mount --bind "$1/empty" /var/tmp; mount --bind "$1/empty" /tmp'
    binary = "/usr/local/bin/odmoe-fs-tested"
    shutil.copy(nobody.binary, binary)
    try:
        done = in_private_mounts(closed, public, "doctor", "--json", user=User(nobody.uid, nobody.gid, binary))
    finally:
        os.unlink(binary)
    assert done.returncode == 1, done.stdout + done.stderr
    assert json.JSONDecoder().raw_decode(done.stdout)[0]["works"] is None
    assert "could not be tried" in done.stderr and "TMPDIR" in done.stderr
    assert "do not work" not in done.stdout


@needs_root
def test_root_without_the_right_to_mount_is_told_how_to_start_the_container():
    done = run("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", ME.binary, "doctor", "--json")
    (found,) = [check for name, check in checks(done, 3).items() if name in ("container", "root")]
    assert "--cap-add SYS_ADMIN" in found["cure"]


@needs_root
def test_where_set_user_id_programs_do_nothing_it_is_said(nobody):
    done = run("setpriv", "--no-new-privs", nobody.binary, "doctor", "--json", user=nobody)
    assert "no-new-privileges" in checks(done, 3)["fusermount3"]["cure"]


@needs_root
def test_a_user_without_a_name_is_noted(nobody):
    done = run("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", nobody.binary, "doctor", "--json")
    assert "54321" in checks(done, done.returncode)["user"]["found"]


def test_errors_are_told_on_screen_and_as_json(tmp_path):
    said = fail("verify", tmp_path / "nothing.gguf", "--json")
    done = odmoe("verify", tmp_path / "nothing.gguf", "--json")
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"code", "message", "hint"} and error["code"] == "model.io"
    assert said == f"error: {error['message']}; {error['hint']}\n"
