"""Another user, or program, that exchanges names while odmoe-fs works: the other side of a race."""

import contextlib
import ctypes
import errno
import os
import threading
import time

AT_FDCWD, RENAME_EXCHANGE = -100, 2
LIBC = ctypes.CDLL(None, use_errno=True)


def exchange(one, other):
    """Exchanges two names, at once."""
    names = [os.fsencode(one), os.fsencode(other)]
    if LIBC.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "renameat2", str(one))


@contextlib.contextmanager
def exchanging(one, *others, pause=0.0003):
    """Exchanges a name for each of the others and back, over and over, until the block ends.

    Where a name was replaced meanwhile, or is mounted on, it stays as it is.
    """
    over = threading.Event()

    def swap():
        while not over.is_set():
            for other in (other for other in others for _ in range(2)):
                try:
                    exchange(one, other)
                except OSError as e:
                    if e.errno not in (errno.ENOENT, errno.EBUSY):
                        raise
                time.sleep(pause)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
