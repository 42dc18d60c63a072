"""Servers that misbehave: each row of what was promised of them, on mounts that must go on."""

import collections
import concurrent.futures
import errno
import itertools
import os
import threading
import time

import pytest

from answers import changed, cut, hang_up, stall, status, whole
from odmoe import expert_gguf, fail, odmoe, promises, run, succeed
from remote import *  # noqa: F403
from servers import Closed, Hub

# Where the payload begins: what goes wrong there does not keep a mount from being made.
PAYLOAD = 64 << 10


@pytest.fixture
def model(tmp_path):
    return expert_gguf(tmp_path)


@pytest.fixture
def mount(server, model, tmp_path, cache):
    with remote(server.put("/m.gguf", model), tmp_path / "mnt", cache) as root:
        server.forget()
        yield root


WRONG = {
    "the whole file": (whole, "whole file where a range was asked for"),
    "another range": (changed(Content_Range="bytes 0-99/1000000"), "another range"),
    "another size": (lambda *a: changed(Content_Range=f"bytes {a[2].range[0]}-{a[2].range[1] - 1}/999999999")(*a), "bytes instead of"),
    "no range at all": (changed(Content_Range=""), "another range"),
    "an encoding": (changed(Content_Encoding="gzip"), "encoded (gzip)"),
    "another ETag": (changed(ETag='"other"'), "its ETag is another"),
    "404": (status(404), "status 404"),
    "401": (status(401), "status 401"),
    "403": (status(403), "status 403"),
    "418": (status(418), "status 418"),
    "412": (status(412), "no longer what it was"),
    "416": (status(416), "no longer what it was"),
}


@promises("Whatever is not certainly the range that was asked for, of the file that was opened, is never taken for data.")
@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_the_range_is_never_data(what, mount, server, expected):
    answer, words = WRONG[what]
    server.fail(answer)
    assert error_of(expert(mount, 1)) == errno.EIO
    assert words in log_of(mount)
    server.heal()
    time.sleep(1.1)  # a failure is remembered for a second
    if what in ("another size", "another ETag", "412", "416"):
        # For good: it is another file.
        assert error_of(expert(mount, 2)) == errno.EIO
        assert log_of(mount).count("reads of it fail from now on") == 1
    else:
        assert expert(mount, 1).read_bytes() == expected[1]


def stalled(server, connection, request, stored):
    """Says nothing."""
    time.sleep(15)
    raise Closed


AGAIN = {
    "408": status(408),
    "429": status(429),
    "500": status(500),
    "503": status(503),
    "a connection that ends": hang_up,
    "a body that ends early": cut(1000),
    "a body that ends at once": cut(0),
}


@promises("A server that is busy, out of order or out of reach is asked again, for 30 seconds at most.")
@pytest.mark.parametrize("what", AGAIN)
def test_what_passes_is_asked_for_again(what, mount, server, expected):
    server.fail(AGAIN[what], times=3)
    assert expert(mount, 1).read_bytes() == expected[1]
    assert len(server.requests) > 3


def test_a_body_that_is_cut_again_and_again_is_continued_where_it_ended(mount, server, expected):
    server.fail(cut(100_000))
    assert expert(mount, 1).read_bytes() == expected[1]
    assert server.twice() == 0


def test_a_server_that_asks_for_a_pause_gets_it(mount, server, expected):
    server.fail(status(429, Retry_After=2), times=1)
    assert expert(mount, 1).read_bytes() == expected[1]
    first, *later = sorted(request.at for request in server.requests)
    refused = next(r.at for r in server.requests if r.status == 429)
    assert min(at for at in later if at > refused + 0.5) - refused >= 1.9


def test_a_pause_without_end_is_an_error_of_that_range_for_a_second(mount, server, expected):
    server.fail(status(429, Retry_After=2**64 - 1), times=1)
    error_of(expert(mount, 1))
    time.sleep(1.1)
    assert expert(mount, 1).read_bytes() == expected[1]
    assert "panicked" not in log_of(mount)


def test_a_server_that_stops_sending_is_asked_again(mount, server, expected):
    server.fail(stall(50_000, seconds=15), times=1)
    assert expert(mount, 1).read_bytes() == expected[1]


