"""Certificates of saved files: what passes, and what must not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import zoo
from remove_refusals.baking.base import base_of
from remove_refusals.baking.certificate import certify
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import ArchitectureError
from remove_refusals.models.load import LoadedModel
from remove_refusals.settings import EditSettings
from remove_refusals.types import DirectionOrigin

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def baked(request, tmp_path):
    """A saved mixture of experts, its edit, and what `certify` needs to compare them."""
    model = zoo.build("mixtral").to(request.param)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = model.float()
    loaded = LoadedModel(model, tiny.tokenizer(), str(tmp_path / "base"), checkpoint_dtype=request.param)
    vector = torch.randn(zoo.D_MODEL, generator=torch.Generator().manual_seed(0))
    direction = direction_from_vectors(vector, DirectionOrigin(method="given"))
    result = bake(loaded, intervene(direction, zoo.N_LAYERS), tmp_path / "edited")
    return tmp_path, result.plan, base_of(loaded), result.certificate


def changed(folder, change):
    """A copy of the edited model with its tensors changed."""
    target = folder / "changed"
    shutil.copytree(folder / "edited", target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_every_expert_is_certified(baked):
    _, _, _, certificate = baked
    assert certificate.passed and certificate.left == {}
    assert len(certificate.edited) == 1 + zoo.N_LAYERS * (1 + 4)
    # What rounding to bfloat16 puts back is well under a hundredth of the direction.
    assert max(entry.share_left for entry in certificate.edited) < 0.01
    assert certificate.boundaries is not None and len(certificate.boundaries) == zoo.N_LAYERS + 1


def test_one_skipped_expert_fails_by_its_name(baked):
    folder, plan, base, _ = baked
    original = load_file(folder / "base" / "model.safetensors")[EXPERT]
    certificate = certify(changed(folder, lambda tensors: tensors.update({EXPERT: original})), base, plan)
    assert not certificate.passed
    assert len(certificate.problems) == 1 and EXPERT in certificate.problems[0]
    assert next(entry for entry in certificate.edited if entry.name == EXPERT).share_left == pytest.approx(1.0)


def test_a_changed_bystander_fails_by_its_name(baked):
    folder, plan, base, _ = baked

    def nudge(tensors):
        tensors["model.norm.weight"][0] += 1

    certificate = certify(changed(folder, nudge), base, plan)
    assert len(certificate.problems) == 1 and "model.norm.weight" in certificate.problems[0]


def test_missing_and_additional_tensors_fail(baked):
    folder, plan, base, _ = baked

    def swap(tensors):
        tensors["stranger"] = tensors.pop("model.norm.weight")
        del tensors[EXPERT]

    problems = " ".join(certify(changed(folder, swap), base, plan).problems)
    assert all(name in problems for name in ("stranger", "model.norm.weight", EXPERT))


def test_a_variant_is_what_is_saved_and_certified(tmp_path):
    model = zoo.build("llama")
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    loaded = LoadedModel(model, tiny.tokenizer(), str(tmp_path / "base"), checkpoint_dtype=torch.float32)
    vector = torch.randn(zoo.D_MODEL, generator=torch.Generator().manual_seed(0))
    intervention = intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), zoo.N_LAYERS)
    kept = bake(loaded, intervention, tmp_path / "kept", EditSettings(variant="norm-preserving"))
    assert kept.certificate.passed and kept.record.plan.variant == "norm-preserving"
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("base", "kept"))
    torch.testing.assert_close(after.norm(dim=0), before.norm(dim=0))
    plain = bake(loaded, intervention, tmp_path / "plain")
    assert not certify(plain.directory, base_of(loaded), kept.plan).passed


def test_a_change_beside_the_direction_fails_by_the_tensors_name(baked):
    folder, plan, base, _ = baked
    basis = plan.entries[0].basis

    def nudge(tensors):
        beside = torch.ones(zoo.D_MODEL, 1) - basis @ (basis.T @ torch.ones(zoo.D_MODEL, 1))
        tensors[EXPERT] = (tensors[EXPERT].float() + 0.01 * beside).to(tensors[EXPERT].dtype)

    certificate = certify(changed(folder, nudge), base, plan)
    assert len(certificate.problems) == 1 and EXPERT in certificate.problems[0]


def test_another_shape_fails_by_the_tensors_name(baked):
    folder, plan, base, _ = baked

    def cut(tensors):
        tensors[EXPERT] = tensors[EXPERT][:, :-1].contiguous()

    certificate = certify(changed(folder, cut), base, plan)
    assert len(certificate.problems) == 1 and EXPERT in certificate.problems[0]


def tied(folder):
    """A saved Gemma, whose embedding is also its unembedding."""
    model = zoo.build("gemma3_text")
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    loaded = LoadedModel(model, tiny.tokenizer(), str(folder / "base"), checkpoint_dtype=torch.float32)
    vector = torch.randn(zoo.D_MODEL, generator=torch.Generator().manual_seed(0))
    return loaded, intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), zoo.N_LAYERS)


def test_an_untied_copy_is_certified_and_must_be_the_unedited_embedding(tmp_path):
    loaded, intervention = tied(tmp_path)
    result = bake(loaded, intervention, tmp_path / "edited", EditSettings(tied="untie"))
    assert result.certificate.passed and result.record.plan.embedding_untied is True
    assert certify_directory(tmp_path / "edited", str(tmp_path / "base")).problems == ()
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "edited")]
    assert torch.equal(files[1]["lm_head.weight"], files[0]["model.embed_tokens.weight"])
    assert result.certificate.identical == len(files[1]) - len(result.certificate.edited)

    def spoil(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    problems = certify(changed(tmp_path, spoil), base_of(loaded), result.plan).problems
    assert any("for the unembedding" in problem for problem in problems)


def test_a_tensor_that_stays_tied_is_certified_as_the_one_that_was_edited(tmp_path):
    loaded, intervention = tied(tmp_path)
    result = bake(loaded, intervention, tmp_path / "edited", EditSettings(tied="both"))
    assert result.certificate.passed and result.record.plan.embedding_untied is False
    assert certify_directory(tmp_path / "edited", str(tmp_path / "base")).problems == ()
    assert "lm_head.weight" not in load_file(tmp_path / "edited" / "model.safetensors")

    def add(tensors):
        tensors["lm_head.weight"] = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]

    problems = certify(changed(tmp_path, add), base_of(loaded), result.plan).problems
    assert len(problems) == 1 and "lm_head.weight" in problems[0]


def test_a_leak_that_is_allowed_is_measured_and_recorded(tmp_path):
    model = zoo.build("bert")
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    loaded = LoadedModel(model, tiny.tokenizer(), str(tmp_path / "base"), checkpoint_dtype=torch.float32)
    vector = torch.randn(zoo.D_MODEL, generator=torch.Generator().manual_seed(0))
    intervention = intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), zoo.N_LAYERS)
    with pytest.raises(ArchitectureError, match="'bert'"):
        bake(loaded, intervention, tmp_path / "refused")
    made = bake(loaded, intervention, tmp_path / "edited", EditSettings(allow_leak=True))
    assert made.record.leak.largest_component == max(made.certificate.boundaries)
    leak = json.loads((tmp_path / "edited" / "ablation.json").read_text())["leak"]
    assert leak["largest_component"] > 1e-3 and "passes through" in leak["why"][0]
    exact = bake(tied(tmp_path / "tied")[0], intervention, tmp_path / "exact")
    assert exact.record.leak is None and max(exact.certificate.boundaries) < 1e-6
