"""Writing the tree as files: how fast it is copied, and how little is written where blocks are shared."""

import json
import os
import shutil
import sys
import time

from lab import BENCHES, BINARY, GIB, KIB, KIMI_EXPERTS, MIB, remove, require, run, say
from measure import OURS, Figure, at_least, at_most, interleave

from . import line

# What a file may take besides its data: its inode, its name, and blocks at the edges of shared ones.
FILE_OVERHEAD = 16 * KIB


def timed(*command):
    start = time.perf_counter_ns()
    run(*command)
    return time.perf_counter_ns() - start


def with_peak(lab, *command):
    """Output and peak in MiB of a command. Below time(1): a child of Python starts with Python's peak."""
    usage = lab.scratch / "usage"
    out = run("/usr/bin/time", "-f", "%M", "-o", usage, *command)
    return out, int(usage.read_text()) * KIB / MIB


def flushed(lab, write):
    """A side that writes the tree into a new folder, cold: GB/s until it is on the disk."""

    def sample():
        out = lab.scratch / "out"
        lab.cold()
        try:
            nanoseconds = write(out) + timed("sync", "-f", out)
            written = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
            assert written > 0.99 * lab.model.stat().st_size, "the tree is not whole"
            return lab.tree_bytes / nanoseconds
        finally:
            remove(out)

    return sample


@line("materialize-ext4", "materialize of the 2.4 GB model on its disk, cold, flushed; against cp -r of the tree")
def copy(lab):
    sides = {
        OURS: flushed(lab, lambda out: timed(BINARY, "materialize", "--quiet", lab.model, out)),
        "cp": flushed(lab, lambda out: timed("cp", "-r", "--reflink=never", lab.tree, out)),
    }
    lab.tree
    yield Figure("throughput", "GB/s", interleave(sides, lab.samples), at_least(0.9, 1))


@line(
    "materialize-converter",
    "the same against the reference converter's way (gguf-py, save_file; its imports not counted), and peak memory",
)
def converter(lab):
    peaks = {OURS: [], "converter": []}

    def ours(out):
        start = time.perf_counter_ns()
        _, peak = with_peak(lab, BINARY, "materialize", "--quiet", lab.model, out)
        peaks[OURS].append(peak)
        return time.perf_counter_ns() - start

    def theirs(out):
        printed, peak = with_peak(lab, sys.executable, BENCHES / "converter.py", lab.model, out)
        peaks["converter"].append(peak)
        return json.loads(printed)

    lab.tree
    sides = {OURS: flushed(lab, ours), "converter": flushed(lab, theirs)}
    yield Figure("throughput", "GB/s", interleave(sides, lab.samples), at_least(1.3))
    peaks = {name: values[-lab.samples :] for name, values in peaks.items()}
    yield Figure("peak memory", "MiB", peaks, at_most(1 / 20))


def used_bytes(where):
    """Bytes in use, by the file system's own account, once it has settled."""
    last = None
    for _ in range(50):
        run("sync", "-f", where)
        fs = os.statvfs(where)
        now = (fs.f_blocks - fs.f_bfree) * fs.f_frsize
        if now == last:
            return now
        last = now
        time.sleep(0.3)
    return last


def newly_allocated(lab, kind):
    described = json.loads(run(BINARY, "inspect", "--json", lab.model))["tree"]
    allowed = described["incongruent_bytes"] + FILE_OVERHEAD * described["files"]
    with lab.file_system(kind, 7 * GIB) as where:
        model, out = where / "model.gguf", where / "out"
        shutil.copyfile(lab.model, model)

        def sample():
            before = used_bytes(where)
            run(BINARY, "materialize", "--quiet", model, out)
            allocated = used_bytes(where) - before
            remove(out)
            return allocated / MIB

        taken = interleave({OURS: sample}, lab.samples, warm_up=0)
    note = f"{described['incongruent_bytes']:,} incongruent bytes, {described['files']} files"
    yield Figure("newly allocated", "MiB", taken, at_most(allowed / MIB), note)


@line("materialize-xfs", "bytes newly allocated on XFS, whose blocks can be shared; by statfs once flushed")
def xfs(lab):
    yield from newly_allocated(lab, "xfs")


@line("materialize-btrfs", "the same on btrfs")
def btrfs(lab):
    yield from newly_allocated(lab, "btrfs")


@line("materialize-sparse-xfs", "materialize of full-size sparse Kimi-K2.5, 23,040 experts, on XFS, flushed")
def sparse(lab):
    require("materialize", "--reflink")  # without sharing it would write 578 GiB
    with lab.file_system("xfs", 1200 * GIB) as where:
        (model,) = lab.kimi(where)
        out = where / "out"

        def sample():
            lab.cold(model)
            nanoseconds = timed(BINARY, "materialize", "--quiet", model, out) + timed("sync", "-f", out)
            assert len(os.listdir(out / "experts")) == KIMI_EXPERTS + 1
            remove(out)
            say(f"{nanoseconds / 1e9:.1f} s")
            return nanoseconds / 1e9

        yield Figure("time", "s", interleave({OURS: sample}, lab.samples, warm_up=0), at_most(60, 10))
