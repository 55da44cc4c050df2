"""Contributions add up to the stream, shares are those of the weights, and routers are found where they are."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

import tiny
import zoo
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.attribution import (
    expert_choices,
    routing_interchange,
    site_contributions,
    writer_shares,
)
from remove_refusals.directions.direction import mean_difference
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.types import PromptSet

HARMFUL = PromptSet("harmful", tuple(f"Steal {word}!" for word in ("a bike", "it", "bread", "that old car")), "test")
HARMLESS = PromptSet("harmless", tuple(f"Bake {word}?" for word in ("a cake", "it", "bread rolls")), "test")
ADDING_UP = [
    "llama",
    "gemma2",
    "gemma3_text",
    "granite",
    "gpt2",
    "gpt_neox",
    "phi",
    "mixtral",
    "qwen3_moe",
    "olmo2",
    "cohere",
]


def build(model_type):
    return LoadedModel(zoo.build(model_type), tiny.tokenizer(), model_type)


def differences(loaded, direction, position=-1):
    means = [
        collect_activations(loaded, part, positions=(position,)).hidden[:, 0].mean(0) for part in (HARMFUL, HARMLESS)
    ]
    return ((means[0] - means[1]) @ direction.basis).squeeze(1)


def found_on(loaded, layer=1):
    return mean_difference(*(collect_activations(loaded, part) for part in (HARMFUL, HARMLESS)), layer=layer)


@pytest.mark.parametrize("model_type", [name for name in ADDING_UP if name in zoo.MODEL_TYPES])
@pytest.mark.parametrize("position", [-1, -3])
def test_contributions_add_up_to_the_stream(model_type, position):
    loaded = build(model_type)
    direction = found_on(loaded)
    model_map = map_model(loaded.model)
    few = dataclasses.replace(loaded, batch_size=2)
    found = site_contributions(few, HARMFUL, HARMLESS, direction, position=position)
    expected = differences(loaded, direction, position)
    torch.testing.assert_close(torch.tensor(found.stream), expected.double().float(), atol=1e-4, rtol=1e-4)
    assert len(found.sites) == 1 + 2 * model_map.n_layers and found.layer == 1
    for index in range(model_map.n_layers + 1):
        total = sum(site.value for site in found.sites if site.layer is None or site.layer < index)
        assert total == pytest.approx(found.stream[index], rel=1e-3, abs=1e-3 * max(map(abs, found.stream)))
    assert all(site.low <= site.value <= site.high for site in found.sites)


def test_an_interval_is_that_of_welch():
    loaded = build("llama")
    direction = found_on(loaded)
    found = site_contributions(loaded, HARMFUL, HARMLESS, direction)
    outputs = []
    module = loaded.model.get_submodule("model.layers.1.mlp")
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output[0, -1] @ direction.basis))
    for part in (HARMFUL, HARMLESS):
        for prompt in part.prompts:
            collect_activations(loaded, PromptSet("one", (prompt,), "test"))
    handle.remove()
    values = torch.cat(outputs).numpy()
    interval = ttest_ind(values[:4], values[4:], equal_var=False).confidence_interval()
    site = next(site for site in found.sites if (site.site, site.layer) == ("mlp", 1))
    np.testing.assert_allclose((site.low, site.high), (interval.low, interval.high), rtol=1e-3)


def test_where_outputs_do_not_explain_a_layer_its_sites_are_left_out():
    loaded = build("llama")
    direction, model_map = found_on(loaded), map_model(loaded.model)
    layer = loaded.model.get_submodule(model_map.layers[0])
    handle = layer.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    found = site_contributions(loaded, HARMFUL, HARMLESS, direction)
    handle.remove()
    assert {site.layer for site in found.sites} == {None, *range(1, model_map.n_layers)}


def test_nothing_stays_on_the_model():
    loaded = build("mixtral")
    direction = found_on(loaded)
    site_contributions(loaded, HARMFUL, HARMLESS, direction)
    expert_choices(loaded, HARMFUL, HARMLESS, direction)
    routing_interchange(loaded, HARMFUL, HARMLESS, direction)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_shares_against_the_weights(model_type):
    loaded = build(model_type)
    direction = found_on(loaded)
    shares = writer_shares(loaded, direction)
    embedding = next(share for share in shares if share.site == "embedding")
    weight = loaded.model.get_input_embeddings().weight.detach()
    expected = (weight @ direction.basis).square().sum() / weight.square().sum() * zoo.D_MODEL
    assert embedding.value == pytest.approx(float(expected), rel=1e-4)
    experts = {(share.layer, share.expert) for share in shares if share.expert is not None}
    assert bool(experts) == (model_type == "mixtral")
    if model_type == "mixtral":
        parameter = next(share.parameter for share in shares if share.expert == 1)
        part = loaded.model.get_parameter(parameter)[1].detach().T
        value = (part @ direction.basis).square().sum() / part.square().sum() * zoo.D_MODEL
        assert next(share.value for share in shares if share.expert == 1) == pytest.approx(float(value), rel=1e-4)


def test_a_writer_orthogonal_to_the_direction_has_no_share_and_a_parallel_one_all():
    loaded = build("llama")
    direction = found_on(loaded)
    unit = direction.basis
    attn, mlp = (
        loaded.model.get_parameter(f"model.layers.0.{name}.weight") for name in ("self_attn.o_proj", "mlp.down_proj")
    )
    with torch.no_grad():
        attn -= unit @ (unit.T @ attn)
        mlp.copy_(unit @ torch.randn(1, mlp.shape[1]))
    shares = {(share.site, share.layer): share.value for share in writer_shares(loaded, direction)}
    assert shares["attn", 0] == pytest.approx(0, abs=1e-6) and shares["mlp", 0] == pytest.approx(zoo.D_MODEL, rel=1e-4)


@pytest.mark.parametrize("model_type", [name for name in ("mixtral", "qwen3_moe", "olmoe") if name in zoo.MODEL_TYPES])
def test_routers_are_found_and_choices_counted(model_type):
    loaded = build(model_type)
    choices = expert_choices(dataclasses.replace(loaded, batch_size=3), HARMFUL, HARMLESS, found_on(loaded))
    config = loaded.model.config
    n_chosen = config.num_experts_per_tok
    layers = {choice.layer for choice in choices}
    assert layers
    for layer in layers:
        for side in ("harmful", "harmless"):
            assert sum(getattr(choice, side) for choice in choices if choice.layer == layer) == pytest.approx(n_chosen)
    loaded.model.config.output_router_logits = True
    counted = torch.zeros(len(choices) // len(layers))
    first = min(layers)
    for prompt in HARMFUL.prompts:
        rendered = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        logits = loaded.model(input_ids=rendered["input_ids"], output_router_logits=True).router_logits[0]
        counted[logits.reshape(-1, logits.shape[-1])[-1].topk(n_chosen).indices] += 1
    expected = (counted / len(HARMFUL)).tolist()
    assert [choice.harmful for choice in choices if choice.layer == first] == pytest.approx(expected)


@pytest.mark.parametrize("model_type", [name for name in ("mixtral", "deepseek_v3") if name in zoo.MODEL_TYPES])
def test_what_experts_write_adds_up_to_what_their_module_gives(model_type):
    loaded = build(model_type)
    direction, model_map = found_on(loaded), map_model(loaded.model)
    written = {mixture.layer: [] for mixture in model_map.mixtures}
    for mixture in model_map.mixtures:
        loaded.model.get_submodule(mixture.module).register_forward_hook(
            lambda module, args, output, into=written[mixture.layer]: into.append(output.reshape(-1, zoo.D_MODEL)[-1])
        )
    choices = expert_choices(dataclasses.replace(loaded, batch_size=1), HARMFUL, HARMLESS, direction)
    n = len(HARMFUL)
    for layer, outputs in written.items():
        # A batch is one prompt, the longest first.
        along = torch.stack(outputs[: n + len(HARMLESS)]) @ direction.basis[:, 0]
        total = sum(choice.contribution for choice in choices if choice.layer == layer)
        assert total == pytest.approx(float(along[:n].mean() - along[n:].mean()), rel=1e-3, abs=1e-5)


def test_the_exchange_of_experts_is_none_between_equal_prompts():
    loaded = build("mixtral")
    direction, same = found_on(loaded, layer=4), PromptSet("same", HARMFUL.prompts[:1] * 3, "test")
    found = routing_interchange(loaded, same, HARMLESS, direction)
    assert [each.layer for each in found] == [*range(zoo.N_LAYERS), None]
    for each in found:
        assert each.share.low <= each.share.value <= each.share.high and each.n == 3
        assert each.share.value != 0 and each.control.value == pytest.approx(0, abs=1e-5)


def test_a_dense_model_has_no_choices():
    loaded = build("llama")
    direction = found_on(loaded)
    assert expert_choices(loaded, HARMFUL, HARMLESS, direction) == ()
    assert routing_interchange(loaded, HARMFUL, HARMLESS, direction) == ()


def test_in_the_demo_model_the_contributions_make_the_refusal():
    loaded = load("demo")
    parts = [draw(embedded_prompts(name), 24, 0) for name in ("harmful_train", "harmless_train")]
    direction = mean_difference(*(collect_activations(loaded, part) for part in parts), layer=4)
    found = site_contributions(loaded, *parts, direction)
    before = [site for site in found.sites if site.layer is not None and site.layer < 4]
    assert sum(site.value for site in before) == pytest.approx(found.stream[4], rel=0.02)
    assert any(site.low > 0 for site in before)
