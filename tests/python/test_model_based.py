"""Random sequences of calls on a mount and on the materialized tree, each answer compared with what the model holds.

What a file must hold comes from tests/python/reference.py, which reads the GGUF by itself; a name that is not there must
be refused in the same way by both trees.
"""

import errno
import mmap
import multiprocessing
import os
import stat
import tempfile

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule, run_state_machine_as_test

import models
from odmoe import DOCUMENTS, contents, expert_gguf, mounted, promises, sparse_gguf, succeed
from reference import Shown, read_header

AGREE = "`read`, `pread`, `mmap`, `O_DIRECT` and `readdir` at any size and offset agree with one another, in both cache modes."
STABLE = "Names, inode numbers, sizes and times do not change while the tree is mounted, and are the same at the next mount."

PAGE = mmap.PAGESIZE
MAKERS = {
    "small in parts": lambda folder: models.write_small(folder, split_max_tensors=3),
    "torture": lambda folder: sparse_gguf("torture-small", folder / "t.gguf", "--splits", 4, "--fill-words"),
    "large experts": lambda folder: [expert_gguf(folder, experts=2)],
}
OPTIONS = {"page": [], "direct": ["--cache", "direct"], "one thread": ["--threads", "1"]}

ODD_NAMES = ["", ".", "..", "experts", "experts/.", "experts/..", "EXPERTS", "nothing", "experts/nothing", "a" * 255]
ODD_NAMES += ["experts/Registry.json", "base_model/NORMS.safetensors"]
ODD_NAMES += ["a" * 256, "é\n", "experts/registry.json/below", "base_model/norms.safetensors/.", "experts//registry.json"]


class Trees:
    """A model's mount and its materialized tree, and what both must hold."""

    def __init__(self, paths, root, real):
        shown = Shown(paths, root)
        self.roots = root, real
        self.truth = {}
        for name, path in ((n, root / n) for n in (*shown.layout, *DOCUMENTS)):
            if name in DOCUMENTS:  # told by tests of their own; here only whether both trees and all calls agree
                self.truth[name] = (real / name).read_bytes()
            else:
                header = path.read_bytes()[: read_header(path).start]
                entries = shown.layout[name]
                self.truth[name] = header + b"".join(shown.bytes[e.part][e.offset : e.offset + e.nbytes] for e in entries)
        self.folders = {"": ["base_model", "experts"]}
        for folder in self.folders[""]:
            below = (n.removeprefix(f"{folder}/") for n in self.truth if n.startswith(f"{folder}/"))
            self.folders[folder] = sorted(below)
        self.inodes = {}


def outcome(call):
    """What a call returns, or its errno."""
    try:
        return call()
    except OSError as e:
        return e.errno


