"""What the tests of remote models share: secrets that must show nowhere, a cache, a mount of a URL."""

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from odmoe import BINARY, daemon_of, mounted, run
from servers import RangeServer

# Whatever is secret in these tests contains this, or is one of the others.
SECRETS = ["s3cr3t", "hf_s3cr3ttoken", "X-Amz-Signature", "leaked"]

# A cache never takes the last twentieth of a disk, and the disk of the tests may be full: memory is not.
ROOMY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


@pytest.fixture
def cache():
    """A folder for a cache on a file system with room."""
    with tempfile.TemporaryDirectory(prefix="odmoe-tests-cache-", dir=ROOMY) as folder:
        yield Path(folder) / "cache"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A usual place for caches that is the test's own; the user's must stay as it was."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odmoe-fs"
    begun = time.time()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))
    yield
    heads = [index.read_bytes()[:8192] for index in usual.rglob("*.index") if index.stat().st_mtime >= begun - 1]
    ours = [b"://127.0.0.1", b"://localhost", b"s3://models/", b"hf://org/repo/"]
    assert not [head for head in heads if any(address in head for address in ours)], f"a test has written to {usual}"


@pytest.fixture
def expected(model, tmp_path):
    """The experts of the test's model, as a mount of the file itself shows them."""
    with mounted(model, tmp_path / "local") as root:
        return [expert(root, number).read_bytes() for number in range(8)]


@pytest.fixture
def server():
    server = RangeServer()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_secret_shows(tmp_path, capfd, said):
    """After each test: nothing secret in what was printed or logged, in process lists, mount tables or names of files."""
    yield
    texts = {"what was said": "\n".join(said)}
    texts["mountinfo"] = Path("/proc/self/mountinfo").read_text()
    for log in tmp_path.rglob("*.log"):
        texts[str(log)] = log.read_text()
    texts["names"] = "\n".join(said.names)
    for name, text in texts.items():
        for secret in SECRETS:
            assert secret not in text, f"{secret} shows in {name}"


class Said(list):
    """All that our commands have printed, how they were called, and the names of files in caches."""

    def __init__(self):
        super().__init__()
        self.names = []


@pytest.fixture
def said(monkeypatch):
    """Everything that `odmoe-fs` prints during a test, and its command lines."""
    said = Said()
    plain = subprocess.run

    def noting(command, *arguments, **options):
        done = plain(command, *arguments, **options)
        if str(command[0]) == str(BINARY):
            said.append(" ".join(map(str, command)))
            said.extend(text for text in (done.stdout, done.stderr) if isinstance(text, str))
            for word in map(str, command):
                folder = Path(word)
                if "odmoe-tests-cache-" in word and folder.is_dir():
                    said.names.extend(str(path) for path in folder.rglob("*"))
            for pid in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if line.startswith(str(BINARY)):
                        said.append(line)
        return done

    monkeypatch.setattr(subprocess, "run", noting)
    return said


@contextlib.contextmanager
def remote(url, where, cache, *flags, **options):
    """A mount of a URL, with a cache of its own and a log that is looked through for secrets."""
    log = Path(where).with_suffix(".log")
    with mounted(url, where, "--cache-dir", cache, "--log-file", log, *flags, **options) as root:
        yield root


def log_of(root):
    return root.with_suffix(".log").read_text()


def kill(root):
    """Ends the daemon of a mount as a power cut would, and takes the dead mount away."""
    os.kill(daemon_of(root), 9)
    run("umount", "-l", root)


def expert(root, number, layer=0):
    return root / f"experts/layer_{layer:02}_expert_{number:03}.safetensors"


def cached_files(cache):
    """The sparse files of a cache that hold the model's bytes."""
    return sorted(p for p in cache.rglob("*") if p.is_file() and p.name != "lock" and p.suffix != ".index")


def error_of(path):
    """The errno of reading a whole file, or None."""
    try:
        path.read_bytes()
    except OSError as e:
        return e.errno
    return None
