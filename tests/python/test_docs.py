"""What is written about the program is true of it: messages, manual pages, completions, exit statuses, the package."""

import os
import re
import shutil
import signal
import subprocess

import pytest

from odmoe import BINARY, REPO, fail, mount_at, needs_root, odmoe, run, succeed, wait_for

# Other names of commands, which have a page and completions, too.
ALIASES = {"unmount": "umount"}
COMMANDS = re.findall(r"^  ([a-z]+) +[A-Z]", succeed("--help"), re.M)


def in_one_line(text):
    """Source code with the strings that are broken over lines, or put together, as one."""
    return re.sub(r"\s+", " ", re.sub(r"\\\n\s*", "", text)).replace('\\"', '"')


CODE = in_one_line("".join(path.read_text() for path in sorted((REPO / "src").rglob("*.rs"))))


def messages():
    page = (REPO / "docs/TROUBLESHOOTING.md").read_text()
    page = re.sub(r"\n## The loader\n.*?(?=\n## )", "", page, flags=re.S)  # what others say
    text = re.sub(r"\s+", " ", page)
    for entry in re.findall(r"\* `(.+?)`(?=:|$| \*| ##)", text):
        yield entry.strip("`")


def test_every_message_of_the_troubleshooting_page_is_in_the_code():
    found = list(messages())
    assert len(found) > 25
    for message in found:
        pieces = [piece.strip(" ;:,`") for piece in message.split("…")]
        for piece in pieces:
            assert piece in CODE, message


def test_the_troubleshooting_page_knows_the_errors_of_mounting_and_unmounting():
    """Those of a machine or a user; not those that only a fault of ours can make."""
    page = re.sub(r"\s+", " ", (REPO / "docs/TROUBLESHOOTING.md").read_text())
    for words in (
        "cannot be started", "is not empty", "already mounted", "does not answer", "modprobe fuse", "chmod 0666",
        "fuse3", "user_allow_other", "is in use", "was mounted by another user", "was aborted",
    ):
        assert words in page


# --- manual pages ---------------------------------------------------------------------------------------------------


def test_every_command_has_a_manual_page_that_names_its_options(tmp_path):
    succeed("man", "--all", tmp_path)
    pages = {path.name: path.read_text() for path in tmp_path.iterdir()}
    commands = [command for command in COMMANDS if command != "help"]
    names = ["odmoe-fs", *(f"odmoe-fs-{command}" for command in (*commands, *ALIASES))]
    assert sorted(pages) == sorted(f"{name}.1" for name in names)
    for page in pages.values():
        named = re.findall(r"(odmoe-fs[a-z-]*)\(1\)", page.replace("\\-", "-"))
        assert named and set(named) <= set(names) or page.startswith(".so ")
    for command in commands:
        page = pages[f"odmoe-fs-{command}.1"].replace("\\-", "-")
        assert page == succeed("man", command).replace("\\-", "-")
        for option in re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", succeed(command, "--help"), re.M):
            assert option in page, (command, option)
    for alias, command in ALIASES.items():
        assert pages[f"odmoe-fs-{alias}.1"] == f".so man1/odmoe-fs-{command}.1\n"
        assert succeed("man", alias) == succeed("man", command)
    fail("man", "nothing", status=2, naming=["no command"])


def test_the_page_of_an_alias_is_found_by_man(tmp_path):
    if not shutil.which("man"):
        pytest.skip("man is not installed")
    succeed("man", "--all", tmp_path / "man1")
    for name in ("odmoe-fs-umount", "odmoe-fs-unmount"):
        done = run("man", "-M", tmp_path, name, env={**os.environ, "MANPAGER": "cat", "MANROFFOPT": ""})
        assert done.returncode == 0 and "--lazy" in done.stdout.replace("\u2010", "-").replace("\u2212", "-"), done.stderr


