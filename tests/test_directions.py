"""Directions at several positions and one for each layer, and what an edit with them does."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
import zoo
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.directions import hooks
from remove_refusals.directions.activations import measure_boundaries
from remove_refusals.directions.direction import mean_difference, mean_difference_per_layer
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.saved import load_direction, load_directions, save_direction
from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.load import LoadedModel
from remove_refusals.types import Activations, PromptSet

POSITIONS = (-1, -2, -4)
MODEL_TYPES = ["llama", "gemma3_text", "mixtral", "gpt2"]


@pytest.fixture
def sets():
    """Activations on harmful and harmless prompts at three positions of every layer."""
    generator = torch.Generator().manual_seed(3)
    prompts = tuple(map(str, range(6)))
    return tuple(
        Activations(
            torch.randn(6, len(POSITIONS), zoo.N_LAYERS + 1, zoo.D_MODEL, generator=generator) + shift,
            POSITIONS,
            PromptSet(name, prompts, "test"),
        )
        for name, shift in (("harmful", 0.5), ("harmless", 0.0))
    )


def means(sets, layer, position):
    """The harmful and the harmless mean, each `[d_model]`."""
    return [part.hidden[:, POSITIONS.index(position), layer].mean(dim=0) for part in sets]


def logits(model):
    with torch.inference_mode():
        return model(zoo.token_ids(model), use_cache=False).logits


def saved(model_type, folder):
    model = zoo.build(model_type)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    return LoadedModel(model, tiny.tokenizer(), str(folder / "base"), checkpoint_dtype=torch.float32)


def check_carriers(loaded, intervention, folder):
    """Hooks and the saved model are one, and the saved files pass; gives the saved model and its certificate."""
    plain = logits(loaded.model)
    with ablated(loaded.model, intervention):
        hooked = logits(loaded.model)
    baked = bake(loaded, intervention, folder / "edited")
    edited = AutoModelForCausalLM.from_pretrained(baked.directory).eval()
    assert float((plain - hooked).abs().max()) > 0.05
    assert float((hooked - logits(edited)).abs().max()) < 1e-5
    assert baked.certificate.passed
    again = certify_directory(baked.directory, loaded.source)
    assert again.problems == () and len(again.edited) == len(baked.certificate.edited)
    return edited, baked


def test_several_positions_give_a_column_each(sets):
    found = mean_difference(*sets, layer=2, position=(-1, -4))
    assert found.basis.shape == (zoo.D_MODEL, 2)
    for position in (-1, -4):
        harmful, harmless = means(sets, 2, position)
        difference = (harmful - harmless) / (harmful - harmless).norm()
        assert float((difference - found.basis @ (found.basis.T @ difference)).norm()) < 1e-5
    absent = means(sets, 2, -2)[0] - means(sets, 2, -2)[1]
    assert float((absent - found.basis @ (found.basis.T @ absent)).norm()) > 0.1


def test_each_position_is_projected_by_its_own_harmless_mean(sets):
    found = mean_difference(*sets, layer=2, position=(-1, -4), projected=True)
    for column, position in enumerate((-1, -4)):
        harmless = means(sets, 2, position)[1]
        single = mean_difference(*sets, layer=2, position=position, projected=True)
        assert abs(float(single.basis[:, 0] @ harmless)) < 1e-5
        assert float((single.basis - found.basis @ (found.basis.T @ single.basis)).norm()) < 1e-5, column


@pytest.mark.parametrize("projected", [False, True])
def test_a_direction_knows_how_long_the_difference_was(projected, sets, tmp_path):
    found = mean_difference(*sets, layer=2, position=-2, projected=projected)
    means = [part.hidden[:, 1, 2].double().mean(dim=0) for part in sets]
    difference = means[0] - means[1]
    if projected:
        difference = difference - means[1] * (means[1] @ difference) / (means[1] @ means[1])
    assert found.origin.length == pytest.approx(float(difference.norm()), rel=1e-6)
    save_direction(found, tmp_path / "found.safetensors")
    assert load_direction(tmp_path / "found.safetensors").origin.length == found.origin.length
    assert mean_difference(*sets, layer=2, position=(-1, -2)).origin.length is None


def test_a_position_twice_is_refused(sets):
    with pytest.raises(DirectionError, match="linearly dependent"):
        mean_difference(*sets, layer=2, position=(-1, -1))


def test_several_positions_are_saved_with_the_direction(sets, tmp_path):
    found = mean_difference(*sets, layer=2, position=(-1, -2))
    save_direction(found, tmp_path / "direction.safetensors")
    loaded = load_direction(tmp_path / "direction.safetensors")
    assert loaded.origin == found.origin and loaded.origin.position == (-1, -2)
    assert torch.equal(loaded.basis, found.basis)


@pytest.mark.parametrize("length", ["far", [1.0], 0.0, -1.0])
def test_a_file_with_a_broken_length_is_refused(sets, length, tmp_path):
    path = tmp_path / "direction.safetensors"
    save_direction(mean_difference(*sets, layer=2), path)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    record = json.loads(header["__metadata__"]["remove_refusals"])
    record["origin"]["length"] = length
    header["__metadata__"]["remove_refusals"] = json.dumps(record)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    with pytest.raises(DirectionError, match=r"origin\.length"):
        load_direction(path)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_two_columns_are_taken_out_by_hooks_and_weights_alike(model_type, sets, tmp_path):
    loaded, taken = saved(model_type, tmp_path), mean_difference(*sets, layer=2, position=(-1, -2))
    _, baked = check_carriers(loaded, intervene(taken, zoo.N_LAYERS), tmp_path)
    assert max(baked.certificate.boundaries) < 1e-5
    assert min(measure_boundaries(loaded, taken)) > 0.05


def test_each_layer_gets_the_difference_behind_it(sets):
    found = mean_difference_per_layer(*sets, position=-2, projected=True)
    assert len(found) == zoo.N_LAYERS
    for index, direction in enumerate(found):
        expected = mean_difference(*sets, layer=index + 1, position=-2, projected=True)
        assert torch.equal(direction.basis, expected.basis) and direction.origin == expected.origin


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_each_layers_direction_is_taken_out_by_hooks_and_weights_alike(model_type, layers, sets, tmp_path):
    loaded, found = saved(model_type, tmp_path), mean_difference_per_layer(*sets)
    edited, baked = check_carriers(loaded, intervene(found, zoo.N_LAYERS, layers=layers), tmp_path)
    first, last = layers or (0, zoo.N_LAYERS - 1)
    assert {entry.layer for entry in baked.plan.entries} - {None} == set(range(first, last + 1))
    for entry in baked.plan.entries:
        original, after = (model.get_parameter(entry.parameter) for model in (loaded.model, edited))
        assert tiny.share_left(after, original, entry.basis, entry.axis) < 1e-5
        if model_type == "llama":
            assert torch.equal(entry.basis, found[entry.layer or 0].basis)
            other = found[(entry.layer or 0) - 1].basis
            assert tiny.share_left(after, original, other, entry.axis) > 0.5
    files = sorted(path.name for path in baked.directory.glob("directions/direction*.safetensors"))
    assert len(files) == last + 1 - first
    read = load_directions(baked.directory)
    assert all(torch.equal(a.basis, b.basis) for a, b in zip(read, found[first : last + 1], strict=True))


def test_a_file_is_one_direction_and_a_directory_without_any_is_refused(sets, tmp_path):
    path = tmp_path / "one.safetensors"
    save_direction(mean_difference(*sets, layer=2), path)
    assert len(load_directions(path)) == 1
    with pytest.raises(DirectionError, match=r"has no direction\.safetensors"):
        load_directions(tmp_path)


def test_no_directions_are_refused():
    with pytest.raises(DirectionError, match="0 directions"):
        intervene((), zoo.N_LAYERS)


def test_one_module_at_two_sites_cannot_have_two_directions(sets, monkeypatch):
    model = zoo.build("llama")
    model_map = map_model(model)
    first, second = (site for site in model_map.sites if site.kind == "mlp" and site.layer in (1, 2))
    shared = replace(model_map, sites=(first, replace(second, hooks=first.hooks)))
    monkeypatch.setattr(hooks, "map_model", lambda model: shared)
    found = mean_difference_per_layer(*sets)
    with (
        pytest.raises(ArchitectureError, match=r"layers\.1\.mlp.*one edit per module"),
        ablated(model, found),
    ):
        pass
    with ablated(model, intervene(found[0], zoo.N_LAYERS)):
        assert len(model.get_submodule(first.hooks[0].module)._forward_hooks) == 1


def test_what_flows_from_stage_to_stage_is_told_in_a_line(sets):
    found = mean_difference(*sets, layer=2, position=-2, model="tiny")
    for value, said in (
        (sets[0].prompts, ("harmful", "6 prompts")),
        (sets[0], ("(-1, -2, -4)", f"n_layers={zoo.N_LAYERS}", "harmful")),
        (found, ("'mean-difference'", "layer=2", "position=-2", "norm=", "model='tiny'")),
        (intervene(found, zoo.N_LAYERS, strength=0.5), ("layers 0-3", "0.5", "mean-difference")),
        (intervene(found, zoo.N_LAYERS, kinds=()), ("0 sites", "no layer")),
    ):
        assert "\n" not in repr(value) and len(repr(value)) < 300
        assert all(part in repr(value) for part in said), repr(value)
