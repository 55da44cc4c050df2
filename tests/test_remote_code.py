"""A model that comes with its own code: run where it is trusted, and edited like any other."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

import remote_code
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import ModelError
from remove_refusals.examination import inspect
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.load import load
from remove_refusals.types import DirectionOrigin


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield remote_code.write(tmp_path / "base")
    # Python remembers packages that it has imported, also from a folder that is gone.
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_without_trust_it_is_refused_in_one_sentence(base):
    for look in (load, lambda path: inspect(str(path))):
        with pytest.raises(ModelError, match="trust") as refusal:
            look(base)
        assert str(refusal.value).count(". ") == 0 and str(base) in str(refusal.value)


def test_it_is_mapped_as_exact(base):
    model_map = map_model(load(base, trust_remote_code=True).model)
    assert model_map.verdict == "exact" and model_map.unused == ()
    assert {(site.kind, site.layer): [w.parameter for w in site.writers] for site in model_map.sites} == {
        ("embedding", None): ["transformer.wte.weight"],
        **{("attn", n): [f"transformer.h.{n}.attn.c_proj.weight"] for n in range(remote_code.N_LAYERS)},
        **{("mlp", n): [f"transformer.h.{n}.mlp.c_proj.weight"] for n in range(remote_code.N_LAYERS)},
    }
    assert inspect(str(base), trust_remote_code=True).verdict == "exact"


def test_its_edit_is_certified_and_loads_with_the_code_that_lies_beside_it(base, tmp_path):
    loaded = load(base, trust_remote_code=True)
    vector = torch.randn(remote_code.WIDTH, generator=torch.Generator().manual_seed(0))
    intervention = intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), remote_code.N_LAYERS)
    baked = bake(loaded, intervention, tmp_path / "edited")
    assert baked.certificate.passed and max(baked.certificate.boundaries) < 1e-6
    for name in ("configuration_old.py", "modeling_old.py"):
        assert (baked.directory / name).read_text() == (base / name).read_text()
    auto_map = json.loads((baked.directory / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_old.OldLMHeadModel"
    edited = AutoModelForCausalLM.from_pretrained(baked.directory, trust_remote_code=True).eval()
    tokens = torch.arange(4, 12).unsqueeze(0)
    with torch.inference_mode():
        plain = loaded.model(tokens).logits
        with ablated(loaded.model, intervention):
            hooked = loaded.model(tokens).logits
        assert float((plain - hooked).abs().max()) > 0.05
        assert float((hooked - edited(tokens).logits).abs().max()) < 1e-5
    assert certify_directory(baked.directory, str(base), trust_remote_code=True).problems == ()


def test_the_whole_job_trusts_what_it_saved(base, command, inputs, tmp_path):
    given = ("run", base, "-o", tmp_path / "edited", *inputs.train, *inputs.test)
    refused = command(*given)
    assert refused.code == 2 and "trust" in refused.err
    done = command(*given, "--trust-remote-code")
    assert done.code == 0 and (tmp_path / "edited" / "scores.json").is_file(), done.err
