import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from remove_refusals.errors import NumericalError
from remove_refusals.measure.answers import kl_divergence
from remove_refusals.measure.statistics import mcnemar, mean_with_interval, perplexity, wilson_rate

SHA = "0" * 64
COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
FLOATS = st.lists(st.floats(0, 100), min_size=1, max_size=30)


def wilson_by_formula(count: int, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    p = count / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return center - half, center + half


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_against_published_values(count: int, n: int, low: float, high: float) -> None:
    rate = wilson_rate(count, n, SHA)
    assert rate is not None
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)
    assert rate.to_json() == {
        "value": count / n,
        "count": count,
        "n": n,
        "low": rate.low,
        "high": rate.high,
        "prompts_sha256": SHA,
    }


@given(COUNTS)
def test_wilson_holds_the_rate_and_the_formula(counts: tuple[int, int]) -> None:
    rate = wilson_rate(*counts, SHA)
    assert rate is not None
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high
    np.testing.assert_allclose((rate.low, rate.high), wilson_by_formula(*counts), atol=1e-9)


@given(COUNTS)
def test_wilson_mirrors(counts: tuple[int, int]) -> None:
    count, n = counts
    rate, other = wilson_rate(count, n, SHA), wilson_rate(n - count, n, SHA)
    assert rate is not None and other is not None
    assert rate.low == pytest.approx(1 - other.high, abs=1e-9)


def test_what_was_not_measured_is_absent() -> None:
    assert wilson_rate(0, 0, SHA) is None
    assert mcnemar([], []) is None
    assert mean_with_interval([], SHA) is None
    assert perplexity([], [], SHA) is None


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(10, 0, 2 / 1024), (0, 5, 2 / 32), (3, 1, 2 * (1 + 4) / 16), (4, 4, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p_value: float) -> None:
    first = [True] * only_first + [False] * only_second + [True] * 7 + [False] * 2
    second = [False] * only_first + [True] * only_second + [True] * 7 + [False] * 2
    test = mcnemar(first, second)
    assert test is not None
    assert (test.only_first, test.only_second, test.n) == (only_first, only_second, only_first + only_second + 9)
    assert test.p_value == pytest.approx(p_value)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_swaps_and_ignores_order(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    test, swapped, backwards = mcnemar(first, second), mcnemar(second, first), mcnemar(first[::-1], second[::-1])
    assert test is not None and swapped is not None
    assert (swapped.only_first, swapped.only_second) == (test.only_second, test.only_first)
    assert swapped.p_value == pytest.approx(test.p_value)
    assert test == backwards
    assert 0 < test.p_value <= 1


def test_mcnemar_needs_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


@settings(deadline=None)
@given(FLOATS, st.integers(0, 5))
def test_mean_interval_holds_the_range_and_the_seed_fixes_it(values: list[float], seed: int) -> None:
    mean = mean_with_interval(values, SHA, seed=seed)
    assert mean is not None
    assert mean.value == pytest.approx(sum(values) / len(values))
    assert min(values) - 1e-9 <= mean.low <= mean.high <= max(values) + 1e-9
    assert mean == mean_with_interval(values, SHA, seed=seed)
    assert (mean.n, mean.seed) == (len(values), seed)


def test_mean_interval_comes_near_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    mean = mean_with_interval(values, SHA)
    assert mean is not None
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert mean.low == pytest.approx(mean.value - half, abs=0.03)
    assert mean.high == pytest.approx(mean.value + half, abs=0.03)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    with pytest.raises(NumericalError, match="prompt 2 of 3"):
        mean_with_interval([0.0, value, 1.0], SHA)
    with pytest.raises(NumericalError, match="prompt 2 of 3"):
        perplexity([0.0, value, 1.0], [1, 1, 1], SHA)


def test_perplexity_weighs_tokens_not_prompts() -> None:
    found = perplexity([math.log(8), 0.0], [1, 2], SHA)
    assert found is not None
    assert found.value == pytest.approx(2.0)  # the cube root of 8
    assert (found.n, found.n_tokens) == (2, 3)
    assert found.low == pytest.approx(1.0) and found.high == pytest.approx(8.0)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    found = perplexity([7 * math.log(50), 3 * math.log(50)], [7, 3], SHA)
    assert found is not None
    assert [found.value, found.low, found.high] == pytest.approx([50.0] * 3)


def test_perplexity_beyond_floats_is_refused() -> None:
    with pytest.raises(NumericalError, match="destroyed"):
        perplexity([1000.0], [1], SHA)


LOGITS = st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=1, max_size=4)


@given(LOGITS, LOGITS, st.sampled_from([torch.float32, torch.float64]))
def test_kl_is_never_negative_and_equals_scipy(first: list[list[float]], other: list[list[float]], dtype) -> None:
    n = min(len(first), len(other))
    log_p, log_q = (torch.tensor(rows[:n], dtype=dtype).log_softmax(-1) for rows in (first, other))
    found = kl_divergence(log_p, log_q)
    assert found.dtype == dtype and found.shape == (n,)
    assert bool((found >= 0).all())
    expected = entropy(log_p.double().exp().numpy(), log_q.double().exp().numpy(), axis=1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4 if dtype == torch.float32 else 1e-9)


@given(LOGITS)
def test_kl_of_a_distribution_with_itself_is_zero(rows: list[list[float]]) -> None:
    log_p = torch.tensor(rows).log_softmax(-1)
    assert kl_divergence(log_p, log_p).tolist() == [0.0] * len(rows)


def test_kl_by_hand_and_at_zero_probabilities() -> None:
    half = torch.tensor([[0.5, 0.5, 0.0]]).log()
    skew = torch.tensor([[0.25, 0.75, 0.0]]).log()
    assert kl_divergence(half, skew).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(torch.tensor([[1.0, 0.0, 0.0]]).log(), half).item() == pytest.approx(math.log(2))
    assert kl_divergence(half, torch.tensor([[1.0, 0.0, 0.0]]).log()).item() == math.inf
