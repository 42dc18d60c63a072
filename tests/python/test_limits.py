"""Little memory, few descriptors, few threads, many readers, many mounts: all of it still works, and nothing is left."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
from pathlib import Path

import pytest

import models
from odmoe import (
    MIB,
    PATIENCE,
    PYTHON,
    User,
    contents,
    daemon_of,
    detach,
    expert_gguf,
    files_of,
    is_running,
    mount_at,
    mounted,
    mounts,
    needs_root,
    odmoe,
    promises,
    public_copy,
    run,
    sparse_gguf,
    succeed,
    wait_for,
)

# Reads the files of a folder that its arguments name, in one way, and prints a digest of each; a process of its own,
# whose memory can be limited.
DIGESTS = """
import hashlib, mmap, sys
way, paths = sys.argv[1], sys.argv[2:]
for path in paths:
    digest = hashlib.blake2b()
    with open(path, "rb", buffering=0) as file:
        if way == "map":
            held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            for at in range(0, len(held), 1 << 20):
                digest.update(held[at : at + (1 << 20)])
        else:
            while piece := file.read(1 << 20):
                digest.update(piece)
    print(digest.hexdigest())
"""


def digests(way, paths, **options):
    done = run(PYTHON, "-c", DIGESTS, way, *paths, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# --- memory ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_limit(name, size):
    """A control group of its own; yields a function for `preexec_fn` that joins it."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    above, limit = (old, "memory.limit_in_bytes") if old.exists() else (new, "memory.max")
    if above == new:
        assert "memory" in (new / "cgroup.controllers").read_text().split(), "this machine limits no memory"
        (new / "cgroup.subtree_control").write_text("+memory")
    group = above / f"odmoe-tests-{os.getpid()}-{name}"
    group.mkdir()
    try:
        (group / limit).write_text(str(size))

        def join():
            with open(group / "cgroup.procs", "w") as processes:
                processes.write("0")

        yield join
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@needs_root
@promises("The memory of the daemon does not grow with what is read.")
@pytest.mark.parametrize("way", ["read", "map"])
@pytest.mark.parametrize("cache", ["page", "direct"])
def test_a_reader_and_a_daemon_of_64_mib_each_read_a_model_of_many_times_that(tmp_path, way, cache):
    model = expert_gguf(tmp_path, experts=80)
    assert model.stat().st_size > 4 * 64 * MIB
    succeed("materialize", model, tmp_path / "out")
    with memory_limit("daemon", 64 * MIB) as join_daemon, memory_limit("reader", 64 * MIB) as join_reader:
        with mounted(model, tmp_path / "mnt", "--cache", cache, preexec_fn=join_daemon) as root:
            experts = [name for name in files_of(root) if "expert_" in name]
            found = digests(way, [root / name for name in experts], preexec_fn=join_reader)
            assert "Rss" in Path(f"/proc/{daemon_of(root)}/status").read_text()
    assert found == digests("read", [tmp_path / "out" / name for name in experts])


def test_a_small_model_takes_little_memory(tmp_path):
    (model,) = models.write_small(tmp_path)
    for _ in range(20):
        with mounted(model, tmp_path / "mnt", "--threads", 16) as root:
            status = Path(f"/proc/{daemon_of(root)}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
            assert peak < 12 * 1024, f"the daemon's memory peaked at {peak} KiB"


@promises("The memory of the daemon does not grow with what is read.")
def test_a_thousand_reads_leave_nothing_in_the_daemon(tmp_path, times):
    (model,) = models.write_small(tmp_path)
    with mounted(model, tmp_path / "mnt", "--cache", "direct") as root:
        daemon = daemon_of(root)
        files = list(files_of(root).values())

        def use(rounds):
            for _ in range(rounds):
                for path in files:
                    with path.open("rb") as file:
                        os.pread(file.fileno(), 4096, 100)
            lines = Path(f"/proc/{daemon}/status").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in lines)
            anonymous = int(fields["RssAnon"].split()[0]) << 10
            return anonymous, int(fields["Threads"]), len(os.listdir(f"/proc/{daemon}/fd"))

        before = use(20)
        after = use(times(100, long=2000))
        assert after[0] < before[0] + 4 * MIB
        assert after[1:] == before[1:]


