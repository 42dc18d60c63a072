"""Google Cloud Storage and Azure, by the names that their own programs give to emulators, keys and public buckets."""

import base64
import errno
import os

import pytest

from odmoe import expert_gguf, fail, mount_at, succeed
from remote import *  # noqa: F403
from servers import status

ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"s3cr3t of an account, 32 bytes..").decode()
OTHERS = ("AZURE_", "GOOGLE_", "STORAGE_")

# How a client is led to a server: the kind of address, its environment, and how the request is signed.
WAYS = {
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


@pytest.fixture(params=WAYS)
def way(request, server, tmp_path):
    """A model in a store: its file, its address, the environment of a client, and what begins its signatures."""
    kind, make, signed = WAYS[request.param]
    model = expert_gguf(tmp_path)
    server.put(f"{'' if kind == 'gs' else f'/{ACCOUNT}'}/models/deep/er one/m.gguf", model)
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
    names = [name for name in env if name.startswith(OTHERS) and "ENDPOINT" not in name and "_NAME" not in name]
    assert [name for name in names if name in said] == [name for name in names if name != "GOOGLE_BASE_URL"]
    assert KEY not in said
