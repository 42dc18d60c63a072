"""Makes docs/terminal.svg, the picture of the README, from a real run: `pip install rich`, then

    python docs/terminal.py MODEL.gguf

Mounts the model on a temporary folder, and unmounts it."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPO = Path(__file__).resolve().parents[1]
BINARY = REPO / "target/release/odmoe-fs"
COLUMNS = 92


def run(folder, *words):
    """What a command shows on a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "xterm-256color"}
    # Not the errors: of a model of full size that was made for the picture, `mount` warns that its data is missing.
    ours = {"stdin": slave, "stdout": slave, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([BINARY, *words], cwd=folder, env=environment, **ours)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while data := os.read(master, 1 << 16):
            shown += data
    os.close(master)
    assert process.wait() == 0, shown
    return shown.decode().replace("\r\n", "\n")


def main():
    model = Path(sys.argv[1]).resolve()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "mnt").mkdir()
        try:
            for words in (["inspect", model.name], ["mount", "--as", "mlx", model.name, "mnt"]):
                console.print(Text(f"$ odmoe-fs {' '.join(words)}", style="bold"))
                said = run(model.parent if words[0] == "inspect" else folder, words[0], *[
                    str(model) if word == model.name else word for word in words[1:]
                ])
                console.print(Text.from_ansi(said.replace(f"{folder}/", "/")))
            console.print(Text("$ ls mnt/experts | head -2", style="bold"))
            console.print("\n".join(sorted(os.listdir(folder / "mnt/experts"))[:2]))
        finally:
            subprocess.run([BINARY, "umount", folder / "mnt"], check=False, stdout=subprocess.DEVNULL)
    svg = console.export_svg(title="odmoe-fs")
    # The viewer's own font, and nothing from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    (REPO / "docs/terminal.svg").write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
