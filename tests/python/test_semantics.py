"""docs/SEMANTICS.md: every promise is quoted by a test, word for word, and nothing is quoted that is not promised."""

import importlib
import re
from pathlib import Path

from odmoe import REPO

HERE = Path(__file__).parent


def promised():
    """Each line that begins with a dash, and what is indented below it."""
    lines = (REPO / "docs/SEMANTICS.md").read_text().splitlines()
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def quoted():
    """What tests quote, with `@promises` or in a comment of a Rust test, and where."""
    for path in sorted(HERE.glob("test_*.py")):
        for name, value in vars(importlib.import_module(path.stem)).items():
            if name.startswith("test_"):
                yield from ((text, f"{path.name}::{name}") for text in getattr(value, "promises", ()))
    for path in [*REPO.glob("src/**/*.rs"), *REPO.glob("tests/*.rs")]:
        for text in re.findall(r"^ *///? Promise: (.*)$", path.read_text(), re.MULTILINE):
            yield text, path.name


def test_every_promise_is_quoted_by_a_test():
    texts = {text for text, _ in quoted()}
    assert [line for line in promised() if line not in texts] == []


def test_nothing_is_quoted_that_is_not_promised():
    lines = set(promised())
    assert [(test, text) for text, test in quoted() if text not in lines] == []
