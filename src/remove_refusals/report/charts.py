"""Charts as lists of marks with their places; the template draws them as SVG that stretches to its column.

Places across are percentages of the width, so that text and dots keep their size on any screen; places down are pixels.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from remove_refusals.report.words import number, tick

_BAR_SHARE = 0.8
"""How much of its step a bar fills."""


@dataclass(frozen=True)
class Tick:
    """A number on an axis: its place and its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Point:
    """A measured number, with the ends of its interval where it has one.

    Attributes:
        x: What it belongs to.
        y: The number.
        low: The lower end of the interval.
        high: The upper end.
        title: What it is, in words.
        kind: How it is drawn: `dot`, `ring` or `star`.
    """

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
class Mark:
    """A point in its place: `x` in percent; `y`, `low` and `high` in pixels from the top."""

    x: float
    y: float
    low: float | None
    high: float | None
    title: str
    kind: str


@dataclass(frozen=True)
class Line:
    """A series in its place."""

    name: str
    style: str
    marks: tuple[Mark, ...]
    joined: bool


@dataclass(frozen=True)
class Chart:
    """What the template draws.

    Attributes:
        label: The text in place of the picture.
        height: In pixels.
        x_name: What lies across.
        y_name: What lies up.
        x_ticks: Places in percent.
        y_ticks: Places in pixels.
        lines: The series.
        rule: The place of a line across, in pixels; None for none.
        rule_name: What that line is.
    """

    label: str
    height: int
    x_name: str
    y_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    rule: float | None = None
    rule_name: str = ""


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: The number at its start.
        high: The number at its end, above `low`.
        logarithmic: Whether equal lengths are equal ratios; then `low` is above 0.
    """

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


def chart(
    label: str,
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    *,
    x_name: str,
    y_name: str,
    whole: bool = True,
    height: int = 220,
    rule: tuple[float, str] | None = None,
    up: Callable[[float], str] = tick,
) -> Chart:
    """Put series into their places.

    Args:
        label: The text in place of the picture.
        series: What is drawn; of a series without points nothing is.
        x: The scale across.
        y: The scale up.
        x_name: What lies across.
        y_name: What lies up.
        whole: Whether only whole numbers stand below.
        height: In pixels.
        rule: A number on the scale up at which a line runs across, and what it is.
        up: How the numbers of the scale up are printed.

    Returns:
        The chart.
    """

    def down(value: float) -> float:
        return round(height * (1 - y.share(value)), 2)

    def across(value: float) -> float:
        return round(100 * x.share(value), 3)

    def mark(point: Point) -> Mark:
        low, high = (None if end is None else down(end) for end in (point.low, point.high))
        return Mark(across(point.x), down(point.y), low, high, point.title, point.kind)

    x_ticks = integer_ticks(x) if whole else x.ticks(5)
    return Chart(
        label=label,
        height=height,
        x_name=x_name,
        y_name=y_name,
        x_ticks=tuple(Tick(across(value), tick(value)) for value in x_ticks),
        y_ticks=tuple(Tick(down(value), up(value)) for value in y.ticks()),
        lines=tuple(
            Line(part.name, part.style, tuple(map(mark, part.points)), part.joined) for part in series if part.points
        ),
        rule=None if rule is None else down(rule[0]),
        rule_name="" if rule is None else rule[1],
    )


@dataclass(frozen=True)
class Bar:
    """A bar in its place: `x` and `width` in percent, `y` and `height` in pixels."""

    x: float
    width: float
    y: float
    height: float
    title: str


@dataclass(frozen=True)
class Bars:
    """A row of bars, one for each layer."""

    name: str
    label: str
    height: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...]


def bars(name: str, label: str, values: Sequence[tuple[int, float]], x: Scale, y: Scale, *, height: int = 90) -> Bars:
    """Put bars into their places.

    Args:
        name: What the row is.
        label: The text in place of the picture.
        values: Layers with their numbers.
        x: The scale across, of `integers`.
        y: The scale up, from 0 or below.
        height: In pixels.

    Returns:
        The row.
    """
    step = 100 / (x.high - x.low)
    zero = height * (1 - y.share(0))
    placed = []
    for layer, value in values:
        top = height * (1 - y.share(value))
        placed.append(
            Bar(
                round(100 * x.share(layer) - step * _BAR_SHARE / 2, 3),
                round(step * _BAR_SHARE, 3),
                round(min(top, zero), 2),
                round(abs(top - zero), 2),
                f"layer {layer}: {number(value)}",
            )
        )
    return Bars(
        name,
        label,
        height,
        tuple(Tick(round(100 * x.share(value), 3), tick(value)) for value in integer_ticks(x)),
        tuple(Tick(round(height * (1 - y.share(value)), 2), tick(value)) for value in y.ticks(4)),
        tuple(placed),
    )


_ROW = 16
"""How many pixels a row is high, where the matrix is not square."""


_MOST_HIGH = 420
"""How many pixels a matrix is high at most."""


@dataclass(frozen=True)
class Heat:
    """What the template draws.

    Attributes:
        label: The text in place of the picture.
        size: How many columns and how many rows there are.
        height: In pixels; None for as high as wide.
        paths: For each shade its sign, its opacity and its path.
        x_ticks: Places in percent from the left.
        y_ticks: Places in percent from the top.
        key: What the full shades of plus, the blank and the full shade of minus are; empty for one that there is not.
        axes: What lies across and down.
        table: The head and the rows of the same as text; None if it is too large.
    """

    label: str
    size: tuple[int, int]
    height: int | None
    paths: list[tuple[str, float, str]]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    key: tuple[str, str, str]
    axes: str
    table: tuple[tuple[str, ...], list[tuple[str, ...]]] | None


def heat(
    label: str,
    cells: Sequence[Sequence[float | None]],
    *,
    key: tuple[str, str, str],
    axes: str,
    table: tuple[tuple[str, ...], list[tuple[str, ...]]] | None = None,
    y_names: Sequence[str] | None = None,
) -> Heat:
    """Put a matrix into its place.

    Args:
        label: The text in place of the picture.
        cells: `[rows, columns]`, from -1 to 1; None is left blank.
        key: As in `Heat`.
        axes: What lies across and down.
        table: As in `Heat`.
        y_names: What each row is called; by default its index, for some of them.

    Returns:
        The matrix with a square picture if it is square.
    """
    rows, columns = len(cells), max(map(len, cells), default=0)
    across = integer_ticks(integers(0, columns - 1), 6)
    down = range(rows) if y_names is not None else map(int, integer_ticks(integers(0, rows - 1), 6))
    return Heat(
        label,
        (columns, rows),
        None if rows == columns and y_names is None else min(_MOST_HIGH, _ROW * rows),
        heat_paths(cells),
        tuple(Tick(round(100 * (at + 0.5) / columns, 2), tick(at)) for at in across),
        tuple(Tick(round(100 * (at + 0.5) / rows, 2), y_names[at] if y_names else tick(at)) for at in down),
        key,
        axes,
        table,
    )


def heat_paths(cells: Sequence[Sequence[float | None]], *, steps: int = 10) -> list[tuple[str, float, str]]:
    """Draw a matrix of numbers from -1 to 1 as one path for each shade, since a cell each would fill the page.

    Args:
        cells: `[n, n]`; None is left blank.
        steps: How many shades there are on each side of 0.

    Returns:
        For each shade its sign, `plus` or `minus`, its opacity from 0 to 1, and the path in units of cells, row 0 on
        top; runs of one shade along a row are one rectangle.
    """
    shades: dict[tuple[str, int], list[str]] = {}
    for row, values in enumerate(cells):
        column = 0
        while column < len(values):
            shade = _shade(values[column], steps)
            end = column + 1
            while end < len(values) and _shade(values[end], steps) == shade:
                end += 1
            if shade is not None:
                shades.setdefault(shade, []).append(f"M{column} {row}h{end - column}v1h-{end - column}z")
            column = end
    return [(sign, round(level / steps, 3), "".join(parts)) for (sign, level), parts in sorted(shades.items())]


def _shade(value: float | None, steps: int) -> tuple[str, int] | None:
    level = 0 if value is None else round(min(1.0, abs(value)) * steps)
    return None if value is None or level == 0 else ("plus" if value > 0 else "minus", level)


_LOGARITHMIC_FROM = 30.0
"""Where the largest number is so many times the smallest, the small ones would lie on the axis of a linear scale."""


_NOTHING = 1e-290
"""Smaller numbers are drawn as 0: steps between them could not be divided any more."""


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def scale_of(values: Iterable[float], *, from_zero: bool = True, may_be_logarithmic: bool = False) -> Scale:
    """Choose a scale that holds numbers.

    Args:
        values: The numbers, finite; with none of them the scale runs from 0 to 1.
        from_zero: Whether a linear scale starts at 0.
        may_be_logarithmic: Whether the scale may be logarithmic: it is where all numbers are positive and far apart.

    Returns:
        The scale, with ends a little outside of the numbers or at 0.
    """
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
