"""Running the binary as a user would, and mounts that never outlive a test."""

import collections
import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "tests" / "data"
BINARY = Path(os.environ.get("ODMOE_FS") or REPO / "target/release/odmoe-fs").resolve()
SPARSE_GGUF = BINARY.parent / "examples" / "sparse_gguf"
FAILING_DISK = BINARY.parent / "examples" / "failing_disk"

# A Python that every user can run: the one of the tests may lie in a closed home.
PYTHON = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable

KIB = 1 << 10
MIB = 1 << 20

# Long enough for a slow machine: nothing here is measured, but a hang must end.
PATIENCE = 120


@dataclasses.dataclass(frozen=True)
class User:
    """Who runs a command. The binary lies where that user can reach it, whatever the modes of the repository."""

    uid: int
    gid: int
    binary: Path = BINARY

    def switch(self):
        """Arguments for `subprocess` that become this user."""
        if self.uid == os.getuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


ME = User(os.getuid(), os.getgid())
needs_root = pytest.mark.skipif(ME.uid != 0, reason="only root can become another user, or mount other file systems")


def promises(*sentences):
    """Marks a test as one that holds these sentences of docs/SEMANTICS.md; test_semantics.py looks for them."""
    assert sentences

    def mark(test):
        test.promises = *getattr(test, "promises", ()), *sentences
        return test

    return mark


def run(*command, user=ME, **options):
    """Runs any command with its output captured, without raising."""
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=PATIENCE, **user.switch(), **options
    )


def odmoe(*arguments, user=ME, **options):
    """Runs `odmoe-fs`, which must not panic, whatever it is given."""
    done = run(user.binary, *arguments, user=user, **options)
    assert "panicked" not in done.stderr, done.stderr
    return done


def succeed(*arguments, **options):
    """Runs `odmoe-fs`, which must exit with status 0; returns its standard output."""
    done = odmoe(*arguments, **options)
    assert done.returncode == 0, f"odmoe-fs {' '.join(map(str, arguments))}: {done.returncode}\n{done.stderr}"
    return done.stdout


def fail(*arguments, status=1, naming=(), **options):
    """Runs `odmoe-fs`, which must refuse and name each of `naming` on standard error; returns that text."""
    done = odmoe(*arguments, **options)
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    said = done.stderr
    if status == 1:
        # One line each; no hint only where none is known.
        what, _, hint = said[said.index("error: ") :].removesuffix("\n").partition("\nhint: ")
        assert "\n" not in what
        assert hint.strip() or any(re.search(known, what) for known in WITHOUT_HINT), f"no hint: {said}"
        said = said.replace("\nhint: ", "; ")
    reasons = said.strip().split(": ")
    assert len(set(reasons)) == len(reasons), f"says something twice: {said}"
    for word in naming:
        assert str(word).lower() in said.lower(), f"{word!s} is not named in: {said}"
    return said


# The errors that have no hint, since nobody can know the next step.
WITHOUT_HINT = [
    # What the mount helper or the kernel has against it, which may be anything.
    "cannot be unmounted: ",
    # It may have been meant for anything.
    "it is a directory, not a regular file",
    "it is a device, pipe or socket, not a regular file",
]

# Code for `ask` that lists the folder `root`.
LISTING = "answer = sorted(os.listdir(root))"


def ask(user, code, **names):
    """Runs Python as that user, who alone may look into the user's mounts; returns what it sets `answer` to, or the errno."""
    lines = ["import json, os, sys", "answer = 0", *(f"{name} = {str(value)!r}" for name, value in names.items())]
    lines += ["try:", textwrap.indent(textwrap.dedent(code), "    "), "except OSError as e:", "    answer = e.errno"]
    done = run(PYTHON, "-c", "\n".join([*lines, "json.dump(answer, sys.stdout)"]), user=user)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# A folder /dev of its own, without a device for FUSE.
NO_FUSE = """
    mkdir "$1/dev" && mount -t tmpfs none "$1/dev" && touch "$1/dev/null" && mount --bind /dev/null "$1/dev/null"
    mount --move "$1/dev" /dev
"""