def test_a_server_that_stops_sending_again_and_again_is_given_up(mount, server):
    server.fail(stall(50_000, seconds=15))
    assert error_of(expert(mount, 1)) == errno.EIO
    tries = collections.Counter(request.range[1] for request in server.requests)
    assert max(tries.values()) <= 4
    assert "trying again for up to 30 s" in log_of(mount)


def test_a_server_that_comes_back_is_found_again(mount, server, expected):
    server.stop()
    threading.Timer(3, server.restart).start()
    assert expert(mount, 1).read_bytes() == expected[1]


@promises(
    "A range that could not be fetched is EIO for its readers, and is asked for again when it is read again a second later.",
    "What is in the cache stays readable when the server is gone.",
)
def test_a_server_that_stays_away_is_an_error_of_what_is_not_cached_after_30_seconds(mount, server, expected):
    assert expert(mount, 1).read_bytes() == expected[1]
    server.stop()
    before = time.monotonic()
    assert error_of(expert(mount, 2)) == errno.EIO
    # Not once more for each page that the kernel asks for again.
    assert time.monotonic() - before < 100
    run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
    assert expert(mount, 1).read_bytes() == expected[1]
    server.restart()
    time.sleep(1.1)
    assert expert(mount, 2).read_bytes() == expected[2]


def read_from(path, start):
    with path.open("rb") as file:
        file.seek(start)
        return file.read()


