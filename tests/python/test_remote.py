"""Models behind URLs: the same bytes as of a file, each of them fetched once, from real servers."""

import errno
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

import models
from answers import status
from odmoe import (
    MIB,
    anonymous,
    contents,
    daemon_of,
    expert_gguf,
    fail,
    mount_at,
    mounted,
    odmoe,
    promises,
    run,
    sparse_gguf,
    succeed,
)
from remote import *  # noqa: F403
from servers import Hub, RangeServer, nginx, s3

READERS = 64


def identical(model, root, **options):
    assert "is identical to the model" in succeed("verify", model, root, **options)


@promises(
    "`MODEL` may be a URL: `https://`, `s3://BUCKET/KEY`, `gs://`, `az://` or `hf://ORG/REPO[@REVISION]/FILE.gguf`.",
)
def test_a_mount_of_a_url_has_the_bytes_of_a_mount_of_the_file(server, tmp_path, cache):
    parts = models.write_small(tmp_path)
    url = server.put_all(parts)
    with mounted(parts[0], tmp_path / "local") as local, remote(url, tmp_path / "mnt", cache) as root:
        assert contents(root) == contents(local)
        identical(parts[0], root)
        assert mount_at(root).source == url


def test_any_part_of_a_split_set_leads_to_all_of_them(server, tmp_path, cache):
    parts = models.write_small(tmp_path, split_max_tensors=3)
    server.put_all(parts)
    for part in (parts[0], parts[len(parts) // 2], parts[-1]):
        with remote(server.url(f"/models/{part.name}"), tmp_path / "mnt", cache) as root:
            identical(parts[0], root)


def test_headers_of_a_split_set_are_read_at_the_same_time(tmp_path, cache):
    parts = models.write_small(tmp_path, split_max_tensors=1)
    assert len(parts) > 8
    server = RangeServer(latency=0.1)
    succeed("inspect", server.put_all(parts), "--cache-dir", cache)
    assert server.peak > 4
    assert len(server.requests) == len(parts)
    server.stop()


def test_a_name_that_promises_parts_is_not_believed_before_the_header(server, tmp_path, cache):
    alone = server.put("/m-00001-of-99999.gguf", models.write_small(tmp_path)[0])
    assert "tensors" in succeed("inspect", alone, "--cache-size", "0")
    part = models.write_small(tmp_path, name="split.gguf", split_max_tensors=8)[0]
    renamed = server.put("/n-00001-of-99999.gguf", part)
    fail("inspect", renamed, "--cache-size", "0", naming=["n-00001-of-99999.gguf", "part 1 of"])
    assert len(server.requests) < 10


def test_a_name_with_spaces_and_letters_of_all_kinds_is_found(server, tmp_path, cache):
    parts = models.write_small(tmp_path, name="modèle nº 1 (Q4).gguf", split_max_tensors=3)
    url = server.put_all(parts)
    with remote(url, tmp_path / "mnt", cache) as root:
        identical(parts[0], root)


@promises(
    "What is read of a model elsewhere is fetched once in the life of a mount, and nothing is fetched that nobody wants but the end of a piece, and what lies before a reader who leaves a file in the middle.",
)
def test_what_is_read_is_fetched_once_and_hardly_more_than_that(server, tmp_path, cache):
    model = expert_gguf(tmp_path)
    with remote(server.put("/m.gguf", model), tmp_path / "mnt", cache) as root:
        server.forget()
        wanted = 0
        for number in (0, 3, 7):
            wanted += len(expert(root, number).read_bytes())
        assert server.sent <= 1.05 * wanted
        identical(model, root)
    assert server.twice() == 0
    assert server.sent <= 1.05 * model.stat().st_size


def test_without_a_cache_what_is_read_is_fetched_once_as_well(server, tmp_path, cache):
    model = expert_gguf(tmp_path)
    with remote(server.put("/m.gguf", model), tmp_path / "mnt", cache, "--cache-size", "0") as root:
        server.forget()
        bytes_ = sum(len(expert(root, number).read_bytes()) for number in range(8))
        assert server.sent <= 1.05 * bytes_
        assert server.twice() == 0
    assert not cache.exists()


@pytest.fixture
def large(tmp_path):
    """A model with three tensors of 40 MiB in one base file."""
    kv = {"general.architecture": "moe", "moe.block_count": 3, "moe.expert_count": 1, "moe.expert_used_count": 1}
    tensors = [[f"blk.{n}.attn_q.weight", [4096, 2560], "F32"] for n in range(3)]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"kv": kv, "tensors": [*tensors, ["blk.0.ffn_up_exps.weight", [256, 1, 1], "F32"]]}))
    return sparse_gguf(table, tmp_path / "model.gguf", "--fill-words")[0]