def in_private_mounts(change, scratch, *arguments, user=ME, **options):
    """Runs `odmoe-fs` where a shell script has changed the mounts for it alone; `$1` in the script is a scratch folder."""
    become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"] if user != ME else []
    script = f'{change}\nshift\nexec "$@"'
    return run("unshare", "-m", "sh", "-euc", script, "sh", scratch, *become, user.binary, *arguments, **options)


def sparse_gguf(table, out, *flags):
    """Writes a table of tests/data/models as a GGUF of full size whose payload is a hole; returns its parts in order."""
    table = table if isinstance(table, Path) else DATA / "models" / f"{table}.json"
    subprocess.run(
        [str(word) for word in (SPARSE_GGUF, table, out, *flags)], check=True, capture_output=True, timeout=PATIENCE
    )
    return [out] if out.exists() else sorted(out.parent.glob(f"{out.name.removesuffix('.gguf')}-*-of-*.gguf"))


def expert_gguf(folder, *flags, experts=8, rows=2048):
    """Writes a model that is nearly all experts, every word of it another one; each has 3.4 MiB, more with more rows."""
    kv = {"general.architecture": "moe", "moe.block_count": 1, "moe.expert_count": experts, "moe.expert_used_count": 2}
    stacks = {"down": [rows, 1024], "gate": [1024, rows], "up": [1024, rows]}
    tensors = [[f"blk.0.ffn_{name}_exps.weight", [*dims, experts], "Q4_K"] for name, dims in stacks.items()]
    table = folder / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": [*tensors, ["output_norm.weight", [1000], "F32"]]}))
    return sparse_gguf(table, folder / "model.gguf", *(flags or ["--fill-words"]))[0]


# --- file systems and caches ----------------------------------------------------------------------------------------


# How file systems are made whose name is not all there is to say.
MAKERS = {
    "ext4-128": ["mkfs.ext4", "-q", "-I", "128"],  # inodes of 128 bytes hold whole seconds, in 32 bits
    "exfat": ["mkfs.exfat"],
}


@contextlib.contextmanager
def file_system(kind, folder, size):
    """A file system of its own, mounted below a folder; nothing is left of it."""
    at = Path(folder) / f"on-{kind}"
    at.mkdir()
    image = at.with_suffix(".img")
    try:
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", kind, "-o", f"size={size}", "none", at], check=True)
        else:
            with image.open("wb") as file:
                file.truncate(size)
            subprocess.run([*MAKERS.get(kind, [f"mkfs.{kind}", "-q"]), image], check=True, capture_output=True)
            if kind == "exfat":  # through FUSE: not every kernel has it
                device = run("losetup", "-f", "--show", image).stdout.strip()
                subprocess.run(["mount.exfat-fuse", device, at], check=True, capture_output=True)
                subprocess.run(["losetup", "-d", device], check=True)  # once it is unmounted
            else:
                subprocess.run(["mount", "-o", "loop", image, at], check=True)
        yield at
    finally:
        # Not there if mounting failed.
        subprocess.run(["umount", at], check=False, capture_output=True)
        image.unlink(missing_ok=True)
        at.rmdir()


class FailingDisk:
    """A mount of tests/support/failing_disk.rs: `at` shows the files of a folder, and `fails` makes it fail."""

    def __init__(self, at, faults, requests, pid):
        self.at = at
        self.pid = pid
        self._faults = faults
        self._requests = requests

    def fails(self, *faults):
        """From now on, instead of what was said before: `("eio", start, end)`, or with `short`, `empty` or `hang`."""
        new = self._faults.with_suffix(".new")
        new.write_text("".join(" ".join(map(str, fault)) + "\n" for fault in faults))
        new.rename(self._faults)  # it is read at any time

    def requests(self):
        """What came so far: `("open", name, handle)`, perhaps with `"direct"`, and `("read", name, handle, offset, size)`."""
        lines = self._requests.read_text().splitlines()
        return [tuple(int(word) if word.isdigit() else word for word in line.split(" ")) for line in lines]


