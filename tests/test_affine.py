"""The affine variant: the harmless mean's component stands in the place of what is taken out."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
import zoo
from remove_refusals.baking.certificate import certify, certify_directory
from remove_refusals.baking.memory import bake
from remove_refusals.directions.activations import measure_boundaries
from remove_refusals.directions.direction import direction_from_vectors, load_direction, mean_difference, save_direction
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.plan import resolve
from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.load import LoadedModel
from remove_refusals.types import Activations, DirectionOrigin, Intervention, PromptSet, SiteEdit

MODEL_TYPES = ["llama", "qwen3", "gemma3_text", "granite", "gpt2", "mixtral"]


def direction(rank=1):
    vectors = torch.randn(zoo.D_MODEL, rank, generator=torch.Generator().manual_seed(5))
    component = tuple(0.7 * (index + 1) for index in range(rank))
    return direction_from_vectors(vectors, DirectionOrigin("given", harmless_component=component))


def logits(model):
    with torch.inference_mode():
        return model(zoo.token_ids(model), use_cache=False).logits


def saved(model_type, folder):
    model = zoo.build(model_type)
    model.save_pretrained(folder / "base")
    return LoadedModel(model, tiny.tokenizer(), str(folder / "base"), checkpoint_dtype=torch.float32)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hooks_equal_the_saved_model_and_the_component_is_the_constant(model_type, rank, tmp_path):
    loaded, taken = saved(model_type, tmp_path), direction(rank)
    model_map = map_model(loaded.model)
    intervention = intervene(taken, zoo.N_LAYERS, affine=True)
    with ablated(loaded.model, intervention, model_map=model_map):
        hooked = logits(loaded.model)
        held = measure_boundaries(loaded, taken, model_map, constant=taken.origin.harmless_component)
    with ablated(loaded.model, intervene(taken, zoo.N_LAYERS), model_map=model_map):
        linear = logits(loaded.model)
    baked = bake(loaded, intervention, tmp_path / "edited")
    edited = AutoModelForCausalLM.from_pretrained(baked.directory).eval()
    assert float((linear - hooked).abs().max()) > 0.05
    assert float((hooked - logits(edited)).abs().max()) < 1e-5
    assert baked.certificate.passed and max(entry.share_left for entry in baked.certificate.edited) < 1e-5
    assert len(held) == len(baked.certificate.boundaries) == zoo.N_LAYERS + 1
    assert max(*held, *baked.certificate.boundaries) < 1e-5
    # The measure sees the constant where it is not expected.
    assert min(measure_boundaries(replace(loaded, model=edited), taken, model_map)) > 0.01
    # The certificate made again from the files alone says the same.
    assert certify_directory(baked.directory, str(tmp_path / "base")).problems == ()


@pytest.mark.parametrize(
    ("model_type", "scale"), [("llama", 1.0), ("gemma3_text", zoo.D_MODEL**0.5), ("granite", 12.0), ("gpt2", 1.0)]
)
def test_the_embeddings_scale_is_measured(model_type, scale):
    model = zoo.build(model_type, **({"embedding_multiplier": 12.0} if model_type == "granite" else {}))
    assert embedding_scale(model, map_model(model)) == pytest.approx(scale, rel=1e-5)


def test_a_share_is_put_back_with_a_strength(tmp_path):
    model = zoo.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(0.0)
    taken = direction()
    with ablated(model, intervene(taken, zoo.N_LAYERS, strength=0.5, affine=True, layers=(0, 0))):
        hidden = model(zoo.token_ids(model), output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(hidden @ taken.basis, torch.full((1, 8, 1), 0.35))


def test_a_plain_edit_fails_the_certificate_of_an_affine_one(tmp_path):
    loaded = saved("gemma3_text", tmp_path)
    model_map = map_model(loaded.model)
    baked = bake(loaded, intervene(direction(), zoo.N_LAYERS), tmp_path / "plain")
    plan = resolve(
        intervene(direction(), zoo.N_LAYERS, affine=True),
        model_map,
        loaded.model.get_parameter,
        embedding_scale=embedding_scale(loaded.model, model_map),
    )
    certificate = certify(baked.directory, tmp_path / "base", plan, model_map)
    assert len(certificate.problems) == 1 and "embed_tokens" in certificate.problems[0]


def test_the_mean_difference_knows_the_harmless_component(tmp_path):
    generator = torch.Generator().manual_seed(0)
    harmful, harmless = (
        Activations(
            torch.randn(5, 1, 3, 16, generator=generator), (-1,), PromptSet(name, tuple(map(str, range(5))), "test")
        )
        for name in ("harmful", "harmless")
    )
    found = mean_difference(harmful, harmless, layer=2)
    expected = float(found.basis[:, 0] @ harmless.hidden[:, 0, 2].mean(dim=0))
    assert found.origin.harmless_component == pytest.approx((expected,), rel=1e-5)
    save_direction(found, tmp_path / "direction.safetensors")
    assert load_direction(tmp_path / "direction.safetensors").origin == found.origin


def test_a_direction_without_the_harmless_mean_is_refused():
    plain = direction_from_vectors(torch.ones(zoo.D_MODEL), DirectionOrigin("given"))
    with pytest.raises(DirectionError, match="find the direction again"):
        intervene(plain, zoo.N_LAYERS, affine=True)


@pytest.mark.parametrize("choice", [{"layers": (1, 3)}, {"kinds": ("attn", "mlp")}])
def test_without_the_embedding_it_is_refused(choice):
    with pytest.raises(DirectionError, match="embedding"):
        intervene(direction(), zoo.N_LAYERS, affine=True, **choice)


@pytest.mark.parametrize("model_type", ["bloom", "bert"])
def test_a_norm_behind_the_embedding_is_refused_by_the_models_type(model_type):
    model = zoo.build(model_type)
    intervention = intervene(direction(), zoo.N_LAYERS, affine=True)
    with pytest.raises(ArchitectureError, match=f"'{model_type}' can carry no constant"), ablated(model, intervention):
        pass
    with pytest.raises(ArchitectureError, match=f"'{model_type}' can carry no constant"):
        resolve(intervention, map_model(model), model.get_parameter, allow_leak=True, embedding_scale=1.0)


@pytest.mark.parametrize("options", [{}, {"embedding_scale": 1.0, "variant": "norm-preserving"}])
def test_an_offset_needs_a_measured_scale_and_the_plain_variant(options):
    model = zoo.build("llama")
    with pytest.raises(DirectionError, match="scale"):
        resolve(intervene(direction(), zoo.N_LAYERS, affine=True), map_model(model), model.get_parameter, **options)


@pytest.mark.parametrize("edit", [SiteEdit("mlp", 1, 1.0, offset=(0.5,)), SiteEdit("embedding", None, 1.0, 0, (1, 2))])
def test_an_offset_that_does_not_fit_is_refused(edit):
    model = zoo.build("llama")
    with pytest.raises(DirectionError, match="numbers at site"), ablated(model, Intervention((direction(),), (edit,))):
        pass
