"""Handles of files, as NFS servers give them out: they outlive what the kernel remembers, and the mount itself."""

import ctypes
import os
from pathlib import Path

import pytest

from odmoe import contents, files_of, mounted, needs_root, promises

pytestmark = needs_root

AT_FDCWD = -100
STAYS_GOOD = (
    "A handle of a file, as NFS exports give them out, stays good when the kernel has forgotten the file, and in the next "
    "mount of the same model."
)
libc = ctypes.CDLL(None, use_errno=True)


class Handle(ctypes.Structure):
    """`struct file_handle`, open_by_handle_at(2)."""

    _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_ubyte * 128)]


def handle_of(path):
    handle, mount = Handle(128), ctypes.c_int()
    if libc.name_to_handle_at(AT_FDCWD, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount), 0) != 0:
        raise OSError(ctypes.get_errno(), "name_to_handle_at", path)
    return handle


def opened(handle, root):
    """The file of a handle, by a descriptor of anything on its file system."""
    mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        descriptor = libc.open_by_handle_at(mount, ctypes.byref(handle), os.O_RDONLY)
        if descriptor < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
        return descriptor
    finally:
        os.close(mount)


def forget_everything():
    for _ in range(3):  # what holds an inode goes before it
        Path("/proc/sys/vm/drop_caches").write_text("3")


@promises(STAYS_GOOD)
@pytest.mark.parametrize("flags", [[], ["--cache", "direct"], ["--stats"]], ids=str)
def test_handles_stay_good_when_the_kernel_has_forgotten_their_files(flags, model, public):
    with mounted(model, public / "mnt", *flags) as root:
        expected = contents(root)
        handles = {name: handle_of(path) for name, path in files_of(root).items()}
        folders = {name: handle_of(root / name) for name in ("", "base_model", "experts")}
        forget_everything()
        for name, handle in handles.items():
            with open(opened(handle, root), "rb") as file:
                assert file.read() == expected[name]
        for name, handle in folders.items():
            folder = opened(handle, root)
            assert os.listdir(folder) == os.listdir(root / name)
            assert os.stat("..", dir_fd=folder).st_ino == (root / name / "..").stat().st_ino or name == ""
            os.close(folder)


@promises(STAYS_GOOD)
def test_handles_are_good_in_the_next_mount_of_the_same_model(model, public):
    with mounted(model, public / "mnt") as root:
        expected = contents(root)
        handles = {name: handle_of(path) for name, path in files_of(root).items()}
    with mounted(model, public / "mnt") as root:
        for name, handle in handles.items():
            with open(opened(handle, root), "rb") as file:
                assert file.read() == expected[name]
