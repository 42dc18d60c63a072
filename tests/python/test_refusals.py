"""Every error that a model can meet before it is shown, with its whole text: files made here, for the checks that no file
of tests/data/hostile reaches, and sets of parts. A changed text is a change for users, so it must show here."""

import re
import struct

import pytest

from odmoe import REPO, fail

U16, I32, U32, STRING, U64 = 2, 5, 4, 8, 10
MIB = 1 << 20


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def pair(key, kind, value):
    packed = {U16: "<H", I32: "<i", U32: "<I", U64: "<Q"}
    return text(key) + struct.pack("<I", kind) + (text(value) if kind == STRING else struct.pack(packed[kind], value))


def tensor(name, dims, kind=0, offset=0):
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def gguf(pairs=(), tensors=(), n_tensors=None, n_pairs=None):
    counts = struct.pack("<QQ", len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    data = b"GGUF" + struct.pack("<I", 3) + counts + b"".join(pairs) + b"".join(tensors)
    return data + bytes(-len(data) % 32)


DAMAGED = "; no program writes this, so the file is probably damaged: compare its checksum with the published one"
NAMES = "; the program that wrote the file must give its keys and tensors names that are text"

# Why -> the bytes, the size of the (then sparse) file, the error behind the file's name.
FILES = {
    "more tensors than any model": (gguf(n_tensors=(1 << 20) + 1), 1 << 30, "the number of tensors, at byte 8: 1048577 is above the limit of 1048576" + DAMAGED),
    "more keys than any model": (gguf(n_pairs=(1 << 20) + 1), 1 << 30, "the number of key/values, at byte 16: 1048577 is above the limit of 1048576" + DAMAGED),
    "a key that is too long": (
        gguf([text("k" * 65_536)]),
        None,
        "key 0, at byte 24: 65536 is above the limit of 65535" + DAMAGED,
    ),
    "a header that is too long": (
        gguf([text("k") + struct.pack("<IQ", STRING, 1 << 28)]),
        1 << 29,
        'key 0 "k", value, at byte 45: the header goes beyond 268435456 bytes, which no real model has' + DAMAGED,
    ),
    "a key that is not UTF-8": (gguf([pair(b"\xff\xfe", U32, 1)]), None, "key 0, at byte 24: is not valid UTF-8" + NAMES),
    "a key with NUL": (gguf([pair("a\0b", U32, 1)]), None, "key 0, at byte 24: holds a NUL byte" + NAMES),
    "a name that is not UTF-8": (gguf(tensors=[tensor(b"\xc3\x28", [1])]), 256, "tensor 0, name, at byte 24: is not valid UTF-8" + NAMES),
    "a name that moves the cursor": (
        gguf(tensors=[tensor("\x1b[2J\n\u202e", [3], 43)]),
        256,
        r'tensor 0 "\u{1b}[2J\n\u{202e}", type, at byte 52: type 43 is unknown, so the size of the tensor cannot be '
        "known; look for a newer odmoe-fs that knows it",
    ),
    "a split number that is text": (gguf([pair("split.count", STRING, "2")]), None, "split.count is not a count; split the model again with a current llama-gguf-split"),
    "a split count that is negative": (gguf([pair("split.count", I32, -1)]), None, "split.count is not a count; split the model again with a current llama-gguf-split"),
    "a split count alone": (gguf([pair("split.count", U16, 2)]), None, "split.count is 2, but split.no is missing; split the model again with a current llama-gguf-split"),
    "more parts than the format has": (
        gguf([pair("split.count", U64, 70_000), pair("split.no", U16, 0), pair("split.tensors.count", I32, 0)]),
        None,
        "split.count is 70000, but the format allows only 65535 parts; "
        "split the model again with a current llama-gguf-split",
    ),
    "a split number beyond the count": (
        gguf([pair("split.count", U16, 2), pair("split.no", U16, 2), pair("split.tensors.count", I32, 0)]),
        None,
        "split.no is 2, but split.count is 2; split the model again with a current llama-gguf-split",
    ),
}


def refused(path):
    said = fail("inspect", path)
    assert fail("verify", path) == said
    assert fail("mount", path, path.parent) == said
    assert said.count("\n") == 1 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)
    return said.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize("why", FILES)
def test_a_malformed_file_is_refused_in_these_words(tmp_path, why):
    data, size, expected = FILES[why]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    if size:
        with path.open("r+b") as file:
            file.truncate(size)
    assert refused(path) == f'"{path}": {expected}'


def part(no, count=2, tensors_count=2, tensors=(), **others):
    pairs = [pair("split.no", U16, no), pair("split.count", U16, count), pair("split.tensors.count", I32, tensors_count)]
    return gguf([pair(key, U32, value) for key, value in others.items()] + pairs, tensors)


