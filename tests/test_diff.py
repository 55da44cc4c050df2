"""What differs between two checkpoints, and an edit that is taken back."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.saved import save_direction
from remove_refusals.errors import DirectionError
from remove_refusals.examination import diff
from remove_refusals.types import DirectionOrigin
from streaming import saved, streamed, taken_out


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_the_difference_of_an_edit_lies_along_its_direction(model_type, tmp_path):
    saved(tmp_path, model_type, torch.float32)
    intervention = taken_out(strength=0.5, layers=(1, 2))
    edited = streamed(tmp_path, intervention)
    found = diff(str(tmp_path / "base"), str(edited.directory), intervention.directions[0])
    assert {row.name for row in found.tensors} == {t.name for entry in edited.plan.entries for t in entry.on_disk}
    assert found.identical == edited.certificate.identical
    assert all(row.status == "changed" and row.along == pytest.approx(1, abs=1e-4) for row in found.tensors)
    assert found.along == pytest.approx(1, abs=1e-4) and 0 < found.relative < 1
    other = direction_from_vectors(torch.randn(zoo.D_MODEL), DirectionOrigin(method="given"))
    assert diff(str(tmp_path / "base"), str(edited.directory), other).along < 0.9


def test_a_difference_is_measured_and_what_cannot_be_is_named(tmp_path):
    saved(tmp_path, "llama", torch.float32)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    tensors = load_file(path)
    scaled, cut, gone = "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    stranger = {"stranger": torch.ones(3)}
    changed = {scaled: 1.5 * tensors[scaled], cut: tensors[cut][:-1].clone(), **stranger}
    save_file({name: value for name, value in (tensors | changed).items() if name != gone}, path)
    found = {row.name: row for row in diff(str(tmp_path / "base"), str(tmp_path / "other")).tensors}
    assert found[scaled].relative == pytest.approx(0.5) and found[scaled].along is None
    assert {name: row.status for name, row in found.items()} == {
        scaled: "changed",
        cut: "another shape",
        gone: "only in the first",
        "stranger": "only in the second",
    }
    with pytest.raises(DirectionError, match="d_model 3"):
        narrow = direction_from_vectors(torch.ones(3), DirectionOrigin(method="given"))
        diff(str(tmp_path / "base"), str(tmp_path / "other"), narrow)


def test_the_commands(tmp_path, command):
    saved(tmp_path, "llama")
    streamed(tmp_path, taken_out())
    save_direction(taken_out().directions[0], tmp_path / "direction.safetensors")
    pair = (tmp_path / "base", tmp_path / "streamed")
    said = command("diff", *pair, "--direction", tmp_path / "direction.safetensors").out
    assert "9 tensors differ" in said and "along the direction" in said
    assert command("diff", pair[0], pair[0]).out.startswith("0 tensors differ")
