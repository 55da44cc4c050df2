"""Intervention → context manager: the direction is taken out of what is written to the residual stream, as it runs.

The hooks sit at the write sites, not on the layers' outputs: a layer's output also holds what earlier layers wrote, so
taking a share out there would take it out again at every layer, and would not be what an edit of the weights does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from remove_refusals.errors import ArchitectureError
from remove_refusals.modelmap import map_model
from remove_refusals.plan import check_fit, pull_back
from remove_refusals.types import Intervention, ModelMap

Placement = Literal["writers", "residual"]
"""Where a norm lies between a writer and the residual stream: `writers` acts before it, as an edit of the weights does;
`residual` acts behind it, on exactly what is added. Elsewhere they are the same."""


def _take_out(basis: torch.Tensor, strength: float, d_model: int) -> Callable[..., Any]:
    """Build a forward hook that changes the first tensor of width d_model in a module's output."""
    on_device: dict[torch.device, torch.Tensor] = {}

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        vectors = on_device.get(tensor.device)
        if vectors is None:
            vectors = on_device.setdefault(tensor.device, basis.to(tensor.device))
        values = tensor.to(torch.float32)
        return (values - strength * (values @ vectors) @ vectors.T).to(tensor.dtype)

    def is_stream(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1:] == (d_model,)

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if is_stream(output):
            return changed(output)
        if isinstance(output, tuple):
            for index, value in enumerate(output):
                if is_stream(value):
                    return (*output[:index], changed(value), *output[index + 1 :])
        raise ArchitectureError(
            f"A hooked {type(module).__name__} returned {type(output).__name__} without a tensor of width {d_model}, "
            "expected what it returned when the model was mapped; report this model type."
        )

    return hook


@contextmanager
def ablated(
    model: PreTrainedModel,
    intervention: Intervention,
    *,
    model_map: ModelMap | None = None,
    placement: Placement = "writers",
) -> Iterator[None]:
    """Run a model with directions taken out while the context lasts; nothing of it stays.

    Args:
        model: The model; its weights are left as they are.
        intervention: What to take out where.
        model_map: The model's map, if it is at hand; otherwise it is derived.
        placement: On which side of a norm between writer and residual stream.

    Yields:
        Nothing.

    Raises:
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If the model cannot be mapped.
    """
    model_map = model_map or map_model(model)
    check_fit(intervention, model_map)
    edits = {(edit.kind, edit.layer): edit for edit in intervention.edits}
    modules = dict(model.named_modules())
    handles = []
    try:
        for site in model_map.sites:
            edit = edits.get((site.kind, site.layer))
            if edit is None or edit.strength == 0:
                continue
            point = site.hook if placement == "writers" else site.residual_hook
            basis = pull_back(intervention.directions[edit.direction].basis, point.steps, model.get_parameter)
            hook = _take_out(basis, edit.strength, model_map.d_model)
            handles.append(modules[point.module].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
