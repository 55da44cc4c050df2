"""Labels and log-probabilities to numbers, each with how many it was computed from and an interval.

What was computed from nothing is None, never 0. Intervals are at 95%.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from remove_refusals.errors import JudgeError, NumericalError

N_RESAMPLES = 2000


@dataclass(frozen=True)
class Rate:
    """A share of prompts.

    Attributes:
        count: How many prompts have what is counted.
        n: How many prompts there are, at least 1.
        low: The lower end of the Wilson interval.
        high: The upper end.
        prompts_sha256: `PromptSet.sha256` of the prompts.
    """

    count: int
    n: int
    low: float
    high: float
    prompts_sha256: str

    @property
    def value(self) -> float:
        """The share, from 0 to 1."""
        return self.count / self.n

    def to_json(self) -> dict[str, object]:
        """Give the attributes and the value."""
        return {"value": self.value, **asdict(self)}


@dataclass(frozen=True)
class McNemar:
    """The exact McNemar test of two labels on the same prompts.

    Attributes:
        only_first: On how many prompts only the first has what is counted.
        only_second: On how many only the second has it.
        p_value: The two-sided p-value: how likely a split at least as uneven is if both are equally likely.
        n: How many prompts there are.
    """

    only_first: int
    only_second: int
    p_value: float
    n: int

    def to_json(self) -> dict[str, object]:
        """Give the attributes."""
        return asdict(self)


@dataclass(frozen=True)
class Mean:
    """A mean over prompts with its bootstrap interval.

    Attributes:
        value: The mean.
        low: The 2.5% quantile of the means of resamples.
        high: The 97.5% quantile.
        n: How many prompts there are.
        seed: The seed of the resamples.
        prompts_sha256: `PromptSet.sha256` of the prompts.
    """

    value: float
    low: float
    high: float
    n: int
    seed: int
    prompts_sha256: str

    def to_json(self) -> dict[str, object]:
        """Give the attributes."""
        return asdict(self)


@dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean negative log-likelihood of a token, with the bootstrap interval over prompts.

    Attributes:
        value: The perplexity, at least 1.
        low: The 2.5% quantile of the perplexities of resampled prompts.
        high: The 97.5% quantile.
        n: How many prompts there are.
        n_tokens: How many tokens they have together.
        seed: The seed of the resamples.
        prompts_sha256: `PromptSet.sha256` of the prompts.
    """

    value: float
    low: float
    high: float
    n: int
    n_tokens: int
    seed: int
    prompts_sha256: str

    def to_json(self) -> dict[str, object]:
        """Give the attributes."""
        return asdict(self)


def wilson_rate(count: int, n: int, prompts_sha256: str) -> Rate | None:
    """Compute a rate with its Wilson score interval (Wilson 1927).

    Args:
        count: How many prompts have what is counted.
        n: How many prompts there are.
        prompts_sha256: The prompts' hash.

    Returns:
        The rate, or None if `n` is 0.
    """
    if n == 0:
        return None
    # SciPy takes a third of a second to import, which editing a checkpoint need not wait for.
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    # At 0 and n the bound is exact, and rounding must not put the rate outside of its interval.
    low, high = min(float(interval.low), count / n), max(float(interval.high), count / n)
    return Rate(count, n, low, high, prompts_sha256)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar | None:
    """Compare two labels on the same prompts by the exact McNemar test (McNemar 1947, binomial form).

    Args:
        first: For each prompt whether the first has what is counted.
        second: The same for the second.

    Returns:
        The test, or None if there are no prompts; the p-value is 1 if no prompt sets the two apart.
    """
    if not first and not second:
        return None
    from scipy.stats import binomtest

    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    apart = only_first + only_second
    p_value = float(binomtest(only_first, apart, 0.5).pvalue) if apart else 1.0
    return McNemar(only_first, only_second, p_value, len(pairs))


