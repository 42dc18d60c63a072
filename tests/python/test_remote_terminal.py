"""What commands say while a server keeps them waiting, when they are interrupted, and of wrong options."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

import models
from answers import hang_up, status
from odmoe import (
    daemon_of,
    detach,
    expert_gguf,
    fail,
    foreground,
    is_running,
    mount_at,
    odmoe,
    promises,
    succeed,
    wait_for,
)
from remote import *  # noqa: F403

WAITING = re.compile(r"waiting for (\S+): (.+); trying again for up to 30 s")
COMMANDS = {
    "inspect": ["inspect"],
    "verify": ["verify"],
    "materialize": ["materialize", "OUT"],
    "fetch": ["fetch"],
    "mount": ["mount", "MNT"],
    "doctor": ["doctor"],
}


def command(words, url, tmp_path, cache):
    (tmp_path / "mnt").mkdir(exist_ok=True)
    places = {"OUT": tmp_path / "out", "MNT": tmp_path / "mnt"}
    name, *rest = (places.get(word, word) for word in words)
    flags = [word for word in rest if str(word).startswith("-")]
    paths = [word for word in rest if word not in flags]
    more = [] if name == "doctor" else ["--cache-dir", cache]
    return [str(word) for word in (BINARY, name, *flags, url, *paths, *more)]  # noqa: F405


def said_until_interrupted(words):
    """All that a command prints on stderr if it gets Ctrl-C once it says that it waits; and how it ends."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if WAITING.search(line):
                process.send_signal(signal.SIGINT)
                lines.append(process.stderr.read())
        process.wait(60)
    return "".join(lines), process.returncode


@promises("A command that waits for a server says so, and can be interrupted.")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_waits_for_a_server_says_so_and_can_be_interrupted(name, server, tmp_path, cache):
    url = server.put("/secret/m.gguf", expert_gguf(tmp_path))
    server.fail(status(503))
    said, end = said_until_interrupted(command(COMMANDS[name], url, tmp_path, cache))
    ((host, reason),) = WAITING.findall(said)
    assert host == f"127.0.0.1:{server.port}"
    assert reason == "the server is busy or out of order (status 503)"
    assert end == 130
    assert said.count("error: ") == 1 and "interrupted by signal 2" in said
    assert "/secret/" not in said.partition("interrupted")[0]


REASONS = {
    "a connection that ends": (lambda server: server.fail(hang_up), "the connection broke"),
    "nobody there": (lambda server: server.stop(), "the server cannot be reached"),
    "a pause": (lambda server: server.fail(status(429, Retry_After=20)), "status 429"),
}


@pytest.mark.parametrize("what", REASONS)
def test_the_reason_of_waiting_is_said_once(what, server, tmp_path, cache):
    url = server.put("/m.gguf", expert_gguf(tmp_path))
    begin, words = REASONS[what]
    begin(server)
    said, end = said_until_interrupted(command(["inspect"], url, tmp_path, cache))
    ((_, reason),) = WAITING.findall(said)
    assert words in reason
    assert end == 130


def test_waiting_shows_nothing_of_a_signed_url(server, tmp_path, cache):
    server.put("/m.gguf", expert_gguf(tmp_path))
    server.fail(status(500))
    urls = tmp_path / "urls"
    urls.write_text(server.url("/m.gguf") + "?X-Amz-Signature=s3cr3t\n")
    words = [BINARY, "inspect", "--url-file", urls, "--cache-dir", cache]  # noqa: F405
    said, _ = said_until_interrupted([str(word) for word in words])
    assert WAITING.search(said)
    assert not any(secret in said for secret in SECRETS)  # noqa: F405


def test_a_short_wait_and_quiet_say_nothing(server, tmp_path, cache):
    url = server.put("/m.gguf", expert_gguf(tmp_path))
    server.fail(status(503), times=2)
    assert "waiting" not in odmoe("inspect", url, "--cache-dir", cache).stderr
    server.fail(status(503), times=6)
    assert odmoe("--quiet", "inspect", url, "--cache-size", "0").stderr == ""


def test_a_daemon_logs_once_that_it_waits_and_that_it_was_answered(server, tmp_path, cache):
    with remote(server.put("/m.gguf", expert_gguf(tmp_path)), tmp_path / "mnt", cache) as root:  # noqa: F405
        healed = time.monotonic() + 5
        server.fail(status(503), when=lambda request: request.at < healed)
        assert error_of(expert(root, 1)) is None  # noqa: F405
        log = log_of(root)  # noqa: F405
        assert len(WAITING.findall(log)) == 1
        assert f"127.0.0.1:{server.port} answers again" in log


def test_doctor_does_not_recommend_itself(server, tmp_path):
    url = server.put("/m.gguf", expert_gguf(tmp_path))
    server.fail(hang_up)
    done = odmoe("doctor", url)
    assert done.returncode == 3
    assert "the connection broke" in done.stdout
    assert "try again later" in done.stdout and "odmoe-fs doctor" not in done.stdout


@pytest.mark.parametrize("flags", [["--quick"], ["--jobs", "2"], ["--quick", "--jobs", "1"]])
def test_options_of_a_comparison_go_with_a_file_of_urls(flags, server, tmp_path, cache):
    parts = models.write_small(tmp_path)
    urls = tmp_path / "urls"
    urls.write_text(server.put_all(parts) + "\n")
    succeed("materialize", parts[0], tmp_path / "out")
    elsewhere = ["--url-file", urls, "--cache-dir", cache]
    assert "is identical" in succeed("verify", *flags, *elsewhere, tmp_path / "out")
    for model in (elsewhere, [parts[0]]):
        said = fail("verify", *flags, *model, status=2)
        assert flags[0] in said and "directory" in said


def test_fetch_says_why_its_cache_cannot_be_used(server, tmp_path, cache):
    url = server.put("/m.gguf", expert_gguf(tmp_path))
    file = tmp_path / "file"
    file.touch()
    fail("fetch", url, "--cache-dir", file, naming=[f'the cache in "{file}" cannot be used', "not a folder", "--cache-dir"])
    below = file / "below"
    fail("fetch", url, "--cache-dir", below, naming=[f'the cache in "{below}" cannot be used', "not a directory"])
    fail("fetch", url, "--cache-dir", "/proc/cache", naming=['the cache in "/proc/cache" cannot be used', "write"])
    said = fail("fetch", url, "--cache-dir", cache, "--cache-size", "0", naming=["no cache", "--cache-size 0"])
    assert "cannot be used" not in said
    # Others read without it.
    done = odmoe("inspect", url, "--cache-dir", file)
    assert done.returncode == 0 and "cannot be used" in done.stderr


def test_an_interrupted_command_answers_programs_in_json(server, tmp_path):
    url = server.put("/m.gguf", expert_gguf(tmp_path))
    server.fail(status(503))
    words = [str(word) for word in (BINARY, "doctor", url, "--json")]  # noqa: F405
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if WAITING.search(line):
                break
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(said)["error"]["code"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unmounts_a_model_elsewhere(number, server, tmp_path, cache):
    url = server.put("/m.gguf", expert_gguf(tmp_path))
    where = tmp_path / "mnt"
    with foreground(url, where, "--cache-dir", cache) as process:
        process.send_signal(number)
        assert process.wait(60) == 0
        assert mount_at(where) is None
    succeed("mount", url, where, "--cache-dir", cache)
    assert len(os.listdir(where / "experts")) > 1
    daemon = daemon_of(where)
    os.kill(daemon, number)
    try:
        wait_for(lambda: not is_running(daemon))
        assert mount_at(where) is None
    finally:
        detach(where)
