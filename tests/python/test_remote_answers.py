"""Answers of all kinds that servers, and what stands before them, give: taken if they are right, and else explained."""

import email.utils
import os
import subprocess
import threading
import time

import pytest

from answers import changed, chunked, page, partial, status, trickle, unframed, whole
from odmoe import expert_gguf, fail, mount_at, odmoe, succeed, wait_for
from remote import *  # noqa: F403
from servers import Proxy, RangeServer, tls


@pytest.fixture
def model(tmp_path):
    return expert_gguf(tmp_path)


def assert_read(url, expected, tmp_path, cache, *flags, **options):
    with remote(url, tmp_path / "mnt", cache, *flags, **options) as root:
        assert expert(root, 1).read_bytes() == expected[1]
        return mount_at(root).source


GOOD = {
    "in chunks": chunked,
    "without a length": unframed(),
    "an empty encoding": changed(Content_Encoding=""),
    "no encoding": changed(Content_Encoding="identity"),
    "the unit in capitals": lambda *a: changed(Content_Range=partial(a[0], a[2], a[3])[1]["Content-Range"].title())(*a),
    "more headers": changed(Vary="*", Cache_Control="no-store", Age="7", X_Cache="HIT"),
}


@pytest.mark.parametrize("what", GOOD)
def test_a_right_answer_of_any_form_is_taken(what, server, model, expected, tmp_path, cache):
    url = server.put("/m.gguf", model)
    server.fail(GOOD[what])
    assert_read(url, expected, tmp_path, cache)
    assert server.twice() == 0


@pytest.mark.parametrize("more", [b"x", b"x" * 100_000])
def test_bytes_behind_the_range_are_not_taken(more, server, model, tmp_path, cache):
    url = server.put("/m.gguf", model)
    server.fail(unframed(more))
    fail("inspect", url, "--cache-size", "0", naming=["another range", "more bytes"])


def at(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


PAUSES = {
    "seconds": lambda: {"Retry_After": 2},
    "a date": lambda: {"Retry_After": at(3)},
    "a date that is over": lambda: {"Retry_After": at(-100)},
    "nonsense": lambda: {"Retry_After": "soon"},
    "less than nothing": lambda: {"Retry_After": -1},
}


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize("what", PAUSES)
def test_a_pause_is_made_however_it_is_written(code, what, server, model, expected, tmp_path, cache):
    url = server.put("/m.gguf", model)
    server.fail(status(code, **PAUSES[what]()), times=1)
    assert_read(url, expected, tmp_path, cache)
    refused, again = server.requests[:2]
    assert refused.status == code and again.status == 206
    if what == "seconds":
        assert again.at - refused.at >= 1.9
    if what == "a date":
        assert again.at - refused.at >= 1.5


@pytest.mark.parametrize("seconds", [3600, 2**63 - 1, 2**64 - 1])
def test_a_pause_beyond_the_patience_is_an_error_at_once(seconds, server, model, cache):
    url = server.put("/m.gguf", model)
    server.fail(status(429, Retry_After=seconds))
    fail("inspect", url, "--cache-size", "0", naming=["status 429"])
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [500, 501, 502, 504, 507, 520, 599])
def test_every_status_of_a_server_out_of_order_is_asked_again(code, server, model, expected, tmp_path, cache):
    url = server.put("/m.gguf", model)
    server.fail(status(code), times=2)
    assert_read(url, expected, tmp_path, cache)


def repeated(name, *values):
    """A good answer with a header given several times."""
    return changed(**{name: f"\r\n{name}: ".join(values)})


