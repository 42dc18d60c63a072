"""A model elsewhere in every way that a model is used: each byte that is wanted comes once, over links of all kinds."""

import json
import os
import random
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

import models
from answers import cut, hang_up, status
from odmoe import MIB, REPO, contents, expert_gguf, fail, file_system, mounted, needs_root, promises, succeed, wait_for
from remote import *  # noqa: F403
from servers import RangeServer, nginx, ranges_of, tls

READERS = 64
FAR = 0.2


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A toy of a real architecture, which mlx-lm can generate with."""
    path = tmp_path_factory.mktemp("toy") / "toy.gguf"
    flags = ["--arch", "qwen3moe", "--type", "q8_0", "--dim", 128, "--ffn-dim", 64, "--vocab", 600, "--experts", 8]
    succeed("toy", path, *flags, "--layers", 3, "--seed", 5)
    return path


class Near:
    """nginx, over TLS."""

    def __init__(self, origin, certificate, log):
        self.origin, self.log = origin, log
        self.env = {**os.environ, "SSL_CERT_FILE": str(certificate)}

    def counts(self):
        """Bytes sent, and bytes sent twice."""
        answers, twice = ranges_of(self.log)
        return sum(sent for *_, sent in answers), twice


class Far:
    """A server 200 ms away, over TLS, which fails every now and then in each of the ways that pass."""

    def __init__(self, folder, scratch):
        context, certificate = tls(scratch)
        self.server = RangeServer(latency=FAR, host="127.0.0.1", tls=context)
        for path in folder.iterdir():
            self.server.put(f"/{path.name}", path)
        self.origin = self.server.url("")
        self.env = {**os.environ, "SSL_CERT_FILE": str(certificate)}
        choose = random.Random(7)
        for answer in (status(503), status(429, Retry_After=1), hang_up, cut(50_000), cut(0)):
            self.server.fail(answer, when=lambda request: choose.random() < 0.02)

    def counts(self):
        return self.server.sent, self.server.twice()


@pytest.fixture(params=["nginx", "far away"])
def link(request, toy, tmp_path):
    """The toy behind a link."""
    if request.param == "nginx":
        with nginx(toy.parent, tmp_path / "nginx") as (origin, certificate):
            yield Near(origin, certificate, tmp_path / "nginx/access.log")
    else:
        far = Far(toy.parent, tmp_path / "tls")
        yield far
        far.server.stop()


def read_by_loaders(root, local):
    """Every safetensors file by MLX and, where it knows the dtypes, by safetensors."""
    for path in sorted(root.rglob("*.safetensors")):
        ours, theirs = mx.load(str(path)), mx.load(str(local / path.relative_to(root)))
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert mx.array_equal(array.view(mx.uint8), theirs[name].view(mx.uint8)), name
        if not any(array.dtype == mx.bfloat16 for array in ours.values()):
            numbers = load_file(path)
            assert all(np.array_equal(numbers[name], np.array(array)) for name, array in ours.items())


def generated(root):
    program = [sys.executable, REPO / "examples/mlx_generate.py", root, "--prompt", "hello world", "--json"]
    command = [str(word) for word in (*program, "--budget", "1G", "--max-tokens", "4")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["tokens"]


@promises(
    "What is read of a model elsewhere is fetched once in the life of a mount, and nothing is fetched that nobody wants but the end of a piece, and what lies before a reader who leaves a file in the middle.",
)
def test_everything_that_is_done_with_a_model_is_done_with_one_elsewhere(link, toy, tmp_path, cache):
    url = f"{link.origin}/{toy.name}"
    elsewhere = {"env": link.env}
    flags = ["--show", "base,experts,hf", "--as", "mlx"]
    with (
        mounted(toy, tmp_path / "local", *flags) as local,
        remote(url, tmp_path / "mnt", cache, *flags, **elsewhere) as root,  # noqa: F405
    ):
        assert generated(root) == generated(local)
        read_by_loaders(root, local)
        assert contents(root) == contents(local)
        assert "is identical" in succeed("verify", toy, root)
    for form in ([], ["--as", "bf16"], ["--show", "experts,joined"], ["--as", "f32"]):
        with (
            mounted(toy, tmp_path / "local", *form) as local,
            remote(url, tmp_path / "mnt", cache, *form, **elsewhere) as root,  # noqa: F405
        ):
            read_by_loaders(root, local)
            assert contents(root) == contents(local)
    with mounted(toy, tmp_path / "local") as root:
        assert "is identical" in succeed("verify", url, root, "--cache-dir", cache, **elsewhere)
    assert json.loads(succeed("verify", url, "--json", "--cache-dir", cache, **elsewhere))["sound"]
    # A copy, of which a part is there already.
    out = tmp_path / "out"
    copy = ["materialize", url, out, "--cache-dir", cache]
    succeed(*copy, "--layers", "1", **elsewhere)
    (removed,) = out.glob("experts/layer_01_expert_003.safetensors")
    removed.unlink()
    succeed(*copy, **elsewhere)
    assert "is identical" in succeed("verify", toy, out)
    assert "nothing to write" in succeed(*copy, **elsewhere)
    sent, twice = link.counts()
    # Each command asks for a byte, to find the model as it was.
    assert twice <= 20
    assert sent <= 1.05 * toy.stat().st_size


def test_a_copy_that_fails_goes_on_and_fetches_nothing_again(toy, tmp_path, cache):
    server = RangeServer(latency=FAR)
    url = server.put("/toy.gguf", toy)
    server.fail(status(403), when=lambda request: server.sent > toy.stat().st_size / 2)
    copy = [str(BINARY), "materialize", url, str(tmp_path / "out"), "--cache-dir", str(cache)]  # noqa: F405
    assert subprocess.run(copy, capture_output=True, text=True, check=False).returncode == 1
    assert toy.stat().st_size / 4 < server.sent < toy.stat().st_size
    server.heal()
    succeed(*copy[1:])
    assert "is identical" in succeed("verify", toy, tmp_path / "out")
    assert server.twice() <= 2
    assert server.sent <= 1.05 * toy.stat().st_size
    server.stop()


def rewritten(part, number):
    """The bytes of a part with others at its end, where its last expert is."""
    return part.read_bytes()[:-8] + number.to_bytes(8, "big")


@needs_root
@pytest.mark.parametrize(
    ("modified", "kind"),
    # The last of them stores whole seconds.
    [("Sun, 06 Nov 1994 08:49:37 GMT", "tmpfs"), (None, "tmpfs"), (None, "ext4-128")],
)
def test_another_model_of_the_same_shape_and_time_is_never_taken_for_this_one(modified, kind, server, tmp_path, cache):
    parts = models.write_small(tmp_path, split_max_tensors=8)
    url = server.put_all(parts)
    for part in parts:
        server.put(f"/models/{part.name}", part, modified=modified)
    with file_system(kind, tmp_path, 64 * MIB) as disk:
        copy = ["materialize", url, disk / "out", "--cache-dir", cache]
        succeed(*copy)
        assert "nothing to write" in succeed(*copy)
        # Not the newest part, if any is.
        server.put(f"/models/{parts[0].name}", rewritten(parts[0], 1), modified=modified)
        fail(*copy, naming=["holds other bytes", "--force"])
        succeed(*copy, "--force", "--verify")


def test_what_nothing_tells_apart_is_compared(server, tmp_path, cache):
    (model,) = models.write_small(tmp_path)
    bare = {"etag": None, "modified": None}
    copy = ["materialize", server.put("/m.gguf", model, **bare), tmp_path / "out", "--cache-dir", cache, "--unpinned"]
    succeed(*copy)
    assert "nothing to write" in succeed(*copy)
    server.put("/m.gguf", rewritten(model, 1), **bare)
    fail(*copy, naming=["holds other bytes", "--force"])


def test_many_readers_far_away_share_what_is_fetched(tmp_path, cache):
    server = RangeServer(latency=FAR)
    model = expert_gguf(tmp_path)
    with (
        mounted(model, tmp_path / "local") as local,
        remote(server.put("/m.gguf", model), tmp_path / "mnt", cache) as root,  # noqa: F405
    ):
        expected = [expert(local, number).read_bytes() for number in range(8)]  # noqa: F405
        server.forget()
        wrong = []

        def read(n):
            if expert(root, n % 8).read_bytes() != expected[n % 8]:  # noqa: F405
                wrong.append(n)

        readers = [threading.Thread(target=read, args=[n]) for n in range(READERS)]
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
        assert not wrong
    assert server.twice() == 0
    assert server.sent <= 1.05 * sum(map(len, expected))
    assert server.peak <= 32
    server.stop()


@pytest.mark.parametrize("latency", [0.02, FAR])
def test_an_expert_comes_in_few_rounds_however_far_its_server_is(latency, tmp_path, cache):
    server = RangeServer(latency=latency)
    model = expert_gguf(tmp_path)
    with remote(server.put("/m.gguf", model), tmp_path / "mnt", cache) as root:  # noqa: F405
        assert server.rounds() <= 2, "a header of a few kilobytes"
        server.forget()
        size = len(expert(root, 2).read_bytes())  # noqa: F405
        # The kernel's first two requests, and all the rest at once; busy machines start some of it late.
        if latency == FAR:
            assert server.rounds() <= 4
        assert len(server.requests) <= 12
        assert server.sent <= 1.05 * size
    server.stop()


def test_a_set_of_parts_far_away_is_opened_in_two_rounds(tmp_path, cache):
    server = RangeServer(latency=FAR)
    parts = models.write_small(tmp_path, split_max_tensors=1)
    url = server.put_all(parts)
    succeed("inspect", url, "--cache-dir", cache)
    assert server.rounds() <= 2 + len(parts) // 32
    assert len(server.requests) == len(parts)
    server.forget()
    succeed("inspect", url, "--cache-dir", cache)
    wait_for(lambda: server.sent == len(parts))  # counted once it was sent
    server.stop()
