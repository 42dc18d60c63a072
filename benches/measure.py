"""Samples of several sides, taken in turn, and what is made of them: medians, spreads, ratios, verdicts."""

import dataclasses
import statistics

# The side that is judged, and the one that shows the cost of FUSE itself. We compare with the others.
OURS = "odmoe-fs"
FLOOR = "floor"


class Unavailable(Exception):
    """Why a line cannot be measured with this binary or on this machine."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A client's work: how long it took, and the sum of the bytes that it read."""

    nanoseconds: int
    bytes: int
    sum: int

    @property
    def gigabytes_per_second(self):
        return self.bytes / self.nanoseconds

    @property
    def milliseconds(self):
        return self.nanoseconds / 1e6


def interleave(sides, samples, warm_up=1):
    """Calls each side in turn, once per sample; the side that comes first alternates.

    The first rounds are thrown away: they pay for everything that happens once, such as filling the
    cache of a host.
    """
    taken = {name: [] for name in sides}
    for n in range(warm_up + samples):
        order = list(sides) if n % 2 == 0 else list(reversed(sides))
        for name in order:
            sample = sides[name]()
            if n >= warm_up:
                taken[name].append(sample)
    return taken


def check_same_bytes(taken):
    """All sides but the floor, which serves zeroes, must have read the same."""
    read = {(r.bytes, r.sum) for name, readings in taken.items() if name != FLOOR for r in readings}
    assert len(read) == 1, f"the sides read different bytes: {read}"


@dataclasses.dataclass(frozen=True)
class Limit:
    """The bar that a figure must reach, and the aim that we would like it to."""

    bar: float | None
    aim: float | None = None
    at_most: bool = True

    def met(self, value, limit):
        return value <= limit if self.at_most else value >= limit

    def verdict(self, value):
        if self.bar is None:
            return "no bar"
        if not self.met(value, self.bar):
            return "BAR MISSED"
        if self.aim is None:
            return "bar met"
        return "aim met" if self.met(value, self.aim) else "bar met, aim missed"

    def text(self, value):
        return "-" if value is None else f"{'<=' if self.at_most else '>='} {number(value)}"


def at_most(bar, aim=None):
    return Limit(bar, aim)


def at_least(bar, aim=None):
    return Limit(bar, aim, at_most=False)


NO_LIMIT = Limit(None)


@dataclasses.dataclass
class Figure:
    """One row of the table. With another side, the ratio of each pair is judged, else the value."""

    what: str
    unit: str
    samples: dict  # side -> a number for each sample, in the order in which they were taken
    limit: Limit
    note: str = ""

    @property
    def other(self):
        """The side that we compare ours with, if any."""
        return next((name for name in self.samples if name not in (OURS, FLOOR)), None)

    def ratios(self, side=OURS):
        """The side by the other one, sample by sample."""
        pairs = zip(self.samples.get(side, []), self.samples.get(self.other, []), strict=False)
        return [a / b for a, b in pairs]

    @property
    def judged(self):
        return statistics.median(self.ratios() if self.other else self.samples[OURS])

    @property
    def verdict(self):
        return self.limit.verdict(self.judged)

    def cells(self):
        other = f"{self.other} {spread(self.samples[self.other])}" if self.other else "-"
        floor = spread(self.samples.get(FLOOR, []))
        if self.other and FLOOR in self.samples:
            floor += f" = {number(statistics.median(self.ratios(FLOOR)))}x"
        bar, aim = (self.limit.text(value) for value in (self.limit.bar, self.limit.aim))
        return [
            self.what,
            self.unit,
            spread(self.samples[OURS]),
            other,
            spread(self.ratios()),
            floor,
            bar,
            aim,
            self.verdict,
        ]

    def json(self):
        sides = {name: {**summary(values), "samples": values} for name, values in self.samples.items()}
        ratios = {side: {**summary(r), "samples": r} for side in (OURS, FLOOR) if (r := self.ratios(side))}
        return {
            **{"what": self.what, "unit": self.unit, "note": self.note, "against": self.other},
            **{"sides": sides, "ratios": ratios, "judged": self.judged, "at_most": self.limit.at_most},
            **{"bar": self.limit.bar, "aim": self.limit.aim, "verdict": self.verdict},
        }


HEADINGS = ["line", "what", "unit", "odmoe-fs", "against", "ratio", "floor", "bar", "aim", "verdict"]


def table(rows):
    """Rows of cells as aligned text."""
    rows = [HEADINGS, *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def summary(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values):
    """Median, minimum and maximum."""
    if not values:
        return "-"
    median, low, high = (number(value) for value in summary(values).values())
    return median if low == high else f"{median} ({low}..{high})"


def number(value):
    """Three digits that matter, without an exponent."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
