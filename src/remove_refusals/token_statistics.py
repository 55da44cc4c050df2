"""Statistics over the tokens of answers, where one answer's tokens stand or fall together. Intervals are at 95%."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from remove_refusals.errors import NumericalError
from remove_refusals.metrics import N_RESAMPLES, Mean, mean_with_interval


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
