"""Models without weights: built from a configuration, and the names that their parameters have on disk."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from remove_refusals.modelmap.types import DiskTensor, ModelMap
from remove_refusals.models import explained, model_source, read_config

T = TypeVar("T")


def skeleton(model: PreTrainedModel, *, dtype: torch.dtype | None = None, tied: bool | None = None) -> PreTrainedModel:
    """Copy a model without weights and quantisation, onto the meta device, its embeddings `tied` or not."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if tied is not None:
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = tied
    with torch.device("meta"):
        built: PreTrainedModel = type(model)._from_config(config, dtype=dtype or model.dtype)
    return _without_weights(built)


def skeleton_of(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model without weights, as `skeleton` does, from a checkpoint's configuration alone."""
    name = model_source(str(source))
    with explained(f"The configuration of {source}"):
        _, config = read_config(name, {"revision": revision}, trust_remote_code)
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return _without_weights(built)


def _without_weights(built: PreTrainedModel) -> PreTrainedModel:
    """Move to the meta device what a model has built elsewhere in spite of the device it was told to use."""
    if any(not parameter.is_meta for parameter in built.parameters()):
        built = built.to("meta")
        built.tie_weights()
    return built.eval()


def disk_tensors(model: PreTrainedModel, name: str, shape: tuple[int, ...], axis: int) -> tuple[DiskTensor, ...]:
    """Find the tensors of a checkpoint that hold a parameter: several for one that is fused in memory only."""
    # The axis is found by its size: only on disk, where it may lie elsewhere, is it twice as wide in the second run.
    first, second = (
        revert_weight_conversion(model, {name: torch.empty(sizes, device="meta")})
        for sizes in (shape, [size + (index == axis) * size for index, size in enumerate(shape)])
    )
    found = []
    for disk_name, tensor in first.items():
        other = second[disk_name]
        axes = [index for index, size in enumerate(tensor.shape) if other.shape[index] != size]
        if len(axes) == 1:
            found.append(DiskTensor(disk_name, axes[0]))
    return tuple(found)


def by_stored_name(tensors: Mapping[str, T], model_map: ModelMap) -> dict[str, T]:
    """Put what belongs to a checkpoint's tensors under the names that the model's map speaks of; others keep theirs."""
    # In the files the base model's prefix may be left out (as in the hub's `gpt2`) or stand before what has none.
    prefix = model_map.prefix + "."

    def named(name: str) -> str:
        others = {prefix + name, name.removeprefix(prefix)} & model_map.stored - tensors.keys()
        return next(iter(others), name) if name not in model_map.stored else name

    return {named(name): value for name, value in tensors.items()}


def disk_names(model: PreTrainedModel, *names: str) -> tuple[str, ...]:
    """Name the tensors of a checkpoint that hold some parameters, or all that one may hold."""
    state = model.state_dict()
    tensors = {name: torch.empty(state[name].shape, device="meta") for name in names or state}
    return tuple(revert_weight_conversion(model, tensors))