# --- threads --------------------------------------------------------------------------------------------------------

# Forks that many readers, each of which faults pages of mapped files in an order of its own, and compares them.
FAULTING = """
import mmap, os, random, sys
mounted, real, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
names = sorted(name for name in os.listdir(mounted) if name.endswith(".safetensors"))
def wrong(number):
    order = random.Random(number)
    for name in order.sample(names, min(4, len(names))):
        with open(f"{mounted}/{name}", "rb") as file, open(f"{real}/{name}", "rb") as wanted:
            ours, theirs = (mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) for f in (file, wanted))
            for _ in range(40):
                at = order.randrange(len(theirs))
                if ours[at : at + 9000] != theirs[at : at + 9000]:
                    return 1
    return 0
children = []
for number in range(count):
    child = os.fork()
    if not child:
        os._exit(wrong(number))
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


@promises("Any number of readers may read at once, whatever the number of worker threads.")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cache", ["page", "direct"])
def test_64_readers_that_fault_on_maps_do_not_wait_for_each_other_for_ever(tmp_path, threads, cache):
    model = expert_gguf(tmp_path, experts=16)
    succeed("materialize", model, tmp_path / "out")
    with mounted(model, tmp_path / "mnt", "--threads", threads, "--cache", cache) as root:
        done = run(PYTHON, "-c", FAULTING, root / "experts", tmp_path / "out/experts", 64)
        assert done.returncode == 0, done.stderr


# --- descriptors ----------------------------------------------------------------------------------------------------


def few_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


@pytest.fixture(scope="module")
def many_parts(tmp_path_factory):
    """A model of 200 parts, nearly all of them experts."""
    folder = tmp_path_factory.mktemp("many")
    stacks = [[f"blk.{n}.ffn_{m}_exps.weight", [64, 64, 4], "F32"] for n in range(66) for m in ("gate", "down", "up")]
    kv = {"general.architecture": "moe", "moe.block_count": 66, "moe.expert_count": 4, "moe.expert_used_count": 2}
    table = folder / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": [*stacks, ["output_norm.weight", [64], "F32"]]}))
    parts = sparse_gguf(table, folder / "model.gguf", "--one-per-part", "--fill-words")
    assert len(parts) == 200
    return parts


def test_200_parts_are_mounted_with_64_descriptors(many_parts, tmp_path):
    with mounted(many_parts[0], tmp_path / "mnt", preexec_fn=few_descriptors) as root:
        assert len(os.listdir(f"/proc/{daemon_of(root)}/fd")) <= 64
        succeed("verify", many_parts[0], root)


@pytest.mark.parametrize("jobs", [1, 8, 64])
def test_200_parts_are_materialized_and_verified_with_64_descriptors(many_parts, tmp_path, jobs):
    succeed("materialize", many_parts[0], tmp_path / "out", "--jobs", jobs, preexec_fn=few_descriptors)
    succeed("verify", many_parts[0], tmp_path / "out", "--jobs", jobs, preexec_fn=few_descriptors)


# --- threads that are refused ----------------------------------------------------------------------------------------


def run_with_few_threads(user, limit, *arguments):
    """Runs the program as a user of its own, who may have so many processes and threads, this one included."""

    def limited():
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))

    return odmoe(*arguments, user=user, preexec_fn=limited)


@pytest.fixture
def alone(public):
    """A user who has no other process."""
    return User(1_000_000 + os.getpid(), 65534, public_copy(public))


@needs_root
@promises("`materialize` and `verify` go on with fewer threads where a limit refuses some, and with one at least.")
@pytest.mark.parametrize("limit", [1, 2, 3, 6])
@pytest.mark.parametrize("jobs", [3, 200])
def test_materialize_and_verify_go_on_with_the_threads_that_they_get(public, alone, limit, jobs):
    (model,) = models.write_small(public)
    public.chmod(0o777)
    out = public / "out"
    for command in (["toy", public / "toy.gguf"], ["materialize", model, out, "--verify"], ["verify", model, out]):
        jobs_too = [] if command[0] == "toy" else ["--jobs", jobs]
        done = run_with_few_threads(alone, limit, *command, *jobs_too)
        assert done.returncode == 0, done.stderr
    assert len(files_of(out)) == len(json.loads((out / "experts/registry.json").read_text())) + 4 + 2
    # How many there were is said to whoever asks.
    done = run_with_few_threads(alone, limit, "-v", "verify", model, out, "--jobs", 3)
    assert ("of 3 threads" in done.stderr) == (limit < 4), done.stderr


@contextlib.contextmanager
def pids_limit(most):
    """A control group of so many processes and threads; yields a function for `preexec_fn` that joins it."""
    old, new = Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")
    above = old if old.exists() else new
    if above == new:
        assert "pids" in (new / "cgroup.controllers").read_text().split(), "this machine limits no processes"
        (new / "cgroup.subtree_control").write_text("+pids")
    group = above / f"odmoe-tests-{os.getpid()}-pids"
    group.mkdir()
    try:
        (group / "pids.max").write_text(str(most))

        def join():
            with open(group / "cgroup.procs", "w") as processes:
                processes.write("0")

        yield join
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@needs_root
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_container_that_allows_few_threads_is_enough_to_materialize_and_verify(tmp_path, most):
    (model,) = models.write_small(tmp_path)
    with pids_limit(most) as join:
        for command in (["materialize", model, tmp_path / "out", "--verify"], ["verify", model, tmp_path / "out"]):
            assert odmoe(*command, "--jobs", 8, preexec_fn=join).returncode == 0


def test_a_thread_too_many_for_the_address_space_is_not_started(tmp_path):
    """`ulimit -v`: each thread reserves a stack."""
    model = expert_gguf(tmp_path, experts=16)

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (160 * MIB, 160 * MIB))

    for command in (["materialize", model, tmp_path / "out"], ["verify", model, tmp_path / "out"]):
        done = odmoe(*command, "--jobs", 128, preexec_fn=limited)
        assert done.returncode == 0, done.stderr


@needs_root
def test_a_signal_still_ends_a_run_that_got_no_thread(public, alone):
    (model,) = sparse_gguf("qwen3-30b-a3b-q4_k_m", public / "model.gguf")

    def limited():
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

    command = [alone.binary, "materialize", model, public / "out", "--reflink", "never", "--jobs", "4"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=limited, **alone.switch()
    )
    wait_for(lambda: list(public.glob("out/experts/.odmoe-*")) or process.poll() is not None)
    assert len(os.listdir(f"/proc/{process.pid}/task")) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == -signal.SIGTERM


# --- mounts ---------------------------------------------------------------------------------------------------------


def processes_of(folder):
    """Processes that were started with a path in that folder, and run; with them go their descriptors and threads."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # they come and go
            if os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes() and is_running(pid):
                found.append(int(pid))
    return found


