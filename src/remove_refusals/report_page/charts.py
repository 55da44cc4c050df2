"""Charts as lists of marks with their places; the template draws them as SVG that stretches to its column.

Places across are percentages of the width, so that text and dots keep their size on any screen; places down are pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remove_refusals.report_page.scales import Scale, integer_ticks
from remove_refusals.report_page.words import number, tick

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
