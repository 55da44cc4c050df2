"""The familiar search: what it draws, what it measures, and that it goes on where it was killed."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import direction_from_vectors, mean_difference_per_layer
from remove_refusals.errors import DirectionError, ModelError, NumericalError, OutputError, PromptError
from remove_refusals.measure.judges.labels import Label
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.types import ModelMap
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.search.candidates import Selection, by_rule, hypervolume
from remove_refusals.search.references import References, confirm, references
from remove_refusals.settings import AnswerSettings, Rule
from remove_refusals.types import Direction, DirectionOrigin, PromptSet

ANSWERS = AnswerSettings(max_new_tokens=12, kl_tokens=1)
# A seed with which trials differ in what they free: the demo model, without layer 0, mostly refuses on.
SETTINGS = TpeSettings(n_trials=6, n_startup_trials=2, seed=23)


class Killed(BaseException):
    """Ends a search as a signal would."""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def model_map(loaded: LoadedModel) -> ModelMap:
    return map_model(loaded.model)


@pytest.fixture(scope="module")
def directions(loaded: LoadedModel) -> tuple[Direction, ...]:
    sets = (draw(embedded_prompts(name), 16, 0) for name in ("harmful_train", "harmless_train"))
    return mean_difference_per_layer(*(collect_activations(loaded, part) for part in sets))


@pytest.fixture(scope="module")
def harmful(loaded: LoadedModel) -> References:
    return references(loaded, draw(embedded_prompts("harmful_test"), 8, 0), ANSWERS)


@pytest.fixture(scope="module")
def harmless(loaded: LoadedModel) -> References:
    return references(loaded, draw(embedded_prompts("harmless_test"), 8, 0), ANSWERS)


class Search:
    """A search on the demo model with everything given but what a test is about."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __call__(self, settings: TpeSettings = SETTINGS, rule: Rule | None = None, **more: Any) -> Selection:
        return select_tpe(*self.given, settings, rule=rule or Rule(), answers=ANSWERS, **more)


@pytest.fixture(scope="module")
def search(
    loaded: LoadedModel,
    model_map: ModelMap,
    directions: tuple[Direction, ...],
    harmful: References,
    harmless: References,
) -> Search:
    return Search(loaded, model_map, directions, harmful, harmless)


@pytest.fixture(scope="module")
def undisturbed(search: Search) -> Selection:
    return search()


def content(selection: Selection) -> list[dict[str, Any]]:
    return [candidate.to_json() for candidate in selection.candidates]


def test_the_same_seed_gives_the_same_candidates_and_another_seed_others(
    search: Search, undisturbed: Selection
) -> None:
    assert [candidate.name for candidate in undisturbed.candidates] == [f"trial {n}" for n in range(1, 7)]
    assert content(search()) == content(undisturbed)
    other = content(search(TpeSettings(2, 2, seed=4)))
    assert not any(record["strengths"] == own["strengths"] for record in other for own in content(undisturbed))


def test_every_trial_draws_other_parameters(undisturbed: Selection) -> None:
    drawn = {json.dumps(record["strengths"]) for record in content(undisturbed)}
    assert len(drawn) == len(undisturbed.candidates)


def test_a_search_killed_between_trials_goes_on_as_if_it_had_not_been(
    search: Search, undisturbed: Selection, tmp_path: Path
) -> None:
    seen = []

    def kill(candidate: object) -> None:
        seen.append(candidate)
        if len(seen) == 3:
            raise Killed

    with pytest.raises(Killed):
        search(journal=tmp_path / "journal", on_trial=kill)
    added: list[str] = []
    found = search(journal=tmp_path / "journal", on_trial=lambda candidate: added.append(candidate.name))
    assert content(found) == content(undisturbed)
    assert found.picked == undisturbed.picked
    assert added == ["trial 4", "trial 5", "trial 6"]


