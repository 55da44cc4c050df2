"""Scales of charts: numbers to shares of a length, and the ticks between."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_LOGARITHMIC_FROM = 30.0
"""Where the largest number is so many times the smallest, the small ones would lie on the axis of a linear scale."""

_NOTHING = 1e-290
"""Smaller numbers are drawn as 0: steps between them could not be divided any more."""


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
