"""Models and mounts that many tests look at."""

import os
import tempfile
from functools import partial
from pathlib import Path

import pytest

import models
from odmoe import BINARY, ME, User, detach, mounted, mounts, public_copy, sparse_gguf
from reference import Shown


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the long forms of tests that repeat something")


@pytest.fixture(scope="session")
def times(request):
    """How often a test repeats something: `times(20, long=200)`."""
    is_long = request.config.getoption("--long")
    return lambda short, long: long if is_long else short


def pytest_sessionstart(session):
    if not BINARY.exists():
        pytest.exit(f"{BINARY} is missing: build it with `cargo build --release --bins --examples`", returncode=2)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        # Without FUSE nothing here would be tested, so that is a failure and not a reason to skip.
        pytest.exit("/dev/fuse cannot be opened: these tests need real mounts", returncode=2)


# Begins the name of every folder outside of pytest's own that a run makes.
PREFIX = f"odmoe-tests-{os.getpid()}-"


@pytest.fixture(scope="session", autouse=True)
def no_mount_is_left_behind(tmp_path_factory):
    yield
    # Mounts of other programs, and of other runs of these tests, are not ours to judge or to remove.
    ours = str(tmp_path_factory.getbasetemp()), str(Path(tempfile.gettempdir()) / PREFIX)
    left = [m.at for m in mounts() if m.at.startswith(ours)]
    for where in left:
        detach(where)
    assert not left


@pytest.fixture
def public():
    """A folder that every user may work in; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.fixture
def model(public):
    """A small model of one file that every user may read, for a test that says nothing else of its model."""
    return models.write_small(public)[0]


@pytest.fixture(scope="session")
def nobody():
    """A normal user, with the binary where that user can run it."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        Path(folder).chmod(0o755)
        yield User(65534, 65534, public_copy(folder))


@pytest.fixture(params=["root", "nobody"] if ME.uid == 0 else ["myself"])
def person(request):
    """Everybody who may mount: root and a normal user go through different doors of the kernel."""
    return request.getfixturevalue("nobody") if request.param == "nobody" else ME


@pytest.fixture
def folder(public, person):
    """An empty folder of the user, to mount on; nothing stays mounted there."""
    path = public / "mnt"
    path.mkdir()
    os.chown(path, person.uid, person.gid)
    yield path
    detach(path)


def torture(*flags):
    return lambda folder: sparse_gguf("torture-small", folder / "torture.gguf", "--fill-words", *flags)


# How each model is written into a folder.
BUILT = {
    "oddities": models.write_oddities,
    "oddities in parts": partial(models.write_oddities, split_max_tensors=5),
    "dense": models.write_dense,
    **{
        f"{naming} {split}": partial(models.write_typed, naming=naming, split=split)
        for naming in models.NAMINGS
        for split in models.SPLITS
    },
}
SPARSE = {
    "torture": torture(),
    "torture in parts": torture("--splits", 5),
    "torture, one tensor per part": torture("--one-per-part"),
    "torture aligned to a page": torture("--alignment", 4096),
}


def show(request, tmp_path_factory, makers):
    folder = tmp_path_factory.mktemp("shown")
    paths = makers[request.param](folder)
    with mounted(paths[-1], folder / "mnt") as root:  # any part stands for the whole set
        yield Shown(paths, root)


@pytest.fixture(scope="session", params=BUILT)
def built(request, tmp_path_factory):
    """Each model written by gguf-py, mounted."""
    yield from show(request, tmp_path_factory, BUILT)


@pytest.fixture(scope="session", params=BUILT | SPARSE)
def shown(request, tmp_path_factory):
    """Each small model, mounted."""
    yield from show(request, tmp_path_factory, BUILT | SPARSE)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small model, not mounted: its parts."""
    return models.write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def split_copy(tmp_path):
    """A split model that a test may damage."""
    return models.write_small(tmp_path, split_max_tensors=3)
