"""The lab: a scratch folder, the models in it, and mounts and file systems that outlive no sample.

A cold sample has a fresh mount and dropped caches, and `fincore` finds no page of the model or of the
native files in memory. Pages that a daemon has mapped cannot be dropped, hence the fresh mount.
Programs are warm in all samples.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from measure import Reading, Unavailable
from odmoe import BINARY, REPO, daemon_of, detach, mount_at, mounted, sparse_gguf, wait_for

BENCHES = REPO / "benches"
EXAMPLES = BINARY.parent / "examples"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Kimi-K2's expert: w1 and w3 of 2048 x 7168, w2 of 7168 x 2048, in Q4_K 24.8 MB. 88 of them are more than 2 GiB.
LAYERS, EXPERTS_PER_LAYER = 2, 44
SHAPE = ["--dim", 7168, "--ffn-dim", 2048, "--type", "q4_k"]
KIMI = "kimi-k2.5-q4_k_m"
KIMI_PARTS = 9
KIMI_EXPERTS = 23_040

# Nothing takes this long unless something is wrong.
PATIENCE = 600


def run(*command, timeout=PATIENCE):
    """Runs a command, which must succeed; returns its standard output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:6])}: exit status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout


def resident_bytes(files):
    """The bytes of files that are in the page cache."""
    out = run("fincore", "--bytes", "--noheadings", "--raw", "--output", "RES", *files)
    return sum(int(line) for line in out.split())