def test_a_hundred_mounts_at_once(tmp_path):
    (model,) = models.write_small(tmp_path)
    places = [tmp_path / f"mnt{number}" for number in range(100)]
    try:
        for where in places:
            where.mkdir()
            succeed("mount", model, where)
        listed = {line["directory"]: line for line in json.loads(succeed("status", "--json"))}
        assert [listed[str(where)]["state"] for where in places] == ["alive"] * 100
        assert len({listed[str(where)]["pid"] for where in places}) == 100
        first = contents(places[0])
        for where in places[1::9]:
            assert contents(where) == first
        for where in places:
            succeed("umount", where)
    finally:
        for where in places:
            if mount_at(where):
                detach(where)
    wait_for(lambda: not processes_of(tmp_path))
    assert not [m.at for m in mounts() if m.at.startswith(str(tmp_path))]


def test_mounting_and_unmounting_again_and_again_leaves_nothing(tmp_path, times):
    (model,) = models.write_small(tmp_path)
    where = tmp_path / "mnt"
    where.mkdir()
    expert = where / "experts/layer_00_expert_000.safetensors"

    try:
        for number in range(times(60, long=1000)):
            succeed("mount", model, where)
            expert.read_bytes()
            if number % 3 == 2:
                # Its predecessor may still be on its way out, with the same arguments.
                (mount,) = [m for m in json.loads(succeed("status", "--json")) if m["directory"] == str(where)]
                os.kill(mount["pid"], signal.SIGTERM)
                wait_for(lambda: mount_at(where) is None)
            else:
                succeed("umount", where)
    finally:
        detach(where)
    wait_for(lambda: not processes_of(tmp_path))
    assert mount_at(where) is None
