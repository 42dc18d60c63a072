"""The lines of the table, by theme: functions from a lab to figures, with a key and a description."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Line:
    key: str
    text: str
    measure: Callable


LINES = {}


def line(key, text):
    """Registers a line. Its text must say what is not alike in the comparison."""

    def register(measure):
        LINES[key] = Line(key, text, measure)
        return measure

    return register


def load():
    """All lines, in the order of the table."""
    from . import computing, forms, materialize, metadata, reading, remote

    order = (reading, metadata, materialize, computing, forms, remote)
    return {key: one for theme in order for key, one in LINES.items() if one.measure.__module__ == theme.__name__}
