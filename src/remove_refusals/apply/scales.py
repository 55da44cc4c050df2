"""What a constant is multiplied by on its way into the residual stream, measured on the model.

Some models scale their embeddings (Gemma by the root of its width, Granite by a number of its configuration), within
the embedding's module or behind it. A constant that is added to a row, or to a module's output, has to be divided by
that number. It is measured in the dtype that the model runs in, and only the part before the first layer is run.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from remove_refusals.errors import ArchitectureError
from remove_refusals.map_types import ModelMap
from remove_refusals.terms import first_of_width

_N_TOKENS = 8
_TOLERANCE = 0.02
"""How far a channel may be off the common factor: beyond the rounding of bfloat16, below any norm's effect."""


class _EnoughError(Exception):
    """Ends a forward pass whose rest is not needed."""


def embedding_scale(model: PreTrainedModel, model_map: ModelMap) -> float:
    """Measure what a row of the input embedding is multiplied by until it is in the residual stream.

    Args:
        model: The model, in memory; it is left as it is.
        model_map: The model's map.

    Returns:
        The factor, 1.0 in most models.

    Raises:
        ArchitectureError: If the rows do not reach the first layer as they are but for one factor.
    """
    name = model_map.input_embedding.rpartition(".")[0]
    outputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)

    _run(model, model_map, name, keep)
    rows = model.get_parameter(model_map.input_embedding)[:_N_TOKENS].detach()
    within = _factor(rows.to(outputs[0].device), outputs[0].reshape(-1, model_map.d_model), model_map)
    return within * stream_scale(model, model_map, name)


def stream_scale(model: PreTrainedModel, model_map: ModelMap, module: str) -> float:
    """Measure what a module's output is multiplied by until it is in the residual stream.

    Args:
        model: The model, in memory; it is left as it is.
        model_map: The model's map.
        module: The module's name, one that runs before the first layer.

    Returns:
        The factor, 1.0 in most models.

    Raises:
        ArchitectureError: If the output does not reach the first layer as it is but for one factor.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_N_TOKENS, model_map.d_model), generator=generator) * 2.0 - 1.0
    zero, one = (_run(model, model_map, module, _put(share * signs, model_map.d_model)) for share in (0.0, 1.0))
    return _factor(signs.to(one.device), (one - zero).reshape(-1, model_map.d_model), model_map)


def _put(values: torch.Tensor, d_model: int) -> Callable[..., Any]:
    """A forward hook that puts values in the place of a module's output."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        stream = first_of_width(leaves, d_model)
        if stream is None:
            return output
        put = values.to(stream).reshape(stream.shape)
        return tree_unflatten([put if leaf is stream else leaf for leaf in leaves], structure)

    return hook


def _run(model: PreTrainedModel, model_map: ModelMap, module: str, hook: Callable[..., Any]) -> torch.Tensor:
    """Run a few tokens up to the first layer with a hook on a module, and give what the layer is handed."""
    found: list[torch.Tensor] = []

    def stop(layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        stream = first_of_width((args, kwargs), model_map.d_model)
        if stream is not None:
            found.append(stream.to(torch.float32))
        raise _EnoughError

    handles = [
        model.get_submodule(module).register_forward_hook(hook),
        model.get_submodule(model_map.layers[0]).register_forward_pre_hook(stop, with_kwargs=True),
    ]
    tokens = torch.arange(_N_TOKENS, device=model.get_input_embeddings().weight.device).unsqueeze(0)
    try:
        with torch.inference_mode(), suppress(_EnoughError):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not found or found[0].numel() != _N_TOKENS * model_map.d_model:
        raise _refusal(model_map, "its first layer was not handed one row for each token")
    return found[0]


def _factor(before: torch.Tensor, after: torch.Tensor, model_map: ModelMap) -> float:
    """The number that the one is the other times, by least squares; refused where there is no such number."""
    given, got = before.to(torch.float64), after.to(torch.float64)
    factor = float((given * got).sum() / given.square().sum())
    if not float((got - factor * given).norm()) <= _TOLERANCE * abs(factor) * float(given.norm()):
        raise _refusal(model_map, "its embedding is changed on the way to the first layer")
    return factor


def _refusal(model_map: ModelMap, reason: str) -> ArchitectureError:
    return ArchitectureError(
        f"Model type '{model_map.model_type}' can carry no constant through its residual stream ({reason}), expected "
        "an embedding whose rows are added to it; leave the affine variant out."
    )