def mean_with_interval(values: Sequence[float], prompts_sha256: str, *, seed: int = 0) -> Mean | None:
    """Compute a mean and its percentile bootstrap interval (Efron 1979) from `N_RESAMPLES` resamples.

    Args:
        values: One value for each prompt.
        prompts_sha256: The prompts' hash.
        seed: The seed of the resamples.

    Returns:
        The mean, or None if there are no values.

    Raises:
        NumericalError: If a value is NaN or infinite.
    """
    if not values:
        return None
    array = _finite(values)
    chosen = _resamples(len(array), seed)
    low, high = np.quantile(array[chosen].mean(axis=1), [0.025, 0.975])
    return Mean(float(array.mean()), float(low), float(high), len(array), seed, prompts_sha256)


def perplexity(
    negative_log_likelihoods: Sequence[float], n_tokens: Sequence[int], prompts_sha256: str, *, seed: int = 0
) -> Perplexity | None:
    """Compute the perplexity of answers: `exp(sum of negative log-likelihoods / number of tokens)`.

    Args:
        negative_log_likelihoods: For each prompt the sum over its answer's tokens, natural logarithm.
        n_tokens: For each prompt the number of those tokens, at least 1.
        prompts_sha256: The prompts' hash.
        seed: The seed of the resamples.

    Returns:
        The perplexity with a percentile bootstrap interval over prompts, or None if there are none.

    Raises:
        NumericalError: If a value is NaN or infinite, or the perplexity is too large for a float.
    """
    if not negative_log_likelihoods:
        return None
    sums, counts = _finite(negative_log_likelihoods), np.asarray(n_tokens, dtype=np.float64)
    chosen = _resamples(len(sums), seed)
    logs = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    mean, (low, high) = float(sums.sum() / counts.sum()), np.quantile(logs, [0.025, 0.975])
    if max(mean, high) > 700:
        raise NumericalError(
            f"The mean negative log-likelihood of a token is {mean:.0f}, expected at most 700; the model is destroyed."
        )
    return Perplexity(math.exp(mean), math.exp(low), math.exp(high), len(sums), int(counts.sum()), seed, prompts_sha256)


