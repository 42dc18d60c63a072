"""The cache on disk: right after kills, damage and full disks, and shared by mounts."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import models
from answers import status
from odmoe import (
    MIB,
    contents,
    daemon_of,
    evict,
    expert_gguf,
    fail,
    file_system,
    files_of,
    foreground,
    mounted,
    needs_root,
    odmoe,
    promises,
    run,
    succeed,
)
from remote import *  # noqa: F403
from servers import Hub, RangeServer

# Where the payload begins, or a little behind it.
PAYLOAD = 64 << 10


@pytest.fixture
def model(tmp_path):
    return expert_gguf(tmp_path)


@pytest.fixture
def url(server, model):
    return server.put("/m.gguf", model)


def size_of(cache):
    blocks = 0
    for path in cache.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            blocks += path.stat().st_blocks if path.is_file() else 0
    return 512 * blocks


def read_or_none(path):
    try:
        return path.read_bytes()
    except OSError as e:
        assert e.errno == errno.EIO
        return None


@promises("What was fetched is not fetched again by a later mount.")
def test_a_later_mount_reads_from_the_cache(server, url, expected, tmp_path, cache):
    with remote(url, tmp_path / "mnt", cache) as root:
        assert expert(root, 1).read_bytes() == expected[1]
    server.forget()
    with remote(url, tmp_path / "mnt", cache) as root:
        assert expert(root, 1).read_bytes() == expected[1]
        assert (len(server.requests), server.sent) == (1, 1)


def test_a_limit_on_files_costs_the_cache_and_nothing_else(server, url, expected, tmp_path, cache):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    where = tmp_path / "mnt"
    with mounted(url, where, "--cache-dir", cache, preexec_fn=limit) as root:
        assert expert(root, 1).read_bytes() == expected[1]
    succeed("verify", url, "--cache-dir", cache, preexec_fn=limit)
    fail("fetch", url, "--cache-dir", cache, preexec_fn=limit, naming=["cannot be used", "File too large"])


def test_the_cache_is_closed_to_others_and_names_nothing(server, url, tmp_path, cache):
    succeed("fetch", url, "--experts", "0", "--cache-dir", cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    for path in cache.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_cache_of_a_file_that_was_replaced_is_not_used(server, url, model, expected, tmp_path, cache):
    succeed("fetch", url, "--cache-dir", cache)
    other = bytearray(model.read_bytes())
    other[-1] ^= 1
    server.put("/m.gguf", bytes(other))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/m.gguf").write_bytes(other)
    with remote(url, tmp_path / "mnt", cache) as root:
        assert "is identical" in succeed("verify", tmp_path / "other/m.gguf", root)


def test_what_nothing_but_its_size_tells_apart_is_never_taken_from_the_cache(server, model, expected, tmp_path, cache):
    bare = {"etag": None, "modified": None}
    url = server.put("/m.gguf", model, **bare)
    with remote(url, tmp_path / "mnt", cache, "--unpinned") as root:
        assert expert(root, 1).read_bytes() == expected[1]
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes()[:-1] + b"\xaa")
    with other.open("r+b") as file:
        for place in range(PAYLOAD, other.stat().st_size, MIB):
            file.seek(place)
            file.write(b"another model")
    server.put("/m.gguf", other, **bare)
    with remote(url, tmp_path / "mnt", cache, "--unpinned") as root:
        assert "is identical" in succeed("verify", other, root)


@promises("A daemon that was killed loses at most what it had not written down.")
def test_a_killed_daemon_leaves_a_cache_of_true_bytes(model, expected, tmp_path, cache, times):
    server = RangeServer(latency=0.002, rate=200e6)
    url = server.put("/m.gguf", model)
    held = 0
    where = tmp_path / "mnt"
    where.mkdir()
    for n in range(times(8, long=100)):
        flags = ["--cache-dir", cache, "--log-file", tmp_path / "mnt.log"]
        succeed("mount", url, where, *flags)
        number = n % 8
        reader = threading.Thread(target=error_of, args=[expert(where, number)])
        reader.start()
        time.sleep(random.Random(n).uniform(0, 0.06))
        kill(where)
        reader.join()
        with remote(url, where, cache, "--offline") as root:
            for number in range(8):
                got = read_or_none(expert(root, number))
                assert got is None or got == expected[number]
                held += got is not None
    assert held
    server.stop()


@promises(
    "A damaged piece of the cache is fetched again.",
)
def test_a_damaged_piece_is_fetched_again(server, url, expected, tmp_path, cache):
    succeed("fetch", url, "--cache-dir", cache)
    (data,) = cached_files(cache)
    with data.open("r+b") as file:
        for place in range(200_000, data.stat().st_size, 3 * MIB):
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
    with remote(url, tmp_path / "mnt", cache) as root:
        server.forget()
        assert [expert(root, number).read_bytes() for number in range(8)] == expected
        assert 0 < server.sent < data.stat().st_size / 2
        assert "damaged" in log_of(root)


@pytest.mark.parametrize("what", ["emptied", "cut", "garbage", "of another version", "without its data"])
def test_a_damaged_index_costs_nothing_but_time(what, server, url, expected, tmp_path, cache):
    succeed("fetch", url, "--cache-dir", cache)
    (index,) = cache.rglob("*.index")
    good = index.read_bytes()
    damaged = {
        "emptied": b"",
        "cut": good[: len(good) * 2 // 3],
        "garbage": os.urandom(len(good)),
        "of another version": good.replace(b"cache 2", b"cache 9"),
        "without its data": good,
    }
    index.write_bytes(damaged[what])
    if what == "without its data":
        cached_files(cache)[0].unlink()
    with remote(url, tmp_path / "mnt", cache) as root:
        assert [expert(root, number).read_bytes() for number in range(8)] == expected


@needs_root
@promises(
    "A disk that is full under the cache costs nothing but time, and a twentieth of it stays free.",
)
def test_a_full_disk_under_the_cache_costs_nothing_but_time(server, url, expected, tmp_path):
    with file_system("tmpfs", tmp_path, "8M") as disk:
        with remote(url, tmp_path / "mnt", disk / "cache", "--cache-size", "1G") as root:
            assert [expert(root, number).read_bytes() for number in range(8)] == expected
            # A part of it stays free.
            assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize >= 8 * MIB / 20
        with remote(url, tmp_path / "mnt", disk / "cache", "--cache-size", "1G") as root:
            (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
            assert [expert(root, number).read_bytes() for number in range(8)] == expected


@needs_root
def test_what_its_disk_cannot_hold_is_not_fetched(server, url, tmp_path):
    with file_system("tmpfs", tmp_path, "8M") as disk:
        fetch = ["fetch", url, "--cache-dir", disk / "cache"]
        fail(*fetch, "--cache-size", "1G", naming=["only 7.", "another disk"])
        assert server.sent <= MIB
        assert succeed(*fetch, "--cache-size", "1G", "--experts", "0").startswith("fetched")


def test_experts_that_were_read_least_recently_leave_first_and_whole(server, url, expected, tmp_path, cache):
    size = "16M"
    with remote(url, tmp_path / "mnt", cache, "--cache-size", size) as root:
        for number in (0, 1, 2):
            assert expert(root, number).read_bytes() == expected[number]
            time.sleep(1.1)  # times are kept in seconds
        for number in (3, 4, 5):
            assert expert(root, number).read_bytes() == expected[number]
            time.sleep(1.1)
    blocks = sum(path.stat().st_blocks * 512 for path in cached_files(cache))
    assert blocks <= 16 * MIB
    with remote(url, tmp_path / "mnt", cache, "--offline") as root:
        kept = [number for number in range(6) if read_or_none(expert(root, number))]
        assert kept and kept == list(range(kept[0], 6))


def test_the_cache_never_takes_more_than_it_may(server, url, expected, tmp_path, cache):
    most, done = [], threading.Event()

    def watch():
        while not done.is_set():
            most.append(size_of(cache))

    with remote(url, tmp_path / "mnt", cache, "--cache-size", "16M") as root:
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(8) as pool:
                for _ in range(8):
                    assert list(pool.map(lambda number: expert(root, number).read_bytes(), range(8))) == expected
                    for number in range(8):
                        evict(expert(root, number))
        finally:
            done.set()
            watcher.join()
        # The index of the last pieces may have grown since it was looked at.
        assert 12 * MIB < max(most) <= 16 * MIB + 64 * 1024
        assert "no more room" not in log_of(root)


@promises(
    "No more than `--cache-size` is taken, wherever the folder of the cache is named from, and wherever it goes.",
)
@pytest.mark.parametrize("how", ["relative", "moved", "relative home", "in the foreground"])
def test_the_limit_holds_wherever_the_folder_is(how, server, url, expected, tmp_path, cache, monkeypatch):
    flags, folder = ["--cache-dir", cache], cache
    monkeypatch.chdir(cache.parent)
    if how == "relative home":
        flags, folder = [], cache / ".cache" / "odmoe-fs"
        monkeypatch.setenv("HOME", cache.name)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    elif how != "moved":
        flags = ["--cache-dir", cache.name]
    # The same path from where daemons are.
    elsewhere = Path("/") / cache.name
    mount, root = foreground if how == "in the foreground" else mounted, tmp_path / "mnt"
    with mount(url, root, *flags, "--cache-size", "8M"):
        if how == "moved":
            folder = cache.rename(cache.with_name(cache.name + "-moved"))
        assert [expert(root, number).read_bytes() for number in range(8)] == expected
        assert 4 * MIB < size_of(folder) <= 8 * MIB + 64 * 1024
        assert not elsewhere.exists()
    if how == "moved":
        shutil.rmtree(folder)


def test_a_cache_that_was_removed_takes_no_room_unseen(server, url, expected, tmp_path, cache):
    with remote(url, tmp_path / "mnt", cache) as root:
        shutil.rmtree(cache)
        assert [expert(root, number).read_bytes() for number in range(8)] == expected
        held = {}
        for path in Path(f"/proc/{daemon_of(root)}/fd").iterdir():
            if "odmoe-tests-cache" in os.readlink(path):
                held[path.stat().st_ino] = path.stat().st_blocks * 512
        assert held and sum(held.values()) < MIB
        assert "its files were removed" in log_of(root)


def test_links_in_a_cache_are_not_followed(server, url, expected, tmp_path, cache):
    with remote(url, tmp_path / "mnt", cache):
        pass
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    victim = cache.parent / "victim"
    folder.rename(victim)
    folder.symlink_to(victim)
    before = contents(victim)
    with remote(url, tmp_path / "mnt", cache, "--cache-size", "1M") as root:
        assert expert(root, 0).read_bytes() == expected[0]
    fail("fetch", url, "--cache-dir", cache, naming=["a folder in it is a link", "--cache-dir"])
    assert contents(victim) == before
    (cache / "lock").unlink()
    (cache / "lock").symlink_to(tmp_path / "made")
    fail("fetch", url, "--cache-dir", cache, naming=["cache"])
    assert not (tmp_path / "made").exists()


def test_a_cache_below_the_mount_is_refused_before_it_is_made(server, url, tmp_path, monkeypatch):
    directory = tmp_path / "mnt"
    directory.mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (directory, directory / "a" / "cache", "mnt/cache"):
        fail("mount", url, directory, "--cache-dir", folder, naming=["below the mount", "--cache-dir"])
    assert not list(directory.iterdir())


@promises(
    "What `fetch` has said to be in the cache is there, and what was in it of other models leaves first.",
)
def test_fetch_keeps_what_it_fetches_beside_another_model(server, url, tmp_path, cache):
    data = (tmp_path / "model.gguf").read_bytes()
    other = server.put("/other.gguf", data[:-1] + b"x")
    # The room of one model, and of half of the other.
    size = len(data)
    for tries, address in enumerate([url, other, url, other]):
        flags = ["--cache-dir", cache, "--cache-size", str(size * 3 // 2)]
        assert "are in the cache" in succeed("fetch", address, *flags), tries
        with remote(address, tmp_path / "mnt", cache, "--offline") as root:
            assert all(read_or_none(expert(root, number)) for number in range(8))


def test_fetch_succeeds_where_the_model_just_fits(server, url, tmp_path, cache):
    size = (tmp_path / "model.gguf").stat().st_size
    for more in (100_000, 300_000):
        for _ in range(5):
            succeed("fetch", url, "--cache-dir", cache, "--cache-size", str(size + more))
            shutil.rmtree(cache)
    fail("fetch", url, "--cache-dir", cache, "--cache-size", str(size), naming=["may hold only", "--cache-size"])


def test_a_file_that_is_named_like_an_index_has_a_cache_of_its_own(server, url, model, expected, tmp_path, cache):
    for path in ("/a.gguf", "/a.gguf.index"):
        address = server.put(path, model)
        for _ in range(2):
            with remote(address, tmp_path / "mnt", cache) as root:
                assert [expert(root, number).read_bytes() for number in range(8)] == expected
    server.forget()
    for path in ("/a.gguf", "/a.gguf.index"):
        with remote(server.url(path), tmp_path / "mnt", cache) as root:
            assert [expert(root, number).read_bytes() for number in range(8)] == expected
    assert server.sent <= 2


@promises(
    "Several mounts may use one cache at the same time.",
)
def test_two_mounts_share_a_cache(server, url, expected, tmp_path, cache):
    with remote(url, tmp_path / "one", cache) as one, remote(url, tmp_path / "two", cache) as two:
        server.forget()
        for number in range(4):
            assert expert(one, number).read_bytes() == expected[number]
            assert expert(two, number).read_bytes() == expected[number]
        assert server.twice() == 0
        # Both write at the same time.
        roots = [(root, number) for number in range(4, 8) for root in (one, two)]
        got = {}
        read = lambda root, number: got.update({(root, number): expert(root, number).read_bytes()})  # noqa: E731
        readers = [threading.Thread(target=read, args=pair) for pair in roots]
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
        assert all(got[pair] == expected[pair[1]] for pair in roots)
    server.stop()
    with remote(url, tmp_path / "mnt", cache, "--offline") as root:
        assert [expert(root, number).read_bytes() for number in range(8)] == expected


def test_what_is_not_in_the_cache_is_not_said_to_be_compared(url, model, tmp_path, cache):
    succeed("fetch", url, "--experts", "0-1", "--cache-dir", cache)
    with remote(url, tmp_path / "mnt", cache, "--offline") as root:
        done = odmoe("verify", model, root, "--json")
        said = json.loads(done.stdout)
        unread = {d["path"] for d in said["differences"]}
        assert {d["kind"] for d in said["differences"]} == {"unreadable"} and len(unread) == 6
        files = files_of(root)
        assert said["files"] == len(files) - len(unread)
        assert said["bytes"] < sum(path.stat().st_size for name, path in files.items() if name not in unread) + MIB
        assert "cannot be read in" in odmoe("verify", model, root).stdout


def test_offline_without_a_cache_says_what_to_do(url, cache):
    fail("inspect", url, "--offline", "--cache-dir", cache, naming=["not in the cache", "odmoe-fs fetch"])


@pytest.mark.parametrize("where", ["server", "hub"])
def test_parts_of_two_models_are_no_model_offline(where, server, tmp_path, cache):
    folders = tmp_path / "old", tmp_path / "new"
    for folder in folders:
        folder.mkdir()
    old, new = (models.write_small(folder, split_max_tensors=8) for folder in folders)
    for part in new:
        part.write_bytes(part.read_bytes()[:-1] + b"!")
    hub = Hub()
    put_one = {
        "server": lambda part: server.put(f"/models/{part.name}", part),
        "hub": lambda part: hub.add("org/repo", part),
    }[where]
    put = lambda parts: [put_one(part) for part in parts][0]  # noqa: E731
    env = {**os.environ, "HF_ENDPOINT": hub.url(""), "HF_TOKEN": ""}
    options = ["--cache-dir", cache]
    url = put(old)
    succeed("fetch", url, *options, env=env)
    with remote(url, tmp_path / "mnt", cache, "--offline", env=env) as root:
        assert "is identical" in succeed("verify", old[0], root)
    # The parts are replaced, and the last of them cannot be opened.
    hub.commit = "f" * 40
    put(new)
    last = lambda request: new[-1].name in request.path  # noqa: E731
    for origin in (server, hub):
        origin.fail(status(403), when=last)
    fail("fetch", url, *options, env=env, naming=["403"])
    fail("inspect", url, "--offline", *options, env=env, naming=["different models", "without --offline"])
    server.heal()
    hub.rules.pop(0)
    succeed("fetch", url, *options, env=env)
    with remote(url, tmp_path / "mnt", cache, "--offline", env=env) as root:
        assert "is identical" in succeed("verify", new[0], root)
    hub.stop()


@needs_root
def test_a_cache_that_cannot_be_written_is_only_read(server, url, expected, tmp_path, cache):
    succeed("fetch", url, "--experts", "0-3", "--cache-dir", cache)
    run("mount", "--bind", cache, cache)
    run("mount", "-o", "remount,bind,ro", cache)
    try:
        with remote(url, tmp_path / "mnt", cache) as root:
            server.forget()
            assert [expert(root, number).read_bytes() for number in range(8)] == expected
            assert server.sent < 1.05 * sum(map(len, expected[4:]))
    finally:
        run("umount", cache)


def test_an_interrupted_fetch_goes_on_where_it_was(tmp_path, cache):
    import signal
    import subprocess

    server = RangeServer(rate=20e6)
    (tmp_path / "large").mkdir()
    model = expert_gguf(tmp_path / "large", rows=12288)
    url = server.put("/m.gguf", model)
    command = [BINARY, "fetch", url, "--cache-dir", cache]  # noqa: F405
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        from odmoe import wait_for

        wait_for(lambda: server.sent > 80 * MIB)
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert process.returncode in (130, -signal.SIGINT)
    server.rate = None
    succeed(*command[1:])
    # Only the pieces that were under way are fetched again.
    assert server.twice() <= 32 * MIB
    server.stop()
