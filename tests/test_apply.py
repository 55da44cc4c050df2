"""Hooks, the edit in memory and the saved model are one intervention."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
import zoo
from remove_refusals.baking.base import Base
from remove_refusals.baking.disk import bake
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.saved import load_direction
from remove_refusals.errors import DirectionError, OutputError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.settings import EditSettings
from remove_refusals.types import DirectionOrigin


def direction(d_model, rank=1):
    vectors = torch.randn(d_model, rank, generator=torch.Generator().manual_seed(5))
    return direction_from_vectors(vectors, DirectionOrigin(method="given"))


def edited_files(model, intervention, directory, **options):
    """The model as `bake` leaves it, loaded."""
    model.save_pretrained(directory / "base")
    base = Base(model, str(directory / "base"), directory=directory / "base")
    bake(base, intervention, directory / "edited", EditSettings(**options))
    return AutoModelForCausalLM.from_pretrained(directory / "edited").eval()


def in_memory(model, intervention):
    other = copy.deepcopy(model)
    return other, bake_in_place(other, intervention)


def logits(model, seed=0):
    with torch.inference_mode():
        return model(zoo.token_ids(model, seed=seed), use_cache=False).logits


def boundaries(model, model_map):
    """The residual stream before each layer and behind the last, each `[tokens, d_model]`."""
    found = []
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(lambda module, args: found.append(args[0])) for name in model_map.layers
    ]
    last = modules[model_map.layers[-1]]
    handles.append(
        last.register_forward_hook(lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    )
    logits(model)
    for handle in handles:
        handle.remove()
    return [hidden.reshape(-1, model_map.d_model) for hidden in found]


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text", "mixtral"]
)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_hooks_equal_the_saved_model(model_type, strength, tmp_path):
    model = zoo.build(model_type)
    intervention = intervene(direction(zoo.D_MODEL), zoo.N_LAYERS, strength=strength)
    plain = logits(model)
    with ablated(model, intervention):
        hooked = logits(model)
    saved = edited_files(model, intervention, tmp_path)
    assert float((plain - hooked).abs().max()) > 0.05
    assert float((hooked - logits(saved)).abs().max()) < 1e-5
    assert float((hooked - logits(in_memory(model, intervention)[0])).abs().max()) < 1e-5
    assert torch.equal(logits(model), plain)


def test_a_direction_and_a_plain_tensor_are_taken_out_everywhere():
    model = zoo.build("llama")
    taken = direction(zoo.D_MODEL)
    with ablated(model, intervene(taken, zoo.N_LAYERS)):
        wanted = logits(model)
    vector = 3 * taken.basis[:, 0]
    loaded = LoadedModel(model, tiny.tokenizer(), "tiny")
    for which in (model, loaded):
        for what in (taken, (taken,), vector, vector[None], vector[:, None]):
            with ablated(which, what):
                torch.testing.assert_close(logits(model), wanted)
    two = torch.randn(zoo.D_MODEL, 2)
    with ablated(model, two):
        found = logits(model)
    with ablated(model, intervene(direction_from_vectors(two), zoo.N_LAYERS)):
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("shape", [(3,), (2, zoo.D_MODEL), (1, 3), (zoo.D_MODEL, 1, 1), ()])
def test_a_tensor_of_another_width_is_refused(shape):
    with pytest.raises(DirectionError, match=rf"shape .*{zoo.D_MODEL}"), ablated(zoo.build("llama"), torch.ones(shape)):
        pass


def test_an_intervention_of_a_larger_model_is_refused_and_not_cut():
    larger = intervene(direction(zoo.D_MODEL), zoo.N_LAYERS + 1)
    with pytest.raises(DirectionError, match=f"layer {zoo.N_LAYERS}"), ablated(zoo.build("llama"), larger):
        pass


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "mixtral"])
@pytest.mark.parametrize("rank", [1, 3])
def test_nothing_is_left_at_any_layer_boundary(model_type, rank, tmp_path):
    model = zoo.build(model_type)
    model_map = map_model(model)
    taken = direction(zoo.D_MODEL, rank)
    saved = edited_files(model, intervene(taken, zoo.N_LAYERS), tmp_path)
    before, after = (
        max(
            float(((hidden @ taken.basis).norm(dim=-1) / hidden.norm(dim=-1)).max())
            for hidden in boundaries(m, model_map)
        )
        for m in (model, saved)
    )
    assert before > 0.05
    assert after < 1e-6


def test_residual_placement_takes_out_what_is_added_behind_the_norm():
    model = zoo.build("gemma3_text")
    model_map = map_model(model)
    taken = direction(zoo.D_MODEL)
    with ablated(model, intervene(taken, zoo.N_LAYERS), placement="residual"):
        left = [
            float(((h @ taken.basis).abs().squeeze(-1) / h.norm(dim=-1)).max()) for h in boundaries(model, model_map)
        ]
    assert max(left) < 1e-6


def test_hooks_go_when_the_context_ends_by_an_exception():
    model = zoo.build("llama")
    plain = logits(model)
    with pytest.raises(ZeroDivisionError), ablated(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS)):
        raise ZeroDivisionError
    assert torch.equal(logits(model), plain)


def test_strength_zero_gives_the_same_bytes():
    model = zoo.build("llama")
    edited, _ = in_memory(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS, strength=0.0))
    for name, tensor in edited.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_only_planned_tensors_change():
    model = zoo.build("mixtral")
    other, plan = in_memory(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS, layers=(1, 2)))
    edited = other.state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, edited[name])}
    assert changed == {entry.parameter for entry in plan.entries}
    for entry in plan.entries:
        original = model.get_parameter(entry.parameter)
        assert tiny.share_left(edited[entry.parameter], original, entry.basis, entry.axis) < 1e-6


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_tied_embeddings(tied, tmp_path):
    model = zoo.build("gemma3_text")
    intervention = intervene(direction(zoo.D_MODEL), zoo.N_LAYERS)
    saved = edited_files(model, intervention, tmp_path, tied=tied)
    head, embedding = saved.get_output_embeddings().weight, saved.get_input_embeddings().weight
    assert saved.config.tie_word_embeddings is (tied == "both")
    assert (head is embedding) is (tied == "both")
    assert torch.equal(head, model.get_input_embeddings().weight) is (tied == "untie")
    for asked in ("untie", "both"):
        with ablated(model, intervention, tied=asked):
            assert (float((logits(model) - logits(saved)).abs().max()) < 1e-5) is (tied == asked)


@pytest.fixture
def loaded(tmp_path):
    source = tmp_path / "source"
    tiny.llama().to(torch.bfloat16).save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    return load(source)


def test_bake_writes_a_whole_model_and_its_record(loaded, tmp_path):
    taken = direction(32)
    baked = bake(loaded, intervene(taken, 2), tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == loaded.tokenizer.chat_template
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert record == baked.record.to_json()
    assert record["base"]["source"] == "source" and set(record["base"]["sha256"]) >= {
        "config.json",
        "model.safetensors",
    }
    assert len(record["plan"]["edited"]) == 5 and record["plan"]["left"] == {}
    assert torch.equal(load_direction(tmp_path / "out" / "directions" / "direction.safetensors").basis, taken.basis)
    for entry in baked.plan.entries:
        original = loaded.model.get_parameter(entry.parameter)
        # Rounding to bfloat16 after the edit puts a little of the direction back: half a unit in the last place.
        assert tiny.share_left(saved.get_parameter(entry.parameter), original, entry.basis, entry.axis) < 0.02


def test_bake_rounds_once(loaded, tmp_path):
    bake(loaded, intervene(direction(32), 2), tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    weight = loaded.model.model.layers[0].mlp.down_proj.weight.double()
    basis = direction(32).basis.double()
    exact = weight - basis @ (basis.T @ weight)
    torch.testing.assert_close(saved.model.layers[0].mlp.down_proj.weight, exact.bfloat16(), rtol=0.0, atol=1e-8)


def test_an_existing_output_stays(loaded, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="out"):
        bake(loaded, intervene(direction(32), 2), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_direction_that_does_not_fit_leaves_nothing(loaded, tmp_path):
    with pytest.raises(DirectionError, match=r"48.*32"):
        bake(loaded, intervene(direction(48), 2), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