@contextlib.contextmanager
def failing_disk(folder, scratch, *flags):
    at = Path(scratch) / "disk"
    at.mkdir()
    faults, requests = Path(scratch) / "faults", Path(scratch) / "requests"
    command = [FAILING_DISK, folder, at, faults, "--requests", requests, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        disk = FailingDisk(at, faults, requests, process.pid)
        try:
            wait_for(lambda: mount_at(at) or process.poll() is not None)
            assert process.poll() is None, process.stderr.read()
            yield disk
        finally:
            disk.fails()  # what hangs goes on
            detach(at)
            process.kill()


class FailingBlocks(FailingDisk):
    """A file system on a disk that fails: `at` shows copies of the files of a folder, of which `fails` takes offsets."""

    def __init__(self, at, disk, image, model):
        super().__init__(at, disk._faults, disk._requests, disk.pid)
        self._model = model.read_bytes()
        self._image = image.read_bytes()

    def fails(self, *faults):
        super().fails(*((kind, self._place(start), self._place(start) + end - start) for kind, start, end in faults))

    def _place(self, offset):
        """Where on the disk a byte of the model lies: no other page holds the same."""
        page = offset // 4096 * 4096
        return self._image.index(self._model[page : page + 4096]) + offset - page


@contextlib.contextmanager
def failing_blocks(model, scratch, kind="ext4"):
    """A copy of a model on a file system of a disk, which fails when it is told to."""
    store, at = Path(scratch) / "blocks", Path(scratch) / "on-blocks"
    store.mkdir()
    at.mkdir()
    image = store / "disk.img"
    with image.open("wb") as file:
        file.truncate(model.stat().st_size + 64 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    shutil.copy(model, at)
    subprocess.run(["umount", at], check=True)
    with failing_disk(store, scratch) as disk:
        subprocess.run(["mount", "-o", "loop,ro", disk.at / image.name, at], check=True)
        try:
            yield FailingBlocks(at, disk, image, model)
        finally:
            disk.fails()
            subprocess.run(["umount", "-l", at], check=False, capture_output=True)


def evict(path):
    with Path(path).open("rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(file):
    """Bytes of an open file that are in the page cache."""
    cachestat = 451  # on every architecture; Linux 6.5
    counts = (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(cachestat, file.fileno(), (ctypes.c_uint64 * 2)(0, 0), counts, 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat")
    return counts[0] * os.sysconf("SC_PAGESIZE")


# --- mounts ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MountLine:
    """One line of /proc/self/mountinfo."""

    at: str
    kind: str
    source: str
    options: str
    device: str


def mounts():
    def plain(text):
        return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)

    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, right = line.split(" - ")
        kind, source, options = right.split(" ", 2)
        fields = left.split()
        yield MountLine(plain(fields[4]), kind, plain(source), options, fields[2])


def mount_at(where):
    """The topmost mount at a folder, or None."""
    return next((m for m in reversed(list(mounts())) if m.at == str(where)), None)


def detach(where):
    """Removes every mount at or below a folder, alive or dead: for cleaning up, not for testing `umount`."""
    for m in reversed(list(mounts())):
        if m.at == str(where) or m.at.startswith(f"{where}/"):
            tool = ["umount", "-l"] if os.getuid() == 0 else ["fusermount3", "-uz"]
            subprocess.run([*tool, m.at], capture_output=True, timeout=PATIENCE, check=False)


@contextlib.contextmanager
def mounted(model, where, *flags, user=ME, **options):
    """A background mount, which must live until the end; then `odmoe-fs umount` removes it, or force if a test failed."""
    where = Path(where)
    if not where.exists():
        where.mkdir()
        os.chown(where, user.uid, user.gid)
    try:
        succeed("mount", model, where, *flags, user=user, **options)
        yield where
        assert mount_at(where), "the mount went away by itself"
        succeed("umount", where, user=user)
        assert mount_at(where) is None
    finally:
        detach(where)


@contextlib.contextmanager
def foreground(model, where, *flags, user=ME):
    """Mounts with `-f`; yields the process once the tree answers."""
    where.mkdir(exist_ok=True)
    command = [str(word) for word in (user.binary, "mount", "-f", model, where, *flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **user.switch())
    try:
        said = process.stdout.readline()
        assert said.startswith("mounted on "), process.stderr.read()
        yield process
    finally:
        detach(where)
        process.kill()
        process.communicate()


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def daemon_of(where):
    """The process id of the daemon that serves a mount; one that still serves what was unmounted there is another."""

    def words(pid):
        with contextlib.suppress(OSError):  # processes come and go
            return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return []

    def connections(pid):
        """What it serves, by the numbers of mounts; nothing on older kernels, and of a daemon that is ending."""
        with contextlib.suppress(OSError):
            infos = [path.read_text() for path in Path(f"/proc/{pid}/fdinfo").iterdir()]
            return re.findall(r"^fuse_connection:\s*(\d+)$", "\n".join(infos), re.MULTILINE)
        return []

    def started(pid):
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return 0

    connection = next((m.device.removeprefix("0:") for m in reversed(list(mounts())) if m.at == str(where)), None)
    mine = os.fsencode(where)
    daemons = [int(p) for p in os.listdir("/proc") if p.isdigit() and mine in words(p) and b"mount" in words(p)]
    serving = [pid for pid in daemons if connection in connections(pid)]
    # The number of a connection is soon used again, while the daemon that had it before is still ending.
    return max(serving or daemons, key=started)


def is_running(pid):
    """A daemon whose new parent does not wait for it leaves a zombie, which runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def counters(pid):
    """What a process has read and written, by system calls (`syscr`, `rchar`, ...) and of disks (`read_bytes`, ...)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return collections.Counter({name: int(n) for name, n in (line.split(": ") for line in lines)})


def anonymous(pid):
    """Bytes of a process's own memory."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) << 10


# How a process uses a file of a mount, or the mount; `read` reads it all and tells how much that was.
USES = {
    "open": "file = open(path, 'rb'); read = lambda: len(file.read())",
    "mapped": """
file = open(path, "rb")
held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
file.close()
read = lambda: len(held[:])
""",
    "working directory": "os.chdir(os.path.dirname(path))",
}


class Holder:
    """A process that keeps a mount busy."""

    def __init__(self, process):
        self.pid = process.pid
        self._process = process

    def read(self):
        """Makes it read all that it holds; returns the size, or the negated errno."""
        self._process.stdin.write("read\n")
        return int(self._process.stdout.readline())


@contextlib.contextmanager
def holding(person, path, how="open"):
    """A process of the user that uses a file until the end."""
    code = f"""
import mmap, os, sys
path = {str(path)!r}
{USES[how]}
print("held", flush=True)
for _ in sys.stdin:
    try:
        print(read(), flush=True)
    except OSError as e:
        print(-e.errno, flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([PYTHON, "-c", code], text=True, bufsize=1, **pipes, **person.switch()) as process:
        assert process.stdout.readline() == "held\n"
        yield Holder(process)


# --- trees ----------------------------------------------------------------------------------------------------------


# What a tree holds besides safetensors files.
DOCUMENTS = {"base_model/metadata.json", "base_model/metadata.gguf", "experts/registry.json"}


def files_of(root):
    """Every file of a tree by its path within it, in sorted order."""
    root = Path(root)
    return {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if not p.is_dir()}


def contents(root):
    """Every byte of a small tree."""
    return {name: path.read_bytes() for name, path in files_of(root).items()}


def read_direct(path):
    """The whole file past the page cache, into a page-aligned buffer."""
    size = path.stat().st_size
    buffer = mmap.mmap(-1, -(-size // 4096) * 4096)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        done = 0
        while done < size:
            n = os.preadv(fd, [memoryview(buffer)[done : done + (1 << 20)]], done)
            assert n > 0
            done += n
        return buffer[:size]
    finally:
        os.close(fd)


def read_on(path, chunk):
    with open(path, "rb", buffering=0) as file:
        return b"".join(iter(lambda: file.read(chunk), b""))


def public_copy(folder):
    """Copies the binary to where everybody may run it."""
    return Path(shutil.copy(BINARY, folder))