ATTENTION = "base_model/attention_layers.safetensors"


@pytest.mark.parametrize("size", ["0", "1G"])
def test_a_large_file_is_streamed(size, large, tmp_path, cache):
    server = RangeServer(latency=0.02)
    url = server.put("/m.gguf", large)
    with mounted(large, tmp_path / "local") as local, remote(url, tmp_path / "mnt", cache, "--cache-size", size) as root:
        server.forget()
        data = (root / ATTENTION).read_bytes()
        assert data == (local / ATTENTION).read_bytes()
        assert server.twice() == 0 and server.sent <= 1.01 * len(data)
        # It begins with pieces of up to 1 MiB, many of them at the same time.
        assert len(server.requests) <= 24 + len(data) / (2 * MIB)
        assert max(end - start for start, end in (r.range for r in server.requests)) == 2 * MIB
        assert 8 <= server.peak <= 32
        assert anonymous(daemon_of(root)) <= 96 * MIB
    server.stop()
    if size != "0":
        with remote(url, tmp_path / "mnt", cache, "--offline") as root:
            assert (root / ATTENTION).read_bytes() == data


def test_a_reader_of_one_large_tensor_fetches_no_other(large, server, tmp_path, cache):
    url = server.put("/m.gguf", large)
    with remote(url, tmp_path / "mnt", cache, "--cache-size", "0") as root, (root / ATTENTION).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensor = json.loads(file.read(length))["blk.1.attn_q.weight"]
        start, end = tensor["data_offsets"]
        server.forget()
        file.seek(8 + length + start)
        assert len(file.read(end - start)) == 40 * MIB
        # Requests of the kernel reach a little beyond both ends.
        assert server.sent <= end - start + (512 << 10)


def test_a_look_at_every_header_fetches_no_expert(server, tmp_path, cache):
    model = expert_gguf(tmp_path)
    with remote(server.put("/m.gguf", model), tmp_path / "mnt", cache) as root:
        server.forget()
        for number in range(8):
            with expert(root, number).open("rb") as file:
                file.read(8)
        # One request of the kernel for each.
        assert server.sent <= 8 * 128 << 10


def test_many_readers_of_one_expert_share_what_is_fetched(tmp_path, cache):
    server = RangeServer(latency=0.02)
    model = expert_gguf(tmp_path)
    with remote(server.put("/m.gguf", model), tmp_path / "mnt", cache, "--cache-size", "0") as root:
        with mounted(model, tmp_path / "local") as local:
            expected = [expert(local, number).read_bytes() for number in range(8)]
        server.forget()
        failures = []

        def read(n):
            if expert(root, n % 8).read_bytes() != expected[n % 8]:
                failures.append(n)

        readers = [threading.Thread(target=read, args=[n]) for n in range(READERS)]
        [reader.start() for reader in readers]
        [reader.join() for reader in readers]
        assert not failures
        assert server.sent <= 1.05 * sum(map(len, expected))
        assert 1 < server.peak <= 32
    server.stop()


def test_workers_that_have_nothing_to_do_take_no_memory(server, tmp_path, cache):
    with remote(server.put("/m.gguf", expert_gguf(tmp_path)), tmp_path / "mnt", cache) as root:
        assert len(os.listdir(f"/proc/{daemon_of(root)}/task")) > 64
        # Each has a buffer of 16 MiB.
        assert anonymous(daemon_of(root)) < 32 * MIB