def test_a_search_killed_within_a_trial_draws_it_anew(search: Search, undisturbed: Selection, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        assert total == 6 * 16
        if done == 3 * 16 + 8:
            raise Killed

    journal = tmp_path / "journal"
    with pytest.raises(Killed):
        search(journal=journal, on_progress=kill)
    # A kill may also leave half a line.
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "wor')
    assert content(search(journal=journal)) == content(undisturbed)


def test_the_time_being_up_ends_a_search_after_the_trial_that_runs(
    search: Search, undisturbed: Selection, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    first = search(journal=journal, deadline_s=0.0)
    assert content(first) == content(undisturbed)[:1]
    assert first.notes[0] == "The time was up after 1 of 6 trials."
    # All that is there counts: no further trial is begun.
    assert content(search(journal=journal, deadline_s=0.0)) == content(first)
    assert content(search(journal=journal)) == content(undisturbed)


def test_a_finished_search_is_read_and_not_run(search: Search, undisturbed: Selection, tmp_path: Path) -> None:
    search(journal=tmp_path / "journal")
    added: list[object] = []
    assert content(search(journal=tmp_path / "journal", on_trial=added.append)) == content(undisturbed)
    assert added == []


def test_another_search_in_the_same_journal_is_left_alone(
    search: Search, undisturbed: Selection, tmp_path: Path
) -> None:
    search(journal=tmp_path / "journal")
    search(TpeSettings(2, 2, seed=4), journal=tmp_path / "journal")
    assert content(search(journal=tmp_path / "journal")) == content(undisturbed)


def test_the_pick_is_the_rules(search: Search, undisturbed: Selection) -> None:
    for rule in (Rule(), Rule(max_kl=0.05), Rule(max_refusals=0.5)):
        found = search(rule=rule)
        points = [(candidate.refusal, candidate.damage) for candidate in found.candidates]
        assert found.picked == by_rule(points, rule)[0]
        assert (found.method, found.rule) == ("tpe", rule)


def test_a_trial_counts_what_a_confirmation_counts(
    loaded: LoadedModel, model_map: ModelMap, harmful: References, harmless: References, undisturbed: Selection
) -> None:
    assert len({candidate.refusal for candidate in undisturbed.candidates}) > 1
    answered = harmless.only(Label.COMPLIANCE)
    assert len(answered) == len(harmless)
    for candidate in undisturbed.candidates:
        found = confirm(loaded, candidate.intervention, model_map, harmful, harmless, ANSWERS)
        assert candidate.refusal == found.refusals.value
        assert found.damage is not None
        assert candidate.damage == pytest.approx(found.damage.value, rel=1e-4, abs=1e-6)


def test_where_the_base_does_not_fit_in_memory_the_damage_is_the_same(
    search: Search, undisturbed: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpe, "_MOST_KEPT", 1)
    for candidate, before in zip(search().candidates, undisturbed.candidates, strict=True):
        assert candidate.damage == pytest.approx(before.damage, rel=1e-4, abs=1e-6)


def test_weights_follow_the_kernel() -> None:
    kernel = Kernel(max_weight=1.4, position=3.5, min_weight=0.2, distance=2.0)
    expected = [0.0, 0.0, 1.4 - 1.2 * 0.75, 1.4 - 1.2 * 0.25, 1.4 - 1.2 * 0.25, 1.4 - 1.2 * 0.75, 0.0]
    assert [kernel.weight(layer) for layer in range(7)] == pytest.approx(expected)
    edge = Kernel(max_weight=1.0, position=2.0, min_weight=0.5, distance=1.0)
    assert [edge.weight(layer) for layer in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("n_layers", [1, 2, 11])
def test_what_is_drawn_keeps_its_ranges_and_fills_them(n_layers: int) -> None:
    last = n_layers - 1
    trials = Trials(None, "search", n_layers=n_layers, n_harmful=1, seed=0, n_random=60, multivariate=True)
    drawn = []
    for _ in range(60):
        trial, parameters = trials.ask()
        trials.tell(trial, Scores(0, 0, 0.0))
        drawn.append(parameters)
    kernels = [kernel for parameters in drawn for kernel in (parameters.attn, parameters.mlp)]
    ranges = [
        ([kernel.max_weight for kernel in kernels], 0.8, 1.5),
        ([kernel.position for kernel in kernels], 0.6 * last, last),
        ([kernel.min_weight / kernel.max_weight for kernel in kernels], 0, 1),
        ([kernel.distance for kernel in kernels], 1, max(1, 0.6 * last)),
        ([parameters.direction_index for parameters in drawn], 0.4 * last, 0.9 * last),
    ]
    for values, low, high in ranges:
        assert low <= min(values) <= low + 0.1 * (high - low)
        assert high >= max(values) >= high - 0.1 * (high - low)
    assert {parameters.scope for parameters in drawn} == {"global", "per layer"}
    assert trials.finished() == tuple(Outcome(parameters, Scores(0, 0, 0.0)) for parameters in drawn)


def searched_area(seed: int, n_random: int, multivariate: bool) -> float:
    """Search with two objectives that cost each other, without a model; the area that the trials beat."""
    trials = Trials(None, "search", n_layers=21, n_harmful=100, seed=seed, n_random=n_random, multivariate=multivariate)
    points = []
    for _ in range(90):
        trial, drawn = trials.ask()
        refused = round(100 * min(1.0, abs(drawn.attn.position - 14) / 8 + abs(drawn.mlp.max_weight - 1.4)))
        damage = abs(drawn.mlp.position - 18) / 8 + drawn.mlp.max_weight / 4 + (drawn.scope == "global")
        trials.tell(trial, Scores(refused, 0, damage))
        points.append((refused / 100, damage))
    return hypervolume(points, (1.0, 1.0))


@pytest.mark.parametrize("multivariate", [True, False])
def test_learning_from_the_trials_beats_random_ones(multivariate: bool) -> None:
    learned, random = (sum(searched_area(seed, n, multivariate) for seed in range(3)) for n in (30, 90))
    assert learned > random


@pytest.mark.parametrize("scope", ["global", "per layer"])
def test_an_intervention_takes_the_scopes_directions(
    scope: Any, model_map: ModelMap, directions: tuple[Direction, ...]
) -> None:
    attn, mlp = Kernel(1.0, 4.0, 0.5, 1.0), Kernel(1.5, 5.0, 0.0, 2.0)
    intervention = build(Parameters(scope, 2.25, attn, mlp), directions, model_map)
    edits = {(edit.kind, edit.layer): edit for edit in intervention.edits}
    strengths = {key: edit.strength for key, edit in edits.items()}
    assert strengths == {
        ("attn", 3): 0.5,
        ("attn", 4): 1.0,
        ("attn", 5): 0.5,
        ("mlp", 4): 0.75,
        ("mlp", 5): 1.5,
    }
    mixed = 0.75 * directions[2].basis + 0.25 * directions[3].basis
    for (_, layer), edit in edits.items():
        expected = mixed / mixed.norm() if scope == "global" else directions[layer].basis
        assert torch.allclose(intervention.directions[edit.direction].basis, expected, atol=1e-6)


def test_an_index_on_a_layer_is_that_layers_direction(directions: tuple[Direction, ...]) -> None:
    for index in (0, 3, len(directions) - 1):
        assert torch.allclose(interpolated(directions, float(index)).basis, directions[index].basis, atol=1e-6)


@contextmanager
def broken(loaded: LoadedModel, when: list[bool]) -> Iterator[None]:
    """A model whose logits are not finite at times."""
    handle = loaded.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: output * float("nan") if when[-1] else output
    )
    try:
        yield
    finally:
        handle.remove()


def test_a_trial_without_finite_logits_is_passed_over(loaded: LoadedModel, search: Search, tmp_path: Path) -> None:
    when = [False]

    def note(done: int, total: int) -> None:
        when.append(done // 16 == 1)

    with broken(loaded, when):
        found = search(TpeSettings(3, 1, seed=23), journal=tmp_path / "journal", on_progress=note)
    assert [candidate.name for candidate in found.candidates] == ["trial 1", "trial 3"]
    assert "1 of 3 trials gave logits that are not finite." in found.notes
    assert content(search(TpeSettings(3, 1, seed=23), journal=tmp_path / "journal")) == content(found)


def test_a_search_in_which_no_trial_is_finite_says_so(loaded: LoadedModel, search: Search) -> None:
    when = [False]
    with broken(loaded, when), pytest.raises(NumericalError, match="None of 3 trials"):
        search(TpeSettings(3, 1), on_progress=lambda done, total: when.append(True))


def test_what_does_not_fit_is_refused(
    loaded: LoadedModel,
    model_map: ModelMap,
    directions: tuple[Direction, ...],
    harmful: References,
    harmless: References,
    search: Search,
    tmp_path: Path,
) -> None:
    with pytest.raises(DirectionError, match="each of 6 layers"):
        Search(loaded, model_map, directions[1:], harmful, harmless)()
    wide = direction_from_vectors(torch.eye(128)[:, :2], DirectionOrigin("given"))
    with pytest.raises(DirectionError, match="1 column"):
        Search(loaded, model_map, (wide,) * 6, harmful, harmless)()
    none = References(PromptSet("harmful", (), "test"), (), (), ())
    with pytest.raises(PromptError, match="0 harmful and 8 harmless"):
        Search(loaded, model_map, directions, none, harmless)()
    with pytest.raises(ModelError, match="n_trials is 0"):
        search(TpeSettings(n_trials=0))
    with pytest.raises(OutputError, match="nowhere"):
        search(journal=tmp_path / "nowhere" / "journal")
    (tmp_path / "text").write_text("A text\nof two lines\n")
    with pytest.raises(OutputError, match="text"):
        search(journal=tmp_path / "text")


def test_without_optuna_the_message_names_the_extra(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModelError, match=r"pip install 'remove-refusals\[search\]'"):
        search()
