"""Candidates, their front and the rule; a model's own answers and what a candidate does to them."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from own_answers import own_answers
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import mean_difference
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import PromptError
from remove_refusals.measure import answer_match, wilson_rate
from remove_refusals.measure.answers import Answered
from remove_refusals.measure.judges import Label
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.progress import Progress
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.search.candidates import Candidate, by_rule, front
from remove_refusals.search.confirming import Confirming, _shortfall, confirm
from remove_refusals.settings import ChatFormat, MeasureSettings, Rule
from remove_refusals.types import Direction, PromptSet

SETTINGS = MeasureSettings(max_new_tokens=40, kl_tokens=4)

# Small integers collide often, which is where ties are got wrong.
INTEGERS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12)
NUMBERS = st.floats(0, 10, allow_nan=False)
POINTS = INTEGERS | st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12)
LIMITS = st.none() | st.integers(0, 8)


def no_worse(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1]


@given(POINTS)
def test_no_point_beats_one_on_the_front(points: list[tuple[float, float]]) -> None:
    for index in front(points):
        assert not any(point != points[index] and no_worse(point, points[index]) for point in points)


@given(POINTS)
def test_every_point_off_the_front_is_beaten_by_one_on_it_or_equals_an_earlier_one(
    points: list[tuple[float, float]],
) -> None:
    on_front = front(points)
    for index in set(range(len(points))) - set(on_front):
        equal = [other for other in on_front if points[other] == points[index]]
        assert any(no_worse(points[other], points[index]) for other in on_front)
        assert all(other < index for other in equal)


@given(POINTS)
def test_along_the_front_damage_rises_and_refusal_falls(points: list[tuple[float, float]]) -> None:
    for one, other in itertools.pairwise(points[index] for index in front(points)):
        assert one[1] < other[1]
        assert one[0] > other[0]


@given(POINTS, LIMITS, LIMITS)
def test_a_rule_puts_the_front_in_an_order(
    points: list[tuple[float, float]], max_kl: int | None, max_refusals: int | None
) -> None:
    assert sorted(by_rule(points, Rule.model_construct(max_kl=max_kl, max_refusals=max_refusals))) == sorted(
        front(points)
    )


@given(POINTS.filter(bool), st.integers(0, 8))
def test_under_a_limit_of_damage_the_pick_has_the_fewest_refusals(points: list[tuple[float, float]], most: int) -> None:
    refusal, damage = points[by_rule(points, Rule(max_kl=most))[0]]
    within = [point for point in points if point[1] <= most]
    if within:
        assert damage <= most
        assert refusal == min(point[0] for point in within)
    else:
        assert damage == min(point[1] for point in points)


@given(POINTS.filter(bool), st.integers(0, 8))
def test_under_a_limit_of_refusals_the_pick_has_the_least_damage(points: list[tuple[float, float]], most: int) -> None:
    refusal, damage = points[by_rule(points, Rule.model_construct(max_refusals=most))[0]]
    within = [point for point in points if point[0] <= most]
    if within:
        assert refusal <= most
        assert damage == min(point[1] for point in within)
    else:
        assert refusal == min(point[0] for point in points)


@given(POINTS.filter(bool), st.integers(0, 8), st.integers(0, 8))
def test_where_both_limits_can_be_kept_they_are(
    points: list[tuple[float, float]], max_kl: int, max_refusals: int
) -> None:
    refusal, damage = points[by_rule(points, Rule.model_construct(max_kl=max_kl, max_refusals=max_refusals))[0]]
    if any(point[0] <= max_refusals and point[1] <= max_kl for point in points):
        assert refusal <= max_refusals
        assert damage <= max_kl


def test_the_knee_of_a_convex_front_is_where_it_bends() -> None:
    bent = [(1.0, 0.0), (0.5, 0.1), (0.1, 0.2), (0.05, 0.9), (0.0, 1.0), (1.0, 1.0)]
    assert by_rule(bent, Rule())[0] == 2


@given(st.integers(3, 30), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_knee_of_a_quarter_circle_is_its_middle_in_any_units(n: int, height: float, width: float) -> None:
    steps = [index / (2 * n) for index in range(2 * n + 1)]
    points = [(height * (1 - (1 - (1 - step) ** 2) ** 0.5), width * (1 - (1 - step**2) ** 0.5)) for step in steps]
    best = by_rule(points, Rule())[0]
    # On 1 - circle the distance to the line of the ends is largest where both coordinates are equal.
    assert abs(points[best][0] / height - points[best][1] / width) < 3 / n


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(), "the knee of the front"),
        (Rule(max_kl=0.25), "fewest refusals at a KL of at most 0.25"),
        (Rule(max_refusals=0.05), "least damage with refusals at most 0.05"),
        (
            Rule(max_kl=0.25, max_refusals=0.05),
            "least damage with refusals at most 0.05, if possible at a KL of at most 0.25",
        ),
        (Rule(max_kl=0, max_refusals=0), "least damage with refusals at most 0, if possible at a KL of at most 0"),
    ],
)
def test_a_rule_says_what_it_does(rule: Rule, words: str) -> None:
    assert str(rule) == words


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def harmful(loaded: LoadedModel) -> Answered:
    return own_answers(loaded, draw(embedded_prompts("harmful_test"), 12, 0), SETTINGS.max_new_tokens)


@pytest.fixture(scope="module")
def harmless(loaded: LoadedModel) -> Answered:
    # The demo model refuses some of these, as a lesson.
    alarming = draw(embedded_prompts("harmless_alarming"), 10, 0)
    plain = draw(embedded_prompts("harmless_test"), 6, 0)
    return own_answers(loaded, PromptSet("harmless", plain.prompts + alarming.prompts, "test"), SETTINGS.max_new_tokens)


@pytest.fixture(scope="module")
def direction(loaded: LoadedModel) -> Direction:
    sets = (draw(embedded_prompts(name), 16, 0) for name in ("harmful_train", "harmless_train"))
    return mean_difference(*(collect_activations(loaded, part) for part in sets))


def n_layers(loaded: LoadedModel) -> int:
    return map_model(loaded.model).n_layers


def test_references_are_the_models_own_answers_with_their_labels(loaded: LoadedModel, harmful: Answered) -> None:
    assert list(harmful.answers) == generate(loaded, harmful.token_ids, max_new_tokens=SETTINGS.max_new_tokens)
    assert harmful.labels.count(Label.REFUSAL) >= 11


def test_references_of_one_label_keep_what_belongs_together(harmless: Answered) -> None:
    parts = [harmless.only(label) for label in Label]
    assert 0 < len(harmless.only(Label.REFUSAL)) < len(harmless)
    rows = [
        set(zip(part.prompts.prompts, part.token_ids, part.answers, part.labels, strict=True))
        for part in (harmless, *parts)
    ]
    assert rows[0] == rows[1] | rows[2] | rows[3]
    assert all(set(part.labels) <= {label} for part, label in zip(parts, Label, strict=True))


def test_references_render_with_the_chat_format(loaded: LoadedModel) -> None:
    prompts = PromptSet("one", ("Fly a kite",), "test")
    plain, asked = (
        own_answers(dataclasses.replace(loaded, chat=chat), prompts, 2)
        for chat in (ChatFormat(plain=True), ChatFormat())
    )
    assert len(plain.token_ids[0]) < len(asked.token_ids[0])
    with pytest.raises(PromptError):
        own_answers(dataclasses.replace(loaded, chat=ChatFormat(plain=True, system_prompt="Be kind.")), prompts, 2)


def test_a_full_edit_frees_and_is_confirmed(
    loaded: LoadedModel, direction: Direction, harmful: Answered, harmless: Answered
) -> None:
    done: list[tuple[int, int]] = []
    intervention = intervene(direction, n_layers(loaded))
    told = Progress(lambda name, n, total: done.append((n, total))).stage("confirming", 28)
    found = confirm(Confirming(loaded, harmful, harmless, SETTINGS), intervention, told)
    assert (found.refusals.n, found.false_refusals.n) == (len(harmful), len(harmless))
    assert found.refusals.count <= 2
    assert found.moralising is not None and found.moralising_harmless is not None
    failures = found.refusals.count + found.moralising.count + found.degenerate.count
    assert found.failures == failures / len(harmful)
    assert found.false_refusals.count < harmless.labels.count(Label.REFUSAL)
    assert found.damage is not None
    assert found.damage.n == harmless.labels.count(Label.COMPLIANCE)
    assert 0 < found.damage.value < 0.5
    assert done == [(len(harmful), 28), (len(harmful) + len(harmless), 28)]
    with ablated(loaded.model, intervention):
        again = own_answers(loaded, harmful.prompts, SETTINGS.max_new_tokens)
    assert again.labels.count(Label.REFUSAL) == found.refusals.count
    assert again.labels.count(Label.DEGENERATE) == found.degenerate.count
    assert (found.match, found.match_of_base) == tuple(answer_match(loaded, again, harmless, by_words=True))
    # Answers to other prompts would match at 0.15; words alone miss some that are right.
    assert found.match is not None and found.match.value > 0.6


def test_answers_to_other_questions_are_no_success(
    loaded: LoadedModel, direction: Direction, harmful: Answered, harmless: Answered
) -> None:
    on, intervention = Confirming(loaded, harmful, harmless, SETTINGS), intervene(direction, n_layers(loaded))
    found, candidate = confirm(on, intervention), Candidate("one", intervention, 0.0, 0.0)
    assert _shortfall(candidate, found, on, 0.2) is None
    foreign = found.model_copy(update={"match": wilson_rate(1, 12, "0")})
    n = harmless.labels.count(Label.COMPLIANCE)
    said = f"1 of 12 answers to harmful prompts match their prompts, and {n} of {n} of the model's own to harmless ones"
    assert _shortfall(candidate, foreign, on, 0.2) == said
    assert foreign.failures == pytest.approx(11 / 12)


def test_strength_0_confirms_what_the_base_does(
    loaded: LoadedModel, direction: Direction, harmful: Answered, harmless: Answered
) -> None:
    intervention = intervene(direction, n_layers(loaded), strength=0.0)
    found = confirm(Confirming(loaded, harmful, harmless, SETTINGS), intervention)
    assert found.refusals.count == harmful.labels.count(Label.REFUSAL)
    assert found.degenerate.count == harmful.labels.count(Label.DEGENERATE)
    assert found.false_refusals.count == harmless.labels.count(Label.REFUSAL)
    assert found.degenerate_harmless.count == harmless.labels.count(Label.DEGENERATE)
    assert found.broken is not None
    assert found.broken.count == 0
    assert found.damage is not None
    assert found.damage.value == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_measured_is_absent(
    loaded: LoadedModel, direction: Direction, harmful: Answered, harmless: Answered
) -> None:
    refused = harmless.only(Label.REFUSAL)
    found = confirm(Confirming(loaded, harmful, refused, SETTINGS), intervene(direction, n_layers(loaded)))
    assert found.damage is None
    assert found.broken is None
    names = {"refusals", "moralising", "degenerate", "match"}
    assert set(found.to_json()) == {*names, "false_refusals", "moralising_harmless", "degenerate_harmless"}
