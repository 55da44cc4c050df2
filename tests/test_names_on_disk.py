"""Checkpoints that name their tensors otherwise than the model does, or hold some that it has no place for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.examination import inspect
from remove_refusals.models.load import load
from remove_refusals.types import DirectionOrigin

MASK = "h.0.attn.bias"


@pytest.fixture(params=["without the prefix", "with masks"])
def base(request, tmp_path):
    """A GPT-2 as the hub has it: no `transformer.` before its names, and perhaps causal masks among its weights."""
    directory = tmp_path / "base"
    tiny.gpt2().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    if request.param == "with masks":
        tensors[MASK] = torch.ones(1, 1, 512, 512).tril()
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def test_inspect_gives_the_names_in_the_files(base):
    writers = inspect(str(base)).writers
    names = load_file(base / "model.safetensors").keys()
    assert {writer.on_disk for writer in writers} <= names and "h.0.attn.c_proj.weight" in names
    assert all(writer.dtype == "F32" and writer.missing is None for writer in writers)
    assert len(writers) == 2 + 2 * 4


def test_an_edit_is_exact_and_certified(base, tmp_path):
    loaded = load(base)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    intervention = intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), 2)
    baked = bake(loaded, intervention, tmp_path / "edited")
    assert baked.certificate.passed and max(baked.certificate.boundaries) < 1e-6
    tokens = torch.arange(4, 12).unsqueeze(0)
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
    with torch.inference_mode(), ablated(loaded.model, intervention):
        assert float((loaded.model(tokens).logits - edited(tokens).logits).abs().max()) < 1e-5
    again = certify_directory(tmp_path / "edited", str(base))
    assert again.problems == () and len(again.edited) == len(baked.certificate.edited)
    assert again.identical == baked.certificate.identical > 0
    # What the model has no place for is kept, and an unembedding is added under the model's name.
    names = load_file(tmp_path / "edited" / "model.safetensors").keys()
    assert names == load_file(base / "model.safetensors").keys() | {"lm_head.weight"}


def test_a_changed_bystander_is_still_found(base, tmp_path):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    bake(load(base), intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), 2), tmp_path / "edited")
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["h.1.ln_1.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    problems = certify_directory(tmp_path / "edited", str(base)).problems
    assert len(problems) == 1 and "h.1.ln_1.weight" in problems[0]
