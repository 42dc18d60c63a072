"""Reading expert files: cold and cached, by maps and preads, in order and at random, by real loaders."""

import contextlib

from lab import MIB, experts, peak_of, require, resident_bytes
from measure import FLOOR, OURS, Figure, at_least, at_most, check_same_bytes, interleave

from . import line

# How many experts a sample reads: 0.8 GB.
EXPERTS = 32
NATIVE = "native"


def sides_cold(lab, read, *flags, count=EXPERTS, floor=True):
    """One cold sample per side: through a fresh mount, natively, and through a fresh floor."""

    def through(mount):
        def sample():
            with mount() as mounted:
                lab.cold()
                return read(mounted.experts(count))

        return sample

    def native():
        lab.cold()
        return read(experts(lab.tree, count))

    lab.tree, lab.settings  # made before anything is measured
    sides = {OURS: through(lambda: lab.mount(*flags)), NATIVE: native}
    return sides | ({FLOOR: through(lab.floor)} if floor else {})


def cold(lab, read, *flags, **options):
    taken = interleave(sides_cold(lab, read, *flags, **options), lab.samples)
    check_same_bytes(taken)
    return taken


def cached(lab, read, *, count=EXPERTS, floor=True):
    """Samples of files that the kernel has cached whole, on mounts that persist."""
    with contextlib.ExitStack() as stack:
        roots = {OURS: stack.enter_context(lab.mount()).root, NATIVE: lab.tree}
        if floor:
            roots[FLOOR] = stack.enter_context(lab.floor()).root

        def side(root):
            def sample():
                files = experts(root, count)
                lab.cached(files)
                return read(files)

            return sample

        taken = interleave({name: side(root) for name, root in roots.items()}, lab.samples)
    check_same_bytes(taken)
    return taken


def rates(taken):
    return {name: [reading.gigabytes_per_second for reading in readings] for name, readings in taken.items()}


def throughput(taken, bar, aim=None):
    yield Figure("throughput", "GB/s", rates(taken), at_least(bar, aim))


@line("cold-mmap", "cold read of 32 whole experts through maps, every byte summed; against the same files materialized")
def cold_mmap(lab):
    yield from throughput(cold(lab, lambda files: lab.reader("mmap", *files)), 0.75, 0.95)


@line("cold-pread", "cold read of 32 whole experts with 1 MiB preads; against the same files materialized")
def cold_pread(lab):
    yield from throughput(cold(lab, lambda files: lab.reader("pread", *files)), 0.75, 0.95)


@line("cold-four", "as cold-pread, by four readers at the same time, each of other files")
def cold_four(lab):
    yield from throughput(cold(lab, lambda files: lab.reader("pread", "--readers", 4, *files)), 0.75, 0.95)


@line("cached-pread", "cached 1 MiB preads of 32 experts; the daemon takes no part, so the floor is the kernel's limit")
def cached_pread(lab):
    yield from throughput(cached(lab, lambda files: lab.reader("pread", *files)), 0.75)


@line("cached-mmap", "cached maps of 32 experts, every byte summed; the daemon takes no part either")
def cached_mmap(lab):
    yield from throughput(cached(lab, lambda files: lab.reader("mmap", *files)), 0.5)


@line("safe-open-cold", "safetensors' safe_open of 32 experts, all tensors copied out, cold")
def safe_open_cold(lab):
    yield from throughput(cold(lab, lambda files: lab.client("safe-open", *files), floor=False), 0.75, 0.95)


@line("safe-open-cached", "the same, cached")
def safe_open_cached(lab):
    yield from throughput(cached(lab, lambda files: lab.client("safe-open", *files), floor=False), 0.65, 0.8)


@line("mlx-cold", "mlx.core.load and eval of 32 experts, cold")
def mlx_cold(lab):
    yield from throughput(cold(lab, lambda files: lab.client("mlx", *files), floor=False), 0.75)


@line("mlx-cached", "the same, cached")
def mlx_cached(lab):
    yield from throughput(cached(lab, lambda files: lab.client("mlx", *files), floor=False), 0.7)


@line("mlx-direct", "the first read of 32 experts by MLX with --cache direct, cold")
def mlx_direct(lab):
    require("mount", "--cache")
    read = lambda files: lab.client("mlx", *files)  # noqa: E731
    yield from throughput(cold(lab, read, "--cache", "direct", floor=False), 0.9)


def counted(lab, *flags, warm):
    """The same reads through a mount that counts and one that does not, each fresh."""

    def side(*flags):
        def sample():
            with lab.mount(*flags) as mount:
                files = mount.experts(EXPERTS)
                lab.cold()
                if warm:
                    lab.reader("pread", *files)
                return lab.reader("pread", *files)

        return sample

    taken = interleave({OURS: side("--stats", *flags), "without": side(*flags)}, lab.samples)
    check_same_bytes(taken)
    return taken


@line("stats-cold", "cold-pread of a mount with --stats; against one without")
def stats_cold(lab):
    require("mount", "--stats")
    yield from throughput(counted(lab, warm=False), 0.95)


@line("stats-direct", "cached preads with --cache direct, each a request, with --stats; against the same without")
def stats_direct(lab):
    require("mount", "--stats")
    yield from throughput(counted(lab, "--cache", "direct", warm=True), 0.95)


@line("open-read-close", "open, pread of 4 KiB and close of a cached file, 100,000 times; against the disk's own")
def open_read_close(lab):
    times = 100_000
    taken = cached(lab, lambda files: lab.reader("open", "--times", times, *files), count=1)
    each = {name: [r.nanoseconds / times / 1e3 for r in readings] for name, readings in taken.items()}
    yield Figure("time", "µs", each, at_most(1.5, 1.2))


@line("random-faults", "1,000 random 4 KiB faults in the map of one expert, cold, no advice given")
def random_faults(lab):
    taken = cold(lab, lambda files: lab.reader("faults", "--count", 1000, "--seed", 1, *files), count=1)
    times = {name: [reading.milliseconds for reading in readings] for name, readings in taken.items()}
    yield Figure("time", "ms", times, at_most(2, 1.2))


@line("resident", "bytes in memory, of mounted files and model, per byte read once in the default mode, cold before")
def resident(lab):
    def after(way):
        with lab.mount() as mount:
            lab.cold()
            files = mount.experts(EXPERTS)
            read = lab.reader(way, *files)
            return resident_bytes([*files, lab.model]) / read.bytes

    for way in ("pread", "mmap"):
        taken = interleave({OURS: lambda way=way: after(way)}, lab.samples, warm_up=0)
        yield Figure(f"after {way}", "x", taken, at_most(1.1, 1.02))


@line("memory", "the daemon's largest anonymous memory while 16 readers read all experts, cold; sampled every 2 ms")
def memory(lab):
    def anonymous():
        with lab.mount() as mount:
            lab.cold()
            with peak_of(mount.pid, "RssAnon") as peak:
                lab.reader("pread", "--readers", 16, *mount.experts())
        return peak[0] / MIB

    yield Figure("RssAnon", "MiB", interleave({OURS: anonymous}, lab.samples, warm_up=0), at_most(64))
