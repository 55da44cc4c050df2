"""How far apart two sets lie: against a direct count, laws that hold for any states, and the demo model."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import mean_difference
from remove_refusals.directions.separation import MOST_PROMPTS, auroc, auroc_interval, measure_separation, separation
from remove_refusals.errors import DirectionError, NumericalError
from remove_refusals.models.load import load
from remove_refusals.progress import Progress
from remove_refusals.prompts import embedded_prompts
from remove_refusals.report.records import AnalysisRecord
from remove_refusals.types import Activations, PromptSet

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=20)
GROUPS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3)


def sets(shift, *, n=(24, 20), width=6, n_layers=2, seed=0):
    """Normal states; the harmful ones are moved by `shift` along the first coordinate of every layer but the first."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, count in zip(("harmful", "harmless"), n, strict=True):
        hidden = torch.randn(count, 1, n_layers + 1, width, generator=generator)
        hidden[:, :, 0] = 1.0
        if name == "harmful":
            hidden[:, :, 1:, 0] += shift
        found.append(Activations(hidden, (-1,), PromptSet(name, tuple(f"{name} {i}" for i in range(count)), "test")))
    return found


def transformed(parts, function):
    return [Activations(function(part.hidden), part.positions, part.prompts) for part in parts]


# The first example imports scipy.stats.
@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs(positive, negative):
    won = sum((a > b) + (a == b) / 2 for a in positive for b in negative)
    assert auroc(positive, negative) == pytest.approx(won / (len(positive) * len(negative)), abs=1e-12)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_mirrors_and_sees_order_alone(positive, negative):
    assert auroc(positive, negative) == pytest.approx(1 - auroc(negative, positive), abs=1e-12)
    assert auroc([math.exp(x) for x in positive], [math.exp(x) for x in negative]) == auroc(positive, negative)


@given(st.floats(0, 1), GROUPS)
def test_the_interval_solves_its_equation(value, groups):
    low, high = auroc_interval(value, groups)
    assert 0 <= low <= value <= high <= 1 and low < high
    pairs = sum(m * n for m, n in groups)
    for end in (low, high):
        if end in (0, 1):
            continue
        first, second = end / (2 - end), 2 * end**2 / (1 + end)
        spread = 0
        for m, n in groups:
            excess = (m + n) / 2 - 1
            spread += (m * n / pairs) ** 2 * (
                end * (1 - end) + excess * (first - end**2) + excess * (second - end**2)
            ) / (m * n)  # fmt: skip
        assert abs(value - end) == pytest.approx(1.959963984540054 * math.sqrt(spread), rel=1e-4, abs=1e-8)


@given(st.floats(0, 1), GROUPS)
def test_the_interval_mirrors_and_narrows(value, groups):
    low, high = auroc_interval(value, groups)
    np.testing.assert_allclose(auroc_interval(1 - value, groups), (1 - high, 1 - low), atol=1e-6)
    narrow = auroc_interval(value, [(4 * m, 4 * n) for m, n in groups])
    assert narrow[1] - narrow[0] < high - low


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.5), (1.8, 0.8985), (3.0, 0.9831)])
def test_the_interval_covers_what_it_should(shift, expected):
    random = np.random.default_rng(0)
    sizes = [(15, 15), (15, 15)]
    covered = 0
    for _ in range(1500):
        value = np.mean([auroc(random.normal(shift, 1, m), random.normal(0, 1, n)) for m, n in sizes])
        low, high = auroc_interval(float(value), sizes)
        covered += low <= expected <= high
    # Phi(shift / sqrt 2); the method is known to be a little wide near 1.
    assert 0.94 <= covered / 1500 <= 0.995


def test_the_interval_of_a_perfect_score_has_a_width():
    low, high = auroc_interval(1.0, [(30, 30), (30, 30)])
    assert high == 1 and 0.9 < low < 0.97


def test_noise_does_not_separate_however_wide_the_stream():
    parts = sets(0.0, n=(40, 40), width=2000)
    found = separation(*parts)
    in_sample = mean_difference(*parts, layer=1).basis
    scores = [(part.hidden[:, 0, 1] @ in_sample).squeeze(1).numpy() for part in parts]
    assert auroc(*scores) > 0.99
    assert found.layers[1].auroc.low < 0.5 < found.layers[1].auroc.high


