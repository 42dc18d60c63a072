"""What `ls`, `df` and `find` see, and that nothing can be changed: section 1.5 of the contract."""

import errno
import os
import stat

import pytest

import models
from odmoe import DOCUMENTS, ME, ask, detach, mount_at, mounted, needs_root, odmoe, promises, run

# Each tries to change the tree: `file` and `folder` are in it, `new` is not yet.
CHANGES = {
    "create": "os.open(new, os.O_CREAT | os.O_WRONLY)",
    "open for writing": "os.open(file, os.O_WRONLY)",
    "open for reading and writing": "os.open(file, os.O_RDWR)",
    "truncate": "os.truncate(file, 0)",
    "unlink": "os.unlink(file)",
    "rename": "os.rename(file, new)",
    "link": "os.link(file, new)",
    "symlink": "os.symlink('x', new)",
    "make a folder": "os.mkdir(new)",
    "remove a folder": "os.rmdir(folder)",
    "make a FIFO": "os.mkfifo(new)",
    "chmod": "os.chmod(file, 0o777)",
    "chown": "os.chown(file, os.getuid(), os.getgid())",
    "set times": "os.utime(file, (0, 0))",
    "set an extended attribute": "os.setxattr(file, 'user.x', b'1')",
}

# Every attribute of every node, by path within the tree.
ATTRIBUTES = """
def look(path):
    s = os.lstat(path)
    return {name: getattr(s, name) for name in dir(s) if name.startswith("st_")}
answer = {".": look(root)}
for folder, folders, files in os.walk(root):
    for name in folders + files:
        path = os.path.join(folder, name)
        answer[os.path.relpath(path, root)] = look(path)
"""

NEWEST = 1_700_000_000_123_456_789  # an mtime with every digit of its nanoseconds


@pytest.fixture
def parts(public):
    """A split model whose second part is the newest."""
    paths = models.write_small(public, split_max_tensors=3)
    for n, path in enumerate(paths):
        os.utime(path, ns=(0, NEWEST - abs(n - 1) * 10**9))
    return paths


def attributes(person, root):
    return ask(person, ATTRIBUTES, root=root)


@promises("Whatever would change the tree fails with EROFS, also for root.")
def test_whatever_would_change_the_tree_is_refused_as_read_only(person, public, parts):
    with mounted(parts[0], public / "mnt", user=person) as root:
        names = {
            "file": root / "experts" / "registry.json",
            "folder": root / "experts",
            "new": root / "base_model" / "new",
        }
        found = {change: ask(person, code, **names) for change, code in CHANGES.items()}
    assert found == dict.fromkeys(CHANGES, errno.EROFS)


@promises("There are no extended attributes, except on the root of a mount made with `--stats`.")
def test_there_are_no_extended_attributes(person, public, parts):
    with mounted(parts[0], public / "mnt", user=person) as root:
        assert ask(person, "os.getxattr(root, 'user.x')", root=root) == errno.ENOTSUP
        assert ask(person, "os.listxattr(root)", root=root) == errno.ENOTSUP


def test_names_that_do_not_exist_are_not_found(person, public, parts):
    with mounted(parts[0], public / "mnt", user=person) as root:
        for name in ("nothing", "experts/layer_99_expert_999.safetensors", "experts/layer_0_expert_0.safetensors"):
            assert ask(person, "os.stat(path)", path=root / name) == errno.ENOENT, name