@promises("A server that is gone holds up the readers of what it has; others are served as long as worker threads are left.")
def test_readers_who_wait_for_a_server_hold_up_nobody_else(mount, server, expected):
    assert expert(mount, 0).read_bytes() == expected[0]
    run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
    server.stop()
    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        starts = [(n, start) for n in range(1, 8) for start in (0, len(expected[n]) // 2)]
        waiting = [pool.submit(read_from, expert(mount, n), start) for n, start in starts]
        time.sleep(1)
        assert len(os.listdir(mount / "experts")) > 8
        assert expert(mount, 7).stat().st_size == len(expected[7])
        assert expert(mount, 0).read_bytes() == expected[0]
        assert not any(reader.done() for reader in waiting)
        server.restart()
        assert [reader.result() for reader in waiting] == [expected[n][start:] for n, start in starts]


@promises("An object that was replaced is EIO from then on, and never bytes of both.")
def test_a_file_that_is_replaced_in_mid_read_never_gives_bytes_of_both(mount, server, model, expected):
    other = bytearray(model.read_bytes())
    for place in range(len(other) // 2, len(other), 100):
        other[place] ^= 0xFF
    server.rate = 1e6
    with expert(mount, 1).open("rb") as file:
        got = file.read(100_000)
        got += file.read(300_000)
        # All of it was asked for; what has not come yet must not come from the new file.
        server.put("/m.gguf", bytes(other))
        server.stop()
        server.restart()
        with pytest.raises(OSError, match="Input/output"):
            while piece := file.read(1 << 20):
                got += piece
    assert got == expected[1][: len(got)]
    assert error_of(expert(mount, 5)) == errno.EIO
    assert log_of(mount).count("reads of it fail from now on") == 1
    said = succeed("status")
    assert "changed" in said
    assert int(said.splitlines()[-1].split()[-1]) > 0


def test_a_file_without_an_etag_is_pinned_by_its_time_and_size(server, model, tmp_path, cache, expected):
    url = server.put("/m.gguf", model, etag=None)
    with remote(url, tmp_path / "mnt", cache) as root:
        assert expert(root, 1).read_bytes() == expected[1]
        server.put("/m.gguf", model, etag=None, modified="Sun, 06 Nov 1994 08:49:37 GMT")
        assert error_of(expert(root, 2)) == errno.EIO


def test_a_file_that_nothing_pins_is_refused_unless_that_is_wanted(server, model, tmp_path, cache, expected):
    url = server.put("/m.gguf", model, etag=None, modified=None)
    fail("inspect", url, naming=["neither an ETag nor a time", "--unpinned"])
    with remote(url, tmp_path / "mnt", cache, "--unpinned") as root:
        assert expert(root, 1).read_bytes() == expected[1]


def test_a_weak_etag_is_compared(server, model, tmp_path, cache, expected):
    url = server.put("/m.gguf", model, etag='W/"a"')
    with remote(url, tmp_path / "mnt", cache) as root:
        assert expert(root, 1).read_bytes() == expected[1]
        assert all("if-match" not in request.headers for request in server.requests)
        server.files["/m.gguf"].etag = 'W/"b"'
        assert error_of(expert(root, 2)) == errno.EIO


def test_redirects_are_followed_once_and_their_end_is_remembered(server, model, tmp_path, cache, expected):
    server.put("/end.gguf", model)
    url = server.url("/m.gguf")
    server.fail(status(307, Location="/end.gguf?X-Amz-Signature=s3cr3t"), when=lambda r: r.path == "/m.gguf")
    with remote(url, tmp_path / "mnt", cache) as root:
        assert expert(root, 1).read_bytes() == expected[1]
        # It expires.
        server.fail(status(403), times=1, when=lambda r: r.path == "/end.gguf")
        assert expert(root, 2).read_bytes() == expected[2]
    assert len([r for r in server.requests if r.path == "/m.gguf"]) == 2


def test_readers_who_wait_for_a_fresh_url_share_the_wait_and_not_their_turns(model, tmp_path, cache, expected):
    hub = Hub()
    url = hub.add("org/repo", model)
    env = {**os.environ, "HF_ENDPOINT": hub.url(""), "HF_TOKEN": ""}
    with remote(url, tmp_path / "mnt", cache, "--threads", "8", env=env) as root:
        # The signature expires, and whoever gives fresh ones accepts connections and says nothing.
        hub.signatures.clear()
        hub.fail(stalled)
        hub.forget()
        errors = []
        readers = [threading.Thread(target=lambda n=n: errors.append(error_of(expert(root, n)))) for n in range(6)]
        before = time.monotonic()
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
        assert errors == [errno.EIO] * 6
        # Each by itself takes 40 s; one after the other, they took 120 s and more.
        assert time.monotonic() - before < 90
        hub.rules.pop(0)
        time.sleep(1.1)
        assert expert(root, 1).read_bytes() == expected[1]
    hub.stop()


def test_one_fresh_url_is_enough_for_all_readers_of_one_that_expired(model, tmp_path, cache, expected):
    hub = Hub()
    url = hub.add("org/repo", model)
    env = {**os.environ, "HF_ENDPOINT": hub.url(""), "HF_TOKEN": ""}
    with remote(url, tmp_path / "mnt", cache, env=env) as root:
        hub.forget()
        old = set(hub.signatures)
        hub.signatures.clear()
        refused = itertools.count()

        def refused_late(connection, request, stored):
            if request.query.rpartition("=")[2] in old:
                time.sleep(0.3 + 0.2 * next(refused))

        hub.store.rules.insert(0, refused_late)
        readers = [threading.Thread(target=expert(root, n).read_bytes) for n in range(4)]
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
        assert next(refused) > 2
        assert len(hub.requests) == 1
        assert [expert(root, n).read_bytes() for n in range(4)] == expected[:4]
    hub.stop()


@pytest.mark.parametrize("name", ["HF_TOKEN_PATH", "HF_HOME", "HOME"])
def test_a_token_that_was_exchanged_is_read_again(name, model, tmp_path, cache, expected):
    hub = Hub(token="hf_s3cr3ttoken")
    url = hub.add("org/repo", model)
    # From where the command is given: its daemon is elsewhere.
    token = tmp_path / {"HF_TOKEN_PATH": "here", "HF_HOME": "here/token", "HOME": "here/.cache/huggingface/token"}[name]
    token.parent.mkdir(exist_ok=True, parents=True)
    token.write_text("hf_s3cr3ttoken\n")
    none = dict.fromkeys(["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"], "")
    env = {**os.environ, **none, "HF_ENDPOINT": hub.url(""), name: "here"}
    with remote(url, tmp_path / "mnt", cache, env=env, cwd=tmp_path) as root:
        hub.token = "hf_s3cr3ttoken2"
        hub.signatures.clear()
        assert error_of(expert(root, 1)) == errno.EIO
        assert "status 401" in log_of(root)
        token.write_text(hub.token)
        time.sleep(1.1)
        assert expert(root, 1).read_bytes() == expected[1]
    hub.stop()


def test_fresh_urls_in_the_file_are_used_once_the_old_ones_expire(server, model, tmp_path, cache, expected):
    url, urls = server.put("/m.gguf", model), tmp_path / "urls"
    signature = None

    def sign(number):
        """Has the server accept only this signature; returns a line of a file of URLs."""
        nonlocal signature
        signature = f"X-Amz-Signature=s3cr3t{number}"
        return f"{url}?{signature}\n"

    server.fail(status(403), when=lambda request: request.query != signature)
    urls.write_text(sign(1))
    with remote("--url-file=urls", tmp_path / "mnt", cache, cwd=tmp_path) as root:
        assert expert(root, 1).read_bytes() == expected[1]
        fresh = sign(2)
        assert error_of(expert(root, 2)) == errno.EIO
        assert "status 403" in log_of(root)
        urls.write_text(f"# fresh\n{fresh}")
        time.sleep(1.1)
        assert expert(root, 2).read_bytes() == expected[2]
        # Another file is not taken for this one, though its URL is in the list.
        server.put("/m.gguf", model.read_bytes() + b"more")
        urls.write_text(sign(3))
        assert error_of(expert(root, 3)) == errno.EIO
        assert "no longer what it was" in log_of(root)


def test_a_part_that_the_file_of_urls_lacks_is_named(server, tmp_path, cache):
    import models

    parts = models.write_small(tmp_path, split_max_tensors=8)
    server.put_all(parts)
    server.fail(status(403), when=lambda request: not request.query)
    urls = tmp_path / "urls"
    urls.write_text(f"{server.url(f'/models/{parts[0].name}')}?X-Amz-Signature=s3cr3t")
    fail("inspect", "--url-file", urls, "--cache-size", "0", naming=[parts[1].name, "403", "of this file, too"])


def test_a_password_in_a_redirect_shows_nowhere(server, model):
    server.put("/end.gguf", model)
    leading = server.url("/end.gguf").replace("http://", "http://user:s3cr3t@")
    server.fail(status(302, Location=leading), when=lambda request: request.path == "/m.gguf")
    done = odmoe("-vv", "inspect", server.url("/m.gguf"), "--cache-size", "0")
    assert done.returncode == 0 and "DEBUG" in done.stderr
    assert not any("authorization" in request.headers for request in server.requests)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (status(302, Location="/m.gguf"), ["redirects"]),
        (status(302), ["where to go"]),
        (status(302, Location="http://192.0.2.1/m.gguf"), ["plain HTTP"]),
        (status(302, Location="file:///etc/passwd"), ["leads nowhere"]),
        (status(404), ["404", "check the address"]),
        (status(401), ["401"]),
        (whole, ["range", "Accept-Ranges"]),
        (changed(Content_Encoding="br"), ["encoded (br)"]),
    ],
)
def test_a_model_that_cannot_be_opened_says_why(answer, words, server, model):
    server.put("/m.gguf", model)
    server.fail(answer)
    fail("inspect", server.url("/m.gguf"), "--cache-size", "0", naming=words)


def test_missing_parts_are_named(server, tmp_path, cache):
    import models

    parts = models.write_small(tmp_path, split_max_tensors=3)
    server.put_all(parts)
    for part in parts[1:3]:
        del server.files[f"/models/{part.name}"]
    fail("inspect", server.url(f"/models/{parts[0].name}"), naming=[parts[1].name, parts[2].name, "missing"])


def test_what_is_no_model_is_refused_in_few_bytes(server):
    url = server.put("/page.gguf", b"<!DOCTYPE html>\n<html><body>Not here</body></html>\n" * 300_000)
    fail("inspect", url, "--cache-size", "0", naming=["web page"])
    assert server.sent <= 64 << 10
