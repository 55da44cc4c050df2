import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remove_refusals.errors import JudgeError
from remove_refusals.measure.statistics import JudgeAccuracy, rogan_gladen


def test_reference_values_worked_by_hand() -> None:
    # p = 0.2, Se = 0.9, Sp = 0.9: (0.2 + 0.9 - 1) / 0.8. The interval step by step: Se' = 91/102, Sp' = 181/202,
    # p' = 21.9207/103.8415; middle 0.135928, shift -0.002076, variance 0.0019655, half width 0.110243.
    rate = rogan_gladen(20, 100, JudgeAccuracy(90, 100, 180, 200))
    assert rate is not None
    assert rate.value == pytest.approx(0.125)
    assert rate.low == pytest.approx(0.023609, abs=2e-6)
    assert rate.high == pytest.approx(0.244095, abs=3e-6)
    assert (rate.n, rate.n_calibration) == (100, 300)
    assert rate.to_json() == {"value": rate.value, "low": rate.low, "high": rate.high, "n": 100, "n_calibration": 300}


def test_a_perfect_judge_leaves_the_rate() -> None:
    rate = rogan_gladen(30, 100, JudgeAccuracy(100_000, 100_000, 100_000, 100_000))
    assert rate is not None
    assert rate.value == pytest.approx(0.3)
    # The interval is then that of Agresti and Coull: 0.3074 +- 1.96 sqrt(0.3074 * 0.6926 / 103.84).
    assert (rate.low, rate.high) == pytest.approx((0.21866, 0.39616), abs=2e-4)


def test_less_calibration_means_a_wider_interval() -> None:
    wide, narrow = (rogan_gladen(20, 100, JudgeAccuracy(9 * k, 10 * k, 18 * k, 20 * k)) for k in (3, 300))
    assert wide is not None and narrow is not None
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)


@pytest.mark.parametrize(
    ("count", "n", "accuracy"),
    [
        (0, 0, JudgeAccuracy(9, 10, 9, 10)),
        (1, 10, JudgeAccuracy(0, 0, 9, 10)),
        (1, 10, JudgeAccuracy(9, 10, 0, 0)),
        (1, 10, JudgeAccuracy(5, 10, 5, 10)),
        (1, 10, JudgeAccuracy(1, 10, 2, 10)),
    ],
)
def test_what_cannot_be_corrected_is_none(count: int, n: int, accuracy: JudgeAccuracy) -> None:
    assert rogan_gladen(count, n, accuracy) is None


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(JudgeError, match="11 right judgements of 10"):
        JudgeAccuracy(11, 10, 0, 10)


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 20), st.data())
def test_the_value_lies_in_its_interval(count: int, positives: int, negatives: int, data: st.DataObject) -> None:
    accuracy = JudgeAccuracy(
        data.draw(st.integers(0, positives)), positives, data.draw(st.integers(0, negatives)), negatives
    )
    rate = rogan_gladen(count, 50, accuracy)
    assert rate is None or 0 <= rate.low <= rate.value <= rate.high <= 1


@pytest.mark.parametrize(("share", "n"), [(0.0, 150), (0.05, 100), (0.5, 150), (0.95, 60)])
def test_the_interval_covers_the_truth(share: float, n: int) -> None:
    random, sensitivity, specificity = np.random.default_rng(7), 0.97, 0.96
    covered = 0
    for _ in range(1000):
        count = int(random.binomial(n, share * sensitivity + (1 - share) * (1 - specificity)))
        accuracy = JudgeAccuracy(int(random.binomial(47, sensitivity)), 47, int(random.binomial(88, specificity)), 88)
        rate = rogan_gladen(count, n, accuracy)
        assert rate is not None
        covered += rate.low <= share <= rate.high
    # The standard error of 95% from 1000 is 0.7 points; the method errs to the safe side at the ends.
    assert 0.93 <= covered / 1000 <= 0.995
