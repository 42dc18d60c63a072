"""`doctor`: what keeps mounts from working is found and its cure named, and exit statuses say whether they work."""

import json
import os
import shutil

import pytest

from odmoe import ME, NO_FUSE, User, fail, in_private_mounts, needs_root, odmoe, run, sparse_gguf, succeed

CLOSED = 'cp -a /dev/fuse "$1/fuse" && chmod 600 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse'
ANOTHER = 'cp -a /dev/null "$1/fuse" && mount --bind "$1/fuse" /dev/fuse'


def checks(done, status):
    assert done.returncode == status, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["works"] == (status == 0)
    assert all(set(check) == {"name", "verdict", "found", "cure"} for check in report["checks"])
    return {check["name"]: check for check in report["checks"]}


def test_where_mounts_work_doctor_says_so_and_leaves_nothing(person, public, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(public))
    before = os.listdir(public)
    found = checks(odmoe("doctor", "--json", user=person), 0)
    assert found["trial mount"]["verdict"] == found["/dev/fuse"]["verdict"] == "good"
    assert ("fusermount3" in found) == (person != ME)
    said = succeed("doctor", user=person)
    assert said.endswith("\nmounts work here\n")
    assert [line.split()[0] for line in said.splitlines() if line[:4].strip()][:-1] == [
        {"good": "ok", "note": "note"}[check["verdict"]] for check in found.values()
    ]
    assert os.listdir(public) == before


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


# --- with a model ---------------------------------------------------------------------------------------------------


def told(*arguments):
    """What doctor says of a model: its report, and the lines below the heading by the form that they begin with."""
    report = json.loads(succeed("doctor", *arguments, "--json"))
    heading, *lines = succeed("doctor", *arguments).split("\nmounts work here\n\n")[1].splitlines()
    assert heading == "in each form (--as)"
    return report, {line.split("  ")[1]: line for line in lines}


@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "iq2_s", "mxfp4", "bf16"])
def test_doctor_says_what_each_form_of_a_model_takes(kind, tmp_path):
    """The same as `inspect`, which is compared with trees; and which types MLX cannot pack."""
    model = tmp_path / "toy.gguf"
    succeed("toy", model, "--type", kind, "--dim", 256, "--ffn-dim", 256, "--vocab", 64)
    report, lines = told(model)
    inspected = json.loads(succeed("inspect", model, "--json"))
    assert (report["works"], report["forms"], report["not_packed"]) == (True, inspected["forms"], inspected["not_packed"])
    is_packed = kind not in ("q6_k", "iq2_s")
    forms = [(form["form"], form["requant"]) for form in report["forms"]]
    assert forms[:5] == [(name, False) for name in ("raw", "f32", "f16", "bf16", "mlx")]
    assert forms[5:] == ([] if is_packed else [("mlx", True)])
    assert list(report["not_packed"]) == ([] if is_packed else [kind.upper()])
    assert is_packed == (f"mlx shows as plain F16 numbers: {kind.upper()} in 16 tensors" not in lines)
    (title,) = [line for name, line in lines.items() if name == "form"]
    assert title.endswith(" free")
    rows = [line for name, line in lines.items() if name.split()[0].strip(",") in ("raw", "f32", "f16", "mlx")]
    assert all(line.endswith("  fits") for line in rows if "plain" not in line)


def test_doctor_says_of_a_working_set_that_the_machine_has_no_room_for_it(tmp_path):
    kv = {"general.architecture": "moe", "moe.block_count": 1, "moe.expert_count": 8, "moe.expert_used_count": 8}
    # 3.4 TiB as blocks.
    stacks = [[f"blk.0.ffn_{name}_exps.weight", [1 << 18, 1 << 20, 8], "Q4_K"] for name in ("down", "gate", "up")]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": stacks}))
    report, lines = told(sparse_gguf(table, tmp_path / "model.gguf")[0])
    assert all(form["active"]["bytes"] > report["memory"]["total"] for form in report["forms"])
    assert all(lines[name].endswith("  does not fit") for name in ("raw", "f32", "f16, bf16", "mlx"))


def test_doctor_says_of_types_that_nobody_here_knows_that_they_are_shown_raw(tmp_path):
    table = tmp_path / "table.json"
    stack = ["blk.0.ffn_up_exps.weight", [256, 256, 2], "IQ4_KS"]
    table.write_text(json.dumps({"kv": {"general.architecture": "moe"}, "tensors": [stack]}))
    report, lines = told(sparse_gguf(table, tmp_path / "model.gguf")[0])
    assert [form["form"] for form in report["forms"]] == ["raw"]
    assert list(lines) == ["raw only: the numbers of some of its types are not known"]


def test_a_model_that_cannot_be_opened_is_an_error_of_doctor(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    fail("doctor", tmp_path / "bad.gguf", naming=["bad.gguf"])
    error = json.loads(odmoe("doctor", tmp_path / "no.gguf", "--json").stdout)["error"]
    assert error["code"] == "model.io"
