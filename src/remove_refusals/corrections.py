"""Correct a rate for what the judge gets wrong. Intervals are at 95%."""

import math
from dataclasses import asdict, dataclass

from remove_refusals.errors import JudgeError

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
