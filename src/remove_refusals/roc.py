"""How well scores tell two sets apart, with an interval that has a width even where they do so perfectly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Auroc:
    """The area under the receiver operating characteristic: how often a harmful prompt scores above a harmless one.

    Attributes:
        value: The share of pairs, ties counted half, from 0 to 1.
        low: The lower end of the 95% interval.
        high: The upper end.
        n_harmful: How many harmful prompts there are.
        n_harmless: How many harmless prompts there are.
        seed: The seed that cut the sets into halves.
    """

    value: float
    low: float
    high: float
    n_harmful: int
    n_harmless: int
    seed: int


def auroc(positive: Sequence[float] | Array, negative: Sequence[float] | Array) -> float:
    """Compute the area under the receiver operating characteristic, by ranks (Mann and Whitney 1947).

    Args:
        positive: `[m]`, scores that should be high, at least one.
        negative: `[n]`, scores that should be low, at least one.

    Returns:
        The share of the `m n` pairs in which the first is above the second, ties counted half.
    """
    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def auroc_interval(value: float, sizes: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Compute a 95% score interval of an AUROC (Newcombe 2006, part 2, method 5), which has a width at 0 and 1 too.

    The variance is that of Hanley and McNeil (1982) with both sizes' excess replaced by their mean, taken at the end of
    the interval and not at the estimate.

    Args:
        value: The AUROC: the mean over groups, each with as much weight as it has pairs.
        sizes: For each group how many positive and how many negative scores it has; the groups are independent.

    Returns:
        The lower and the upper end.
    """
    pairs = sum(m * n for m, n in sizes)
    square = float(norm.ppf(0.975)) ** 2

    def outside(at: float) -> float:
        variance = sum(
            (m * n / pairs) ** 2
            * at * (1 - at) / (m * n)
            * (1 + ((m + n) / 2 - 1) * ((1 - at) / (2 - at) + at / (1 + at)))
            for m, n in sizes
        )  # fmt: skip
        return float((value - at) ** 2 - square * variance)

    # At the estimate the score is inside, at 0 and 1 outside; the estimate may itself be 0 or 1.
    low = brentq(outside, 0, value * (1 - 1e-9)) if value > 0 else 0.0
    high = brentq(outside, value + (1 - value) * 1e-9, 1) if value < 1 else 1.0
    return min(float(low), value), max(float(high), value)
