"""The yardstick of the searches: what it draws, what it measures, that it goes on where it was killed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from own_answers import own_answers
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import mean_difference_per_layer
from remove_refusals.errors import NumericalError, OutputError
from remove_refusals.measure.answers import Answered
from remove_refusals.measure.judges import Label
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.progress import Progress
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.search.candidates import Candidate
from remove_refusals.search.confirming import Confirming, confirm
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import Direction

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import distributed
import tpe
from tpe import (
    Kernel,
    Outcome,
    Parameters,
    Scores,
    TpeSettings,
    Trials,
    build,
    interpolated,
    search_trials,
)

N_TOKENS = 12
# A seed with which trials differ in what they free: the demo model, without layer 0, mostly refuses on.
SETTINGS = TpeSettings(n_trials=6, n_startup_trials=2, seed=23)


class Killed(BaseException):
    """Ends a search as a signal would."""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def directions(loaded: LoadedModel) -> tuple[Direction, ...]:
    sets = (draw(embedded_prompts(name), 16, 0) for name in ("harmful_train", "harmless_train"))
    return mean_difference_per_layer(*(collect_activations(loaded, part) for part in sets))


@pytest.fixture(scope="module")
def own(loaded: LoadedModel) -> tuple[Answered, Answered]:
    sets = (draw(embedded_prompts(name), 8, 0) for name in ("harmful_test", "harmless_test"))
    harmful, harmless = (own_answers(loaded, part, N_TOKENS) for part in sets)
    return harmful, harmless


class Search:
    """A search on the demo model with everything given but what a test is about."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __call__(self, settings: TpeSettings = SETTINGS, **more: Any) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
        return search_trials(*self.given, settings, N_TOKENS, **more)


@pytest.fixture(scope="module")
def search(loaded: LoadedModel, directions: tuple[Direction, ...], own: tuple[Answered, Answered]) -> Search:
    return Search(loaded, directions, *own)


@pytest.fixture(scope="module")
def undisturbed(search: Search) -> tuple[Candidate, ...]:
    return search()[0]


def content(candidates: tuple[Candidate, ...]) -> list[dict[str, Any]]:
    return [candidate.record().to_json() for candidate in candidates]


def test_the_seed_and_the_trials_before_decide_what_is_drawn(
    search: Search, undisturbed: tuple[Candidate, ...]
) -> None:
    assert [candidate.name for candidate in undisturbed] == [f"trial {n}" for n in range(1, 7)]
    assert len({json.dumps(record["strengths"]) for record in content(undisturbed)}) == 6
    other = content(search(TpeSettings(2, 2, seed=4))[0])
    assert not any(record["strengths"] == one["strengths"] for record in other for one in content(undisturbed))


def test_a_killed_search_goes_on_as_if_it_had_not_been(
    search: Search, undisturbed: tuple[Candidate, ...], tmp_path: Path
) -> None:
    def kill(name: str, done: int, total: int) -> None:
        assert (name, total) == ("trials", 6 * 8)
        if done == 4 * 8:
            raise Killed

    journal = tmp_path / "journal"
    with pytest.raises(Killed):
        search(journal=journal, progress=Progress(kill))
    # A kill may also leave half a line.
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "wor')
    first, notes = search(journal=journal, deadline_s=0.0)
    assert content(first) == content(undisturbed)[:3]
    assert notes == ("The time was up after 3 of 6 trials.",)
    assert content(search(journal=journal)[0]) == content(undisturbed)


def test_a_trial_counts_what_a_confirmation_counts(
    loaded: LoadedModel, own: tuple[Answered, Answered], undisturbed: tuple[Candidate, ...]
) -> None:
    assert len({candidate.refusal for candidate in undisturbed}) > 1
    assert len(own[1].only(Label.COMPLIANCE)) == len(own[1])
    for candidate in undisturbed:
        found = confirm(
            Confirming(loaded, *own, MeasureSettings(max_new_tokens=N_TOKENS, kl_tokens=1)), candidate.intervention
        )
        assert candidate.refusal == found.refusals.value
        assert found.damage is not None
        assert candidate.damage == pytest.approx(found.damage.value, rel=1e-4, abs=1e-6)


def test_a_trial_without_finite_logits_is_passed_over(
    loaded: LoadedModel, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = loaded.model.get_output_embeddings().register_forward_hook(lambda *given: given[-1] * float("nan"))
    try:
        with pytest.raises(NumericalError, match="None of 2 trials"):
            search(TpeSettings(2, 1))
    finally:
        handle.remove()
    scores = iter([Scores(1, 0, 0.1), None, Scores(2, 0, 0.1)])
    monkeypatch.setattr(tpe, "tried", lambda *_: next(scores))
    candidates, notes = search(TpeSettings(3, 1))
    assert [candidate.name for candidate in candidates] == ["trial 1", "trial 3"]
    assert notes == ("1 of 3 trials gave logits that are not finite.",)


def test_weights_follow_the_kernel() -> None:
    kernel = Kernel(max_weight=1.4, position=3.5, min_weight=0.2, distance=2.0)
    expected = [0.0, 0.0, 1.4 - 1.2 * 0.75, 1.4 - 1.2 * 0.25, 1.4 - 1.2 * 0.25, 1.4 - 1.2 * 0.75, 0.0]
    assert [kernel.weight(layer) for layer in range(7)] == pytest.approx(expected)


@pytest.mark.parametrize("n_layers", [1, 2, 11])
def test_what_is_drawn_keeps_its_ranges_and_fills_them(n_layers: int) -> None:
    last = n_layers - 1
    trials = Trials(None, "search", n_layers, 1, TpeSettings(n_trials=180))
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


@pytest.mark.parametrize("scope", ["global", "per layer"])
def test_an_intervention_takes_the_scopes_directions(
    scope: Any, loaded: LoadedModel, directions: tuple[Direction, ...]
) -> None:
    attn, mlp = Kernel(1.0, 4.0, 0.5, 1.0), Kernel(1.5, 5.0, 0.0, 2.0)
    intervention = build(Parameters(scope, 2.25, attn, mlp), directions, loaded)
    edits = {(edit.kind, edit.layer): edit for edit in intervention.edits}
    strengths = {key: edit.strength for key, edit in edits.items()}
    assert strengths == {("attn", 3): 0.5, ("attn", 4): 1.0, ("attn", 5): 0.5, ("mlp", 4): 0.75, ("mlp", 5): 1.5}
    mixed = 0.75 * directions[2].basis + 0.25 * directions[3].basis
    for (_, layer), edit in edits.items():
        expected = mixed / mixed.norm() if scope == "global" else directions[layer].basis
        assert torch.allclose(intervention.directions[edit.direction].basis, expected, atol=1e-6)
    assert torch.allclose(interpolated(directions, 5.0).basis, directions[5].basis, atol=1e-6)


def test_what_spreading_a_model_costs_is_measured_on_any_device(tmp_path: Path) -> None:
    words = ["demo", "-o", str(tmp_path / "found.json"), "--device", "cpu", "--reference", "cpu", "--n-prompts", "2"]
    distributed.main(words)
    found = distributed.Spread.read(tmp_path / "found.json", error=OutputError)
    assert (found.apart, found.same_answers, found.n_processes) == (0.0, 2, 1)
    assert found.devices == ("cpu",) and found.tokens > 0
