import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remove_refusals.errors import NumericalError
from remove_refusals.measure.statistics import McNemar, Verdict, holm, paired_difference, paired_rates, verdict


def test_a_clear_difference_is_decided_both_ways() -> None:
    first = [0.1 * i for i in range(20)]
    second = [value + 1 + 0.01 * i for i, value in enumerate(first)]
    up, down = paired_difference(first, second), paired_difference(second, first)
    assert up is not None and down is not None
    assert up.value == pytest.approx(1.095)
    assert (up.verdict, up.decided) == (Verdict.HIGHER, True)
    assert (down.verdict, down.decided) == (Verdict.LOWER, True)
    assert 1.0 < up.low < up.value < up.high < 1.2
    assert up.to_json()["verdict"] == "higher"
    assert up.to_json()["n"] == 20


def test_few_pairs_and_noise_decide_nothing() -> None:
    few = paired_difference([0.0] * 5, [1.0, 1.1, 1.2, 1.3, 1.4])
    same = paired_difference([1.0] * 50, [1.0] * 50)
    noise = paired_difference([0.0] * 40, [1.0, -1.1] * 20)
    for difference in (few, same, noise):
        assert difference is not None
        assert difference.verdict is Verdict.UNDECIDED
        assert not difference.decided
    assert same is not None and same.p_value == 1.0


def test_the_p_value_is_that_of_all_flips() -> None:
    # Of the 64 ways to flip six equal differences, two are as extreme as the data.
    difference = paired_difference([0.0] * 6, [1.0] * 6)
    assert difference is not None
    assert difference.p_value == pytest.approx(2 / 64, abs=0.015)


def test_the_seed_decides_the_interval() -> None:
    values = [math.sin(i) for i in range(30)]
    runs = [paired_difference([0.0] * 30, values, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_pairs_must_fit_and_be_finite() -> None:
    assert paired_difference([], []) is None
    with pytest.raises(NumericalError, match="2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(NumericalError, match="prompt 2 of 2"):
        paired_difference([1.0, 2.0], [1.0, math.nan])


def test_the_bootstrap_covers_the_truth_and_seldom_finds_what_is_not_there() -> None:
    random = np.random.default_rng(3)
    covered = false = 0
    for seed in range(400):
        truth = 0.0 if seed % 2 else 0.4
        found = paired_difference([0.0] * 60, random.normal(truth, 1.0, 60).tolist(), seed=seed)
        assert found is not None
        covered += found.low <= truth <= found.high
        false += truth == 0 and found.decided
    # The standard errors are 1.1 points of 95% from 400 and 1.5 points of 5% from 200.
    assert 0.91 <= covered / 400 <= 0.98
    assert false / 200 <= 0.095


def test_newcombes_interval_has_its_published_value() -> None:
    # Airway hyper-responsiveness before and after a transplantation (Bentur et al. 2009), the table 1, 1, 7, 12:
    # Fagerland, Lydersen and Laake (2014, Statistics in Medicine 33) give 0.026 to 0.507 and an exact p of 0.070.
    first = [True] * 2 + [False] * 19
    second = [True, False] + [True] * 7 + [False] * 12
    found = paired_rates(first, second)
    assert found is not None
    assert found.value == pytest.approx(6 / 21)
    assert (found.low, found.high) == pytest.approx((0.026, 0.507), abs=5e-4)
    assert found.test.p_value == pytest.approx(0.0703, abs=5e-5)
    assert found.verdict is Verdict.UNDECIDED
    assert (found.to_json()["verdict"], found.decided) == ("undecided", False)


def test_rates_are_decided_by_the_exact_test() -> None:
    # 6 of 6 flips one way has p = 2 / 64, 5 of 5 has 2 / 32.
    lower = paired_rates([True] * 6 + [False] * 4, [False] * 10)
    undecided = paired_rates([True] * 5 + [False] * 4, [False] * 9)
    assert lower is not None and undecided is not None
    assert (lower.verdict, lower.value) == (Verdict.LOWER, pytest.approx(-0.6))
    assert undecided.verdict is Verdict.UNDECIDED
    assert paired_rates([], []) is None
    assert verdict(lower.test) is Verdict.LOWER
    assert verdict(lower.test, p_value=0.06) is Verdict.UNDECIDED
    assert verdict(McNemar(only_first=0, only_second=9, p_value=0.0039, n=20)) is Verdict.HIGHER


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_swapping_the_pair_turns_the_difference_round(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = paired_rates(first, second), paired_rates(second, first)
    assert one is not None and other is not None
    assert one.value == pytest.approx(-other.value)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.low <= one.value <= one.high
    assert one.decided == other.decided


def test_holm_has_its_reference_values() -> None:
    # As R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") gives.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(NumericalError, match=r"p-value 2 of 2 is 1\.5"):
        holm([0.5, 1.5])


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    ranked = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(ranked))
    if p_values:
        assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))