def one(name):
    return [tensor(name, [8])]


# Why -> the parts, the number of the one that is named, the error behind its name.
SETS = {
    "one is of another count": (
        [part(0, tensors=one("a")), part(1, count=3, tensors=one("b"))],
        2,
        "split.count is 3, but 2 in the first part; keep the parts of one model and one version in a folder of their own",
    ),
    "one is of another number of tensors": (
        [part(0, tensors=one("a")), part(1, tensors_count=9, tensors=one("b"))],
        2,
        "split.tensors.count is 9, but 2 in the first part; keep the parts of one model and one version in a folder of their own",
    ),
    "one has the other's number": (
        [part(0, tensors=one("a")), part(0, tensors=one("b"))],
        2,
        "split.no is 0, but in this place it must be 1; give the file the name that it was published with",
    ),
    "one is a whole model": (
        [part(0, tensors=one("a")), gguf(tensors=one("b"))],
        2,
        "this is not part of a split set, but part 2 of 2 was expected here; "
        "put that part in its place, or give this file another name",
    ),
    "a tensor is there twice": (
        [part(0, tensors=one("a")), part(1, tensors=one("a"))],
        2,
        'tensor "a" is in part 1 and again in part 2; check that all parts are of one model and one version',
    ),
    "a tensor is lacking": (
        [part(0, tensors_count=3, tensors=one("a")), part(1, tensors_count=3, tensors=one("b"))],
        1,
        "the parts together hold 2 tensors, but split.tensors.count is 3; "
        "check that all parts are of one model and one version",
    ),
}


@pytest.mark.parametrize("why", SETS)
def test_parts_that_make_no_model_are_refused_in_these_words(tmp_path, why):
    parts, named, expected = SETS[why]
    paths = [tmp_path / f"m-{n:05}-of-00002.gguf" for n in (1, 2)]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data + bytes(32))
    assert refused(paths[0]) == f'"{paths[named - 1]}": {expected}'


def test_a_part_without_the_others_is_refused_in_these_words(tmp_path):
    path = tmp_path / "m-00002-of-00005.gguf"
    path.write_bytes(part(1, count=5))
    missing = ", ".join(f'"m-0000{n}-of-00005.gguf"' for n in (1, 3, 4))
    assert refused(path) == f'4 of 5 parts missing in "{tmp_path}": {missing} and 1 more; download the whole set into one folder'
    lone = path.rename(tmp_path / "lone.gguf")
    assert refused(lone) == (
        f'"{lone}" is part 2 of 5, but its name does not end in "-00002-of-00005.gguf", so the other parts cannot be found; '
        "give the parts the names that they were published with"
    )
    assert refused(tmp_path / "nothing.gguf") == f'cannot open "{tmp_path}/nothing.gguf": No such file or directory (os error 2); check the path; `namei PATH` shows where it ends'


# --- and none is forgotten ------------------------------------------------------------------------------------------

ERRORS = ["src/gguf/error.rs", "src/gguf/split.rs", "src/layout/mod.rs", "src/source/error.rs"]
TESTS = ["tests/python/test_refusals.py", "tests/data/hostile/manifest.json", "tests/layout.rs"]
TESTS += [
    f"tests/python/test_{name}.py"
    for name in ("refused_layouts", "failing_disk", "foreign_files", "joined_parts", "stores", "unfinished", "dialects")
]
# What the system says, and sets of sizes that no file system has room for (src/gguf/split.rs).
ELSEWHERE = ["check the file system", "cannot be read: ", "the parts together are larger", "the parts together hold {0} tensors"]


# The texts of errors, and the pieces of advice that are kept apart from them.
TEXT = re.compile(r'(?:#\[error\(|const [A-Z_]+: &str =|=>|=> \{)\s*"((?:[^"\\]|\\.)*)"')


def patterns():
    """Each error text of the code, as an expression for what it can become."""
    for path in ERRORS:
        for found in TEXT.finditer((REPO / path).read_text()):
            literal = found[1].replace('\\"', '"')
            pieces = re.split(r"\{[^}]*\}", literal)
            if max(map(len, pieces)) > 8:  # more than how errors are put together
                yield path, literal, ".*".join(map(re.escape, pieces))


def test_every_error_text_is_expected_by_some_test():
    expected = ""
    for path in TESTS:
        text = (REPO / path).read_text()
        # Long texts are broken up.
        expected += re.sub(r"""["']\n\s*f?r?["']""", "", text).replace('\\"', '"')
    missing = [
        (path, literal)
        for path, literal, pattern in patterns()
        if not re.search(pattern, expected) and not any(literal.startswith(known) for known in ELSEWHERE)
    ]
    assert missing == []
