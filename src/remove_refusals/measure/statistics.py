"""Labels and log-probabilities to numbers, each with how many it was computed from and an interval.

What was computed from nothing is None, never 0. Intervals are at 95%.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from remove_refusals.errors import JudgeError, NumericalError
from remove_refusals.files import Record

N_RESAMPLES = 2000
_BATCH = 100
"""So many resamples are held at once: a task may have ten thousand samples."""

SIGNIFICANCE = 0.05
_FEWEST_PAIRS = 6
"""With five pairs even an unanimous sign test has p = 0.0625: fewer than six can decide nothing."""
_Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""

POOR_MATCH = 0.75
"""Below this share of the base model's own match on harmless prompts a match is poor."""


def number(value: float) -> str:
    """Print a number with three significant digits, whole numbers whole, and an exponent only where it is shorter."""
    if value == 0 or (float(value).is_integer() and abs(value) < 1e5):
        return str(int(value))
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return re.sub(r"e([+-])0*(\d)", lambda match: f"e{match[1].lstrip('+')}{match[2]}", f"{value:.2g}")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def percent(value: float) -> str:
    """Print a share from 0 to 1 as a percentage: whole, or with a digit where it is near an end but not at it."""
    shown = 100 * value
    return f"{shown:.1f}%" if 0 < shown < 1 or 99 < shown < 100 else f"{shown:.0f}%"


class Estimate(Record):
    """A number with its interval at 95%, from so many prompts; as text it is both."""

    value: float
    low: float
    high: float
    n: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


class Rate(Estimate):
    """The share of prompts that have what is counted, with its Wilson interval."""

    count: int = Field(ge=0)
    prompts_sha256: str

    def __str__(self) -> str:
        return f"{self.count}/{self.n} [{percent(self.low)[:-1]}, {percent(self.high)[:-1]}]%"


class Mean(Estimate):
    """A mean over prompts with the bootstrap interval of the seed."""

    seed: int
    prompts_sha256: str


class TokenMean(Estimate):
    """A mean over the prompts whose answer reaches so far as this token, counted from 1."""

    token: int


class Perplexity(Mean):
    """The exponential of the mean negative log-likelihood of a token; the interval is over prompts."""

    n_tokens: int


class Quantile(Mean):
    """A quantile over the tokens of all answers; `share` says which, and the interval is over prompts."""

    share: float
    n_tokens: int


class CorrectedRate(Estimate):
    """A rate corrected for the judge's sensitivity and specificity, as `n_calibration` labelled answers show them."""

    n_calibration: int

    def __str__(self) -> str:
        return f"{percent(self.value)[:-1]} [{percent(self.low)[:-1]}, {percent(self.high)[:-1]}]%"


class Verdict(StrEnum):
    """How the second of two compares with the first."""

    HIGHER = "higher"
    LOWER = "lower"
    UNDECIDED = "undecided"


class McNemar(Record):
    """The exact McNemar test of two labels on the same `n` prompts: two-sided, of a split at least as uneven."""

    only_first: int
    only_second: int
    p_value: float
    n: int


class Difference(Estimate):
    """The second of two minus the first, over pairs."""

    verdict: Verdict

    @property
    def decided(self) -> bool:
        """Whether the data support a difference."""
        return self.verdict is not Verdict.UNDECIDED


class PairedDifference(Difference):
    """Of means; the p-value is two-sided, of flipped signs."""

    p_value: float
    seed: int


class PairedRateDifference(Difference):
    """Of the shares of yes, with Newcombe's interval."""

    test: McNemar


@dataclass(frozen=True)
class JudgeAccuracy:
    """How often a judge was right about one label, on answers that have it and on answers that do not."""

    true_positives: int
    positives: int
    true_negatives: int
    negatives: int

    def __post_init__(self) -> None:
        for hits, n in ((self.true_positives, self.positives), (self.true_negatives, self.negatives)):
            if not 0 <= hits <= n:
                raise JudgeError(
                    f"A calibration has {hits} right judgements of {n}, expected 0 to {n}; calibrate the judge again."
                )


def wilson_rate(count: int, n: int, prompts_sha256: str) -> Rate | None:
    """Compute a rate with its Wilson score interval (Wilson 1927); None of no prompts."""
    if n == 0:
        return None
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    # At 0 and n the bound is exact, and rounding must not put the rate outside of its interval.
    low, high = min(float(interval.low), count / n), max(float(interval.high), count / n)
    return Rate(value=count / n, low=low, high=high, n=n, count=count, prompts_sha256=prompts_sha256)


def is_poor_match(found: Rate | None, own: Rate | None) -> bool:
    """Tell whether answers match their prompts clearly worse than the base model's own match harmless prompts."""
    if found is None or own is None:
        return False
    return found.value < POOR_MATCH * own.value and found.high < own.low


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar | None:
    """Compare two labels on the same prompts (McNemar 1947, binomial form); None of no prompts, p = 1 if all agree."""
    if not first and not second:
        return None
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    apart = only_first + only_second
    from scipy.stats import binomtest

    p_value = float(binomtest(only_first, apart, 0.5).pvalue) if apart else 1.0
    return McNemar(only_first=only_first, only_second=only_second, p_value=p_value, n=len(pairs))


