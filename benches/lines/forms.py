"""Reading and writing experts as numbers and as MLX's arrays: what is computed against the same bytes in native files."""

import json
import sys

from lab import BENCHES, BINARY, MIB, experts, peak_of, process_bytes, remove, require, resident_bytes, run
from measure import OURS, Figure, at_least, at_most, check_same_bytes, interleave

from . import line
from .materialize import timed
from .metadata import first_byte

NATIVE = "native"
# How many experts a sample reads: of bf16 1.4 GB, of mlx 0.4 GB.
EXPERTS = 16


def native(lab, form):
    """Expert files in a form, written once."""
    require("mount", "--as")
    root = lab.scratch / f"tree-{form}"
    if not root.exists():
        run(BINARY, "materialize", "--quiet", "--as", form, "--layers", 0, "--experts", f"0-{EXPERTS - 1}", lab.model, root)
    return root


def cold(lab, form, read, *flags):
    """A cold sample of each side: computed by a fresh mount, and read from native files of the same bytes."""
    files = experts(native(lab, form), EXPERTS)

    def ours():
        with lab.mount("--as", form, *flags) as mount:
            lab.cold(*files)
            return read(mount.experts(EXPERTS))

    def theirs():
        lab.cold(*files)
        return read(files)

    taken = interleave({OURS: ours, NATIVE: theirs}, lab.samples)
    check_same_bytes(taken)
    return {name: [reading.gigabytes_per_second for reading in readings] for name, readings in taken.items()}


@line("as-mlx-cold", "cold read of 16 whole experts with --as mlx by 1 MiB preads; against native files of the same bytes")
def as_mlx(lab):
    for readers in (1, 4):
        taken = cold(lab, "mlx", lambda files, n=readers: lab.reader("pread", "--readers", n, *files))
        yield Figure(f"readers: {readers}", "GB/s", taken, at_least(0.75, 0.95))
    taken = cold(lab, "mlx", lambda files: lab.reader("pread", *files), "--cache", "direct")
    yield Figure("--cache direct", "GB/s", taken, at_least(0.75, 0.95))


@line("as-bf16-cold", "the same with --as bf16: 3.6 bytes come out of each byte of Q4_K")
def as_bf16(lab):
    for readers in (1, 4):
        taken = cold(lab, "bf16", lambda files, n=readers: lab.reader("pread", "--readers", n, *files))
        yield Figure(f"readers: {readers}", "GB/s", taken, at_least(1, 1.5))


@line("as-mlx-forward", "cold mx.load of 16 experts and one quantized_matmul forward of each; against native MLX files")
def forward(lab):
    taken = cold(lab, "mlx", lambda files: lab.client("forward", *files))
    yield Figure("throughput", "GB/s", taken, at_least(0.75, 0.95))


def blocks_of(lab, files):
    """Bytes of blocks in the model that files of the tree are made from."""
    total = 0
    for path in files:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = json.loads(header["__metadata__"]["odmoe.tensors"])
        elements = sum(a * b for a, b in (t["shape"] for t in tensors.values() if t["ggml_type"] == "Q4_K"))
        # 144 bytes for 256 weights; all others are F32.
        total += elements // 256 * 144
        total += sum(4 * n for t in tensors.values() if t["ggml_type"] == "F32" for n in [product(t["shape"])])
    return total


def product(shape):
    n = 1
    for dim in shape:
        n *= dim
    return n


@line("as-mlx-reads", "bytes read from the disk per byte of blocks, cold: whole experts, and the base files")
def reads(lab):
    native(lab, "mlx")

    def sample(choose, way="pread"):
        with lab.mount("--as", "mlx") as mount:
            files = choose(mount)
            blocks = blocks_of(lab, files)
            lab.cold()
            before = process_bytes(mount.pid, "read_bytes", "io")
            lab.reader(way, *files) if way == "pread" else lab.client(way, *files)
            return (process_bytes(mount.pid, "read_bytes", "io") - before) / blocks

    for way in ("pread", "mlx", "safe-open"):
        sides = {OURS: lambda way=way: sample(lambda mount: mount.experts(EXPERTS), way)}
        yield Figure(f"experts, {way}", "x", interleave(sides, lab.samples, warm_up=0), at_most(1.1, 1))
    sides = {OURS: lambda: sample(lambda mount: sorted(mount.root.glob("base_model/*.safetensors")))}
    yield Figure("base files", "x", interleave(sides, lab.samples, warm_up=0), at_most(2.2, 1.1))