def machine(trees):
    """The class of random sequences on some trees; a class, since that is what hypothesis runs."""
    names = st.sampled_from(sorted(trees.truth))
    sizes = st.one_of(st.integers(0, 300), st.integers(0, 70_000), st.sampled_from([4096, 1 << 17, (1 << 17) + 1, 3 << 20]))

    class Sequence(RuleBasedStateMachine):
        handles = Bundle("handles")

        @initialize()
        def begin(self):
            self.open = []

        def teardown(self):
            for _, fds in self.open:
                for fd in fds:
                    os.close(fd)

        def place(self, data, length):
            """Some place of a file, most often one where something ends or begins."""
            near = st.sampled_from([0, 8, length // 2, max(length - 1, 0), length, length + 1, 1 << 40, 1 << 62, (1 << 63) - 5001])
            around = st.builds(lambda at, by: max(at + by, 0), near, st.integers(-5000, 5000))
            # Linux refuses what ends beyond 2^63.
            return min(data.draw(st.one_of(st.integers(0, length), near, around)), (1 << 63) - (16 << 20))

        @rule(name=st.one_of(names, st.sampled_from(ODD_NAMES)))
        def look_up(self, name):
            found, real = (outcome(lambda r=root: os.stat(f"{r}/{name}")) for root in trees.roots)
            if isinstance(real, int):
                assert found == real, (name, found, real)
                return
            assert not isinstance(found, int), (name, found)
            assert stat.S_IFMT(found.st_mode) == stat.S_IFMT(real.st_mode)
            is_file = stat.S_ISREG(found.st_mode)
            assert stat.S_IMODE(found.st_mode) == (0o444 if is_file else 0o555) or ".." in name
            if is_file:
                assert found.st_size == real.st_size and found.st_nlink == 1
                assert found.st_mtime_ns == real.st_mtime_ns
            if ".." not in name:
                key = os.path.normpath(name)
                assert trees.inodes.setdefault(key, found.st_ino) == found.st_ino

        @rule(folder=st.sampled_from(["", "experts", "base_model"]), some=st.integers(0, 40))
        def list_folder(self, folder, some):
            for root in trees.roots:
                assert sorted(os.listdir(root / folder)) == trees.folders[folder]
                with os.scandir(root / folder) as entries:  # and a part of it, twice
                    first = [entry.name for entry, _ in zip(entries, range(some))]
                assert set(first) <= set(trees.folders[folder]) and len(set(first)) == len(first)

        @rule(target=handles, name=names)
        def open_file(self, name):
            handle = name, [os.open(root / name, os.O_RDONLY) for root in trees.roots]
            self.open.append(handle)
            return handle

        @rule(handle=consumes(handles))
        def close_file(self, handle):
            self.open.remove(handle)
            for fd in handle[1]:
                os.close(fd)

        @rule(handle=handles, size=sizes, data=st.data())
        def read_at(self, handle, size, data):
            name, fds = handle
            at = self.place(data, len(trees.truth[name]))
            for fd in fds:
                assert os.pread(fd, size, at) == trees.truth[name][at : at + size], (name, at, size)

        @rule(handle=handles, sizes=st.lists(sizes, min_size=1, max_size=4), data=st.data())
        def read_into_several(self, handle, sizes, data):
            name, fds = handle
            at = self.place(data, len(trees.truth[name]))
            for fd in fds:
                buffers = [bytearray(size) for size in sizes]
                count = os.preadv(fd, buffers, at)
                assert b"".join(buffers)[:count] == trees.truth[name][at : at + sum(sizes)], (name, at, sizes)

        @rule(handle=handles, size=sizes, data=st.data())
        def seek_and_read(self, handle, size, data):
            name, fds = handle
            at = min(self.place(data, len(trees.truth[name])), 1 << 40)
            for fd in fds:
                assert os.lseek(fd, at, os.SEEK_SET) == at
                assert os.read(fd, size) == trees.truth[name][at : at + size]
                assert os.lseek(fd, -1, os.SEEK_END) == len(trees.truth[name]) - 1

        @rule(handle=handles, size=st.integers(1, 200_000), private=st.booleans(), data=st.data())
        def map_some(self, handle, size, private, data):
            name, fds = handle
            truth = trees.truth[name]
            at = data.draw(st.integers(0, (len(truth) - 1) // PAGE)) * PAGE
            size = min(size, len(truth) - at)
            for fd in fds:
                flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
                with mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ, offset=at) as held:
                    assert held[:] == truth[at : at + size], (name, at, size)

        @rule(name=names, pages=st.integers(1, 40), data=st.data())
        def read_past_the_cache(self, name, pages, data):
            truth = trees.truth[name]
            at = data.draw(st.integers(0, len(truth) // PAGE)) * PAGE
            for root in trees.roots:
                fd = os.open(root / name, os.O_RDONLY | os.O_DIRECT)
                try:
                    buffer = mmap.mmap(-1, pages * PAGE)
                    count = os.preadv(fd, [buffer], at)
                    assert buffer[:count] == truth[at : at + len(buffer)], (name, at, pages)
                finally:
                    os.close(fd)

        @rule(handle=handles, size=sizes, data=st.data())
        def send(self, handle, size, data):
            name, fds = handle
            at = min(self.place(data, len(trees.truth[name])), 1 << 40)
            wanted = trees.truth[name][at : at + size]
            for fd in fds:
                with tempfile.TemporaryFile() as out:
                    sent = 0
                    while count := os.sendfile(out.fileno(), fd, at + sent, size - sent):
                        sent += count
                    out.seek(0)
                    assert out.read() == wanted

        @rule(handle=handles)
        def look_at_handle(self, handle):
            name, fds = handle
            assert {os.fstat(fd).st_size for fd in fds} == {len(trees.truth[name])}
            assert os.statvfs(trees.roots[0]).f_bfree == 0

        @rule(name=names)
        def change_nothing(self, name):
            path = trees.roots[0] / name
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
                assert outcome(lambda f=flags: os.open(path, f)) == errno.EROFS
            assert outcome(lambda: os.truncate(path, 0)) == errno.EROFS
            assert outcome(lambda: os.unlink(path)) == errno.EROFS
            assert outcome(lambda: os.getxattr(path, "user.x")) == errno.EOPNOTSUPP
            assert not os.access(path, os.W_OK) and os.access(path, os.R_OK)

    return Sequence


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    paths = MAKERS[request.param](folder)
    succeed("materialize", paths[0], folder / "out")
    return folder, paths


@pytest.fixture(params=OPTIONS)
def trees(request, made):
    folder, paths = made
    with mounted(paths[0], folder / "mnt", *OPTIONS[request.param]) as root:
        yield Trees(paths, root, folder / "out")


def run_sequences(trees, examples, number=None):
    """The same sequences every time, but others for each number; forked processes would else all take the same."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    chosen = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=quiet,
    )
    sequences = machine(trees) if number is None else seed(number)(machine(trees))
    run_state_machine_as_test(sequences, settings=chosen)


@promises(AGREE, STABLE)
def test_every_sequence_of_calls_gets_what_the_model_holds(trees, times):
    run_sequences(trees, times(40, long=1000))


@promises(AGREE)
def test_sequences_of_several_processes_do_not_disturb_each_other(trees, times):
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=run_sequences, args=(trees, times(15, long=300), number)) for number in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0, 0]


@promises("A materialized tree holds the bytes of the mounted one, and a partial one a part of them.")
def test_both_trees_hold_what_the_model_holds(trees):
    assert contents(trees.roots[0]) == contents(trees.roots[1]) == trees.truth
