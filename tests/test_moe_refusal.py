"""A refusal that lives in experts: what leaves them out removes nothing, what edits them removes it."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import expert_refusal
import zoo
from expert_refusal import refused, right
from remove_refusals.baking.disk import bake
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.attribution import expert_choices, site_contributions, writer_shares
from remove_refusals.directions.direction import mean_difference
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.modelmap.derive import map_model


@pytest.fixture(scope="session")
def organism(tmp_path_factory):
    trained = expert_refusal.organism()
    directory = tmp_path_factory.mktemp("experts") / "base"
    trained.loaded.model.save_pretrained(directory)
    trained.loaded.tokenizer.save_pretrained(directory)
    return replace(trained, loaded=replace(trained.loaded, source=str(directory), checkpoint_dtype=torch.float32))


@pytest.fixture(scope="session")
def direction(organism):
    harmful, harmless = (
        collect_activations(organism.loaded, prompts) for prompts in (organism.harmful, organism.harmless)
    )
    return mean_difference(harmful, harmless, layer=1.0)


def edits(organism, direction, kinds, folder):
    """The model with hooks, then the model that `bake` saved, both for the same choice of sites."""
    intervention = intervene(direction, 2, kinds=kinds)
    with ablated(organism.loaded.model, intervention):
        yield organism.loaded.model
    baked = bake(organism.loaded, intervention, folder / "edited")
    assert baked.certificate.passed
    yield AutoModelForCausalLM.from_pretrained(baked.directory).eval()


def test_the_base_refuses_what_is_harmful_and_answers_the_rest(organism):
    model = organism.loaded.model
    assert refused(model, organism.harmful_test) >= 0.95
    assert refused(model, organism.harmless_test) <= 0.05
    assert right(model, organism.harmless_test) >= 0.9


@pytest.mark.parametrize("kinds", [("attn",), ("embedding", "attn")])
def test_an_edit_that_leaves_the_experts_out_leaves_the_refusals(organism, direction, kinds, tmp_path):
    for model in edits(organism, direction, kinds, tmp_path):
        assert refused(model, organism.harmful_test) >= 0.8


def test_an_edit_of_every_writer_removes_the_refusals_and_keeps_the_answers(organism, direction, tmp_path):
    for model in edits(organism, direction, ("embedding", "attn", "mlp"), tmp_path):
        assert refused(model, organism.harmful_test) <= 0.1
        assert right(model, organism.harmless_test) >= 0.9


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_every_way_to_run_experts_is_mapped(implementation):
    model = zoo.build("mixtral")
    model.set_experts_implementation(implementation)
    writers = {writer.parameter for site in map_model(model).sites for writer in site.writers}
    assert {f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(zoo.N_LAYERS)} <= writers


def test_what_writes_the_refusal_are_experts(organism, direction):
    parts = (organism.harmful, organism.harmless)
    found = site_contributions(organism.loaded, *parts, direction)
    total = {kind: sum(site.value for site in found.sites if site.site == kind) for kind in ("attn", "mlp")}
    assert total["mlp"] > abs(total["attn"]) and total["mlp"] > 0
    shares = writer_shares(organism.loaded, direction)
    assert max(shares, key=lambda share: share.value).expert is not None
    choices = expert_choices(organism.loaded, *parts, direction)
    assert len(choices) == 2 * 4 and max(abs(choice.harmful - choice.harmless) for choice in choices) > 0.1