def test_materialize_writes_the_tree_of_a_url(server, tmp_path, cache):
    parts = models.write_small(tmp_path, split_max_tensors=3)
    url = server.put_all(parts)
    succeed("materialize", url, tmp_path / "out", "--cache-dir", cache, "--verify")
    identical(parts[0], tmp_path / "out")
    again = succeed("materialize", url, tmp_path / "out", "--cache-dir", cache)
    assert "nothing to write" in again


def test_inspect_and_verify_take_urls(server, tmp_path, cache):
    parts = [expert_gguf(tmp_path)]
    url = server.put_all(parts)
    here, there = (
        json.loads(succeed("inspect", model, "--json", *flags))
        for model, flags in ((parts[0], ()), (url, ("--cache-dir", cache)))
    )
    for report in (here, there):
        del report["memory"], report["parts"]
    # No file system can share blocks with a model elsewhere.
    assert here["tree"].pop("sharable_bytes") > 0 == there["tree"].pop("sharable_bytes")
    assert here == there
    assert "XFS" in succeed("inspect", parts[0])
    assert "XFS" not in succeed("inspect", url, "--cache-dir", cache)
    assert json.loads(succeed("verify", url, "--json", "--cache-dir", cache))["sound"]


# --- where models are -----------------------------------------------------------------------------------------------


def test_nginx_serves_a_model_with_tls(tmp_path, cache):
    (tmp_path / "web").mkdir()
    parts = models.write_small(tmp_path / "web", split_max_tensors=3)
    with nginx(tmp_path / "web", tmp_path / "nginx") as (origin, certificate):
        url = f"{origin}/{parts[0].name}"
        said = fail("inspect", url, naming=["trusted", "SSL_CERT_FILE"])
        assert "certificate" in said
        trusting = {**os.environ, "SSL_CERT_FILE": str(certificate)}
        with remote(url, tmp_path / "mnt", cache, env=trusting) as root:
            identical(parts[0], root)
        # The file is replaced while it is mounted.
        with remote(url, tmp_path / "mnt", cache, "--cache-size", "0", env=trusting) as root:
            new = tmp_path / "new.gguf"
            new.write_bytes(parts[0].read_bytes())
            os.utime(new, (2e9, 2e9))
            new.rename(parts[0])
            assert any(error_of(path) == errno.EIO for path in root.rglob("*.safetensors"))
            assert "no longer what it was" in log_of(root)


