"""Three small mixtures, trained here: what is found of their experts, and what a run makes of them."""

import os
import random
from functools import cache

import pytest
from transformers import AutoModelForCausalLM

from remove_refusals.directions.activations import collect_both
from remove_refusals.directions.attribution import expert_choices, routing_interchange
from remove_refusals.directions.direction import mean_difference
from remove_refusals.directions.hooks import ablated
from remove_refusals.modelmap.derive import map_model
from remove_refusals.pipeline import run
from remove_refusals.settings import ChatFormat, DirectionSettings, MeasureSettings, RunSettings, SelectSettings
from remove_refusals.types import Intervention, PromptSet, SiteEdit
from routing_refusal import KINDS, LAYER, TESTED, TRAINED, prompts, refused, right, save_prompts, trained

HARMFUL, HARMLESS = (prompts("test", TESTED, harmful=harmful) for harmful in (True, False))


def some(*, harmful, n=64):
    found = list(prompts("some", TRAINED, harmful=harmful).prompts)
    return PromptSet("some", tuple(random.Random(0).sample(found, n)), "synthetic")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the models are, for all processes of one run of the tests."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@cache
def looked_at(name, directory):
    """The model, prompts, and the difference of the means behind its last layer."""
    loaded, sets = trained(name, directory), (some(harmful=True), some(harmful=False))
    n_layers = map_model(loaded.model).n_layers
    return loaded, *sets, mean_difference(*collect_both(loaded, *sets), layer=n_layers)


@pytest.mark.parametrize("name", KINDS)
def test_they_refuse_what_is_harmful_and_answer_the_rest(name, directory):
    model = trained(name, directory).model
    assert refused(model, HARMFUL) >= 0.95 and refused(model, HARMLESS) <= 0.01
    assert right(model, HARMLESS) >= 0.99


@pytest.mark.parametrize("name", ["one", "four"])
def test_the_refusing_experts_add_most_five_times_what_the_next_does(name, directory):
    choices = sorted(expert_choices(*looked_at(name, directory)), key=lambda choice: -choice.contribution)
    refusing = KINDS[name].refusing
    first, rest = choices[: len(refusing)], choices[len(refusing) :]
    assert {(choice.layer, choice.expert) for choice in first} == {(LAYER, expert) for expert in refusing}
    assert first[-1].contribution >= 5 * rest[0].contribution
    assert all(choice.low > 0 and choice.harmful > choice.harmless for choice in first)


@pytest.mark.parametrize("name", KINDS)
def test_the_choice_of_experts_decides_where_refusal_is_routed(name, directory):
    found = routing_interchange(*looked_at(name, directory))
    most = max((each for each in found if each.layer is not None), key=lambda each: each.share.value)
    if KINDS[name].topics:
        assert most.layer == LAYER and most.share.value >= 0.9 and most.share.low > 0.5
    else:
        assert most.share.value <= 0.5


def test_without_the_refusing_experts_the_right_answers_come_back(directory):
    model = trained("four", directory).model
    edits = (
        SiteEdit(kind="expert", layer=LAYER, expert=expert, strength=1.0, whole=True)
        for expert in KINDS["four"].refusing
    )
    with ablated(model, Intervention((), tuple(edits))):
        assert refused(model, HARMFUL) == 0 and right(model, HARMFUL) >= 0.9


@cache
def made(name, most_experts, directory, own):
    """What a run makes of a model."""
    source = trained(name, directory) and directory / f"routing-{name}"
    save_prompts(own)

    def file(part):
        return str(own / f"{part}.txt")

    settings = RunSettings(
        model=str(source),
        chat=ChatFormat(plain=True),
        direction=DirectionSettings(harmful=file("harmful_train"), harmless=file("harmless_train")),
        select=SelectSettings(most_experts=most_experts),
        measure=MeasureSettings(
            harmful=file("harmful_test"),
            harmless=file("harmless_test"),
            alarming=file("alarming"),
            max_new_tokens=10,
            kl_tokens=4,
        ),
    )
    output = own / f"{name}-{most_experts}"
    return run(settings, output), AutoModelForCausalLM.from_pretrained(output).eval()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return tmp_path_factory.mktemp("routing")


def test_a_run_silences_the_experts_that_refuse_and_the_answers_are_right(directory, own):
    result, model = made("four", 128, directory, own)
    edits = result.selection.intervention.edits
    assert {edit.expert for edit in edits if edit.whole} == set(KINDS["four"].refusing)
    assert refused(model, HARMFUL) <= 0.05 and right(model, HARMFUL) >= 0.9
    assert abs(right(model, HARMLESS) - right(trained("four", directory).model, HARMLESS)) <= 0.01
    scores = result.evaluation.sets
    assert scores["harmful"].match["edited"].value >= 0.9 * scores["harmless"].match["base"].value
    assert not any("do not answer" in warning for warning in result.warnings)
    assert {row.expert for row in result.baked.certificate.edited if row.kind == "expert"} >= {
        edit.expert for edit in edits
    }


def test_without_expert_candidates_a_run_ends_refusals_and_says_that_questions_are_not_answered(directory, own):
    result, model = made("four", 0, directory, own)
    assert not any(edit.expert is not None for one in result.selection.candidates for edit in one.intervention.edits)
    assert refused(model, HARMFUL) <= 0.05 and right(model, HARMFUL) <= 0.1
    assert abs(right(model, HARMLESS) - right(trained("four", directory).model, HARMLESS)) <= 0.01
    scores = result.evaluation.sets
    assert scores["harmful"].match["edited"].value <= 0.6 * scores["harmless"].match["base"].value
    assert any("Refusals were removed, but the answers do not answer" in warning for warning in result.warnings)


def test_where_the_experts_have_learned_it_the_directional_edit_is_picked(directory, own):
    result, model = made("experts", 128, directory, own)
    assert any(edit.expert is not None for one in result.selection.candidates for edit in one.intervention.edits)
    assert not any(edit.expert is not None for edit in result.selection.intervention.edits)
    assert refused(model, HARMFUL) <= 0.1
