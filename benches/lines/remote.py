"""Models that are elsewhere, 20 ms away, at 100 MB/s for each connection (tests/support/range_server.rs)."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

from lab import BINARY, EXAMPLES, MIB, run
from measure import NO_LIMIT, OURS, Figure, Unavailable, at_least, at_most, interleave
from odmoe import expert_gguf

from . import line

LATENCY_MS, RATE_MB, CONNECTIONS = 20, 100, 32
# One request for the header and what lies behind it, and one for all the rest.
ROUNDS = 2
PARTS = 14
NO_CACHE = ("--cache-size", "0")


class Link:
    """A server of a folder; `counts` gives its requests and bytes so far."""

    def __init__(self, folder):
        command = [EXAMPLES / "range_server", folder, LATENCY_MS, RATE_MB]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([str(word) for word in command], **pipes)
        self.origin = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def url(self, path):
        return f"{self.origin}/{path.name}"

    def counts(self):
        requests, sent = run("curl", "-sS", f"{self.origin}/counts").split()
        return int(requests), int(sent)


@contextlib.contextmanager
def link(folder):
    server = Link(folder)
    try:
        yield server
    finally:
        server.process.stdin.close()
        server.process.wait()


def read(path):
    """Reads a file as a loader does; milliseconds and bytes."""
    start = time.perf_counter_ns()
    with path.open("rb", buffering=0) as file:
        space = bytearray(MIB)
        total = 0
        while count := file.readinto(space):
            total += count
    return (time.perf_counter_ns() - start) / 1e6, total


def expert(root, number):
    return root / f"experts/layer_00_expert_{number:03}.safetensors"


def model(lab):
    """Eight experts of 21.2 MB."""
    return expert_gguf(lab.fresh("elsewhere"), rows=12288)


@line("remote-expert", "a cold expert of 21 MB from a server; against what the link itself needs for two rounds")
def remote_expert(lab):
    path = model(lab)
    numbers = iter(range(1000))
    with link(path.parent) as server, lab.mount(*NO_CACHE, model=server.url(path)) as mount:
        before = server.counts()

        def ours():
            number = next(numbers) % 8
            if number == 0:
                lab.cold()
            return read(expert(mount.root, number))

        taken = interleave({OURS: ours}, lab.samples)[OURS]
        after = server.counts()
        requests, sent = ((b - a) / (len(taken) + 1) for a, b in zip(before, after, strict=True))
        size = taken[0][1]
        needed = ROUNDS * LATENCY_MS + size / (RATE_MB * 1e6 * CONNECTIONS) * 1e3
        samples = {OURS: [ms for ms, _ in taken], "the link": [needed] * len(taken)}
        note = f"{requests:.0f} requests, {sent / size:.3f} bytes fetched for each byte read"
        yield Figure("time", "ms", samples, at_most(3, 1.5), note)


@line("remote-base", "a base file of 256 MiB from a server, in order; against 32 connections of curl")
def remote_base(lab):
    folder = lab.fresh("base")
    kv = {"general.architecture": "moe", "moe.block_count": 1, "moe.expert_count": 1, "moe.expert_used_count": 1}
    stacks = [["blk.0.ffn_gate_exps.weight", [256, 16, 1], "F32"], ["blk.0.attn_q.weight", [16384, 4096], "F32"]]
    (folder / "table.json").write_text(json.dumps({"kv": kv, "tensors": stacks}))
    run(EXAMPLES / "sparse_gguf", folder / "table.json", folder / "model.gguf", "--fill-words")
    path = folder / "model.gguf"
    with link(folder) as server:
        size = path.stat().st_size

        def ours():
            with lab.mount(*NO_CACHE, model=server.url(path)) as mount:
                ms, total = read(mount.root / "base_model/attention_layers.safetensors")
            return total / ms / 1e6

        def curl():
            step = -(-size // CONNECTIONS)
            ranges = [f"{n}-{min(n + step, size) - 1}" for n in range(0, size, step)]
            start = time.perf_counter_ns()
            sides = [subprocess.Popen(["curl", "-sS", "-o", "/dev/null", "-r", r, server.url(path)]) for r in ranges]
            assert not any(side.wait() for side in sides)
            return size / (time.perf_counter_ns() - start)

        samples = interleave({OURS: ours, f"curl x {CONNECTIONS}": curl}, lab.samples)
    yield Figure("throughput", "GB/s", samples, at_least(0.7, 0.9))


@line("remote-mount", "mount of sparse Kimi-K2.5 in 14 parts from a server, until the first byte of an expert")
def remote_mount(lab):
    parts = lab.kimi(lab.fresh("kimi-14"), "--splits", PARTS)
    with link(parts[0].parent) as server:

        def ours():
            where = lab.fresh("mnt")
            start = time.perf_counter_ns()
            run(BINARY, "mount", server.url(parts[0]), where, *NO_CACHE)
            with next((where / "experts").glob("*.safetensors")).open("rb") as file:
                file.read(1)
            ms = (time.perf_counter_ns() - start) / 1e6
            run(BINARY, "umount", where)
            where.rmdir()
            return ms

        yield Figure("time", "ms", interleave({OURS: ours}, lab.samples), at_most(600, 250))


@line("remote-cached", "a cold expert from the cache on disk; against the same expert of a local model")
def remote_cached(lab):
    path = model(lab)
    cache = lab.fresh("cache")
    numbers = iter(range(1000))
    with link(path.parent) as server:
        url = server.url(path)
        flags = ["--cache-dir", cache, "--cache-size", "1G"]
        done = subprocess.run([BINARY, "fetch", url, *flags], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(done.stderr.strip())

        def of(source, *flags):
            with lab.mount(*flags, model=source) as mount:
                lab.cold(path, *(p for p in Path(cache).rglob("*") if p.is_file()))
                ms, total = read(expert(mount.root, next(numbers) % 8))
            return total / ms / 1e6

        sides = {OURS: lambda: of(url, *flags), "local": lambda: of(path)}
        yield Figure("throughput", "GB/s", interleave(sides, lab.samples), at_least(0.9, 1))


@line("remote-rclone", "the first cold expert of a mount from a server; against our mount on top of a mount of rclone")
def remote_rclone(lab):
    path = model(lab)
    if not any(os.access(Path(p) / "rclone", os.X_OK) for p in os.get_exec_path()):
        raise Unavailable("rclone is not installed")
    notes = {}
    with link(path.parent) as server:

        def counted(side, root):
            before = server.counts()
            ms, total = read(expert(root, 3))
            requests, sent = (b - a for a, b in zip(before, server.counts(), strict=True))
            notes[side] = f"{side}: {requests} requests, {sent / 1e6:.0f} MB for {total / 1e6:.0f} MB"
            return ms

        def ours():
            with lab.mount(*NO_CACHE, model=server.url(path)) as mount:
                return counted(OURS, mount.root)

        def rclone():
            below, store = lab.fresh("rclone"), lab.fresh("rclone-cache")
            command = ["rclone", "mount", f":http,url='{server.origin}':", below, "--daemon", "--read-only"]
            command += ["--vfs-cache-mode", "full", "--cache-dir", store, "--config", "/dev/null"]
            run(*command)
            try:
                with lab.mount(model=below / path.name) as mount:
                    return counted("rclone", mount.root)
            finally:
                run("umount", "-l", below)

        samples = interleave({OURS: ours, "rclone": rclone}, lab.samples, warm_up=0)
    yield Figure("time", "ms", samples, NO_LIMIT, "; ".join(notes.values()))