def process_bytes(pid, field, source="status"):
    """A field of /proc/PID/status, in bytes, or of /proc/PID/io."""
    for line in Path(f"/proc/{pid}/{source}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            words = value.split()
            return int(words[0]) * (KIB if words[1:] == ["kB"] else 1)
    raise RuntimeError(f"/proc/{pid}/{source} has no {field}")


def bdi(path):
    """The kernel's settings for the device below a path."""
    device = os.stat(path).st_dev
    return Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")


def read_ahead_kib(path):
    with contextlib.suppress(OSError):  # btrfs and others have no such entry under this number
        return int((bdi(path) / "read_ahead_kb").read_text())
    return None


def workers(pid):
    """The threads of a daemon that answer the kernel; fuser calls them fuser-0, fuser-1, ..."""
    names = [path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
    return sum(name.removeprefix("fuser-").isdigit() for name in names)


def fuse_descriptors(pid):
    """How often a daemon has /dev/fuse open: once, or once for each worker with `clone_fd`."""
    return sum(os.readlink(path) == "/dev/fuse" for path in Path(f"/proc/{pid}/fd").iterdir())


def experts(root, count=None):
    """The first expert files of a tree."""
    return sorted(Path(root).glob("experts/*.safetensors"))[:count]


def knows(command, option):
    """Whether this binary's command has an option."""
    return option in run(BINARY, command, "--help")


def require(command, option):
    if not knows(command, option):
        raise Unavailable(f"this odmoe-fs knows no `{command} {option}`")


@dataclasses.dataclass
class Mounted:
    root: Path
    pid: int

    def experts(self, count=None):
        return experts(self.root, count)


class Lab:
    def __init__(self, scratch, samples):
        self.scratch = scratch
        self.samples = samples
        self.number = 0

    def fresh(self, kind):
        """A new folder."""
        self.number += 1
        folder = self.scratch / f"{kind}-{self.number}"
        folder.mkdir()
        return folder

    # --- data, made when it is first needed ---

    @functools.cached_property
    def model(self):
        path = self.scratch / "model.gguf"
        say(f"writing {path.name}: {LAYERS} layers of {EXPERTS_PER_LAYER} experts of Kimi-K2's shape")
        run(BINARY, "toy", path, "--layers", LAYERS, "--experts", EXPERTS_PER_LAYER, *SHAPE)
        return path

    @functools.cached_property
    def tree(self):
        """The model's tree as real files: the native side."""
        path = self.scratch / "tree"
        model = self.model
        say("writing its tree as files")
        run(BINARY, "materialize", "--quiet", model, path)
        return path

    @functools.cached_property
    def tree_bytes(self):
        return sum(path.stat().st_size for path in self.tree.rglob("*") if path.is_file())

    def kimi(self, folder, *flags):
        """Full-size Kimi-K2.5 whose payload is a hole; any part of it."""
        return sparse_gguf(KIMI, folder / "kimi.gguf", "--tokenizer", *flags)

    @functools.cached_property
    def kimi_parts(self):
        return self.kimi(self.fresh("kimi"), "--splits", KIMI_PARTS)

    @functools.cached_property
    def settings(self):
        """The settings that a mount was granted, as far as they are visible from outside."""
        with self.mount() as mount:
            pages = Path("/proc/sys/fs/fuse/max_pages_limit")
            limit = int(pages.read_text()) * 4 if pages.exists() else None
            read_ahead = read_ahead_kib(mount.root)
            return {
                "worker threads": workers(mount.pid),
                "descriptors of /dev/fuse": fuse_descriptors(mount.pid),
                "read-ahead of the mount, KiB": read_ahead,
                "largest request the kernel allows, KiB": limit,
                "largest read-ahead request, KiB": min(filter(None, (limit, read_ahead)), default=None),
            }

    # --- mounts ---

    @contextlib.contextmanager
    def mount(self, *flags, model=None):
        """A fresh mount; its daemon, and what that has mapped, are gone afterwards."""
        model = model or self.model
        where = self.fresh("mnt")
        with mounted(model, where, *flags):
            pid = daemon_of(where)
            yield Mounted(where, pid)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
        where.rmdir()

    @contextlib.contextmanager
    def floor(self):
        """The same tree served as zeroes, with the threads, descriptors and read-ahead of the product."""
        granted = self.settings
        where = self.fresh("floor")
        flags = ["--threads", str(granted["worker threads"])]
        if granted["descriptors of /dev/fuse"] > 1:
            flags.append("--clone-fd")
        process = subprocess.Popen([EXAMPLES / "floor", self.model, where, *flags])
        try:
            wait_for(lambda: mount_at(where) or process.poll() is not None)
            (bdi(where) / "read_ahead_kb").write_text(str(granted["read-ahead of the mount, KiB"]))
            yield Mounted(where, process.pid)
        finally:
            detach(where)
            process.wait(PATIENCE)
        where.rmdir()

    @contextlib.contextmanager
    def file_system(self, kind, size):
        """A new file system in a sparse image."""
        image, where = self.scratch / f"{kind}.img", self.fresh(kind)
        try:
            with image.open("wb") as file:
                file.truncate(size)
            run(f"mkfs.{kind}", "-q", image)
            run("mount", "-o", "loop", image, where)
            yield where
        finally:
            detach(where)
            wait_for(lambda: not run("losetup", "--associated", image))
            image.unlink(missing_ok=True)
        where.rmdir()

    # --- caches ---

    def cold(self, *others):
        """Drops all caches, and makes sure that no page of the models or native files is left."""
        files = [path for path in others if path.is_file()]
        if "model" in self.__dict__:
            files.append(self.model)
        if "tree" in self.__dict__:
            files += [path for path in self.tree.rglob("*") if path.is_file()]
        if "kimi_parts" in self.__dict__:
            files += self.kimi_parts
        for _ in range(20):
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
            if not files or resident_bytes(files) == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{resident_bytes(files):,} bytes of the model or of native files stay in memory")

    def cached(self, files):
        """Makes sure that whole files are in memory."""
        want = sum(path.stat().st_size for path in files)
        for _ in range(3):
            if resident_bytes(files) >= want:
                return
            self.reader("pread", *files)
        raise RuntimeError("files do not stay in the page cache: is there enough memory?")

    # --- clients ---

    def reader(self, *arguments):
        return Reading(**json.loads(run(EXAMPLES / "reader", *arguments)))

    def client(self, way, *files):
        """A Python client, in a process of its own."""
        return Reading(**json.loads(run(sys.executable, BENCHES / "clients.py", way, *files)))


@contextlib.contextmanager
def peak_of(pid, field):
    """Samples a field of /proc/PID/status meanwhile; yields a list that ends up holding its maximum."""
    peak, stop = [0], threading.Event()

    def watch():
        while not stop.is_set():
            with contextlib.suppress(OSError, RuntimeError):
                peak[0] = max(peak[0], process_bytes(pid, field))
            stop.wait(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def remove(folder):
    """Removes a tree, and lets its file system settle, so that the next sample does not pay for it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def say(text):
    print(f"    {text}", file=sys.stderr, flush=True)
