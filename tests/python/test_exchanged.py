"""Root at work where another user renames things at will: nothing is done through a link that user has put there."""

import os
import subprocess

import pytest

from exchange import exchanging
from odmoe import ME, fail, mount_at, mounted, mounts, needs_root, odmoe, promises, succeed

pytestmark = needs_root

NOT_THROUGH = "Root mounts, and writes logs, through no link that another user could exchange."


@pytest.fixture
def theirs(public, nobody):
    """A folder of another user."""
    folder = public / "theirs"
    folder.mkdir()
    os.chown(folder, nobody.uid, nobody.gid)
    return folder


def link_of(person, link, target):
    link.symlink_to(target)
    os.chown(link, person.uid, person.gid, follow_symlinks=False)


@promises(NOT_THROUGH)
@pytest.mark.parametrize("flags", [[], ["--replace"]], ids=str)
def test_root_never_mounts_through_a_link_that_is_exchanged(flags, model, public, theirs, nobody, times):
    victim = public / "victim"
    victim.mkdir()
    (theirs / "mnt").mkdir()
    os.chown(theirs / "mnt", nobody.uid, nobody.gid)
    link_of(nobody, theirs / "link", victim)
    outcomes = set()
    with exchanging(theirs / "mnt", theirs / "link", pause=0):
        for _ in range(times(40, long=400)):
            done = odmoe("mount", *flags, model, theirs / "mnt")
            outcomes.add(done.returncode)
            there = [m.at for m in mounts() if m.at.startswith(str(public))]
            assert str(victim) not in there
            assert bool(there) == (done.returncode == 0), done.stderr
            for where in there:
                subprocess.run(["umount", "-l", where], check=True)
    assert outcomes == {0, 1}, "both were met"


@promises(NOT_THROUGH)
def test_a_link_of_another_user_is_named_and_not_followed(model, public, theirs, nobody):
    target = public / "target"
    target.mkdir()
    link_of(nobody, theirs / "link", target)
    fail("mount", model, theirs / "link", naming=[theirs / "link", "is a link of user 65534"])
    (target / "below").mkdir()
    fail("mount", model, theirs / "link/below", naming=[theirs / "link", "is a link of user 65534"])
    assert not [m.at for m in mounts() if m.at.startswith(str(public))]
    # That user may, and root may by a link that only root can exchange.
    os.rmdir(target / "below")
    os.chown(target, nobody.uid, nobody.gid)
    (public / "links").mkdir()
    link_of(nobody, public / "links/link", target)
    for user, link in ((nobody, theirs / "link"), (ME, public / "links/link")):
        succeed("mount", model, link, user=user)
        assert mount_at(target)
        succeed("umount", target, user=user)


@promises(NOT_THROUGH)
def test_the_log_is_not_written_through_a_link_of_another_user(model, public, theirs, nobody):
    victim, folder = public / "victim", public / "mnt"
    victim.write_text("precious\n")
    folder.mkdir()
    link_of(nobody, theirs / "log", victim)
    link_of(nobody, theirs / "dangling", public / "new")
    link_of(nobody, theirs / "folder", public)
    for log in ("log", "dangling", "folder/log"):
        fail("mount", model, folder, "--log-file", theirs / log, naming=["is a link of user 65534"])
    assert victim.read_text() == "precious\n"
    assert not (public / "new").exists() and not (public / "log").exists()
    with exchanging(theirs / "log", theirs / "folder", pause=0):
        for _ in range(10):
            fail("mount", model, folder, "--log-file", theirs / "log")
    link_of(ME, theirs / "ours", victim)
    with mounted(model, folder, "--log-file", theirs / "ours"):
        pass
    assert "has ended" in victim.read_text()
