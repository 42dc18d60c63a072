"""What a person sees: a command run on a terminal of its own, and its screen compared whole with tests/data/screens.

`UPDATE_SCREENS=1 tests/run.sh python -k screen` writes the screens anew; look at the difference before committing it."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

import pyte

from odmoe import DATA, ME, PATIENCE

SCREENS = DATA / "screens"


class Terminal:
    """A command on a terminal: `text()` is what the screen shows, `press` types."""

    def __init__(self, command, columns, lines, environment, user, controls):
        self.screen = pyte.Screen(columns, lines)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "xterm-256color"} | environment
        words = [str(word) for word in command]
        options = {"env": environment, "start_new_session": True, **user.switch()}
        if controls:
            # Sends signals for keys, and says which processes are in the foreground, as a shell needs it.
            options["preexec_fn"] = lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, **options)
        os.close(slave)

    def modes(self):
        """Echo, raw mode and so on."""
        return termios.tcgetattr(self._master)

    def is_given_back(self):
        """Whether the screen shows what it showed before the command took it."""
        return self.raw.count(b"\x1b[?1049h") == self.raw.count(b"\x1b[?1049l")

    def read(self, seconds):
        """Takes what comes within a time; says whether the command goes on."""
        if not select.select([self._master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # nobody has the terminal open any more
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def press(self, keys):
        os.write(self._master, keys.encode())

    def resize(self, columns, lines):
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.text()
            self.read(0.05)

    def wait(self):
        """Reads until the command has ended; returns its exit status."""
        deadline = time.monotonic() + PATIENCE
        while self.read(0.1):
            assert time.monotonic() < deadline, self.text()
        return self.process.wait(PATIENCE)

    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip() + "\n"

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def terminal(*command, columns=80, lines=24, user=ME, controls=False, **environment):
    shown = Terminal(command, columns, lines, environment, user, controls)
    try:
        yield shown
    finally:
        shown.close()


def screen_of(*command, status=0, **options):
    """The screen that a command leaves when it has ended."""
    with terminal(*command, lines=options.pop("lines", 60), **options) as shown:
        assert shown.wait() == status, shown.text()
        return shown.text()


def compare(name, text, *masks):
    """Compares a screen with the one that is kept under a name; each mask is `(pattern, instead)`."""
    for pattern, instead in masks:
        text = re.sub(pattern, instead, text)
    path = SCREENS / f"{name}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
