"""Matrices as shades: few paths in place of many cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from remove_refusals.report_page.charts import Tick
from remove_refusals.report_page.scales import integer_ticks, integers
from remove_refusals.report_page.words import tick

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
