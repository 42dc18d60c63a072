"""`mount --stats` and `top`: counters are exact, cost nothing where they are off, and a person sees what is hot."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from odmoe import ME, ask, daemon_of, detach, expert_gguf, fail, mounted, needs_root, odmoe, sparse_gguf, succeed
from screens import compare, terminal


@pytest.fixture
def model(public):
    return expert_gguf(public)


def expert(root, number):
    return root / f"experts/layer_00_expert_{number:03}.safetensors"


def sample(root, user=ME):
    return json.loads(succeed("top", root, "--once", "--json", user=user))


def use(root, counts):
    for number, count in counts.items():
        for _ in range(count):
            os.close(os.open(expert(root, number), os.O_RDONLY))


# --- counters -------------------------------------------------------------------------------------------------------


def test_opens_and_bytes_are_counted_exactly(model, public):
    with mounted(model, public / "mnt", "--stats", "--cache", "direct") as root:
        use(root, {1: 3, 5: 1})
        with expert(root, 2).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(4):
                assert len(os.pread(file.fileno(), 10_000, 5_000)) == 10_000
        said = sample(root)
        assert said["heat"] == [{"layer": 0, "experts": [[1, 3, 0, 0], [2, 1, 4, 40_000], [5, 1, 0, 0]]}]
        stats = said["stats"]
        assert stats["experts"] == {"opens": 5, "reads": 4, "bytes": 40_000}
        assert stats["base"] == {"opens": 0, "reads": 0, "bytes": 0}
        assert (stats["requests"]["open"], stats["requests"]["read"], stats["errors"]) == (5, 4, 0)
        assert stats["layers"] == [[0, 8]]
        assert stats["latency"]["p50_us"] <= stats["latency"]["p99_us"] <= stats["latency"]["max_us"]


def test_many_readers_lose_no_count(model, public):
    def read(number):
        for _ in range(50):
            with expert(root, number).open("rb", buffering=0) as file:
                file.read(1000)

    with mounted(model, public / "mnt", "--stats", "--cache", "direct") as root:
        readers = [threading.Thread(target=read, args=(n % 4,)) for n in range(16)]
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
        heat = sample(root)["heat"][0]["experts"]
        assert sorted(heat) == [[n, 200, 200, 200_000] for n in range(4)]


def test_counters_that_are_read_while_readers_count_are_never_more_than_they_counted(model, public, times):
    """Base files are not touched here, so that every count of them would be made up."""
    is_over = threading.Event()

    def read(number):
        while not is_over.is_set():
            with expert(root, number).open("rb", buffering=0) as file:
                file.read(1000)

    with mounted(model, public / "mnt", "--stats", "--cache", "direct") as root:
        readers = [threading.Thread(target=read, args=(n,)) for n in range(8)]
        [reader.start() for reader in readers]
        try:
            for _ in range(times(2000, long=20_000)):
                stats = json.loads(os.getxattr(root, "user.odmoe.stats"))
                assert stats["base"] == {"opens": 0, "reads": 0, "bytes": 0}
                used, requests = stats["experts"], stats["requests"]
                assert used["opens"] <= requests["open"] and used["reads"] <= requests["read"]
        finally:
            is_over.set()
            [reader.join() for reader in readers]
        said = sample(root)
        assert said["stats"]["experts"]["opens"] == said["stats"]["requests"]["open"]
        assert sum(opens for _, opens, _, _ in said["heat"][0]["experts"]) == said["stats"]["experts"]["opens"]


def numbered(folder, numbers):
    """A model whose experts, of one layer, have these numbers."""
    kv = {"general.architecture": "moe", "moe.block_count": 1, "moe.expert_count": len(numbers)}
    names = [f"blk.0.ffn_{matrix}.{number}.weight" for number in numbers for matrix in ("gate", "down", "up")]
    table = folder / "numbered.json"
    table.write_text(json.dumps({"kv": kv, "tensors": [[name, [32, 32], "F32"] for name in names]}))
    return sparse_gguf(table, folder / "numbered.gguf")[0]


@pytest.mark.parametrize("numbers", [[0, 2, 4], [3], [1, 2, 9], [0, 1, 2, 40], [0, 100_000]])
def test_experts_are_shown_whatever_their_numbers(public, numbers):
    last = numbers[-1]
    with mounted(numbered(public, numbers), public / "mnt", "--stats") as root:
        use(root, {last: 3})
        said = sample(root)
        assert said["stats"]["layers"] == [[0, len(numbers)]]
        runs = said["stats"]["numbers"][0][1]
        assert [number for first, end in runs for number in range(first, end + 1)] == numbers
        printed = succeed("top", root, "--once")
        row = next(line for line in printed.splitlines() if line.startswith("        0 "))[10:]
        cells = {number * len(row) // (last + 1) for number in numbers}
        assert row == "".join("█" if n == len(row) - 1 else "·" if n in cells else " " for n in range(len(row)))
        assert f"experts 0 to {last}" in printed and f"expert {last}" in printed
        drawing = public / "heat.svg"
        succeed("top", root, "--export", drawing)
        titles = [e[0].text for e in ET.parse(drawing).iter() if e.get("class") == "cell"]
        assert len(titles) == len(numbers) and titles[-1].endswith(f"{last}: 3 opens")


def test_reads_that_fail_are_counted_as_errors(model, public):
    with mounted(model, public / "mnt", "--stats", "--cache", "direct") as root:
        os.truncate(model, 10_000)
        assert ask(ME, "answer = len(open(path, 'rb').read())", path=expert(root, 7)) == errno.EIO
        stats = sample(root)["stats"]
        assert stats["errors"] == stats["requests"]["read"] > 0


def test_the_root_alone_has_attributes_and_only_with_stats(model, public):
    with mounted(model, public / "mnt", "--stats") as root:
        assert os.listxattr(root) == ["user.odmoe.stats", "user.odmoe.heat.0"]
        assert os.listxattr(expert(root, 0)) == []
        assert json.loads(os.getxattr(root, "user.odmoe.heat.0")) == []
        for path, name in ((root, "user.odmoe.heat.1"), (root, "user.x"), (expert(root, 0), "user.odmoe.stats")):
            with pytest.raises(OSError) as error:
                os.getxattr(path, name)
            assert error.value.errno == errno.ENODATA
    with mounted(model, public / "mnt") as root:
        with pytest.raises(OSError) as error:
            os.getxattr(root, "user.odmoe.stats")
        assert error.value.errno == errno.EOPNOTSUPP


def test_cached_pages_are_kept_with_stats(model, public):
    """What was read once is not asked for again, though every open is."""
    with mounted(model, public / "mnt", "--stats") as root:
        for _ in range(3):
            expert(root, 3).read_bytes()
        ((number, opens, _, size),) = sample(root)["heat"][0]["experts"]
        assert (number, opens, size) == (3, 3, expert(root, 3).stat().st_size)


@contextlib.contextmanager
def left_mounted(model, where):
    """A mount that a test ends itself."""
    where.mkdir()
    succeed("mount", model, where, "--stats")
    try:
        yield where
    finally:
        detach(where)


# --- screens --------------------------------------------------------------------------------------------------------

MASKS = [(r"on /\S+", "on DIR"), (r"counted for \d+ s", "counted for N s"), (r"within .*", "within TIMES")]


def test_the_printed_screen(model, public):
    with mounted(model, public / "mnt", "--stats") as root:
        assert "no expert was used yet" in succeed("top", root, "--once")
        use(root, {1: 30, 5: 1, 2: 9})
        compare("top-once", succeed("top", root, "--once"), *MASKS)


@pytest.mark.parametrize("colours", [{"NO_COLOR": "1"}, {}], ids=["plain", "colours"])
def test_the_live_screen_follows_keys_and_sizes_and_ends(model, public, colours):
    with mounted(model, public / "mnt", "--stats", "--cache", "direct") as root:
        use(root, {1: 30, 5: 1, 2: 9})
        with terminal(ME.binary, "top", root, **colours) as shown:
            shown.wait_for(lambda: "q ends" in shown.text())
            compare(f"top-live-{'plain' if colours else 'colours'}", shown.text(), *MASKS)
            assert (b"\x1b[38;5;196m" in shown.raw or b"38;5;196" in shown.raw) == (not colours)
            shown.press("h")
            shown.wait_for(lambda: "reads of experts" in shown.text())
            shown.press("hr")
            shown.wait_for(lambda: "bytes of experts in the last interval" in shown.text())
            use(root, {7: 5})
            shown.press("h")
            shown.wait_for(lambda: "the hottest has 5 opens" in shown.text())
            shown.resize(60, 10)
            shown.wait_for(lambda: shown.text().splitlines()[-1].startswith("q ends") and len(shown.text().splitlines()) == 10)
            shown.press("q")
            assert shown.wait() == 0
            assert b"\x1b[?1049l" in shown.raw  # the screen from before


def test_a_map_of_a_large_model_fits_the_terminal(public):
    kimi = sparse_gguf("kimi-k2.5-q4_k_m", public / "kimi.gguf")[0]
    with mounted(kimi, public / "mnt", "--stats") as root:
        (root / "experts/layer_60_expert_383.safetensors").open("rb").close()
        with terminal(ME.binary, "top", root, NO_COLOR="1") as shown:
            shown.wait_for(lambda: "q ends" in shown.text())
            compare("top-live-kimi", shown.text(), *MASKS)
            shown.press("\x1b")
            assert shown.wait() == 0
        drawing = public / "heat.svg"
        succeed("top", root, "--export", drawing)
        cells = [e for e in ET.parse(drawing).iter() if e.get("class") == "cell"]
        assert len(cells) == 60 * 384


@pytest.mark.parametrize("end", ["unmounted", "killed", "stopped"])
def test_the_live_view_ends_with_a_reason_when_the_mount_does(end, model, public):
    with mounted(model, public / "mnt", "--stats") if end == "stopped" else left_mounted(model, public / "mnt") as root:
        with terminal(ME.binary, "top", root) as shown:
            shown.wait_for(lambda: "q ends" in shown.text())
            daemon = daemon_of(root)
            if end == "unmounted":
                succeed("umount", "--lazy", root)
            else:
                os.kill(daemon, signal.SIGKILL if end == "killed" else signal.SIGSTOP)
            try:
                assert shown.wait() == 1
            finally:
                if end == "stopped":
                    os.kill(daemon, signal.SIGCONT)
            assert "error: " in shown.text() and "hint: " in shown.text()


def state(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


ENDING = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPROF", "SIGXCPU", "SIGPWR"]


@pytest.mark.parametrize("name", ENDING)
def test_a_signal_that_ends_the_live_view_leaves_the_terminal_as_it_was(name, model, public):
    number = getattr(signal, name)
    with mounted(model, public / "mnt", "--stats") as root:
        # The one who runs the tests may have it ignored.
        with terminal("env", f"--default-signal={name.removeprefix('SIG')}", ME.binary, "top", root) as shown:
            before = shown.modes()
            shown.wait_for(lambda: "q ends" in shown.text())
            assert shown.modes() != before and not shown.is_given_back()
            shown.process.send_signal(number)
            assert shown.wait() == 128 + number
            assert shown.modes() == before and shown.is_given_back()


def test_a_live_view_that_waits_for_its_mount_obeys_a_signal(model, public):
    with mounted(model, public / "mnt", "--stats") as root, terminal(ME.binary, "top", root) as shown:
        before = shown.modes()
        shown.wait_for(lambda: "q ends" in shown.text())
        os.kill(daemon_of(root), signal.SIGSTOP)
        try:
            shown.process.send_signal(signal.SIGTERM)
            assert shown.wait() in (1, 128 + signal.SIGTERM)
        finally:
            os.kill(daemon_of(root), signal.SIGCONT)
        assert shown.modes() == before and shown.is_given_back()


def test_a_time_limit_ends_the_live_view_and_leaves_the_terminal_as_it_was(model, public):
    with mounted(model, public / "mnt", "--stats") as root:
        with terminal("timeout", "3", ME.binary, "top", root) as shown:
            before = shown.modes()
            assert shown.wait() == 124
            assert shown.modes() == before and shown.is_given_back()


def test_a_live_view_that_is_stopped_gives_the_terminal_back_and_goes_on_later(model, public):
    with mounted(model, public / "mnt", "--stats") as root, terminal(ME.binary, "top", root) as shown:
        before = shown.modes()
        for last in (False, False, True):
            shown.wait_for(lambda: "q ends" in shown.text())
            shown.process.send_signal(signal.SIGTSTP)
            shown.wait_for(lambda: state(shown.process) == "T")
            shown.wait_for(shown.is_given_back)
            assert shown.modes() == before
            shown.screen.reset()
            if last:
                shown.process.terminate()
            shown.process.send_signal(signal.SIGCONT)
        assert shown.wait() == 128 + signal.SIGTERM
        assert shown.modes() == before and shown.is_given_back()


def test_ctrl_z_gives_the_terminal_back_to_the_shell_and_fg_goes_on(model, public):
    with mounted(model, public / "mnt", "--stats") as root:
        with terminal("bash", "--norc", "-i", columns=120, controls=True, PS1="ready$ ", HISTFILE="") as shown:
            shown.wait_for(lambda: "ready$" in shown.text())
            shown.press(f"{ME.binary} top {root}\n")
            for _ in range(2):
                shown.wait_for(lambda: "q ends" in shown.text())
                shown.press("\x1a")
                shown.wait_for(lambda: "Stopped" in shown.text())
                shown.wait_for(shown.is_given_back)
                shown.press("clear; echo still $((6 * 7))\n")
                shown.wait_for(lambda: "still 42" in shown.text())
                shown.press("fg\n")
                shown.wait_for(lambda: "still 42" not in shown.text())
            shown.press("q")
            shown.wait_for(shown.is_given_back)
            shown.press("exit $?\n")
            assert shown.wait() == 0


def test_a_live_view_in_the_background_leaves_the_terminal_alone(model, public):
    with mounted(model, public / "mnt", "--stats") as root:
        with terminal("bash", "--norc", "-i", columns=120, controls=True, PS1="ready$ ", HISTFILE="") as shown:
            shown.wait_for(lambda: "ready$" in shown.text())
            shown.press(f"{ME.binary} top {root} &\n")
            shown.wait_for(lambda: "[1]+  Stopped" in shown.text() or shown.press("\n"))
            assert b"\x1b[?1049h" not in shown.raw
            shown.press("fg\n")
            shown.wait_for(lambda: "q ends" in shown.text())
            shown.press("q")
            shown.wait_for(shown.is_given_back)
            shown.press("exit $?\n")
            assert shown.wait() == 0


def test_a_mount_that_stops_while_it_is_asked_is_said_not_to_answer(model, public, times):
    with mounted(model, public / "mnt", "--stats") as root:
        daemon = daemon_of(root)
        for n in range(times(15, long=60)):
            command = [ME.binary, "top", root, "--once"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            time.sleep(n % 15 / 1000)
            os.kill(daemon, signal.SIGSTOP)
            try:
                _, errors = process.communicate(timeout=60)
            finally:
                os.kill(daemon, signal.SIGCONT)
                process.kill()
            assert process.returncode == 0 or "does not answer" in errors


# --- pictures -------------------------------------------------------------------------------------------------------


def test_the_exported_map_is_xml_with_a_cell_for_each_expert(model, public):
    drawing = public / "heat.svg"
    drawing.write_text("an older one")
    where = public / 'a<b>&"c'
    with mounted(model, where, "--stats") as root:
        use(root, {1: 30, 5: 1})
        succeed("top", root, "--export", drawing)
    cells = [e for e in ET.parse(drawing).iter() if e.get("class") == "cell"]
    assert len(cells) == 8
    titles = [cell[0].text for cell in cells]
    assert titles[1] == "layer 0, expert 1: 30 opens" and titles[5] == "layer 0, expert 5: 1 open"
    assert cells[0].get("fill") == cells[2].get("fill") != cells[1].get("fill")


def test_experts_that_share_a_cell_of_the_exported_map_are_named_together(public):
    drawing = public / "heat.svg"
    model = expert_gguf(public, "--alignment", 32, experts=601, rows=256)
    with mounted(model, public / "mnt", "--stats") as root:
        use(root, {0: 2, 1: 3, 600: 1})
        succeed("top", root, "--export", drawing)
    titles = [e[0].text for e in ET.parse(drawing).iter() if e.get("class") == "cell"]
    assert len(titles) == 301
    assert (titles[0], titles[300]) == ("layer 0, experts 0-1: 5 opens", "layer 0, expert 600: 1 open")
    assert "the darkest cell (2 experts) is 5 opens" in drawing.read_text()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_top_cannot_show_it_says(model, public):
    fail("top", public, naming=["not an odmoe-fs mount"])
    fail("top", public / "nothing", naming=["not an odmoe-fs mount"])
    with mounted(model, public / "mnt") as root:
        fail("top", root, "--once", naming=["--stats"])
        done = odmoe("top", root, "--once", "--json")
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (1, "top.not_counted")
    with mounted(model, public / "mnt", "--stats") as root:
        fail("top", root, naming=["no terminal", "--once"])
        fail("top", root, "--export", model, naming=[".svg"])
        fail("top", root, "--export", public / "none/heat.svg", naming=["heat.svg"])
        fail("top", root, "--json", status=2)
        os.kill(daemon_of(root), signal.SIGSTOP)
        try:
            fail("top", root, "--once", naming=["does not answer"])
        finally:
            os.kill(daemon_of(root), signal.SIGCONT)


@needs_root
def test_the_counters_of_another_user_are_not_shown(model, public, nobody):
    with mounted(model, public / "mnt", "--stats") as root:
        fail("top", root, "--once", user=nobody, naming=["another user"])
    with mounted(model, public / "theirs", "--stats", user=nobody) as root:
        assert sample(root, nobody)["stats"]["layers"] == [[0, 8]]
