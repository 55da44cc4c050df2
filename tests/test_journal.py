"""A journal keeps what is done: under the same inputs it is found again, and a killed search goes on."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remove_refusals.errors import OutputError
from remove_refusals.files import STAGES, Journal
from remove_refusals.models.load import LoadedModel, fingerprint, load
from remove_refusals.progress import Progress
from remove_refusals.prompts import embedded_prompts
from remove_refusals.search.candidates import Selection
from remove_refusals.search.search import SearchPrompts, select, split_for_search
from remove_refusals.settings import GradientSettings, MeasureSettings, Rule, SelectSettings


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def count(journal: Journal, inputs: object) -> tuple[int, int]:
    """Remember the number 7; give what came back and how often it was computed."""
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        return 7

    return journal.remember("seven", inputs, compute, str, int), len(calls)


JSON_VALUES = st.recursive(
    st.integers() | st.text() | st.booleans(), lambda inner: st.lists(inner, max_size=4), max_leaves=6
)


@given(inputs=JSON_VALUES, other=JSON_VALUES)
@settings(deadline=None, max_examples=30)
def test_the_same_inputs_are_found_again_and_others_are_not(
    tmp_path_factory: pytest.TempPathFactory, inputs: object, other: object
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    assert count(Journal(directory, "model"), inputs) == (7, 1)
    assert count(Journal(directory, "model"), inputs) == (7, 0)
    assert count(Journal(directory, "another model"), inputs) == (7, 1)
    same = json.dumps(inputs) == json.dumps(other)
    assert count(Journal(directory, "model"), other) == (7, 0 if same else 1)


def test_without_a_directory_nothing_is_kept() -> None:
    journal = Journal()
    assert [count(journal, 0), count(journal, 0)] == [(7, 1), (7, 1)]


def test_the_half_of_a_line_is_cut_off(tmp_path: Path) -> None:
    count(Journal(tmp_path), 0)
    with (tmp_path / STAGES).open("a") as file:
        file.write('{"key": "0", "na')
    journal = Journal(tmp_path)
    assert journal.n_kept == 1
    assert count(journal, 1) == (7, 1)
    assert Journal(tmp_path).n_kept == 2


@pytest.mark.parametrize("content", ["[]\n", "not JSON\n", "{}\n"])
def test_something_else_in_its_place_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / STAGES).write_text(content)
    with pytest.raises(OutputError, match="remove it"):
        Journal(tmp_path)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


def test_models_have_fingerprints_of_their_own(loaded: LoadedModel) -> None:
    other = load("demo")
    assert fingerprint(other) == fingerprint(loaded)
    other.model.model.layers[2].mlp.down_proj.weight.data[0, 0] += 1
    assert fingerprint(other) != fingerprint(loaded)


SETTINGS = SelectSettings(
    n_choose=32,
    n_confirm=16,
    # Without a limit on refusals there is a second descent, whatever the first one reached.
    rule=Rule(max_kl=10.0),
    descent=GradientSettings(targets=(0.05, 0.01), n_steps=8, n_more_steps=4),
)


@pytest.fixture(scope="module")
def prompts() -> SearchPrompts:
    return split_for_search(embedded_prompts("harmful_train"), embedded_prompts("harmless_train"), 16, SETTINGS)


def search(loaded: LoadedModel, prompts: SearchPrompts, journal: Path | None, kill_at: str = "") -> Selection:
    """Search; die when a stage of a name that begins so reports for the first time."""

    def report(stage: str, done: int, total: int) -> None:
        if kill_at and f"{stage} {done}".startswith(kill_at):
            raise Killed

    answers = MeasureSettings(max_new_tokens=24)
    kept = None if journal is None else Journal(journal)
    return select(loaded, prompts, SETTINGS, answers, journal=kept, progress=Progress(report))


@pytest.fixture(scope="module")
def undisturbed(loaded: LoadedModel, prompts: SearchPrompts) -> Selection:
    return search(loaded, prompts, None)


@pytest.mark.parametrize("stage", ["own answers 64", "descent 10", "confirming"])
def test_a_killed_search_goes_on_with_the_stage_that_it_died_in(
    loaded: LoadedModel, prompts: SearchPrompts, undisturbed: Selection, tmp_path: Path, stage: str
) -> None:
    with pytest.raises(Killed):
        search(loaded, prompts, tmp_path, kill_at=stage)
    done = len((tmp_path / STAGES).read_text().splitlines())
    assert done >= 1
    found = search(loaded, prompts, tmp_path)
    assert found.record() == undisturbed.record()
    for one, other in zip(found.intervention.directions, undisturbed.intervention.directions, strict=True):
        assert (one.basis == other.basis).all()
    names = [json.loads(line)["name"] for line in (tmp_path / STAGES).read_text().splitlines()]
    assert len(names) == len(set(names)) > done


@pytest.mark.parametrize(
    ("at", "note"), [(3, "Descent 1 goes on at step 4 of 8."), (10, "Descent 2 goes on at step 3 of 4.")]
)
def test_a_killed_descent_goes_on_at_its_step(
    loaded: LoadedModel, prompts: SearchPrompts, undisturbed: Selection, tmp_path: Path, at: int, note: str
) -> None:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)

        def die(stage: str, done: int, total: int) -> None:
            if (stage, done) == ("descent", at):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            answers = MeasureSettings(max_new_tokens=24)
            select(loaded, prompts, SETTINGS, answers, journal=Journal(tmp_path), progress=Progress(die))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.unfinished"))) == 1
    steps: list[int] = []
    notes: list[str] = []

    def report(stage: str, done: int, total: int) -> None:
        steps.extend([done] if stage == "descent" else [])

    answers = MeasureSettings(max_new_tokens=24)
    told = Progress(report, notes.append)
    found = select(loaded, prompts, SETTINGS, answers, journal=Journal(tmp_path), progress=told)
    assert (steps[0], notes) == (at + 1, [note])
    assert found.record() == undisturbed.record()
    for one, other in zip(found.intervention.directions, undisturbed.intervention.directions, strict=True):
        assert (one.basis == other.basis).all()
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_finished_search_runs_nothing_again(loaded: LoadedModel, prompts: SearchPrompts, tmp_path: Path) -> None:
    search(loaded, prompts, tmp_path)
    before = (tmp_path / STAGES).read_bytes()
    stages: list[str] = []
    found = select(
        loaded,
        prompts,
        SETTINGS,
        MeasureSettings(max_new_tokens=24),
        journal=Journal(tmp_path),
        progress=Progress(lambda stage, done, total: stages.append(stage)),
    )
    assert (tmp_path / STAGES).read_bytes() == before
    assert found.candidate.confirmation is not None
    assert all(stage.startswith("activations") for stage in stages)
