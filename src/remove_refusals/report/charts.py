"""Charts: numbers on scales, which the template draws as SVG that stretches to its column.

Places across are percentages of the width, so that text and dots keep their size on any screen; places down are pixels.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from remove_refusals.measure import number
from remove_refusals.report.words import tick

# How much of its step a bar fills.
_BAR_SHARE = 0.8
# Where the largest number is so many times the smallest, the small ones would lie on the axis of a linear scale.
_LOGARITHMIC_FROM = 30.0
# Smaller numbers are drawn as 0: steps between them could not be divided any more.
_NOTHING = 1e-290
# The pixels of a row, where the matrix is not square, and of a matrix at most.
_ROW, _MOST_HIGH = 16, 420

Ticks = list[tuple[float, str]]
"""The numbers on an axis: the place and the text of each."""


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; of a logarithmic one equal lengths are equal ratios, and `low` is above 0."""

    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Give how far along the axis a number lies, from 0 to 1; numbers outside are put at its ends."""
        if not self.logarithmic:
            share = (value - self.low) / (self.high - self.low)
        elif value <= 0:
            return 0.0
        else:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        return min(1.0, max(0.0, share))

    def ticks(self, most: int = 6) -> list[float]:
        """Give at most about `most` round numbers within the axis, ascending."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / most))
            return [10.0**power for power in range(first, last + 1, every)]
        step = _round_step((self.high - self.low) / max(1, most - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def scale_of(values: Iterable[float], *, from_zero: bool = True, may_be_logarithmic: bool = False) -> Scale:
    """Choose a scale that holds finite numbers, with ends a little outside of them or at 0; of none from 0 to 1."""
    found = [0.0 if abs(value) < _NOTHING else value for value in values] or [0.0, 1.0]
    low, high = min(found), max(found)
    if may_be_logarithmic and low > 0 and high / low >= _LOGARITHMIC_FROM:
        return Scale(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9), logarithmic=True)
    low = min(low, 0.0) if from_zero else low
    room = 0.06 * (high - low) or abs(high) or 1.0
    return Scale(low if from_zero and low == 0 else low - room, high + room)


def integers(first: int, last: int) -> Scale:
    """Give a linear scale for layers or tokens, with half a step of room at both ends."""
    return Scale(first - 0.5, last + 0.5)


def integer_ticks(scale: Scale, most: int = 9) -> list[float]:
    """Give round whole numbers within a scale of `integers`."""
    first, last = round(scale.low + 0.5), round(scale.high - 0.5)
    every = max(1, math.ceil(_round_step(max(1.0, (last - first) / most))))
    return [float(number) for number in range(first, last + 1) if number % every == 0]


@dataclass(frozen=True)
class Point:
    """A measured number with its interval, if it has one; it is drawn as a `dot`, a `ring` or a `star`."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""
    kind: str = "dot"


@dataclass(frozen=True)
class Series:
    """Points of one kind; `style` is the class that colours them, and `joined` whether lines run between them."""

    name: str
    style: str
    points: tuple[Point, ...]
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """What the template draws: points, or a bar for each layer; `rule` is where a line runs across, and what it is."""

    label: str
    x: Scale
    y: Scale
    y_name: str
    x_name: str = ""
    series: tuple[Series, ...] = ()
    bars: tuple[tuple[int, float], ...] = ()
    whole: bool = True
    height: int = 220
    rule: tuple[float, str] | None = None
    up: Callable[[float], str] = tick

    def across(self, value: float) -> float:
        """Give the place across of a number."""
        return round(100 * self.x.share(value), 3)

    def down(self, value: float) -> float:
        """Give the place down of a number."""
        return round(self.height * (1 - self.y.share(value)), 2)

    @property
    def x_ticks(self) -> Ticks:
        """What stands below."""
        return [(self.across(at), tick(at)) for at in (integer_ticks(self.x) if self.whole else self.x.ticks(5))]

    @property
    def y_ticks(self) -> Ticks:
        """What stands beside."""
        return [(self.down(at), self.up(at)) for at in self.y.ticks(4 if self.height < 100 else 6)]

    @property
    def rectangles(self) -> list[tuple[float, float, float, float, str]]:
        """The bars: place across, width, place down, height, and what each is."""
        step, zero = 100 / (self.x.high - self.x.low), self.height * (1 - self.y.share(0))
        placed = []
        for layer, value in self.bars:
            left, top = 100 * self.x.share(layer) - step * _BAR_SHARE / 2, self.height * (1 - self.y.share(value))
            box = round(left, 3), round(step * _BAR_SHARE, 3), round(min(top, zero), 2), round(abs(top - zero), 2)
            placed.append((*box, f"layer {layer}: {number(value)}"))
        return placed


Cells = Sequence[Sequence[float | None]]
"""`[rows, columns]`, from -1 to 1; None is left blank."""


@dataclass(frozen=True)
class Heat:
    """A matrix that the template draws; `key` says what full plus, blank and full minus are, or is empty for one."""

    label: str
    cells: Cells
    key: tuple[str, str, str]
    axes: str
    y_names: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """How many columns and how many rows there are."""
        return max(map(len, self.cells), default=0), len(self.cells)

    @property
    def height(self) -> int | None:
        """In pixels; None for as high as wide."""
        columns, rows = self.size
        return None if rows == columns and not self.y_names else min(_MOST_HIGH, _ROW * rows)

    @property
    def paths(self) -> list[tuple[str, float, str]]:
        """For each shade its sign, its opacity and its path."""
        return heat_paths(self.cells)

    @property
    def x_ticks(self) -> Ticks:
        """What stands below: places in percent from the left."""
        columns = self.size[0]
        return [(round(100 * (at + 0.5) / columns, 2), tick(at)) for at in integer_ticks(integers(0, columns - 1), 6)]

    @property
    def y_ticks(self) -> Ticks:
        """What stands beside: places in percent from the top."""
        rows = self.size[1]
        every = range(rows) if self.y_names else map(int, integer_ticks(integers(0, rows - 1), 6))
        return [(round(100 * (at + 0.5) / rows, 2), self.y_names[at] if self.y_names else tick(at)) for at in every]


def heat_paths(cells: Cells, *, steps: int = 10) -> list[tuple[str, float, str]]:
    """Draw a matrix as one path for each shade, since a cell each would fill the page: sign, opacity, path in cells."""
    shades: dict[tuple[str, int], list[str]] = {}
    for row, values in enumerate(cells):
        column = 0
        for shade, run in itertools.groupby(values, lambda value: _shade(value, steps)):
            width = len(list(run))
            if shade is not None:
                shades.setdefault(shade, []).append(f"M{column} {row}h{width}v1h-{width}z")
            column += width
    return [(sign, round(level / steps, 3), "".join(parts)) for (sign, level), parts in sorted(shades.items())]


def _shade(value: float | None, steps: int) -> tuple[str, int] | None:
    level = 0 if value is None else round(min(1.0, abs(value)) * steps)
    return None if value is None or level == 0 else ("plus" if value > 0 else "minus", level)
