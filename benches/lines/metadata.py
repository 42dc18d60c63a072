"""What loaders do before they read data: mount, list, look at headers."""

import os
import subprocess
import tempfile
import time

from lab import BINARY, KIB, KIMI_EXPERTS, MIB, process_bytes, resident_bytes, run
from measure import OURS, Figure, at_most, interleave
from odmoe import daemon_of, detach, succeed

from . import line

HEADERS = 500


@line("headers", "safe_open of 500 experts of sparse Kimi-K2.5, headers only, cold: bytes of the model read per file")
def headers(lab):
    """The most of what the daemon asked for, what came from the disk, and what is in memory afterwards.

    The last includes what was only advised, and holes, which the disk does not see; the first includes
    what was dropped again.
    """
    parts = lab.kimi_parts
    model = lab.model

    def look(model, parts, count):
        with lab.mount(model=model) as mount:
            files = mount.experts(count)
            lab.cold()
            counters = ("rchar", "read_bytes")
            before = [process_bytes(mount.pid, field, "io") for field in counters]
            lab.client("headers", *files)
            after = [process_bytes(mount.pid, field, "io") for field in counters]
            grown = [b - a for a, b in zip(before, after, strict=True)]
            # The kernel's requests, some 100 bytes each, are part of what the daemon asks for.
            return [n / len(files) / KIB for n in (*grown, resident_bytes(parts))]

    for what, arguments in {"sparse": (parts[-1], parts, HEADERS), "on disk": (model, [model], None)}.items():
        taken = interleave({OURS: lambda a=arguments: look(*a)}, lab.samples, warm_up=0)[OURS]
        asked, disk, left = (sorted(column)[len(column) // 2] for column in zip(*taken, strict=True))
        note = f"{what}, KiB a file: {asked:.1f} read by the daemon, {disk:.1f} by the disk, {left:.1f} then cached"
        yield Figure(f"per file, {what}", "KiB", {OURS: [max(sample) for sample in taken]}, at_most(160, 8), note)


@line("find", "find -printf %s of all 23,041 entries of experts/ after dropped caches; against a tree of empty files")
def find(lab):
    parts = lab.kimi_parts
    empty = lab.fresh("empty")
    with lab.mount(model=parts[0]) as mount:
        names = os.listdir(mount.root / "experts")
    assert len(names) == KIMI_EXPERTS + 1
    (empty / "experts").mkdir()
    for name in names:
        (empty / "experts" / name).touch()

    def timed(root):
        lab.cold()
        run("find", "/dev/null")  # the program itself is warm on both sides
        with tempfile.TemporaryFile() as out:
            start = time.perf_counter_ns()
            subprocess.run(["find", root / "experts", "-printf", r"%s\n"], stdout=out, check=True)
            end = time.perf_counter_ns()
            out.seek(0)
            assert len(out.readlines()) == len(names) + 1
        return (end - start) / 1e6

    def ours():
        with lab.mount(model=parts[0]) as mount:
            return timed(mount.root)

    yield Figure(
        "time", "ms", interleave({OURS: ours, "empty files": lambda: timed(empty)}, lab.samples), at_most(1, 0.6)
    )


def first_byte(lab, *flags, milliseconds=(150, 50), mebibytes=(48, 32)):
    """Mounts sparse Kimi-K2.5 in 9 parts until the first byte of an expert is read, and takes the peak of memory.

    The model is cold, the program is warm. The peak is the larger of the command's and the daemon's.
    """
    parts = lab.kimi_parts
    peaks = []

    def start():
        where = lab.fresh("mnt")
        usage = lab.scratch / "usage"
        try:
            lab.cold()
            run(BINARY, "--version")
            start = time.perf_counter_ns()
            succeed("mount", *flags, parts[0], where)
            fd = os.open(where / "experts/layer_30_expert_100.safetensors", os.O_RDONLY)
            assert len(os.pread(fd, 1, 0)) == 1
            end = time.perf_counter_ns()
            os.close(fd)
            daemon = process_bytes(daemon_of(where), "VmHWM")
            succeed("umount", where)
            # Once more, not timed, for the peak of the command that goes before the daemon.
            run("/usr/bin/time", "-f", "%M", "-o", usage, BINARY, "mount", *flags, parts[0], where)
            succeed("umount", where)
            peaks.append(max(daemon, int(usage.read_text()) * KIB) / MIB)
        finally:
            detach(where)
        return (end - start) / 1e6

    yield Figure("until the first byte", "ms", interleave({OURS: start}, lab.samples), at_most(*milliseconds))
    yield Figure("VmHWM", "MiB", {OURS: peaks[-lab.samples :]}, at_most(*mebibytes))


@line("mount", "mount of sparse Kimi-K2.5 with its tokenizer in 9 parts until the first byte of an expert; peak memory")
def mount(lab):
    yield from first_byte(lab)
