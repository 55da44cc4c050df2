"""Labels and log-probabilities to numbers, each with how many it was computed from and an interval.

What was computed from nothing is None, never 0. Intervals are at 95%.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from remove_refusals.errors import NumericalError

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


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Compute the Kullback-Leibler divergence `sum of p (log p - log q)` (Kullback and Leibler 1951).

    Args:
        log_p: `[n, vocabulary]`, floating point: natural logarithms of the probabilities of the base.
        log_q: `[n, vocabulary]`, the same of what is compared to it.

    Returns:
        `[n]`, in nats, in the dtype of the input; never negative, infinite where `q` is 0 and `p` is not.
    """
    terms = log_p.exp() * (log_p - log_q)
    # Where p is 0 the term is 0, and -inf - -inf must not make it NaN.
    terms = torch.where(log_p == -math.inf, torch.zeros_like(terms), terms)
    return terms.sum(-1).clamp(min=0)


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