def _finite(values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise NumericalError(
            f"The value of prompt {index + 1} of {len(array)} is {array[index]}, expected a finite number; look at "
            "the answers to that prompt."
        )
    return array


def _resamples(n: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw `[N_RESAMPLES, n]` indices with replacement."""
    return np.random.default_rng(seed).integers(0, n, size=(N_RESAMPLES, n))


SIGNIFICANCE = 0.05


_FEWEST_PAIRS = 6
"""With five pairs even an unanimous sign test has p = 0.0625: fewer than six can decide nothing."""


class Verdict(StrEnum):
    """How the second of two compares with the first."""

    HIGHER = "higher"
    LOWER = "lower"
    UNDECIDED = "undecided"


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


_Z = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""


@dataclass(frozen=True)
class JudgeAccuracy:
    """How often a judge was right about one label, on answers with known labels.

    Attributes:
        true_positives: On how many answers that have the label the judge gave it.
        positives: How many answers have the label.
        true_negatives: On how many answers without the label the judge did not give it.
        negatives: How many answers do not have the label.
    """

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

    @property
    def n(self) -> int:
        """How many answers there are."""
        return self.positives + self.negatives


@dataclass(frozen=True)
class CorrectedRate:
    """A rate corrected for the judge's sensitivity and specificity.

    Attributes:
        value: The corrected share, from 0 to 1.
        low: The lower end of its interval, which carries the uncertainty of the rate and of the calibration.
        high: The upper end.
        n: How many answers the rate is of.
        n_calibration: How many answers with known labels the judge was measured on.
    """

    value: float
    low: float
    high: float
    n: int
    n_calibration: int

    def to_json(self) -> dict[str, object]:
        """Give the attributes."""
        return asdict(self)


def rogan_gladen(count: int, n: int, accuracy: JudgeAccuracy) -> CorrectedRate | None:
    """Correct a rate for a judge that errs: `(p + Sp - 1) / (Se + Sp - 1)` (Rogan and Gladen 1978).

    The interval is that of Lang and Reiczigel (2014, Preventive Veterinary Medicine 113): counts are shifted towards
    the middle (as Agresti and Coull do for `p`, and by one success and one failure for `Se` and `Sp`), the variances of
    the three add up by the delta method, and the midpoint is shifted for the skew. All are clamped to 0 and 1.

    Args:
        count: To how many answers the judge gave the label.
        n: How many answers there are.
        accuracy: How often the judge is right about that label; what it was measured on must not be these answers.

    Returns:
        The corrected rate; None if there are no answers, if the calibration lacks answers with or without the label,
        or if the judge does no better than chance (`Se + Sp <= 1`), so that the rate says nothing.
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
    value = _clamped((count / n + specificity - 1) / gain)
    # Where the estimate is clamped, rounding and the shift must not put it outside of its interval.
    low, high = min(value, _clamped(middle + shift - half)), max(value, _clamped(middle + shift + half))
    return CorrectedRate(value, low, high, n, accuracy.n)


def _clamped(share: float) -> float:
    return min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Quantile:
    """A quantile over the tokens of all answers, with its bootstrap interval over prompts.

    Attributes:
        share: Which quantile it is, from 0 to 1.
        value: The quantile.
        low: The 2.5% quantile of what resampled prompts give.
        high: The 97.5% quantile.
        n: How many prompts there are.
        n_tokens: How many tokens they have together.
        seed: The seed of the resamples.
        prompts_sha256: `PromptSet.sha256` of the prompts.
    """

    share: float
    value: float
    low: float
    high: float
    n: int
    n_tokens: int
    seed: int
    prompts_sha256: str

    def to_json(self) -> dict[str, object]:
        """Give the attributes."""
        return asdict(self)


def token_quantile(
    values: Sequence[Sequence[float]], share: float, prompts_sha256: str, *, seed: int = 0
) -> Quantile | None:
    """Compute a quantile over all tokens; whole prompts are resampled for the interval (Efron 1979; Field 2007).

    Args:
        values: For each prompt the value at each token of its answer, at least one.
        share: Which quantile, from 0 to 1.
        prompts_sha256: The prompts' hash.
        seed: The seed of the resamples.

    Returns:
        The quantile (the least value that at least `share` of the tokens do not exceed), or None without prompts.

    Raises:
        NumericalError: If a value is NaN or infinite.
    """
    if not values:
        return None
    flat = np.concatenate([np.asarray(row, dtype=np.float64) for row in values])
    if not np.isfinite(flat).all():
        raise NumericalError(
            f"Of {len(flat)} values along the answers, {int((~np.isfinite(flat)).sum())} are NaN or infinite, expected "
            "finite numbers; look at the answers."
        )
    owners = np.repeat(np.arange(len(values)), [len(row) for row in values])
    order = np.argsort(flat, kind="stable")
    flat, owners = flat[order], owners[order]

    def of(weights: np.ndarray) -> float:
        cumulated = np.cumsum(weights[owners])
        index = int(np.searchsorted(cumulated, share * cumulated[-1] * (1 - 1e-12)))
        return float(flat[index])

    generator = np.random.default_rng(seed)
    n = len(values)
    resamples = (np.bincount(generator.integers(0, n, size=n), minlength=n) for _ in range(N_RESAMPLES))
    low, high = np.quantile([of(weights) for weights in resamples], [0.025, 0.975])
    return Quantile(share, of(np.ones(n)), float(low), float(high), n, len(flat), seed, prompts_sha256)


def means_by_token(values: Sequence[Sequence[float]], prompts_sha256: str, *, seed: int = 0) -> tuple[Mean, ...]:
    """Compute the mean at each place in the answers, over the prompts whose answer reaches so far.

    Args:
        values: For each prompt the value at each token of its answer.
        prompts_sha256: The hash of all prompts; `n` of each mean says how many reach so far.
        seed: The seed of the resamples.

    Returns:
        One mean for each place that at least one answer reaches.

    Raises:
        NumericalError: If a value is NaN or infinite.
    """
    longest = max(map(len, values), default=0)
    columns = ([row[place] for row in values if place < len(row)] for place in range(longest))
    means = (mean_with_interval(column, prompts_sha256, seed=seed) for column in columns)
    return tuple(mean for mean in means if mean is not None)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> float:
    """Measure how much of two answers is the same from the start on.

    Returns:
        The length of the common prefix over the length of the longer answer; 1 if both are empty.
    """
    longer = max(len(first), len(second))
    same = next((index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    length = min(len(first), len(second)) if same is None else same
    return length / longer if longer else 1.0
