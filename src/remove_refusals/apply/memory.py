"""Edit plan → a model that fits in memory: new tensors, and a directory that holds them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from remove_refusals.errors import ModelError
from remove_refusals.linalg import project_out
from remove_refusals.loading import quiet
from remove_refusals.map_types import EditPlan, ModelMap
from remove_refusals.skeleton import skeleton


def edited_tensors(
    model: PreTrainedModel,
    plan: EditPlan,
    model_map: ModelMap,
    *,
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> dict[str, torch.Tensor]:
    """Compute a model's tensors after an edit.

    Args:
        model: The model; it is left as it is.
        plan: What happens to which tensor.
        model_map: The model's map.
        dtype_of: Gives the dtype that a floating-point tensor of a given name is cast to; None keeps it as it is.
            Edits are computed in float32 from the model's tensors and cast once.

    Returns:
        Every tensor of the model's state by name. Tensors that the plan leaves alone and whose dtype does not change
        share memory with the model's. With `plan.untie` the unembedding is the unedited embedding.

    Raises:
        ModelError: If a tensor is quantised or not in memory.
    """
    tensors: dict[str, torch.Tensor] = dict(model.state_dict())
    originals = dict(tensors)
    for entry in plan.entries:
        tensor = tensors.get(entry.parameter)
        if tensor is None or tensor.is_meta or not tensor.is_floating_point() or tensor.shape != entry.shape:
            raise ModelError(
                f"Tensor '{entry.parameter}' is missing, quantised or not in memory, expected a floating-point tensor "
                f"of shape {entry.shape}; load the model without quantisation and without offloading."
            )
        edited = project_out(
            tensor.to(torch.float32), entry.basis, entry.strength, entry.axis, plan.variant, entry.offset
        )
        tensors[entry.parameter] = edited.to(dtype_of(entry.parameter) or tensor.dtype)
    if model_map.unembedding is not None and model_map.tied:
        source = originals if plan.untie else tensors
        for name in _names_of(model, model_map.input_embedding) - {model_map.input_embedding}:
            tensors[name] = source[model_map.input_embedding]
    return {
        name: tensor.to(dtype_of(name) or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _names_of(model: PreTrainedModel, parameter: str) -> set[str]:
    """Every name under which the state holds one parameter."""
    wanted = model.get_parameter(parameter)
    return {name for name, value in model.named_parameters(remove_duplicate=False) if value is wanted}


def with_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], *, untie: bool) -> PreTrainedModel:
    """Build a second model of the same class around given tensors.

    Args:
        model: The model whose class and configuration are used; it is left as it is.
        tensors: Its state, complete.
        untie: Whether the embedding and the unembedding become two parameters.

    Returns:
        The new model, in evaluation mode.
    """
    built = skeleton(model, tied=False) if untie else skeleton(model)
    built.load_state_dict(_apart(tensors) if untie else dict(tensors), strict=True, assign=True)
    if not untie:
        built.tie_weights()
    # The names on disk stay those of the checkpoint that the model was loaded from.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        built._weight_conversions = conversions
    if model.generation_config is not None:
        built.generation_config = model.generation_config
    return built


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give each tensor memory of its own: a model that ties nothing saves every one of them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def save_edited(
    model: PreTrainedModel,
    plan: EditPlan,
    model_map: ModelMap,
    directory: Path,
    *,
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> None:
    """Write an edited model as a Transformers directory: configuration, generation configuration and weights.

    Args:
        model: The model; it is left as it is.
        plan: What happens to which tensor.
        model_map: The model's map.
        directory: An existing directory.
        dtype_of: Gives the dtype of the saved tensor of a given name; None keeps the model's.

    Raises:
        ModelError: If a tensor is quantised or not in memory.
    """
    tensors = edited_tensors(model, plan, model_map, dtype_of=dtype_of)
    with quiet(bars=True):
        with_tensors(model, tensors, untie=plan.untie).save_pretrained(directory, max_shard_size="4GB")