@promises("All times are that of the newest part; files have mode 0444, directories 0555.")
def test_modes_links_times_and_blocks(person, public, parts):
    with mounted(parts[0], public / "mnt", user=person) as root:
        nodes = attributes(person, root)
    assert {nodes[folder]["st_nlink"] for folder in ("base_model", "experts")} == {2}
    assert nodes["."]["st_nlink"] == 4
    for path, s in nodes.items():
        folder = path in (".", "base_model", "experts")
        assert s["st_mode"] == (stat.S_IFDIR | 0o555 if folder else stat.S_IFREG | 0o444), path
        assert folder or s["st_nlink"] == 1, path
        assert (s["st_uid"], s["st_gid"]) == (person.uid, person.gid), path
        assert s["st_blksize"] == 4096, path
        assert folder or s["st_blocks"] == -(-s["st_size"] // 512), path
        assert {s["st_mtime_ns"], s["st_ctime_ns"], s["st_atime_ns"]} == {NEWEST}, path
    assert len({s["st_ino"] for s in nodes.values()}) == len(nodes)


def test_an_owner_can_be_given(person, public, parts):
    with mounted(parts[0], public / "mnt", "--uid", person.uid, "--gid", 5678, user=person) as root:
        assert {(s["st_uid"], s["st_gid"]) for s in attributes(person, root).values()} == {(person.uid, 5678)}


def test_an_owner_who_may_not_enter_is_pointed_out(public, parts):
    (public / "mnt").mkdir()
    try:
        done = odmoe("mount", parts[0], public / "mnt", "--uid", 12345)
        assert done.returncode == 0
        assert "12345" in done.stderr and "--allow-other" in done.stderr
    finally:
        detach(public / "mnt")


@promises(
    "Names, inode numbers, sizes and times do not change while the tree is mounted, and are the same at the next mount.",
)
def test_attributes_are_the_same_after_a_remount(person, public, parts):
    seen = []
    for where in ("here", "there"):
        with mounted(parts[0], public / where, user=person) as root:
            seen.append(attributes(person, root))
    for nodes in seen:
        for s in nodes.values():
            del s["st_dev"]
    assert seen[0] == seen[1]


def test_the_file_system_is_as_large_as_its_files_and_full(person, public, parts):
    with mounted(parts[0], public / "mnt", user=person) as root:
        nodes = attributes(person, root)
        f = ask(person, "s = os.statvfs(root); answer = {n: getattr(s, n) for n in dir(s) if n[:2] == 'f_'}", root=root)
    size = sum(s["st_size"] for s in nodes.values() if stat.S_ISREG(s["st_mode"]))
    assert size <= f["f_blocks"] * f["f_frsize"] < size + 4096 * len(nodes)
    assert [f[name] for name in ("f_bfree", "f_bavail", "f_ffree", "f_favail")] == [0] * 4
    assert f["f_files"] == len(nodes)
    assert f["f_flag"] & os.ST_RDONLY


def test_find_and_ls_see_every_file(person, public, parts):
    with mounted(parts[0], public / "mnt", user=person) as root:
        found = run("find", root, "-type", "f", user=person).stdout.split()
        assert len(found) == 2 * models.EXPERTS + len(DOCUMENTS) + 3  # files of the base
        listed = run("ls", "-lR", root, user=person)
        assert listed.returncode == 0 and listed.stderr == ""


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("plain.gguf", "plain.gguf"),
        ("with space and ü.gguf", "with space and ü.gguf"),
        ("x,allow_other.gguf", None),
        ("back\\slash.gguf", None),
        ("new\nline.gguf", None),
    ],
    ids=["plain", "space", "comma", "backslash", "control character"],
)
def test_the_mount_table_names_the_model_unless_that_could_be_read_as_something_else(
    person, public, small, name, source
):
    model = public / name
    model.write_bytes(small[0].read_bytes())
    with mounted(model, public / "mnt", user=person) as root:
        mount = mount_at(root)
        assert mount.kind == "fuse.odmoe"
        assert mount.source == (str(public / source) if source else "odmoe")
        assert "allow_other" not in mount.options


@needs_root
def test_only_the_mounting_user_may_look_unless_others_are_allowed(public, nobody, parts):
    listing = "answer = os.listdir(root)"
    with mounted(parts[0], public / "mnt") as root:
        assert ask(nobody, listing, root=root) == errno.EACCES
    with mounted(parts[0], public / "theirs", user=nobody) as root:
        assert ask(ME, listing, root=root) == errno.EACCES
    with mounted(parts[0], public / "mnt", "--allow-other") as root:
        assert sorted(ask(nobody, listing, root=root)) == ["base_model", "experts"]