@line("as-mlx-memory", "pages of mounted files and model per byte read, and the daemon's anonymous memory, 16 readers")
def memory(lab):
    native(lab, "mlx")

    def pages():
        with lab.mount("--as", "mlx") as mount:
            files = mount.experts(EXPERTS)
            lab.cold()
            read = lab.reader("pread", *files)
            return resident_bytes([*files, lab.model]) / read.bytes

    yield Figure("resident", "x", interleave({OURS: pages}, lab.samples, warm_up=0), at_most(1.1, 1.02))

    def anonymous(form):
        with lab.mount("--as", form) as mount:
            lab.cold()
            with peak_of(mount.pid, "RssAnon") as peak:
                lab.reader("pread", "--readers", 16, *mount.experts(32))
        return peak[0] / MIB

    for form in ("mlx", "bf16"):
        taken = interleave({OURS: lambda form=form: anonymous(form)}, lab.samples, warm_up=0)
        yield Figure(f"RssAnon, {form}", "MiB", taken, at_most(96, 64))


@line("as-materialize", "materialize --as of 16 experts, ext4, cold, flushed; against cp of the output, and a converter")
def written(lab):
    """The converter is Python: gguf-py's dequantize, MLX's packing by numpy, safetensors' save_file."""
    for form in ("bf16", "mlx"):
        files = experts(native(lab, form), EXPERTS)
        total = sum(path.stat().st_size for path in files)

        def flushed(write, files=files, total=total):
            def sample():
                out = lab.scratch / "out"
                lab.cold(*files)
                try:
                    nanoseconds = write(out) + timed("sync", "-f", out)
                    written = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
                    assert written == total, (written, total)
                    return total / nanoseconds
                finally:
                    remove(out)

            return sample

        flags = ["--quiet", "--as", form, "--experts-only", "--layers", 0, "--experts", f"0-{EXPERTS - 1}"]
        ours = flushed(lambda out, flags=flags: timed(BINARY, "materialize", *flags, lab.model, out))
        copy = flushed(lambda out, form=form: timed("cp", "-r", "--reflink=never", native(lab, form) / "experts", out))
        yield Figure(f"{form}, cp", "GB/s", interleave({OURS: ours, "cp": copy}, lab.samples), at_least(0.8, 1))

        def convert(out, form=form):
            # Blocks and numbers of one expert at a time; nothing is flushed, which is in its favour.
            command = [sys.executable, BENCHES / "converter.py", lab.model, out, form, EXPERTS]
            return json.loads(run(*command))

        total_written = lambda out: sum(p.stat().st_size for p in out.rglob("*.safetensors"))  # noqa: E731

        def converter():
            out = lab.scratch / "out"
            lab.cold(*files)
            try:
                nanoseconds = convert(out) + timed("sync", "-f", out)
                return total_written(out) / nanoseconds
            finally:
                remove(out)

        few = min(lab.samples, 3)
        taken = interleave({OURS: ours, "converter": converter}, few, warm_up=0)
        yield Figure(f"{form}, converter", "GB/s", taken, at_least(8, 20))


@line("as-mlx-mount", "the same mount with --as mlx, and then with everything shown")
def mount(lab):
    require("mount", "--as")
    yield from first_byte(lab, "--as", "mlx")
    everything = "--show", "base,experts,joined,hf"
    yield from first_byte(lab, "--as", "mlx", *everything, milliseconds=(250, 100), mebibytes=(96, 48))
