"""Google Cloud Storage and Azure, by the names that their own programs give to emulators, keys and public buckets."""

import base64
import errno
import os

import pytest

from answers import status
from odmoe import expert_gguf, fail, mount_at, succeed
from remote import *  # noqa: F403

ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"s3cr3t of an account, 32 bytes..").decode()
OTHERS = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_")

# How a client is led to a server: the kind of address, its environment, and how the request is signed.
WAYS = {
    "keys with line ends": (
        "s3",
        lambda url: {
            "AWS_ENDPOINT_URL": f" {url}/\n",
            "AWS_ACCESS_KEY_ID": "AKIATTTT\n",
            "AWS_SECRET_ACCESS_KEY": f"{KEY}\r\n",
            "AWS_SESSION_TOKEN": f"{KEY}\n",
        },
        "AWS4-HMAC-SHA256 Credential=AKIATTTT/",
    ),
    "a base URL": ("gs", lambda url: {"GOOGLE_BASE_URL": url, "GOOGLE_SKIP_SIGNATURE": "true"}, None),
    "an emulator": ("gs", lambda url: {"STORAGE_EMULATOR_HOST": url}, None),
    "an emulator without a scheme": ("gs", lambda url: {"STORAGE_EMULATOR_HOST": url.removeprefix("http://") + "/"}, None),
    "a key": (
        "az",
        lambda url: {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"{url}/{ACCOUNT}",
        },
        f"SharedKey {ACCOUNT}:",
    ),
    "a connection string": (
        "az",
        lambda url: {
            "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};"
            f"BlobEndpoint={url}/{ACCOUNT};"
        },
        f"SharedKey {ACCOUNT}:",
    ),
    "the emulator": ("az", lambda url: {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true", "AZURITE_BLOB_STORAGE_URL": url}, f"SharedKey {ACCOUNT}:"),
    "a public container": (
        "az",
        lambda url: {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_SKIP_SIGNATURE": "true",
            "AZURE_STORAGE_ENDPOINT": f"{url}/{ACCOUNT}",
        },
        None,
    ),
}


def environment(more):
    return {**{name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}, **more}


KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
ENDPOINTS = ["localhost:9000", "127.0.0.1:9000", "minio", "http://", "http://127.0.0.1:99999", "ftp://h", "http://u:s3cr3t@h", "http://h?s3cr3t"]


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        *(("s3://models/m.gguf", "AWS_ENDPOINT_URL", endpoint) for endpoint in ENDPOINTS),
        ("s3://models/m.gguf", "AWS_ENDPOINT_URL_S3", "localhost:9000"),
        ("s3://models/m.gguf", "AWS_REGION", "eu west"),
        ("s3://models/m.gguf", "AWS_ACCESS_KEY_ID", "s3cr3t\ns3cr3t"),
        ("s3://models/m.gguf", "AWS_SESSION_TOKEN", "s3cr3t\x07t"),
        ("s3://models/m.gguf", "AWS_SESSION_TOKEN", "s3cr3tü"),
        ("gs://models/m.gguf", "GOOGLE_BASE_URL", "localhost:4443"),
        ("gs://models/m.gguf", "STORAGE_EMULATOR_HOST", "a b"),
        ("az://models/m.gguf", "AZURE_STORAGE_ENDPOINT", "localhost:4443"),
        ("az://models/m.gguf", "AZURE_STORAGE_ACCOUNT_NAME", "a b"),
        ("az://models/m.gguf", "AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=c2VjcmV0;BlobEndpoint=localhost:1"),
        ("s3://my bucket/m.gguf", "the bucket", ""),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_and_not_shown(url, name, value):
    more = {"AZURE_STORAGE_ACCOUNT_NAME": "a"} if name == "AZURE_STORAGE_ENDPOINT" else {}
    env = environment({**KEYS, **more, **({name: value} if value else {})})
    fail("inspect", url, "--cache-size", "0", env=env, naming=[name])


def test_an_account_of_another_azure_cloud_is_asked_there(server, tmp_path):
    # The server is a proxy here, which is told the whole URL.
    server.put("http://acc.blob.none.invalid/models/m.gguf", expert_gguf(tmp_path))
    text = f"DefaultEndpointsProtocol=http;AccountName=acc;AccountKey={KEY};EndpointSuffix=none.invalid"
    env = environment({"AZURE_STORAGE_CONNECTION_STRING": text, "http_proxy": server.url("")})
    succeed("inspect", "az://models/m.gguf", "--insecure-http", "--cache-size", "0", env=env)
    assert server.requests[0].headers["authorization"].startswith("SharedKey acc:")


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("[other]\nregion = eu-west-1\n", ["AWS_PROFILE names \"work\""]),
        ("[profile work]\ncredential_process = /bin/s3cr3t\n", ["credential_process", "export-credentials --profile work"]),
        ("[profile work]\nsso_session = mine\nregion = eu-west-1\n", ["sso_session", "export-credentials"]),
    ],
)
def test_a_profile_without_keys_says_why(profile, words, server, tmp_path):
    server.put("/models/m.gguf", expert_gguf(tmp_path))
    (tmp_path / "config").write_text(profile)
    env = environment({"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "work", "AWS_ENDPOINT_URL": server.url("")})
    fail("inspect", "s3://models/m.gguf", "--cache-size", "0", env=env, naming=words)
    # Other ways to keys, or none, do without the profile.
    for more in (KEYS, {"AWS_SKIP_SIGNATURE": "true"}):
        succeed("inspect", "s3://models/m.gguf", "--cache-size", "0", env={**env, **more})


def test_what_a_store_cannot_answer_here_has_a_way_out(server):
    env = environment({**KEYS, "AWS_ENDPOINT_URL": server.url("")})
    inspect = ["s3://models/m.gguf", "--cache-size", "0"]
    fail("inspect", "s3://models/a//m.gguf", env=env, naming=["empty", "--url-file"])
    server.fail(status(307, Location="http://192.0.2.1/"), times=1)
    fail("inspect", *inspect, env=env, naming=["307", "AWS_REGION"])
    server.fail(status(301, x_amz_bucket_region="eu-central-1"), times=1)
    fail("inspect", *inspect, env=env, naming=["AWS_REGION=eu-central-1"])


def test_an_endpoint_with_blanks_in_its_path_is_asked_there(server, tmp_path):
    server.put("/a b/models/m.gguf", expert_gguf(tmp_path))
    env = environment({**KEYS, "AWS_ENDPOINT_URL": server.url("").rstrip("/") + "/a b"})
    succeed("inspect", "s3://models/m.gguf", "--cache-size", "0", env=env)


def test_a_profile_with_a_new_key_that_cannot_be_sent_costs_the_read_only(server, tmp_path, cache):
    server.put("/models/m.gguf", expert_gguf(tmp_path))
    (tmp_path / ".aws").mkdir()
    profile = tmp_path / ".aws/credentials"
    profile.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    env = environment({"HOME": str(tmp_path), "AWS_ENDPOINT_URL": server.url("")})
    with remote("s3://models/m.gguf", tmp_path / "mnt", cache, env=env) as root:  # noqa: F405
        server.fail(status(403))
        profile.write_text("[default]\naws_access_key_id = ü\naws_secret_access_key = b\n")
        assert error_of(expert(root, 1)) == errno.EIO  # noqa: F405
        assert "aws_access_key_id of the AWS profile" in log_of(root)  # noqa: F405
        assert "panicked" not in log_of(root)  # noqa: F405
        server.heal()
        profile.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
        assert error_of(expert(root, 2)) is None  # noqa: F405


@pytest.fixture(params=WAYS)
def way(request, server, tmp_path):
    """A model in a store: its file, its address, the environment of a client, and what begins its signatures."""
    kind, make, signed = WAYS[request.param]
    model = expert_gguf(tmp_path)
    server.put(f"{f'/{ACCOUNT}' if kind == 'az' else ''}/models/deep/er one/m.gguf", model)
    return model, f"{kind}://models/deep/er one/m.gguf", environment(make(server.url(""))), signed


def test_a_model_in_a_store_is_read_signed_or_in_public_and_pinned(way, server, tmp_path, cache):
    model, url, env, signed = way
    with remote(url, tmp_path / "mnt", cache, env=env) as root:  # noqa: F405
        assert "is identical to the model" in succeed("verify", model, root)
        assert server.twice() == 0
        for request in server.requests:
            said = request.headers.get("authorization")
            assert said is None if signed is None else said.startswith(signed)
        assert all("if-match" in request.headers for request in server.requests[1:])
        assert mount_at(root).source.replace("\\040", " ") == url
    with remote(url, tmp_path / "mnt", cache, "--cache-size", "0", env=env) as root:  # noqa: F405
        (stored,) = server.files.values()
        stored.etag = '"another"'
        assert error_of(expert(root, 1)) == errno.EIO  # noqa: F405
        assert "no longer what it was" in log_of(root)  # noqa: F405


def test_a_store_that_denies_access_is_explained_without_keys(way, server):
    _, url, env, _ = way
    server.fail(status(403))
    said = fail("inspect", url, "--cache-size", "0", env=env, naming=["status 403", "SKIP_SIGNATURE"])
    assert KEY not in said
    assert len(server.requests) == 2  # with fresh credentials once more


def test_doctor_says_which_variables_it_found(way):
    _, url, env, signed = way
    said = succeed("doctor", url, env=env)
    others = ("ENDPOINT", "_NAME", "SECRET")
    names = [name for name in env if name.startswith(OTHERS) and not any(word in name for word in others)]
    assert [name for name in names if name in said] == [name for name in names if name != "GOOGLE_BASE_URL"]
    assert KEY not in said
