"""Activations and the direction from them."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
import zoo
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import largest_coordinate_share, layer_index, mean_difference
from remove_refusals.errors import DirectionError, NumericalError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.batches import MOST_PROMPTS, fitting_pass
from remove_refusals.models.chat_template import render
from remove_refusals.models.load import LoadedModel
from remove_refusals.progress import Progress
from remove_refusals.types import Activations, PromptSet

PROMPTS = PromptSet("some", ("Hello", "How do I bake bread?", "x", "Name three rivers in Europe, please."), "test")


def of_size(loaded, n):
    return dataclasses.replace(loaded, batch_size=n)


def told(done):
    return Progress(lambda stage, n, total: done.append(n))


@pytest.fixture(params=["llama", "gpt2"])
def loaded(request):
    return LoadedModel(getattr(tiny, request.param)(), tiny.tokenizer(), "tiny")


def test_equal_to_one_prompt_at_a_time_with_all_hidden_states(loaded):
    found = collect_activations(loaded, PROMPTS, positions=(-1, -3))
    assert found.hidden.shape == (4, 2, 3, 32) and found.hidden.dtype == torch.float32
    for index, ids in enumerate(render(loaded, PROMPTS.prompts)):
        with torch.inference_mode():
            states = loaded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for place, position in enumerate((-1, -3)):
            # The last of Transformers' hidden states is behind the final norm, ours is before it.
            for layer in range(2):
                torch.testing.assert_close(
                    found.hidden[index, place, layer], states[layer][0, position], atol=1e-5, rtol=1e-5
                )


def test_the_last_index_is_the_stream_before_the_final_norm(loaded):
    found = collect_activations(loaded, PROMPTS)
    norm = loaded.model.model.norm if hasattr(loaded.model, "model") else loaded.model.transformer.ln_f
    ids = torch.tensor([render(loaded, PROMPTS.prompts)[1]])
    with torch.inference_mode():
        last = loaded.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(norm(found.hidden[1, 0, 2]), last, atol=1e-5, rtol=1e-5)


def test_layers_behind_those_asked_for_are_not_run(loaded):
    whole = collect_activations(of_size(loaded, 4), PROMPTS).hidden
    model_map = map_model(loaded.model)
    ran = []
    modules = dict(loaded.model.named_modules())
    handles = [
        # The part that is called within a layer, so that the call of the layer alone does not count.
        next(modules[name].children()).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in model_map.layers
    ]
    for n_layers in range(3):
        ran.clear()
        part = collect_activations(of_size(loaded, 4), PROMPTS, n_layers=n_layers)
        assert part.n_layers == n_layers
        assert torch.equal(part.hidden, whole[:, :, : n_layers + 1])
        # A look at one prompt first, with all layers.
        assert ran == [*(model_map.layers if n_layers < 2 else ()), *model_map.layers[:n_layers]]
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.skipif("hrm_text" not in zoo.MODEL_TYPES, reason="this Transformers has no hrm_text")
def test_layers_that_are_called_again_count_with_their_last_call():
    loaded = LoadedModel(zoo.build("hrm_text"), tiny.tokenizer(), "tiny")
    whole = collect_activations(loaded, PROMPTS).hidden
    assert torch.equal(collect_activations(loaded, PROMPTS, n_layers=1).hidden, whole[:, :, :2])


@pytest.mark.parametrize("n_layers", [-1, 3])
def test_more_layers_than_there_are(loaded, n_layers):
    with pytest.raises(DirectionError, match=f"{n_layers} layers were asked for, expected 0 to 2"):
        collect_activations(loaded, PROMPTS, n_layers=n_layers)


def test_automatic_batches_change_nothing(loaded):
    prompts = dataclasses.replace(PROMPTS, prompts=tuple("How? " * (1 + number % 23) for number in range(90)))
    done = []
    found = collect_activations(loaded, prompts, progress=told(done)).hidden
    torch.testing.assert_close(found, collect_activations(of_size(loaded, 1), prompts).hidden, atol=1e-5, rtol=1e-5)
    assert done[-1] == 90 and 2 < len(done) < 45


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300))
def test_a_fitting_pass_is_neither_too_large_nor_too_small(lengths):
    loaded = LoadedModel(tiny.llama(), tiny.tokenizer(), "tiny")
    lengths = sorted(lengths, reverse=True)
    n = fitting_pass(loaded, lengths)

    def fits(count):
        padding = count * lengths[0] - sum(lengths[:count])
        return count <= MOST_PROMPTS and padding <= 64 and count * lengths[0] <= 1500

    assert n == 1 or fits(n)
    assert n == len(lengths) or not fits(n + 1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_batch_size_and_padding_change_nothing(loaded, batch_size):
    whole = collect_activations(of_size(loaded, 4), PROMPTS).hidden
    done = []
    part = collect_activations(of_size(loaded, batch_size), PROMPTS, progress=told(done)).hidden
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    assert done[-1] == 4 and len(done) == -(-4 // batch_size)


def test_no_hook_and_no_change_is_left(loaded):
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    collect_activations(loaded, PROMPTS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("position", [0, 1, -400])
def test_positions_outside_of_the_prompt_are_refused(loaded, position):
    with pytest.raises(DirectionError, match=str(position)):
        collect_activations(loaded, PROMPTS, positions=(position,))


def test_mean_difference_is_that():
    loaded = LoadedModel(tiny.llama(), tiny.tokenizer(), "tiny")
    harmful = collect_activations(loaded, PROMPTS)
    harmless = collect_activations(loaded, dataclasses.replace(PROMPTS, prompts=("One", "Two", "Three")))
    direction = mean_difference(harmful, harmless, layer=0.6, model="tiny", seed=4)
    expected = harmful.hidden[:, 0, 1].mean(0) - harmless.hidden[:, 0, 1].mean(0)
    torch.testing.assert_close(direction.basis[:, 0], expected / expected.norm(), atol=1e-6, rtol=1e-5)
    origin = direction.origin
    assert (origin.layer, origin.position, origin.n_harmful, origin.n_harmless) == (1, -1, 4, 3)
    assert (origin.model, origin.seed, origin.harmful_sha256) == ("tiny", 4, PROMPTS.sha256)


def test_the_projected_direction_is_orthogonal_to_the_harmless_mean():
    loaded = LoadedModel(tiny.llama(), tiny.tokenizer(), "tiny")
    harmful = collect_activations(loaded, PROMPTS)
    harmless = collect_activations(loaded, dataclasses.replace(PROMPTS, prompts=("One", "Two", "Three")))
    mean = harmless.hidden[:, 0, 1].mean(0)
    plain, projected = (mean_difference(harmful, harmless, layer=1, projected=flag) for flag in (False, True))
    assert abs(float(plain.basis[:, 0] @ mean)) > 1e-2
    assert abs(float(projected.basis[:, 0] @ mean)) < 1e-5
    assert projected.origin.method == "projected-mean-difference"


@pytest.mark.parametrize(("layer", "index"), [(0.6, 9), (0.0, 0), (1.0, 16), (0, 0), (1, 1), (16, 16)])
def test_a_float_is_a_fraction_and_an_int_an_index(layer, index):
    assert layer_index(layer, 16) == index


@pytest.mark.parametrize("layer", [-0.1, -0.01, 1.01, 1.2, float("nan"), float("inf"), 17, -1])
def test_layers_outside_are_refused(layer):
    with pytest.raises(DirectionError, match=str(layer)):
        layer_index(layer, 16)


def activations(hidden):
    return Activations(hidden, (-1,), dataclasses.replace(PROMPTS, prompts=PROMPTS.prompts[: len(hidden)]))


def test_nan_activations_name_the_prompt_and_the_layer():
    hidden = torch.randn(4, 1, 3, 8)
    hidden[2, 0, 1, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"prompt 2 of set 'some' at layer index 1"):
        mean_difference(activations(hidden), activations(torch.randn(4, 1, 3, 8)), layer=1)


def test_equal_means_and_other_models_are_refused():
    hidden = torch.randn(4, 1, 3, 8)
    with pytest.raises(DirectionError, match="non-zero"):
        mean_difference(activations(hidden), activations(hidden), layer=1)
    with pytest.raises(DirectionError, match=r"\(3, 8\).*\(3, 9\)"):
        mean_difference(activations(hidden), activations(torch.randn(4, 1, 3, 9)), layer=1)
    with pytest.raises(DirectionError, match="-2"):
        mean_difference(activations(hidden), activations(hidden + 1), layer=1, position=-2)


def test_largest_coordinate_share():
    hidden = torch.zeros(2, 1, 1, 4)
    hidden[:, 0, 0] = torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert largest_coordinate_share([activations(hidden)], 0, -1) == pytest.approx(0.9)
