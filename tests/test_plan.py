"""Interventions and plans."""

import pytest
import torch

import zoo
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.plan import resolve
from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.formula import ChannelStep, pull_back
from remove_refusals.modelmap.derive import map_model
from remove_refusals.settings import EditSettings
from remove_refusals.types import DirectionOrigin, Intervention, SiteEdit


def direction(d_model=zoo.D_MODEL, seed=0):
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(seed))
    return direction_from_vectors(vector, DirectionOrigin(method="given"))


def plan_for(model, intervention, **options):
    return resolve(intervention, map_model(model), model.get_parameter, EditSettings(**options))


def test_a_range_of_layers_leaves_the_others_and_says_so():
    model = zoo.build("llama")
    plan = plan_for(model, intervene(direction(), zoo.N_LAYERS, layers=(1, 2), strength=0.5))
    assert {entry.layer for entry in plan.entries} == {1, 2}
    assert {entry.strength for entry in plan.entries} == {0.5}
    assert dict(plan.left)["model.embed_tokens.weight"] == "not selected"
    assert len(plan.entries) + len(plan.left) == 1 + 2 * zoo.N_LAYERS


def test_kinds_of_site_are_chosen():
    plan = plan_for(zoo.build("llama"), intervene(direction(), zoo.N_LAYERS, kinds=("mlp",)))
    assert {entry.kind for entry in plan.entries} == {"mlp"}


def test_strength_zero_edits_nothing():
    plan = plan_for(zoo.build("gpt2"), intervene(direction(), zoo.N_LAYERS, strength=0.0))
    assert plan.entries == () and not plan.untie


@pytest.mark.parametrize("layers", [(0, 4), (2, 1), (-1, 2)])
def test_layers_outside_of_the_model_are_refused(layers):
    with pytest.raises(DirectionError, match="layer"):
        intervene(direction(), zoo.N_LAYERS, layers=layers)


def test_a_direction_that_does_not_fit_is_refused_with_both_numbers():
    with pytest.raises(DirectionError, match=r"48.*64"):
        plan_for(zoo.build("llama"), intervene(direction(48), zoo.N_LAYERS))


def test_a_site_twice_is_refused():
    edits = (SiteEdit(kind="mlp", layer=1, strength=1.0), SiteEdit(kind="mlp", layer=1, strength=0.5))
    with pytest.raises(DirectionError, match="twice"):
        plan_for(zoo.build("llama"), Intervention((direction(),), edits))


def test_a_model_that_leaks_is_refused_by_its_type():
    with pytest.raises(ArchitectureError, match="bert"):
        plan_for(zoo.build("bert"), intervene(direction(), zoo.N_LAYERS))


def test_tied_embeddings_are_untied_unless_asked():
    model, intervention = zoo.build("gemma3_text"), intervene(direction(), zoo.N_LAYERS)
    assert plan_for(model, intervention).untie
    assert not plan_for(model, intervention, tied="both").untie
    assert not plan_for(model, intervene(direction(), zoo.N_LAYERS, layers=(1, 3))).untie


def test_pulled_back_through_a_gain_and_a_centring():
    gain = torch.randn(zoo.D_MODEL) + 2
    steps = (ChannelStep("center"), ChannelStep("gain", "g", 1.0))
    basis = direction().basis
    pulled = pull_back(basis, steps, {"g": gain}.__getitem__)
    hidden = torch.randn(200, zoo.D_MODEL)
    hidden = hidden - (hidden @ pulled) @ pulled.T
    behind = (hidden - hidden.mean(-1, keepdim=True)) * (gain + 1)
    assert float((behind @ basis).abs().max()) < 1e-4
    assert float(((hidden * (gain + 1)) @ basis).abs().max()) > 1e-3


@pytest.mark.parametrize("variant", ["plain", "norm-preserving"])
def test_the_plan_carries_its_variant(variant):
    plan = plan_for(zoo.build("llama"), intervene(direction(), zoo.N_LAYERS), variant=variant)
    assert plan.variant == variant
