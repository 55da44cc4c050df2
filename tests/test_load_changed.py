"""A saved edit whose changed tensors alone are read back is the saved directory loaded as a second model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import zoo
from remove_refusals.baking.base import base_of
from remove_refusals.baking.disk import bake
from remove_refusals.baking.memory import load_changed
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.settings import EditSettings
from streaming import saved, taken_out
from test_blockformats import quantised
from test_whole_models import with_vision


def wrapper(folder: Path) -> None:
    with_vision(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")


def of_type(model_type: str, **options: Any) -> Callable[[Path], object]:
    return lambda folder: saved(folder, model_type, **options)


def in_blocks(model_type: str) -> Callable[[Path], object]:
    return lambda folder: quantised(folder, model_type, 256)


KINDS: dict[str, tuple[Callable[[Path], object], str, Any]] = {
    "dense": (of_type("llama"), "bfloat16", "auto"),
    "dense, in another data type": (of_type("qwen3", dtype=torch.float16), "float32", "auto"),
    "tied, untied by the edit": (of_type("gemma3"), "bfloat16", "untie"),
    "tied, edited as one": (of_type("gemma"), "float32", "both"),
    "experts that are fused in memory": (of_type("qwen3_moe"), "bfloat16", "auto"),
    "experts that the files fuse": (of_type("gpt_oss"), "float32", "auto"),
    "image-text wrapper": (wrapper, "float32", "auto"),
    "FP8": (in_blocks("llama"), "float32", "auto"),
    "FP8 experts": (in_blocks("deepseek_v3"), "bfloat16", "auto"),
    "MXFP4 experts": (in_blocks("gpt_oss"), "float32", "auto"),
    "INT4": (in_blocks("mistral"), "bfloat16", "auto"),
}


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(**zoo.inputs(loaded.model)).logits
    return found


def edit(base: LoadedModel, tied: Any, folder: Path) -> tuple[LoadedModel | None, Path, set[str]]:
    """Save an edit; give what is read of it, where it is, and which parameters it changes."""
    made_from = base_of(base)
    edited = bake(made_from, taken_out(strength=0.8), folder / "out", EditSettings(tied=tied))
    changed = {entry.parameter for entry in edited.plan.entries}
    return load_changed(base, made_from, edited.plan, edited.directory), edited.directory, changed


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_a_second_model(kind: str, tmp_path: Path) -> None:
    build, dtype, tied = KINDS[kind]
    build(tmp_path)
    base = load(tmp_path / "base", dtype=dtype)
    before = logits(base)
    read, directory, changed = edit(base, tied, tmp_path)
    assert read is not None
    found, afresh = logits(read), logits(load(directory, dtype=dtype))
    assert torch.equal(found, afresh) and not torch.equal(found, before) and torch.equal(logits(base), before)
    # Nothing but the writers has memory of its own.
    own = {value.data_ptr() for value in base.model.parameters()}
    assert {name for name, value in read.model.named_parameters() if value.data_ptr() not in own} == changed


@pytest.mark.parametrize("kind", ["offloaded", "other files", "numbers that Transformers rounds twice"])
def test_what_is_not_known_to_be_read_alike_is_left_to_be_loaded_afresh(kind: str, tmp_path: Path) -> None:
    build, options = of_type("llama"), {"dtype": "bfloat16"}
    if kind == "offloaded":
        options |= {"device_map": "auto", "max_memory": "40KB", "offload": str(tmp_path / "disk")}
    elif kind == "numbers that Transformers rounds twice":
        # To the data type of the scales, and then to this one.
        build, options = in_blocks("mistral"), {"dtype": "float32"}
    build(tmp_path)
    base = load(tmp_path / "base", **options)
    if kind == "other files":
        path, name = tmp_path / "base" / "model.safetensors", "model.layers.2.mlp.down_proj.weight"
        stored = load_file(path)
        save_file(stored | {name: stored[name] * 2}, path, metadata={"format": "pt"})
    assert edit(base, "auto", tmp_path)[0] is None


def test_a_saved_tensor_in_no_known_format_is_left_to_be_loaded_afresh(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    base = load(tmp_path / "base", dtype="bfloat16")
    made_from, out = base_of(base), tmp_path / "out"
    plan = bake(made_from, taken_out(), out).plan
    assert load_changed(base, made_from, plan, out) is not None
    stored = load_file(out / "model.safetensors")
    name = plan.entries[-1].parameter
    save_file(stored | {name: stored[name].to(torch.int8)}, out / "model.safetensors", metadata={"format": "pt"})
    assert load_changed(base, made_from, plan, out) is None
