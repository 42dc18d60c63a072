"""Everything at once, for a long time: loaders, copies, listings, faults, materializing and remounts against one model.

    tests/run.sh soak [SECONDS]      an hour, if nothing is said

Each actor is a process of its own that repeats one thing and compares every byte with digests that were made from the GGUF.
One of them unmounts and mounts again, now and then by killing the daemon. While it does, the others may meet errors,
which are counted; wrong bytes they may never meet, and no error at any other time. What was wrong is printed at the end,
and makes the exit status 1.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import mmap
import multiprocessing
import os
import random

import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from odmoe import BINARY, DOCUMENTS, MIB, daemon_of, detach, files_of, mount_at, mounts, succeed, wait_for
from reference import Shown, read_header

# A daemon with buffers for reading ahead and for every worker stays far below.
MOST_MEMORY = 160 * MIB
CONTEXT = multiprocessing.get_context("fork")


def digest(data):
    return hashlib.blake2b(data).hexdigest()


class Wrong(Exception):
    """What may never happen."""


class Overlooked(Exception):
    """A loader has overlooked that a read failed, while the mount went away, and made up bytes of its own."""


@dataclasses.dataclass
class Scene:
    """What all actors share."""

    paths: list  # of the model
    root: Path  # of the mount
    scratch: Path
    files: dict  # name -> digest of the whole file
    tensors: dict  # name -> {tensor: digest}
    until: float
    generation: object  # odd while the mount goes away and comes back
    failures: object

    def experts(self):
        return [name for name in self.files if "_expert_" in name]


def scene(scratch, seconds):
    model = scratch / "toy.gguf"
    succeed("toy", model, "--layers", 3, "--experts", 16, "--split", 3)
    paths = sorted(scratch.glob("toy*.gguf"))
    root = scratch / "mnt"
    root.mkdir()
    succeed("mount", paths[0], root)
    shown = Shown(paths, root)
    files, tensors = {name: digest((root / name).read_bytes()) for name in DOCUMENTS}, {}
    for name, entries in shown.layout.items():
        header = read_header(root / name)
        head = (root / name).read_bytes()[: header.start]
        payloads = [bytes(shown.bytes[e.part][e.offset : e.offset + e.nbytes]) for e in entries]
        files[name] = digest(head + b"".join(payloads))
        order = sorted(header.tensors, key=lambda t: header.tensors[t]["data_offsets"])  # noqa: B023
        tensors[name] = dict(zip(order, map(digest, payloads), strict=True))
    until = time.monotonic() + seconds
    return Scene(paths, root, scratch, files, tensors, until, CONTEXT.Value("L", 0), CONTEXT.Queue())


# --- what actors do: each takes the scene and a source of chance, and returns the bytes that it has compared --------


def compare(scene, name, found):
    if found != scene.files[name]:
        raise Wrong(f"{name} holds other bytes")


def plain_reads(scene, chance):
    name = chance.choice(list(scene.files))
    size = chance.choice([4096, 70_000, MIB])
    with open(scene.root / name, "rb", buffering=0) as file:
        data = b"".join(iter(lambda: file.read(size), b""))
    compare(scene, name, digest(data))
    return len(data)


def safetensors(scene, chance):
    from safetensors import safe_open

    name = chance.choice(list(scene.tensors))
    count = 0
    with safe_open(scene.root / name, framework="np") as file:
        for tensor in file.keys():  # noqa: SIM118
            data = file.get_tensor(tensor).tobytes()
            count += len(data)
            if digest(data) != scene.tensors[name][tensor]:
                raise Wrong(f"safe_open: {tensor} of {name} holds other bytes")
    return count


def mlx(scene, chance):
    import mlx.core as mx
    import numpy as np

    name = chance.choice(scene.experts())
    count, before = 0, scene.generation.value
    for tensor, array in mx.load(str(scene.root / name)).items():
        data = np.array(array).tobytes()
        count += len(data)
        if digest(data) != scene.tensors[name][tensor]:
            # It overlooks errors of `pread`, and hands out memory that was never written (0.32.4).
            overlooked = before % 2 or scene.generation.value != before
            raise (Overlooked if overlooked else Wrong)(f"mx.load: {tensor} of {name} holds other bytes")
    return count


def faults(scene, chance):
    """In a process of its own: where the daemon dies under a map, the kernel sends SIGBUS."""
    names = [chance.choice(scene.experts()) for _ in range(8)]
    seed = chance.random()
    child = os.fork()
    if not child:
        status = 2
        with contextlib.suppress(OSError):
            order, status = random.Random(seed), 0
            for name in names:
                with open(scene.root / name, "rb") as file:
                    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                    pages = list(range(0, len(held), 4096))
                    order.shuffle(pages)
                    for at in pages[:50]:
                        held[at]
                    if digest(held[:]) != scene.files[name]:
                        status = 1
                        break
        os._exit(status)
    _, how = os.waitpid(child, 0)
    if os.WIFEXITED(how) and os.WEXITSTATUS(how) == 1:
        raise Wrong(f"a map of one of {names} holds other bytes")
    if how:
        raise OSError(f"a reader of maps ended with {how}")
    return sum((scene.root / name).stat().st_size for name in names)


def checksums(scene, chance):
    names = chance.sample(list(scene.files), 12)
    done = subprocess.run(["b2sum", *names], cwd=scene.root, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        found, name = line.split("  ")
        compare(scene, name, found)
    return sum((scene.root / name).stat().st_size for name in names)


def find(scene, _):
    done = subprocess.run(["find", ".", "-type", "f", "-size", "+0"], cwd=scene.root, capture_output=True, text=True, check=True)
    if {line.removeprefix("./") for line in done.stdout.splitlines()} != set(scene.files):
        raise OSError("files are missing")  # an empty folder, where nothing is mounted
    return 0


def copy(scene, _):
    with tempfile.TemporaryDirectory(dir=scene.scratch) as out:
        subprocess.run(["cp", "-r", f"{scene.root}/.", out], check=True, capture_output=True)
        found = files_of(out)
        if set(found) != set(scene.files):
            raise OSError("files are missing")
        for name, path in found.items():
            compare(scene, name, digest(path.read_bytes()))
        return sum(path.stat().st_size for path in found.values())


def materialize(scene, _):
    """Needs no mount, so nothing may go wrong at any time."""
    with tempfile.TemporaryDirectory(dir=scene.scratch) as out:
        for command in (["materialize", scene.paths[0], out], ["verify", scene.paths[0], out]):
            done = subprocess.run([BINARY, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Wrong(f"{command[0]}: {done.stdout}{done.stderr}")
        for name, path in files_of(out).items():
            compare(scene, name, digest(path.read_bytes()))
        return sum(path.stat().st_size for path in files_of(out).values())


def verify_mount(scene, _):
    done = subprocess.run([BINARY, "verify", scene.paths[-1], scene.root], capture_output=True, text=True, check=False)
    if " holds other bytes" in done.stdout:
        raise Wrong(done.stdout)
    if done.returncode:
        raise OSError(done.stdout + done.stderr)
    return sum(path.stat().st_size for path in scene.paths)


READERS = [plain_reads, safetensors, mlx, faults, checksums, find, copy, materialize, verify_mount]


def act(scene, actor, seed, tally):
    """Repeats what an actor does until the time is over."""
    os.setsid()  # so that what it starts can be ended with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    chance = random.Random(seed)
    while time.monotonic() < scene.until:
        before = scene.generation.value
        try:
            count = actor(scene, chance)
        except Wrong as e:
            scene.failures.put(f"{actor.__name__}: {e}")
            return
        except Overlooked:
            tally[3] += 1
            continue
        except Exception:
            if before % 2 == 0 and scene.generation.value == before:
                scene.failures.put(f"{actor.__name__}: an error while the mount was there:\n{traceback.format_exc()}")
                return
            tally[2] += 1
            time.sleep(0.02)
            continue
        tally[0] += 1
        tally[1] += count


def remount(scene, chance, seen):
    """Takes the mount away, in one of many ways, and makes it again."""
    daemon = daemon_of(scene.root)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{daemon}/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) << 10
    descriptors = len(os.listdir(f"/proc/{daemon}/fd"))
    seen["peak"] = max(seen["peak"], peak)
    seen["descriptors"].add(descriptors)
    seen["threads"].add(int(status["Threads"]))
    if peak > MOST_MEMORY:
        raise Wrong(f"the daemon has taken {peak} bytes")
    scene.generation.value += 1
    how = chance.choice(["umount", "umount", "term", "kill", "kill and mount"])
    seen[how] += 1
    if how == "umount":
        succeed("umount", "--lazy", scene.root)
    else:
        os.kill(daemon, signal.SIGTERM if how == "term" else signal.SIGKILL)
    if how == "term":
        wait_for(lambda: mount_at(scene.root) is None)
    elif how == "kill":
        succeed("umount", "--lazy", scene.root)
    elif how == "kill and mount":
        # Until the kernel has noticed, it is still a mount that answers.
        wait_for(lambda: not Path(f"/proc/{daemon}/fd/0").exists())
    # The old daemon may serve its last readers for a while.
    flags = chance.choice([[], ["--cache", "direct"], ["--threads", "2"], ["--keep-source-cache"]])
    succeed("mount", chance.choice(scene.paths), scene.root, *flags)
    wait_for(lambda: len([m for m in mounts() if m.at == str(scene.root)]) == 1)
    scene.generation.value += 1


def soak(seconds, seed):
    chance = random.Random(seed)
    print(f"soaking for {seconds} s, seed {seed}", flush=True)
    seen = {"peak": 0, "descriptors": set(), "threads": set()}
    seen |= dict.fromkeys(["umount", "term", "kill", "kill and mount"], 0)
    with tempfile.TemporaryDirectory(prefix=f"odmoe-tests-{os.getpid()}-") as scratch:
        stage = scene(Path(scratch), seconds)
        tallies = [CONTEXT.Array("Q", 4) for _ in READERS]
        actors = []
        try:
            for actor, tally in zip(READERS, tallies, strict=True):
                actors.append(CONTEXT.Process(target=act, args=(stage, actor, chance.random(), tally)))
                actors[-1].start()
            started = time.monotonic()
            said = 0
            while time.monotonic() < stage.until and stage.failures.empty():
                # Some daemons live long enough to show what they do not give back.
                time.sleep(chance.choice([chance.uniform(0.5, 6)] * 9 + [seconds / 8]))
                try:
                    remount(stage, chance, seen)
                except Exception:
                    stage.failures.put(f"remount:\n{traceback.format_exc()}")
                if time.monotonic() - started > 10 * (said + 1):
                    said = int((time.monotonic() - started) / 10)
                    rounds, count = (sum(tally[i] for tally in tallies) for i in (0, 1))
                    print(f"{said * 10:6} s  {rounds:8} rounds  {count / (1 << 30):9.2f} GiB", flush=True)
            failures = finished(stage, actors)
        finally:
            for actor in actors:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(actor.pid, signal.SIGKILL)
                actor.kill()
                actor.join()
            detach(stage.root)
        print(f"{'actor':14}{'rounds':>8}{'GiB':>10}{'interrupted':>13}{'overlooked':>12}")
        for actor, tally in zip(READERS, tallies, strict=True):
            print(f"{actor.__name__:14}{tally[0]:8}{tally[1] / (1 << 30):10.2f}{tally[2]:13}{tally[3]:12}")
            if not tally[0]:
                failures.append(f"{actor.__name__} never got to its end")
        ways = ", ".join(f"{name} {seen[name]}" for name in ("umount", "term", "kill", "kill and mount"))
        print(f"remounts: {ways}")
        print(f"daemon: at most {seen['peak'] >> 20} MiB, descriptors {seen['descriptors']}, threads {seen['threads']}")
        # No daemon had more than the others: what they open and start does not grow with their age.
        if max(seen["descriptors"]) > 64 or max(seen["threads"]) > 64:
            failures.append("a daemon has opened or started too much")
        for failure in failures:
            print(f"WRONG: {failure}")
        return not failures


def finished(stage, actors):
    """Waits for the actors; what they found wrong."""
    failures = []
    for actor in actors:
        actor.join(300)
        if actor.is_alive():
            failures.append(f"{actor.name} hangs")
    while not stage.failures.empty():
        failures.append(stage.failures.get())
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=int, nargs="?", default=3600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and clean up
    sys.exit(0 if soak(arguments.seconds, arguments.seed) else 1)


if __name__ == "__main__":
    main()