def test_a_bucket_of_s3_is_read_with_keys_from_the_environment_and_from_a_profile(tmp_path, cache):
    parts = models.write_small(tmp_path, split_max_tensors=3)
    with s3({f"deep/er/{part.name}": part.read_bytes() for part in parts}) as env:
        url = f"s3://models/deep/er/{parts[0].name}"
        with remote(url, tmp_path / "mnt", cache, env=env) as root:
            identical(parts[0], root)
            assert mount_at(root).source == url
        keys = {name: env.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        home = tmp_path / "home"
        (home / ".aws").mkdir(parents=True)
        lines = "\n".join(f"{name.lower()} = {value}" for name, value in keys.items())
        (home / ".aws/credentials").write_text(f"[default]\nregion = nowhere\n[work]\n{lines}\n")
        env |= {"HOME": str(home), "AWS_PROFILE": "work"}
        succeed("inspect", url, "--cache-size", "0", env=env)
        said = succeed("doctor", url, env=env)
        assert "AWS_PROFILE" in said and "a profile in the AWS files" in said
        fail("inspect", "s3://models/deep/er/none.gguf", "--cache-size", "0", env=env, naming=["404"])


def test_the_hub_is_asked_once_for_each_part_and_for_a_signed_url(tmp_path, cache):
    hub = Hub(token="hf_s3cr3ttoken")
    parts = models.write_small(tmp_path, split_max_tensors=3)
    urls = [hub.add("org/repo", part) for part in parts]
    env = {**os.environ, "HF_ENDPOINT": hub.url(""), "HF_TOKEN": "hf_s3cr3ttoken"}
    with remote(urls[0], tmp_path / "mnt", cache, env=env) as root:
        identical(parts[0], root)
        assert mount_at(root).source == urls[0]
    assert len(hub.requests) == len(parts)
    # All parts are read at the commit of the first.
    assert [r.path.split("/")[4] for r in hub.requests].count("main") <= 1
    assert hub.store.twice() == 0
    fail("inspect", urls[0], "--cache-size", "0", env={**env, "HF_TOKEN": "hf_wrong"}, naming=["401", "HF_TOKEN"])
    hub.stop()


def test_a_signed_url_that_expires_is_asked_for_again(tmp_path, cache):
    hub = Hub(lasts=5)
    model = expert_gguf(tmp_path)
    url = hub.add("org/repo", model)
    env = {**os.environ, "HF_ENDPOINT": hub.url(""), "HF_TOKEN": ""}
    with remote(url, tmp_path / "mnt", cache, env=env) as root:
        identical(model, root)
        assert len(hub.requests) > 2
        # Another content under the same name is not taken for this one.
        blob = hub.linked["/org/repo/resolve/main/model.gguf"]
        other = bytearray(model.read_bytes())
        other[-1] ^= 1
        hub.store.put("/blobs/other", bytes(other))
        hub.linked = dict.fromkeys(hub.linked, "/blobs/other")
        hub.signatures.clear()
        run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
        assert blob != "/blobs/other"
    with remote(url, tmp_path / "again", cache, "--cache-size", "0", env=env) as root:
        hub.linked = dict.fromkeys(hub.linked, blob)
        hub.signatures.clear()
        assert error_of(expert(root, 1)) == errno.EIO
        assert "no longer what it was" in log_of(root)
    hub.stop()


@promises(
    "No token, signature or query of a URL is in the mount table, the log, an error, the list of processes or the cache.",
)
def test_signed_urls_come_from_a_file_and_show_nowhere(server, tmp_path, cache):
    parts = models.write_small(tmp_path, split_max_tensors=8)
    signed = lambda request: "X-Amz-Signature=s3cr3t" in request.query  # noqa: E731
    server.put_all(parts)
    server.fail(status(403), when=lambda request: not signed(request))
    urls = tmp_path / "urls"
    lines = [f"{server.url(f'/models/{part.name}')}?X-Amz-Signature=s3cr3t{n}" for n, part in enumerate(parts)]
    urls.write_text("# signed\n" + "\n".join(lines) + "\n")
    where = tmp_path / "mnt"
    where.mkdir()
    succeed("mount", "--url-file", urls, where, "--cache-dir", cache, "--log-file", tmp_path / "mnt.log")
    identical(parts[0], where)
    assert "is identical" in succeed("verify", "--url-file", urls, where, "--cache-dir", cache)
    succeed("inspect", "--url-file", urls, "--cache-dir", cache)
    succeed("doctor", "--url-file", urls)
    assert mount_at(where).source == server.url(f"/models/{parts[0].name}")
    succeed("umount", where)
    succeed("materialize", "--url-file", urls, tmp_path / "out", "--cache-dir", cache)
    identical(parts[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.invalid/m.gguf", ["plain http", "--insecure-http"]),
        ("https://user:s3cr3t@127.0.0.1/m.gguf", ["password", "--url-file"]),
        ("https://127.0.0.1/m.gguf?X-Amz-Signature=s3cr3t", ["query", "--url-file"]),
        ("ftp://127.0.0.1/m.gguf", ["ftp", "https://"]),
        ("s3://bucket", ["no file"]),
        ("hf://org/repo", ["hf://ORG/REPO"]),
        ("https://huggingface.co/org/repo/blob/main/m.gguf", ["/resolve/"]),
        ("https://127.0.0.1:1/", ["no file"]),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_what_to_do(url, words, said):
    fail("inspect", url, naming=words)
    # The user has typed the secret; we do not repeat it.
    said[:] = [text for text in said if not text.startswith(str(BINARY))]  # noqa: F405


def test_a_file_of_urls_that_cannot_be_read_is_told_with_what_to_check(tmp_path):
    fail("inspect", "--url-file", tmp_path / "none", naming=[tmp_path / "none", "namei -l"])


# --- what shows -------------------------------------------------------------------------------------------------------


def test_status_and_top_say_what_was_fetched(server, tmp_path, cache):
    model = expert_gguf(tmp_path)
    with remote(server.put("/m.gguf", model), tmp_path / "mnt", cache, "--stats") as root:
        size = len(expert(root, 1).read_bytes())
        line = next(m for m in json.loads(succeed("status", "--json")) if m["directory"] == str(root))
        assert line["state"] == "alive"
        assert size <= line["remote"]["fetched_bytes"] <= size + (256 << 10)
        assert line["remote"]["errors"] == 0
        said = succeed("status")
        assert "FETCHED" in said and "FROM CACHE" in said
        top = json.loads(succeed("top", root, "--once", "--json"))["stats"]["remote"]
        assert top["requests"] == len(server.requests)
        assert "from the cache" in succeed("top", root, "--once")


def test_doctor_measures_the_way_to_a_server(server, tmp_path):
    url = server.put("/m.gguf", os.urandom(17 * MIB))
    said = succeed("doctor", url)
    for word in ("server", "ranges", "by its ETag", "one connection", "16 together", "can be read"):
        assert word in said
    report = json.loads(succeed("doctor", url, "--json"))
    assert report["works"]
    assert server.sent <= 40 * MIB
    server.put("/bare.gguf", b"x" * 1000, etag=None, modified=None)
    assert "neither an ETag nor a time" in odmoe("doctor", server.url("/bare.gguf")).stdout
    done = odmoe("doctor", server.url("/none.gguf"))
    assert done.returncode == 3 and "404" in done.stdout and "cannot be read" in done.stdout


def test_fetch_fills_the_cache_with_what_was_chosen(server, tmp_path, cache):
    model = expert_gguf(tmp_path)
    url = server.put("/m.gguf", model)
    said = succeed("fetch", url, "--experts", "0,5", "--cache-dir", cache)
    assert said.startswith("fetched ")
    succeed("fetch", url, "--base-only", "--cache-dir", cache)
    assert succeed("fetch", url, "--experts", "5", "--cache-dir", cache).startswith("nothing to fetch")
    server.stop()
    with mounted(model, tmp_path / "local") as local, remote(url, tmp_path / "mnt", cache, "--offline") as root:
        for number in (0, 5):
            assert expert(root, number).read_bytes() == expert(local, number).read_bytes()
        assert error_of(expert(root, 1)) == errno.EIO
        assert "--offline" in log_of(root)


@pytest.mark.parametrize("name", ["model.gguf", "my model (ü).gguf"])
def test_a_cache_that_is_full_is_the_model(name, server, tmp_path, cache):
    parts = models.write_small(tmp_path, name=name, split_max_tensors=8)
    url = server.put_all(parts)
    succeed("fetch", url, "--cache-dir", cache)
    for part, cached in zip(parts, cached_files(cache), strict=True):
        assert cached.name == part.name
        # Padding between tensors belongs to nobody and is not fetched.
        assert cached.stat().st_size == part.stat().st_size
    with mounted(cached_files(cache)[0], tmp_path / "mnt") as root:
        identical(parts[0], root)


def test_fetch_says_what_it_cannot_do(server, tmp_path, cache):
    model = expert_gguf(tmp_path)
    url = server.put("/m.gguf", model)
    fail("fetch", model, naming=["file on this machine", "mount it"])
    fail("fetch", url, "--cache-dir", cache, "--cache-size", "0", naming=["no cache"])
    fail("fetch", url, "--cache-dir", cache, "--cache-size", "1M", naming=["only 1.00 MiB", "--cache-size"])
    assert subprocess.call([BINARY, "fetch", url, "--layers", "9", "--cache-dir", cache]) == 1  # noqa: F405