def test_manual_pages_are_formatted_without_a_warning(tmp_path):
    if not shutil.which("groff"):
        pytest.skip("groff is not installed")
    succeed("man", "--all", tmp_path / "man1")
    for page in (tmp_path / "man1").iterdir():
        command = ["groff", "-man", "-ww", "-z", "-Tutf8", page]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_the_exit_statuses_of_the_manual_page_are_those_of_the_program(tmp_path):
    page = succeed("man").replace("\\-", "-").split("EXIT STATUS")[1].split(".SH")[0]
    listed = re.findall(r"^\\fB(\d+)\\fR$", page, re.M)
    toy = tmp_path / "toy.gguf"
    statuses = {
        odmoe("toy", toy, "--dim", 64, "--ffn-dim", 64).returncode,
        odmoe("toy", toy).returncode,
        odmoe("toy").returncode,
    }
    succeed("materialize", toy, tmp_path / "out")
    (tmp_path / "out/experts/registry.json").unlink()
    statuses.add(odmoe("verify", toy, tmp_path / "out").returncode)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        big = tmp_path / number.name / "big.gguf"
        big.parent.mkdir()
        # It is ignored where these tests run in the background, or under nohup.
        heard = {"preexec_fn": lambda number=number: signal.signal(number, signal.SIG_DFL)}
        process = subprocess.Popen([BINARY, "-q", "toy", big, "--layers", "60"], stderr=subprocess.DEVNULL, **heard)
        wait_for(lambda folder=big.parent: os.listdir(folder))
        process.send_signal(number)
        statuses.add(process.wait(60))
    assert statuses == {int(status) for status in listed}


# --- completions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_know_every_command(shell, tmp_path):
    script = succeed("completions", shell)
    assert all(command in script for command in (*COMMANDS, *ALIASES))
    if shutil.which(shell):
        path = tmp_path / "completions"
        path.write_text(script)
        done = run(shell, "-n", path)
        assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_commands_and_options():
    code = succeed("completions", "bash") + """
complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _odmoe__fs odmoe-fs "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; echo "${COMPREPLY[@]}"; }
complete_words odmoe-fs mat
complete_words odmoe-fs mount --rep
complete_words odmoe-fs unmount --la
complete_words odmoe-fs unm
"""
    assert run("bash", "-c", code).stdout.splitlines() == ["materialize", "--replace", "--lazy", "unmount"]


# --- the package ----------------------------------------------------------------------------------------------------


@needs_root
def test_the_debian_package_installs_mounts_by_mount_and_fstab_and_goes_away(tmp_path):
    """Changes the machine, so only where that is meant for it: `.ci/run` says so."""
    if not os.environ.get("ODMOE_FS_INSTALL"):
        pytest.skip("ODMOE_FS_INSTALL is not set: the package is not installed")
    # The binary that all other tests run.
    environment = os.environ | {"CARGO_TARGET_DIR": str(REPO / "target"), "ODMOE_FS_BUILT": "1"}
    subprocess.run([REPO / "packaging/deb.sh"], check=True, env=environment)
    (package,) = (REPO / "target/debian").glob("*.deb")
    model, where = tmp_path / "toy.gguf", tmp_path / "mnt"
    where.mkdir()
    subprocess.run(["dpkg", "-i", package], check=True)
    try:
        subprocess.run(["odmoe-fs", "-q", "toy", model], check=True)
        subprocess.run(["mount", "-t", "fuse.odmoe", "-o", "allow_other,threads=2", model, where], check=True)
        assert (where / "experts/registry.json").exists() and mount_at(where).kind == "fuse.odmoe"
        assert "allow_other" in mount_at(where).options
        subprocess.run(["umount", where], check=True)
        fstab = tmp_path / "fstab"
        fstab.write_text(f"{model} {where} fuse.odmoe noauto,nofail,uid=7,x-systemd.automount 0 0\n")
        subprocess.run(["mount", "-T", fstab, where], check=True)
        assert (where / "experts/registry.json").stat().st_uid == 7
        subprocess.run(["umount", where], check=True)
        assert "fuse3" in subprocess.run(["dpkg", "-s", "odmoe-fs"], capture_output=True, text=True, check=True).stdout
        for path in ("man/man1/odmoe-fs-mount.1.gz", "bash-completion/completions/odmoe-fs"):
            # Containers of Debian leave manual pages out.
            assert path in run("dpkg", "-L", "odmoe-fs").stdout
        assert os.path.exists("/usr/lib/systemd/system/odmoe-fs@.service")
    finally:
        subprocess.run(["umount", "-l", where], check=False, capture_output=True)
        subprocess.run(["dpkg", "-r", "odmoe-fs"], check=True)
    assert not os.path.lexists("/usr/sbin/mount.fuse.odmoe")


def test_the_unit_says_options_that_exist():
    unit = (REPO / "packaging/odmoe-fs@.service").read_text()
    assert "Type=notify" in unit
    helped = succeed("mount", "--help")
    (command,) = re.findall(r"^ExecStart=(.*)", unit, re.M)
    for option in re.findall(r"--[a-z-]+", command):
        assert option in helped
