"""Files that are given as a model and are something else: each is called by its name, with what to do about it."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import models
from odmoe import fail, mount_at, odmoe

WEB_LINK = "/resolve/"
LOG_IN = "log in, accept the model's terms if it has any"
CONVERT = "convert_hf_to_gguf.py"


def archive(kind):
    """An archive that holds a GGUF, as its own tool writes it."""
    data, out = b"GGUF" + struct.pack("<IQQ", 3, 0, 0), io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("model.gguf", data)
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as file:
            info = tarfile.TarInfo("model.gguf")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    else:
        out.write({"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}[kind](data))
    return out.getvalue()


def torch_checkpoint():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("consolidated/data.pkl", pickle.dumps({}))
        file.writestr("consolidated/data/0", bytes(64))
    return out.getvalue()


def saved(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def ollama_manifest():
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{n:064x}", "size": n}
        for n, kind in enumerate(["template", "model", "params"])
    ]
    return json.dumps({"schemaVersion": 2, "layers": layers}).encode()


# What was given -> its bytes, and words of the error and of its hint.
FILES = {
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7c5a28a0f2\nsize 7516192768\n",
        ["Git LFS pointer", "7516192768 bytes", "git lfs pull"],
    ),
    "a pointer of git-annex": (b"/annex/objects/SHA256E-s7516192768--4d7c.gguf\n", ["git-annex", "git annex get"]),
    "a page with a login form": (b"<!DOCTYPE html>\n<html><title>Log in</title>" + b" " * 5000, ["web page", WEB_LINK]),
    "an error page": (b"\n<html>\r\n<head><title>502 Bad Gateway</title></head>", ["web page", WEB_LINK]),
    "no password": (b"Invalid username or password.", ['"Invalid username or password."', LOG_IN]),
    "no such entry": (b"Entry not found", ['"Entry not found"', "check the address"]),
    "a restricted model": (
        b"Access to model a/b is restricted and you are not in the authorized list. Visit https://example.org/a/b",
        ["Access to model a/b is restricted", LOG_IN],
    ),
    "a restricted model, as JSON": (b'{"error":"Access to model a/b is restricted."}', ["JSON", LOG_IN]),
    "an expired link": (
        b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
        ["XML", "Request has expired", "get a new link"],
    ),
    "a list of shards": (json.dumps({"weight_map": {f"t{n}": "x" for n in range(9999)}}).encode(), ["a JSON text", "give the model itself"]),
    "a manifest of Ollama": (ollama_manifest(), ["manifest of Ollama", f"blobs/sha256-{1:064x}"]),
    "a Modelfile": (b"# mine\nFROM ./model.gguf\nPARAMETER temperature 1\n", ["Modelfile", "FROM"]),
    "nothing": (b"", ["an empty file", "download it again"]),
    "zeros": (
        bytes(100_000),
        [
            "this is a file that begins with 65536 zeros; "
            "wait for its download or copy to end, or start it again: so far, only room was reserved"
        ],
    ),
    "gzip": (archive("gzip"), ["gzip", "gunzip"]),
    "bzip2": (archive("bzip2"), ["bzip2", "bunzip2"]),
    "xz": (archive("xz"), ["xz", "unxz"]),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), ["zstd", "unzstd"]),
    "zip": (archive("zip"), ["zip archive", "unzip"]),
    "tar": (archive("tar"), ["tar archive", "tar -xf"]),
    "safetensors": (safetensors.numpy.save({"a": np.ones(4)}), ["safetensors", CONVERT]),
    "a checkpoint of PyTorch": (torch_checkpoint(), ["PyTorch", CONVERT]),
    "a pickle": (pickle.dumps({"a": list(range(100))}), ["pickle", CONVERT]),
    "an array of NumPy": (saved(np.ones(4)), ["NumPy", CONVERT]),
    "GGML": (b"lmgg" + bytes(100), ["GGML", "from before GGUF"]),
    "GGJT": (b"tjgg" + bytes(100), ["GGJT", "from before GGUF"]),
    "GGLA": (b"algg" + bytes(100), ["LoRA adapter", "that it belongs to"]),
    "a magic with its bytes swapped": (b"FUGG" + bytes(100), ["big-endian", "little-endian"]),
    "a llamafile": (b"MZqFpD='\n\n" + bytes(5000) + b"GGUF", ["llamafile", "unzip FILE '*.gguf'"]),
    "a program": (b"\x7fELF\x02\x01\x01" + bytes(100), ["a program", "llamafile"]),
    "a GGUF with something before it": (
        b"\xf5" * 300 + b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        ["begins only at byte 300", "tail -c +301"],
    ),
    "a GGUF that was printed by PowerShell": ("\ufeffGGUF\x03".encode("utf-16-le"), ["PowerShell", "download it again"]),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_another_kind_is_called_by_its_name(what, tmp_path):
    data, words = FILES[what]
    (tmp_path / "mnt").mkdir()
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    said = fail("inspect", path, naming=[path.name, *words])
    assert fail("mount", path, tmp_path / "mnt") == said and mount_at(tmp_path / "mnt") is None
    assert said.count("\n") == 1 and said.strip().isprintable() and "checksum" not in said
    assert json.loads(odmoe("inspect", "--json", path).stdout)["error"]["code"] == "gguf.magic"


@pytest.mark.parametrize("data", [b"\xf5\xf6\xf7\xf8" * 100, b"GGUX" + bytes(100), b"\x1b[2Jboo"], ids=repr)
def test_unknown_bytes_are_only_quoted(data, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    said = fail("inspect", path, naming=["so this is not a GGUF file; check which file this is"])
    assert said.strip().isprintable()


def test_a_part_of_a_set_that_is_of_another_kind_is_named(tmp_path):
    parts = models.write_small(tmp_path, split_max_tensors=2)
    parts[2].write_bytes(FILES["a pointer of Git LFS"][0])
    fail("inspect", parts[0], naming=[parts[2].name, "git lfs pull"])