def mean_with_interval(values: Sequence[float], prompts_sha256: str, *, seed: int = 0) -> Mean | None:
    """Compute a mean over prompts and its percentile bootstrap interval (Efron 1979); None of no values."""
    if not values:
        return None
    return Mean(**_bootstrap(np.mean, _finite(values), seed=seed), seed=seed, prompts_sha256=prompts_sha256)


def means_by_token(values: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[TokenMean, ...]:
    """Compute the mean at each place in the answers, over the prompts whose answer reaches so far."""
    longest = max(map(len, values), default=0)
    columns = (_finite([row[place] for row in values if place < len(row)]) for place in range(longest))
    return tuple(
        TokenMean(token=place, **_bootstrap(np.mean, column, seed=seed))
        for place, column in enumerate(columns, start=1)
    )


def perplexity(
    negative_log_likelihoods: Sequence[float], n_tokens: Sequence[int], prompts_sha256: str, *, seed: int = 0
) -> Perplexity | None:
    """Compute `exp(sum / number)` of each prompt's summed negative log-likelihood, in nats, and number of tokens."""
    if not negative_log_likelihoods:
        return None
    sums, counts = _finite(negative_log_likelihoods), np.asarray(n_tokens, dtype=np.float64)
    found = _bootstrap(lambda some, many, axis: some.sum(axis) / many.sum(axis), sums, counts, seed=seed)
    if max(found["value"], found["high"]) > 700:
        raise NumericalError(
            f"The mean negative log-likelihood of a token is {found['value']:.0f}, expected at most 700; the model is "
            "destroyed."
        )
    found |= {name: math.exp(found[name]) for name in ("value", "low", "high")}
    return Perplexity(**found, seed=seed, prompts_sha256=prompts_sha256, n_tokens=int(counts.sum()))


def token_quantile(
    values: Sequence[Sequence[float]], share: float, prompts_sha256: str, *, seed: int = 0
) -> Quantile | None:
    """Compute the least value that at least `share` of all tokens do not exceed; None without prompts.

    Whole prompts are resampled for the interval (Efron 1979; Field 2007): their tokens go together.
    """
    if not values:
        return None
    flat = np.concatenate([np.asarray(row, dtype=np.float64) for row in values])
    if not np.isfinite(flat).all():
        raise NumericalError(
            f"Of {len(flat)} values along the answers, {int((~np.isfinite(flat)).sum())} are NaN or infinite, expected "
            "finite numbers; look at the answers."
        )
    order = np.argsort(flat, kind="stable")
    flat, owners = flat[order], np.repeat(np.arange(len(values)), [len(row) for row in values])[order]

    def of(chosen: npt.NDArray[np.int64]) -> float:
        cumulated = np.cumsum(np.bincount(chosen, minlength=len(values))[owners])
        return float(flat[int(np.searchsorted(cumulated, share * cumulated[-1] * (1 - 1e-12)))])

    everyone = np.arange(len(values))
    found = _bootstrap(lambda chosen, axis: np.apply_along_axis(of, axis, chosen), everyone, seed=seed)
    return Quantile(**found, share=share, n_tokens=len(flat), seed=seed, prompts_sha256=prompts_sha256)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> float:
    """Give the length of the common prefix over the length of the longer answer; 1 if both are empty."""
    longer, shorter = max(len(first), len(second)), min(len(first), len(second))
    pairs = zip(first, second, strict=False)
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)
    return same / longer if longer else 1.0


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedDifference | None:
    """Compare the means of two measurements of the same prompts: second minus first; None if there are none.

    The interval is the percentile bootstrap over pairs (Efron 1979), the p-value that of Fisher's (1935) test, which
    flips signs. The difference is decided if the interval excludes 0, the p-value is at most 5%, and there are at least
    six pairs.
    """
    if len(first) != len(second):
        raise NumericalError(
            f"The paired measurements have {len(first)} and {len(second)} values, expected one of each for each "
            "prompt; measure both on the same prompts."
        )
    if not first:
        return None
    differences = _finite(second) - _finite(first)
    from scipy.stats import permutation_test

    found, p_value = _bootstrap(np.mean, differences, seed=seed), 1.0
    if len(differences) > 1:
        options: dict[str, Any] = {"permutation_type": "samples", "n_resamples": N_RESAMPLES, "batch": _BATCH}
        random = np.random.default_rng(seed)
        p_value = float(permutation_test((differences,), np.mean, **options, rng=random).pvalue)
    decided = found["n"] >= _FEWEST_PAIRS and p_value <= SIGNIFICANCE and not found["low"] <= 0 <= found["high"]
    return PairedDifference(**found, p_value=p_value, seed=seed, verdict=_direction(found["value"], decided=decided))