NOT_OPENED = {
    "a login page": (page, ["web page", "--url-file"]),
    "410": (status(410), ["status 410", "check the address"]),
    "400": (status(400), ["status 400"]),
    "451": (status(451), ["status 451"]),
    "204": (status(204), ["status 204"]),
    "304": (status(304), ["where to go"]),
    "the whole file": (whole, ["whole file", "Accept-Ranges"]),
    "an encoding that was not asked for": (changed(Content_Encoding="gzip"), ["encoded (gzip)"]),
    "two encodings": (changed(Content_Encoding="gzip, identity"), ["encoded"]),
    "an encoding behind none": (repeated("Content-Encoding", "identity", "gzip"), ["encoded (gzip)"]),
    "an encoding for the way": (changed(Transfer_Encoding="gzip, chunked"), ["encoded"]),
    "two ranges for one": (repeated("Content-Range", "bytes 0-65535/100000", "bytes 9-65544/100000"), ["another range"]),
    "several ranges that look like one": (changed(Content_Type="Multipart/byteranges; boundary=x"), ["several"]),
    "a range of unknown size": (changed(Content_Range="bytes 0-65535/*"), ["another range"]),
    "a range in other units": (changed(Content_Range="rows 0-65535/100000"), ["another range"]),
    "a range of words": (changed(Content_Range="bytes left-right/all"), ["another range", "left-right"]),
    "several ranges": (changed(Content_Type="multipart/byteranges; boundary=x", Content_Range=""), ["another range"]),
    "a redirect without a host": (status(302, Location="https:///"), ["leads nowhere"]),
    "a redirect to a script": (status(302, Location="javascript:alert(1)"), ["leads nowhere"]),
    "a redirect to no HTTP": (status(301, Location="ftp://127.0.0.1/m.gguf"), ["leads nowhere"]),
    "a redirect beyond this machine": (status(308, Location="http://192.0.2.1/m.gguf?X-Amz-Signature=s3cr3t"), ["plain HTTP"]),
}


@pytest.mark.parametrize("what", NOT_OPENED)
def test_what_cannot_be_taken_is_explained_and_asked_for_once_or_twice(what, server, model):
    url = server.put("/m.gguf", model)
    answer, words = NOT_OPENED[what]
    server.fail(answer)
    done = odmoe("inspect", url, "--cache-size", "0")
    said = done.stderr
    assert done.returncode == 1 and said.count("error: ") == 1
    assert all(word in said for word in words)
    assert "\x1b" not in said and "s3cr3t" not in said
    assert len(server.requests) <= 2


@pytest.mark.parametrize("how", ["416", "200"])
def test_an_empty_file_is_empty(how, server):
    url = server.put("/m.gguf", b"")
    if how == "200":
        server.fail(whole)
    fail("inspect", url, "--cache-size", "0", naming=["empty", "check the address"])


def test_a_file_whose_first_bytes_are_refused_is_not_called_empty(server, model):
    url = server.put("/m.gguf", model)
    server.fail(status(416, Content_Range="bytes */9417536"))
    fail("inspect", url, "--cache-size", "0", naming=["9417536 bytes", "416", "allow ranges"])


def test_two_servers_that_lead_to_each_other_are_left(server, model):
    other = RangeServer()
    server.fail(status(302, Location=other.url("/m.gguf")))
    other.fail(status(302, Location=server.url("/m.gguf")))
    fail("inspect", server.url("/m.gguf"), "--cache-size", "0", naming=["redirects"])
    assert len(server.requests) + len(other.requests) <= 6
    other.stop()


def test_bytes_that_trickle_are_no_answer(server, model, expected, tmp_path, cache):
    url = server.put("/m.gguf", model)
    with remote(url, tmp_path / "mnt", cache) as root:
        # It sends something in every second, and would for days.
        server.fail(trickle(every=0.9), times=2)
        assert expert(root, 1).read_bytes() == expected[1]
    # A byte may be under way when nobody waits for it any more.
    assert server.twice() <= 4


@pytest.mark.parametrize("kind", [{"etag": None}, {"etag": 'W/"x"'}, {"etag": '"x"', "modified": None}, {"etag": "bare"}])
def test_whatever_pins_a_file_is_enough(kind, server, model, expected, tmp_path, cache):
    url = server.put("/m.gguf", model, **kind)
    assert_read(url, expected, tmp_path, cache)
    # A later mount trusts what is cached under the same pin, and nothing else.
    server.forget()
    assert_read(url, expected, tmp_path, cache)
    wait_for(lambda: server.sent == 1)  # counted once it was sent
    other = bytearray(model.read_bytes())
    other[-1] ^= 1
    new = {name: value and f"{value[:-1]}2{value[-1]}" for name, value in kind.items()}
    later = {"modified": "Sun, 06 Nov 2033 08:49:37 GMT"} if kind.get("etag", "") is None else {}
    server.put("/m.gguf", bytes(other), **{**new, **later})
    server.forget()
    with remote(url, tmp_path / "mnt", cache) as root:
        expert(root, 1).read_bytes()
    assert server.sent > len(expected[1])


# --- addresses ------------------------------------------------------------------------------------------------------

