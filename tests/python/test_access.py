"""Who may enter a mount, whatever the kernel has cached; and which privileges the daemon keeps."""

import errno
import os
import re
from pathlib import Path

import pytest

from odmoe import BINARY, ME, User, ask, daemon_of, mount_at, mounted, needs_root, promises, run

pytestmark = needs_root

EXPERT = "experts/layer_00_expert_000.safetensors"
ONLY_WHO_MOUNTS = "Only the user who mounts may enter; root may not enter a user's mount, nor a user root's, whatever is cached."

# What anybody could try: each becomes a size, a list, or an errno.
ATTEMPTS = {
    "list": "answer = len(os.listdir(root))",
    "list below": "answer = len(os.listdir(root + '/experts'))",
    "stat": f"answer = os.stat(root + '/{EXPERT}').st_size",
    "read": f"answer = len(open(root + '/{EXPERT}', 'rb').read())",
    "statfs": "answer = os.statvfs(root).f_blocks",
    "missing": "answer = os.path.exists(root + '/nothing') or os.stat(root + '/nothing')",
}


def tried(user, root):
    return {name: ask(user, code, root=root) for name, code in ATTEMPTS.items()}


@pytest.fixture
def stranger(nobody):
    return User(65533, 65533, nobody.binary)


@promises(ONLY_WHO_MOUNTS)
@pytest.mark.parametrize("mounter", ["root", "nobody"])
def test_nobody_else_may_enter_before_or_after_who_may_has(mounter, model, public, nobody, stranger):
    owner, others = (ME, [nobody, stranger]) if mounter == "root" else (nobody, [ME, stranger])
    closed = dict.fromkeys(ATTEMPTS, errno.EACCES) | {"statfs": 0}  # the kernel's answer to those it keeps out
    with mounted(model, public / "mnt", user=owner) as root:
        for _ in range(2):
            for other in others:
                assert tried(other, root) == closed
            allowed = tried(owner, root)
            assert allowed["list"] == 2 and allowed["read"] == allowed["stat"] > 0 and allowed["missing"] == errno.ENOENT


@promises("With `--allow-other` everybody may read, and nobody may write.")
@pytest.mark.parametrize("flags", [[], ["--uid", 65534], ["--uid", 1000, "--gid", 65533]], ids=str)
def test_with_allow_other_everybody_may_read_and_nobody_write(model, public, nobody, stranger, flags):
    writing = [
        f"open(root + '/{EXPERT}', 'r+b')",
        "open(root + '/experts/new', 'wb')",
        f"os.chmod(root + '/{EXPERT}', 0o666)",
        f"os.chown(root + '/{EXPERT}', os.getuid(), -1)",
        f"os.unlink(root + '/{EXPERT}')",
        "os.mkdir(root + '/new')",
        f"os.utime(root + '/{EXPERT}')",
    ]
    with mounted(model, public / "mnt", "--allow-other", *flags) as root:
        expected = tried(ME, root)
        for user in (stranger, nobody):
            assert tried(user, root) == expected
            for code in writing:
                assert ask(user, code, root=root) in (errno.EROFS, errno.EACCES, errno.EPERM), code
        for code in writing:
            assert ask(ME, code, root=root) in (errno.EROFS, errno.EACCES), code


@promises("A mount ignores set-user-id bits and devices, and executes nothing: `nosuid`, `nodev`, `noexec`.")
def test_the_mount_table_shows_the_guards(model, public, nobody):
    for owner in (ME, nobody):
        for flags in [[], ["--allow-other"]] if owner is ME else [[]]:
            with mounted(model, public / f"mnt{owner.uid}{len(flags)}", *flags, user=owner) as root:
                line = next(x for x in Path("/proc/self/mountinfo").read_text().splitlines() if f" {root} " in x)
                assert set("ro,nosuid,nodev,noexec".split(",")) <= set(line.split()[5].split(","))
                assert "default_permissions" in mount_at(root).options
                assert ("allow_other" in mount_at(root).options) == bool(flags)


def privileges(pid):
    lines = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(Cap\w+|NoNewPrivs):\s*(\w+)$", lines, re.MULTILINE))
    return {name: int(value, 16) for name, value in fields.items()}


SYS_ADMIN, DAC_READ_SEARCH, FOWNER = 1 << 21, 1 << 2, 1 << 3


@promises("The daemon of root keeps three capabilities and gains no others; the daemon of a user has none.")
def test_the_daemon_keeps_only_the_privileges_that_it_needs(model, public, nobody):
    with mounted(model, public / "mnt") as root:
        kept = privileges(daemon_of(root))
    assert kept["NoNewPrivs"] == 1
    assert kept["CapInh"] == kept["CapAmb"] == 0
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert kept[name] & ~(SYS_ADMIN | DAC_READ_SEARCH | FOWNER) == 0, name
    assert kept["CapEff"] & SYS_ADMIN
    with mounted(model, public / "theirs", user=nobody) as root:
        kept = privileges(daemon_of(root))
        # It unmounts with fusermount3, which is set-user-id, when a signal asks for it.
        assert kept["CapEff"] == kept["CapPrm"] == 0 and kept["NoNewPrivs"] == 0


def test_a_root_without_privileges_to_give_up_can_still_mount_and_unmount(model, public):
    """As in a container that has nothing but what mounting needs."""
    bounded = ["setpriv", "--bounding-set=-all,+sys_admin", "--inh-caps=-all"]
    (public / "mnt").mkdir()
    try:
        done = run(*bounded, BINARY, "mount", model, public / "mnt")
        assert done.returncode == 0, done.stderr
        assert len(os.listdir(public / "mnt")) == 2
        done = run(*bounded, BINARY, "umount", public / "mnt")
        assert done.returncode == 0, done.stderr
    finally:
        run("umount", "-l", public / "mnt")