def test_layers_against_a_direct_computation():
    parts = sets(2.0)
    found = separation(*parts, seed=5)
    assert [layer.layer for layer in found.layers] == [0, 1, 2]
    for index, layer in enumerate(found.layers):
        states = [part.hidden[:, 0, index].double().numpy() for part in parts]
        difference = states[0].mean(0) - states[1].mean(0)
        assert layer.difference_norm == pytest.approx(np.linalg.norm(difference), abs=1e-9)
        assert layer.norm_harmful == pytest.approx(np.linalg.norm(states[0], axis=1).mean())
        assert layer.norm_harmless == pytest.approx(np.linalg.norm(states[1], axis=1).mean())
        squares = (np.concatenate(states) ** 2).sum(0)
        assert layer.largest_coordinate_share == pytest.approx(squares.max() / squares.sum())
    cuts = [np.random.default_rng(5).permutation(len(part.prompts)) for part in parts]
    halves = [(cut[: len(cut) // 2], cut[len(cut) // 2 :]) for cut in cuts]
    won, pairs = 0.0, 0
    for scored in (0, 1):
        states = [part.hidden[:, 0, 1].double().numpy() for part in parts]
        seen = [state[half[1 - scored]].mean(0) for state, half in zip(states, halves, strict=True)]
        direction = seen[0] - seen[1]
        scores = [state[half[scored]] @ direction for state, half in zip(states, halves, strict=True)]
        won += sum((a > b) + (a == b) / 2 for a in scores[0] for b in scores[1])
        pairs += len(scores[0]) * len(scores[1])
    assert found.layers[1].auroc.value == pytest.approx(won / pairs, abs=1e-12)
    assert found.layers[1].auroc.n_harmful == 24 and found.layers[1].auroc.seed == 5


def test_where_the_token_is_the_same_nothing_is_measured():
    record = AnalysisRecord.made(separation(*sets(2.0))).to_json()
    assert "auroc" not in record["layers"][0] and "projection" not in record["layers"][0]
    assert record["cosines"][0] == [None, None, None] and record["cosines"][1][0] is None
    assert record["cosines"][1][1] == record["cosines"][2][2] == 1
    assert record["cosines"][1][2] == record["cosines"][2][1]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_cosines_against_the_directions():
    parts = sets(2.0, n_layers=3)
    found = separation(*parts).cosines
    for i in (1, 2, 3):
        for j in (1, 2, 3):
            bases = [mean_difference(*parts, layer=index).basis for index in (i, j)]
            assert found[i][j] == pytest.approx(float((bases[0] * bases[1]).sum()), abs=1e-5)


def test_the_picture_holds_what_the_difference_leaves():
    parts = sets(6.0)
    layer = separation(*parts).layers[1]
    points = np.array([*layer.projection.harmful, *layer.projection.harmless])
    assert min(x for x, _ in layer.projection.harmful) > 0 > max(x for x, _ in layer.projection.harmless)
    states = torch.cat([part.hidden[:, 0, 1] for part in parts]).double().numpy()
    states -= states.mean(0)
    unit = mean_difference(*parts, layer=1).basis.double().numpy()
    rest = states - states @ unit @ unit.T
    assert np.linalg.norm(points[:, 1]) == pytest.approx(np.linalg.svd(rest, compute_uv=False)[0], rel=1e-6)
    assert points[np.argmax(np.abs(points[:, 1])), 1] > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_turning_scaling_and_moving_the_stream_changes_no_separation(seed, scale):
    parts = sets(1.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    move = torch.randn(6, generator=generator, dtype=torch.float64)
    plain = separation(*transformed(parts, lambda hidden: hidden.double()))
    turned = separation(*transformed(parts, lambda hidden: scale * (hidden.double() @ turn + move)))
    for before, after in zip(plain.layers[1:], turned.layers[1:], strict=True):
        assert after.auroc == before.auroc
        assert after.difference_norm == pytest.approx(scale * before.difference_norm)
        xs = [[x for x, _ in (*layer.projection.harmful, *layer.projection.harmless)] for layer in (before, after)]
        np.testing.assert_allclose(xs[1], scale * np.array(xs[0]), rtol=1e-6, atol=1e-6 * scale)


def test_swapping_the_sets_turns_the_picture_round():
    parts = sets(1.0, n=(12, 12))
    there, back = separation(*parts), separation(*reversed(parts))
    assert there.layers[1].auroc == back.layers[1].auroc
    np.testing.assert_allclose(
        [x for x, _ in there.layers[1].projection.harmful], [-x for x, _ in back.layers[1].projection.harmless]
    )


def test_too_few_prompts_and_what_is_not_finite():
    with pytest.raises(DirectionError, match="on 1 harmful and 5 harmless prompts"):
        separation(*sets(1.0, n=(1, 5)))
    with pytest.raises(DirectionError, match=r"\(3, 6\) and \(3, 7\)"):
        separation(sets(1.0)[0], sets(1.0, width=7)[1])
    parts = sets(1.0)
    parts[1].hidden[3, 0, 1, 0] = math.nan
    with pytest.raises(NumericalError, match="prompt 3 of set 'harmless' at layer index 1"):
        separation(*parts)


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def test_the_demo_model_tells_harmful_prompts_apart(demo):
    harmful, harmless = embedded_prompts("harmful_test"), embedded_prompts("harmless_test")
    done = []
    found = measure_separation(demo, harmful, harmless, progress=Progress(lambda _, *step: done.append(step)))
    assert done[-1] == (120, 120)
    assert found.layers[0].auroc is None
    assert found.layers[-1].auroc.value > 0.95 and found.layers[-1].auroc.low > 0.85
    collected = [collect_activations(demo, part) for part in (harmful, harmless)]
    again = separation(*collected)
    assert AnalysisRecord.made(again).to_json()["prompts"]["harmful"] == {
        "n": 60, "sha256": harmful.sha256, "ids": list(harmful.ids),
    }  # fmt: skip
    assert [layer.auroc for layer in again.layers] == [layer.auroc for layer in found.layers]


def test_of_large_sets_a_part_is_looked_at(demo):
    harmful = embedded_prompts("harmful_train")
    assert len(harmful) > MOST_PROMPTS
    found = measure_separation(demo, harmful, embedded_prompts("harmless_test"))
    assert [len(part) for part in found.prompts] == [MOST_PROMPTS, 60]
    assert set(found.prompts[0].prompts) < set(harmful.prompts)