def paired_rates(first: Sequence[bool], second: Sequence[bool]) -> PairedRateDifference | None:
    """Compare how often two models have what is counted on the same prompts: second minus first; None of no prompts.

    The test is the exact McNemar test (1947); the interval is Newcombe's (1998, Statistics in Medicine 17, method 10)
    from the Wilson intervals of both shares and their correlation.
    """
    test = mcnemar(first, second)
    if test is None:
        return None
    n, both = test.n, sum(a and b for a, b in zip(first, second, strict=True))
    plus, minus = (wilson_rate(both + apart, n, "") for apart in (test.only_second, test.only_first))
    assert plus is not None and minus is not None  # there are prompts
    neither = n - both - test.only_first - test.only_second
    # The phi coefficient with Newcombe's correction; 0 where a margin is 0.
    margins = (both + test.only_first) * (test.only_second + neither)
    margins *= (both + test.only_second) * (test.only_first + neither)
    cross: float = both * neither - test.only_first * test.only_second
    phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins) if margins else 0.0

    def root(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    value = plus.value - minus.value
    low = value - root(plus.value - plus.low, minus.high - minus.value)
    high = value + root(plus.high - plus.value, minus.value - minus.low)
    return PairedRateDifference(value=value, low=low, high=high, n=n, test=test, verdict=verdict(test))


def verdict(test: McNemar, p_value: float | None = None) -> Verdict:
    """Say at 5%, by the test's p-value or a corrected one, whether the second has more or less of what is counted."""
    p_value = test.p_value if p_value is None else p_value
    return _direction(test.only_second - test.only_first, decided=p_value <= SIGNIFICANCE)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values, in their order, so that the chance of even one false difference is below 5% (Holm 1979)."""
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


def rogan_gladen(count: int, n: int, accuracy: JudgeAccuracy) -> CorrectedRate | None:
    """Correct a rate for a judge that errs: `(p + Sp - 1) / (Se + Sp - 1)` (Rogan and Gladen 1978).

    The interval is that of Lang and Reiczigel (2014, Preventive Veterinary Medicine 113): counts are shifted towards
    the middle (as Agresti and Coull do for `p`, and by one success and one failure for `Se` and `Sp`), the variances of
    the three add up by the delta method, and the midpoint is shifted for the skew. All are clamped to 0 and 1.

    The accuracy must not be that on these answers. There is none if there are no answers, if the calibration lacks
    answers with or without the label, or if the judge does no better than chance (`Se + Sp <= 1`).
    """
    if n == 0 or accuracy.positives == 0 or accuracy.negatives == 0:
        return None
    sensitivity = accuracy.true_positives / accuracy.positives
    specificity = accuracy.true_negatives / accuracy.negatives
    n_se, n_sp, n_p = accuracy.positives + 2, accuracy.negatives + 2, n + _Z**2
    se, sp = (accuracy.true_positives + 1) / n_se, (accuracy.true_negatives + 1) / n_sp
    gain, shifted_gain = sensitivity + specificity - 1, se + sp - 1
    if gain <= 0 or shifted_gain <= 0:
        return None
    p = (count + _Z**2 / 2) / n_p
    middle = (p + sp - 1) / shifted_gain
    of_se, of_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    shift = 2 * _Z**2 * (middle * of_se - (1 - middle) * of_sp)
    variance = p * (1 - p) / n_p + (1 - middle) ** 2 * of_sp + middle**2 * of_se
    half = _Z * math.sqrt(variance) / shifted_gain
    value, low, high = np.clip(
        [(count / n + specificity - 1) / gain, middle + shift - half, middle + shift + half], 0, 1
    ).tolist()
    # Where the estimate is clamped, rounding and the shift must not put it outside of its interval.
    n_calibration = accuracy.positives + accuracy.negatives
    return CorrectedRate(value=value, low=min(value, low), high=max(value, high), n=n, n_calibration=n_calibration)


def _direction(difference: float, *, decided: bool) -> Verdict:
    if not decided or difference == 0:
        return Verdict.UNDECIDED
    return Verdict.HIGHER if difference > 0 else Verdict.LOWER


def _finite(values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise NumericalError(
            f"The value of prompt {index + 1} of {len(array)} is {array[index]}, expected a finite number; look at "
            "the answers to that prompt."
        )
    return array


def _bootstrap(statistic: Callable[..., Any], *samples: npt.NDArray[Any], seed: int) -> dict[str, Any]:
    """Give the fields of an `Estimate` with the percentile interval over prompts; the samples belong together."""
    from scipy.stats import bootstrap

    n, value = len(samples[0]), float(statistic(*samples, axis=0))
    low = high = value
    if n > 1:
        options: dict[str, Any] = {"paired": True, "vectorized": True, "method": "percentile", "batch": _BATCH}
        random = np.random.default_rng(seed)
        low, high = bootstrap(samples, statistic, n_resamples=N_RESAMPLES, rng=random, **options).confidence_interval
    # Sums of equal numbers may differ in the last digit.
    return {"value": value, "low": min(float(low), value), "high": max(float(high), value), "n": n}