NAMES = ["a b.gguf", "100%25.gguf", "a+b&c=d;e,f@g:h.gguf", "#1?.gguf", "ü–日本.gguf", "a%2Fb.gguf", "..gguf", "'\"$(x)`.gguf"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_all_kinds_are_found(name, server, model, expected, tmp_path, cache):
    url = server.put(f"/some folder/{name}", model)
    assert assert_read(url, expected, tmp_path, cache).startswith(f"http://127.0.0.1:{server.port}/some%20folder/")
    server.forget()
    assert_read(url, expected, tmp_path, cache)
    wait_for(lambda: server.sent == 1)  # counted once it was sent


def test_the_scheme_may_be_in_capitals(server, model, expected, tmp_path, cache):
    url = server.put("/m.gguf", model)
    assert assert_read(url.replace("http", "HTTP"), expected, tmp_path, cache) == url


def test_a_host_may_be_an_address_of_ipv6(model, expected, tmp_path, cache):
    server = RangeServer(host="::1")
    url = server.put("/m.gguf", model)
    assert assert_read(url, expected, tmp_path, cache) == url
    server.stop()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://s3cr3t@127.0.0.1/m.gguf", ["user"]),
        ("https://:s3cr3t@127.0.0.1/m.gguf", ["user"]),
        ("HTTPS://user:s3cr3t@[::1]/m.gguf", ["user"]),
        ("https://user:s3cr3t@", ["user"]),
        ("https:///user:s3cr3t@127.0.0.1/m.gguf", ["user"]),
        ("https://us\ner:s3cr3t@127.0.0.1/m.gguf", ["user"]),
        ("https://127.0.0.1\\user:s3cr3t@other/m.gguf", []),
        ("s3://s3cr3t:s3cr3t@bucket/m.gguf", ["user"]),
        ("hf://user:s3cr3t@org/repo/m.gguf", []),
        ("https://127.0.0.1/m.gguf?token=s3cr3t", ["query"]),
        ("https://127.0.0.1/m.gguf?", ["query"]),
        ("s3://bucket/m.gguf?X-Amz-Signature=s3cr3t", ["query"]),
        ("gs://bucket/m.gguf?X-Goog-Signature=s3cr3t", ["query"]),
        ("az://container/m.gguf?sig=s3cr3t", ["query"]),
        ("hf://org/repo/m.gguf?token=s3cr3t", ["query"]),
        ("https://[::1/m.gguf?s3cr3t", []),
        ("https://a b/m.gguf?s3cr3t", []),
        ("ftp://user:s3cr3t@host/m.gguf", ["ftp"]),
        ("gopher://host/m.gguf?s3cr3t", ["gopher"]),
        ("file:///m.gguf?s3cr3t", ["file"]),
    ],
)
def test_no_address_shows_what_is_secret_in_it(url, words, said):
    for command in (["inspect"], ["doctor"], ["fetch"]):
        fail(*command, url, naming=words)
    said[:] = [text for text in said if not text.startswith(str(BINARY))]  # noqa: F405


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("https://user:s3cr3t@127.0.0.1/m.gguf", ["line 2", "user or a password", "not sent"]),
        ("s3://bucket/m.gguf?X-Amz-Signature=s3cr3t", ["line 2", "query", "https://"]),
        ("127.0.0.1/m.gguf?s3cr3t", ["line 2", "kind of address", "https://"]),
        ("ftp://127.0.0.1/m.gguf?s3cr3t", ["line 2", "ftp"]),
    ],
)
def test_a_wrong_line_in_a_file_of_urls_is_named(line, words, tmp_path):
    urls = tmp_path / "urls"
    urls.write_text(f"https://127.0.0.1/m-00001-of-00002.gguf?s3cr3t\n{line}\n")
    assert "list of processes" not in fail("inspect", "--url-file", urls, naming=[urls, *words])


def test_a_file_of_urls_may_begin_with_a_mark_of_its_encoding(server, model, tmp_path):
    urls = tmp_path / "urls"
    urls.write_text(f"{server.put('/m.gguf', model)}\r\n", encoding="utf-8-sig")
    succeed("inspect", "--url-file", urls, "--cache-size", "0")


