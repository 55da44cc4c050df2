"""Say which differences between paired measurements are real. Intervals are at 95%, tests two-sided at 5%."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np

from remove_refusals.errors import NumericalError
from remove_refusals.metrics import N_RESAMPLES, McNemar, mcnemar, wilson_rate

SIGNIFICANCE = 0.05
_FEWEST_PAIRS = 6
"""With five pairs even an unanimous sign test has p = 0.0625: fewer than six can decide nothing."""


class Verdict(StrEnum):
    """How the second of two compares with the first."""

    HIGHER = "higher"
    LOWER = "lower"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class PairedDifference:
    """The mean of second minus first over pairs.

    Attributes:
        value: The mean difference.
        low: The 2.5% quantile of the mean differences of resampled pairs.
        high: The 97.5% quantile.
        p_value: Two-sided, of the test that flips the signs of the differences at random.
        n: How many pairs there are.
        seed: The seed of the resamples and the flips.
        verdict: Whether the second is higher or lower, or the data cannot say.
    """

    value: float
    low: float
    high: float
    p_value: float
    n: int
    seed: int
    verdict: Verdict

    @property
    def decided(self) -> bool:
        """Whether the data support a difference."""
        return self.verdict is not Verdict.UNDECIDED

    def to_json(self) -> dict[str, object]:
        """Give the attributes and whether it is decided."""
        return {**asdict(self), "verdict": str(self.verdict), "decided": self.decided}


@dataclass(frozen=True)
class PairedRateDifference:
    """The share of second minus the share of first over pairs of yes and no.

    Attributes:
        value: The difference of the shares, from -1 to 1.
        low: The lower end of Newcombe's interval.
        high: The upper end.
        test: The exact McNemar test.
        n: How many pairs there are.
        verdict: Whether the second is higher or lower, or the data cannot say; by the exact test.
    """

    value: float
    low: float
    high: float
    test: McNemar
    n: int
    verdict: Verdict

    @property
    def decided(self) -> bool:
        """Whether the data support a difference."""
        return self.verdict is not Verdict.UNDECIDED

    def to_json(self) -> dict[str, object]:
        """Give the attributes and whether it is decided."""
        return {**asdict(self), "verdict": str(self.verdict), "decided": self.decided}


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedDifference | None:
    """Compare the means of two measurements of the same prompts.

    The interval is the percentile bootstrap over pairs (Efron 1979) from `N_RESAMPLES` resamples; the p-value is that
    of Fisher's (1935) test, which flips signs at random as often. The difference is decided if the interval excludes 0,
    the p-value is at most 5%, and there are at least six pairs.

    Args:
        first: One value for each prompt.
        second: The same for the second.
        seed: The seed.

    Returns:
        Second minus first, or None if there are no prompts.

    Raises:
        NumericalError: If the lengths differ, or a value is NaN or infinite.
    """
    if len(first) != len(second):
        raise NumericalError(
            f"The paired measurements have {len(first)} and {len(second)} values, expected one of each for each "
            "prompt; measure both on the same prompts."
        )
    if not first:
        return None
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if not np.isfinite(differences).all():
        index = int(np.flatnonzero(~np.isfinite(differences))[0])
        raise NumericalError(
            f"The values of prompt {index + 1} of {len(first)} are {first[index]} and {second[index]}, expected finite "
            "numbers; look at the answers to that prompt."
        )
    n, value = len(differences), float(differences.mean())
    random = np.random.default_rng(seed)
    resampled = differences[random.integers(0, n, size=(N_RESAMPLES, n))].mean(axis=1)
    low, high = (float(end) for end in np.quantile(resampled, [0.025, 0.975]))
    flipped = (random.integers(0, 2, size=(N_RESAMPLES, n)) * 2 - 1) @ differences / n
    # The margin keeps rounding from telling equal sums apart; the data themselves are one of the flips.
    extreme = int((np.abs(flipped) >= abs(value) * (1 - 1e-9)).sum())
    p_value = (extreme + 1) / (N_RESAMPLES + 1)
    decided = n >= _FEWEST_PAIRS and p_value <= SIGNIFICANCE and not low <= 0 <= high
    return PairedDifference(value, low, high, p_value, n, seed, _direction(value, decided=decided))


def paired_rates(first: Sequence[bool], second: Sequence[bool]) -> PairedRateDifference | None:
    """Compare how often two models have what is counted on the same prompts.

    The test is the exact McNemar test (1947); the interval is Newcombe's (1998, Statistics in Medicine 17, method 10)
    from the Wilson intervals of both shares and their correlation.

    Args:
        first: For each prompt whether the first has what is counted.
        second: The same for the second.

    Returns:
        Second minus first, or None if there are no prompts.
    """
    test = mcnemar(first, second)
    if test is None:
        return None
    n, both = test.n, sum(a and b for a, b in zip(first, second, strict=True))
    rates = [wilson_rate(both + apart, n, "") for apart in (test.only_second, test.only_first)]
    high_share, low_share = rates
    assert high_share is not None and low_share is not None  # there are prompts
    neither = n - both - test.only_first - test.only_second
    phi = _correlation(both, test.only_first, test.only_second, neither)
    value = high_share.value - low_share.value
    below = _root(high_share.value - high_share.low, low_share.high - low_share.value, phi)
    above = _root(high_share.high - high_share.value, low_share.value - low_share.low, phi)
    return PairedRateDifference(value, value - below, value + above, test, n, verdict(test))


def verdict(test: McNemar, p_value: float | None = None) -> Verdict:
    """Say whether the second of two has more or less of what is counted, or the data cannot say.

    Args:
        test: The exact test of the two.
        p_value: Its p-value after a correction for multiple comparisons, for example `holm`; by default its own.

    Returns:
        The verdict at 5%.
    """
    p_value = test.p_value if p_value is None else p_value
    return _direction(test.only_second - test.only_first, decided=p_value <= SIGNIFICANCE)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple comparisons (Holm 1979, Scandinavian Journal of Statistics 6).

    Compared with 5%, they keep the chance of even one false difference among all below 5%.

    Args:
        p_values: One for each comparison, from 0 to 1.

    Returns:
        The adjusted p-values, in the same order.

    Raises:
        NumericalError: If a p-value is not from 0 to 1.
    """
    for index, p_value in enumerate(p_values):
        if not 0 <= p_value <= 1:
            raise NumericalError(
                f"The p-value {index + 1} of {len(p_values)} is {p_value}, expected 0 to 1; look at that comparison."
            )
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _direction(difference: float, *, decided: bool) -> Verdict:
    if not decided or difference == 0:
        return Verdict.UNDECIDED
    return Verdict.HIGHER if difference > 0 else Verdict.LOWER


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Give the phi coefficient of a table of two by two, with Newcombe's correction; 0 where a margin is 0."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - only_first * only_second
    n = both + only_first + only_second + neither
    return (max(cross - n / 2, 0.0) if cross > 0 else float(cross)) / math.sqrt(margins)


def _root(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))
