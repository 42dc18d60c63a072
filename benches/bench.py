"""Measures the table of the project. benches/run.sh makes everything that this needs.

Every line measures both sides in one run, sample by sample in turn. The table gives the median
(min..max) of each side and of the ratio of each pair. Of throughput, more than 1 is better; of time and
memory, less. A floor is a mount of the same tree that serves zeroes: the cost of FUSE itself. Missed
bars are marked, never left out.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCHES = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHES), str(BENCHES.parent / "tests/python")]

import lines  # noqa: E402
from lab import GIB, Lab, read_ahead_kib, run  # noqa: E402
from measure import HEADINGS, Unavailable, table  # noqa: E402
from odmoe import BINARY, REPO, detach, mounts  # noqa: E402

# For the model, its tree, a copy being written, and two images.
NEEDED_BYTES = 20 * GIB


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop(number, _):
    print("benches/run.sh: told to stop; cleaning up", file=sys.stderr)
    sys.exit(128 + number)


def machine(scratch):
    names = (x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    cpu = next(names, "of unknown kind").rpartition(": ")[2]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    kind, source, how = run("findmnt", "-no", "FSTYPE,SOURCE,OPTIONS", "-T", scratch).splitlines()[-1].split(None, 2)
    return {
        "processor": f"{cpu}, {os.cpu_count()} cores",
        "memory": f"{memory:.1f} GiB",
        "kernel": f"{platform.release()} {platform.machine()}",
        "scratch": f"{kind} on {source} ({how})",
        "read-ahead of the disk, KiB": read_ahead_kib(scratch),
    }


def commit():
    git = ["git", "-c", f"safe.directory={REPO}", "-C", str(REPO)]
    done = subprocess.run(
        [*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def meant(word, key):
    """Whether a word selects a line: by its whole key, or by the beginning of it."""
    return key == word or key.startswith(f"{word}-")


def options(known):
    parser = argparse.ArgumentParser(
        prog="benches/run.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="list what is measured, and stop")
    parser.add_argument("--only", metavar="LINE,...", help="only these; `cold` means cold-mmap and so on")
    parser.add_argument("--samples", type=int, default=7, metavar="N", help="samples of each side [default: 7]")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=BINARY.parent.parent,
        metavar="DIR",
        help="where to make a folder for the data, which is removed again; on a real disk [default: target]",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=BINARY.parent.parent / "bench.json",
        metavar="FILE",
        help="[default: target/bench.json]",
    )
    args = parser.parse_args()
    if args.samples < 1:
        parser.error("--samples must be 1 or more")
    if args.list:
        for line in known.values():
            print(f"{line.key:24}{line.text}")
        parser.exit()
    words = args.only.split(",") if args.only else list(known)
    for word in words:
        if not any(meant(word, key) for key in known):
            parser.error(f"no line is called {word}; --list shows them all")
    args.lines = [line for key, line in known.items() if any(meant(word, key) for word in words)]
    return args


def check_place(scratch):
    if os.geteuid() != 0:
        sys.exit("benches/run.sh: only root can drop caches and mount loop devices; use sudo")
    scratch.mkdir(parents=True, exist_ok=True)
    kind = run("findmnt", "-no", "FSTYPE", "-T", scratch).split()[-1]  # of mounts over each other, the topmost
    if kind in ("tmpfs", "ramfs", "overlay"):
        sys.exit(
            f"benches/run.sh: {scratch} is on {kind}, where nothing is cold; choose a folder on a disk with --scratch"
        )
    fs = os.statvfs(scratch)
    if fs.f_bavail * fs.f_frsize < NEEDED_BYTES:
        sys.exit(
            f"benches/run.sh: {scratch} has less than {NEEDED_BYTES // GIB} GiB of room; choose another with --scratch"
        )


@contextlib.contextmanager
def scratch_below(folder):
    """A folder that is removed with every mount in it, whatever happens."""
    path = Path(tempfile.mkdtemp(prefix="odmoe-bench-", dir=folder.resolve()))
    try:
        yield path
    finally:
        # Nothing may interrupt the cleaning.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        detach(path)
        left = [m.at for m in mounts() if m.at.startswith(f"{path}/")]
        assert not left, f"still mounted: {left}"
        # One file system only: if a mount is left after all, nothing in it is touched.
        run("rm", "-r", "-f", "--one-file-system", path)


def measure(line, lab):
    """The figures of a line, as rows of the table and as JSON; a failure does not stop the others."""
    print(f"==> {line.key}: {line.text}", file=sys.stderr, flush=True)
    start, figures, error = time.monotonic(), [], None
    try:
        figures = list(line.measure(lab))
    except Unavailable as reason:
        error = f"not measured: {reason}"
    except Exception as e:  # noqa: BLE001
        error = f"FAILED: {e or type(e).__name__}"
        detach(lab.scratch)
    rows = [[line.key, *figure.cells()] for figure in figures]
    if error:
        rows.append([line.key, *["-"] * (len(HEADINGS) - 2), error.splitlines()[0]])
        print(f"    {error}", file=sys.stderr)
    seconds = time.monotonic() - start
    found = {"line": line.key, "text": line.text, "seconds": round(seconds, 1), "error": error}
    return rows, found | {"figures": [figure.json() for figure in figures]}


def main():
    args = options(lines.load())
    check_place(args.scratch)
    for number in STOPPING:
        signal.signal(number, stop)
    report = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit()}
    report |= {"samples": args.samples, "machine": machine(args.scratch), "settings": {}, "lines": []}
    rows = []
    with scratch_below(args.scratch) as scratch:
        lab = Lab(scratch, args.samples)
        report["settings"] = lab.settings
        for line in args.lines:
            more, found = measure(line, lab)
            rows += more
            report["lines"].append(found)
    for name, value in {"commit": report["commit"], **report["machine"], **report["settings"]}.items():
        print(f"{name}: {value}")
    print(f"samples: {args.samples} of each side, taken in turn; median (minimum..maximum)\n\n{table(rows)}")
    notes = [f"{found['line']}: {f['note']}" for found in report["lines"] for f in found["figures"] if f["note"]]
    print("\n".join(["", *notes]) if notes else "", end="\n" if notes else "")
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nthe same for programs: {args.json}", file=sys.stderr)
    if any((found["error"] or "").startswith("FAILED") for found in report["lines"]):
        sys.exit(1)


main()
