"""Progress of long work: a bar where the terminal can draw one, lines everywhere else."""

import os
import pty
import re
import subprocess
import threading
import time

import pytest

from odmoe import BINARY, PATIENCE, expert_gguf, failing_disk, needs_root, succeed, wait_for

LINE = re.compile(r"^\d0 %: \S+ \S+ of \S+ \S+(, \d+ files?)?, \S+ \S+/s\r?$", re.MULTILINE)


def said_by(command, term):
    """What a command says on its standard error, a terminal unless `term` is `None`; and how to go on."""
    ours, theirs = pty.openpty() if term is not None else os.pipe()
    environment = {name: value for name, value in os.environ.items() if name not in ("TERM", "NO_COLOR")}
    if term:
        environment["TERM"] = term
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    pieces = []

    def listen():
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # a terminal whose other end is closed
                break
            if not piece:
                break
            pieces.append(piece.decode())

    listener = threading.Thread(target=listen)
    listener.start()

    def finish():
        assert process.wait(PATIENCE) == 0
        listener.join()
        os.close(ours)
        return "".join(pieces)

    return process, finish


@needs_root
@pytest.mark.parametrize("term", [None, "dumb", "", "xterm-256color"], ids=["no terminal", "dumb", "not set", "xterm"])
@pytest.mark.parametrize("command", ["materialize", "verify"])
def test_progress_is_told_in_lines_unless_the_terminal_can_draw(tmp_path, command, term):
    (tmp_path / "store").mkdir()
    model = expert_gguf(tmp_path / "store", experts=12)
    out = tmp_path / "out"
    if command == "verify":
        succeed("materialize", model, out)
    with failing_disk(model.parent, tmp_path) as disk:
        place = model.stat().st_size // 4
        disk.fails(("hang", place, place + 1))
        process, finish = said_by([BINARY, command, disk.at / model.name, out, "--jobs", "1"], term)
        # So long that there is something to tell of.
        wait_for(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) - started(process.pid) > 1.3)
        disk.fails()
        said = finish()
    has_bar = term == "xterm-256color"
    assert bool(LINE.search(said)) != has_bar, said
    assert ("\x1b" in said) == has_bar, said


def started(pid):
    """When a process was started, in seconds since the machine was."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