@pytest.mark.parametrize(
    ("url", "variable", "endpoint", "words"),
    [
        ("s3://bucket/m.gguf", "AWS_ENDPOINT_URL", "http://192.0.2.1:9000", ["http://192.0.2.1:9000", "--insecure-http"]),
        ("hf://org/repo/m.gguf", "HF_ENDPOINT", "http://192.0.2.1:9000", ["http://192.0.2.1:9000", "--insecure-http"]),
        ("hf://org/repo/m.gguf", "HF_ENDPOINT", "localhost:80", ["HF_ENDPOINT", "URL"]),
        ("hf://org/repo/m.gguf", "HF_ENDPOINT", "data:x", ["HF_ENDPOINT", "URL"]),
        ("hf://org/repo/m.gguf", "HF_ENDPOINT", "https://user:s3cr3t@127.0.0.1", ["user"]),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_explained(url, variable, endpoint, words):
    keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s3cr3t"}
    fail("inspect", url, "--cache-size", "0", env={**os.environ, **keys, variable: endpoint}, naming=words)


# --- TLS and names ----------------------------------------------------------------------------------------------------

CERTIFICATES = {
    "of its own": ({}, False, "SSL_CERT_FILE"),
    "expired": ({"days": (-9, -2)}, True, "clock"),
    "of tomorrow": ({"days": (2, 9)}, True, "clock"),
    "of another host": ({"names": ["example.org"]}, True, "another"),
    "of an authority": ({"authority": True}, True, "CA:FALSE"),
}


@pytest.mark.parametrize("what", CERTIFICATES)
def test_a_certificate_that_is_not_right_is_refused_at_once(what, model, tmp_path):
    kinds, is_known, words = CERTIFICATES[what]
    context, file = tls(tmp_path / "tls", **kinds)
    server = RangeServer(tls=context)
    url = server.put("/m.gguf", model)
    env = {**os.environ, **({"SSL_CERT_FILE": str(file)} if is_known else {})}
    fail("inspect", url, "--cache-size", "0", env=env, naming=["cannot be trusted", words])
    assert not server.requests
    server.stop()


def test_a_server_that_speaks_no_tls_is_explained(server, model):
    url = server.put("/m.gguf", model).replace("http:", "https:")
    fail("inspect", url, "--cache-size", "0", naming=["cannot be trusted", "plain HTTP"])
    assert not any(request.status == 206 for request in server.requests)


def test_a_redirect_from_https_to_plain_http_elsewhere_is_not_followed(model, tmp_path):
    context, file = tls(tmp_path / "tls")
    server = RangeServer(tls=context)
    url = server.put("/m.gguf", model)
    server.fail(status(302, Location="http://192.0.2.1/m.gguf"))
    env = {**os.environ, "SSL_CERT_FILE": str(file)}
    fail("inspect", url, "--cache-size", "0", env=env, naming=["plain HTTP"])
    server.stop()


def test_a_name_that_is_none_is_explained():
    with subprocess.Popen(
        [BINARY, "inspect", "https://none.invalid/m.gguf", "--cache-size", "0"],  # noqa: F405
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        threading.Timer(60, process.kill).start()
        said = process.stderr.read()
    assert "none.invalid" in said and "error: " in said and "hint: check the address, the network" in said


# --- proxies ------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy():
    proxy = Proxy()
    yield proxy
    proxy.stop()


def behind(**variables):
    """An environment with these proxies and no others."""
    return {**{name: value for name, value in os.environ.items() if "proxy" not in name.lower()}, **variables}


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_proxy_of_socks_is_gone_through(scheme, proxy, server, model):
    url = server.put("/m.gguf", model).replace("127.0.0.1", "localhost")
    succeed("inspect", url, "--cache-size", "0", env=behind(ALL_PROXY=f"{scheme}://{proxy.host}"))
    assert proxy.used and server.requests


@pytest.mark.parametrize("excepted", ["*", "example.org, *", "127.0.0.0/8"])
def test_a_server_that_is_excepted_is_asked_directly(excepted, proxy, server, model):
    url = server.put("/m.gguf", model)
    succeed("inspect", url, "--cache-size", "0", env=behind(http_proxy=f"http://{proxy.host}", no_proxy=excepted))
    assert not proxy.used


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_password_is_told_so_at_once(scheme, proxy):
    env = behind(ALL_PROXY=f"http://user:s3cr3t@{proxy.host}")
    url = f"{scheme}://example.org/m.gguf"
    fail("inspect", url, "--insecure-http", "--cache-size", "0", env=env, naming=["407", "USER:PASSWORD"])
    assert proxy.used == 1


@pytest.mark.parametrize("value", ["http://[s3cr3t", "ftp://127.0.0.1:1", "http://"])
def test_a_variable_that_holds_no_proxy_is_named(value, server, model):
    url = server.put("/m.gguf", model)
    fail("inspect", url, "--cache-size", "0", env=behind(HTTPS_PROXY=value), naming=["HTTPS_PROXY"])
    assert not server.requests
