"""Intervention → context manager: the direction is taken out of what is written to the residual stream, as it runs.

The hooks sit at the write sites, not on the layers' outputs: a layer's output also holds what earlier layers wrote, so
taking a share out there would take it out again at every layer, and would not be what an edit of the weights does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from remove_refusals.errors import ArchitectureError
from remove_refusals.modelmap import map_model
from remove_refusals.plan import check_fit, pull_back
from remove_refusals.types import Direction, HookPoint, Intervention, ModelMap

Placement = Literal["writers", "residual"]
"""Where a norm lies between a writer and the residual stream: `writers` acts before it, as an edit of the weights does;
`residual` acts behind it, on exactly what is added. Elsewhere they are the same."""


@dataclass(frozen=True)
class _TakeOut:
    """A forward hook: takes the component along `basis` out of the module's first output of width d_model.

    With `constant`, `[d_model]`, that vector is subtracted instead: the component of a bias.
    """

    basis: torch.Tensor
    strength: float
    d_model: int
    constant: torch.Tensor | None = None

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._fits(output):
            return self._changed(output)
        if isinstance(output, tuple):
            for index, value in enumerate(output):
                if self._fits(value):
                    return (*output[:index], self._changed(value), *output[index + 1 :])
        raise ArchitectureError(
            f"A hooked {type(module).__name__} returned {type(output).__name__} without a tensor of width "
            f"{self.d_model}, expected what it returned when the model was mapped; report this model type."
        )

    def on_input(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Do the same to the module's first input of width d_model, as a forward pre-hook."""
        for index, value in enumerate(args):
            if self._fits(value):
                return (*args[:index], self._changed(value), *args[index + 1 :]), kwargs
        for name, value in kwargs.items():
            if self._fits(value):
                return args, {**kwargs, name: self._changed(value)}
        raise ArchitectureError(
            f"A hooked {type(module).__name__} was called without a tensor of width {self.d_model}, expected what it "
            "took when the model was mapped; report this model type."
        )

    def _fits(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.dim() > 0
            and value.shape[-1] % self.d_model == 0
            and value.shape[-1] > 0
        )

    def _changed(self, output: torch.Tensor) -> torch.Tensor:
        values = output.to(torch.float32).reshape(*output.shape[:-1], -1, self.d_model)
        if self.constant is not None:
            values = values - self.constant.to(output.device)
        else:
            basis = self.basis.to(output.device)
            values = values - self.strength * (values @ basis) @ basis.T
        changed: torch.Tensor = values.reshape(output.shape).to(output.dtype)
        return changed


def _hook_for(model: PreTrainedModel, point: HookPoint, direction: Direction, strength: float) -> _TakeOut:
    basis = pull_back(direction.basis, point.steps, model.get_parameter)
    if point.bias is None:
        return _TakeOut(basis, strength, direction.d_model)
    bias = model.get_parameter(point.bias).detach().to("cpu", torch.float32)
    return _TakeOut(basis, strength, direction.d_model, strength * basis @ (basis.T @ bias))


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
        ArchitectureError: If the model cannot be mapped, or no hook reaches one of its writers.
    """
    model_map = model_map or map_model(model)
    if model_map.unhooked:
        raise ArchitectureError(
            f"Hooks on model type '{model_map.model_type}' are not exact: {model_map.unhooked[0]} "
            "Edit the weights instead."
        )
    check_fit(intervention, model_map)
    edits = {(edit.kind, edit.layer): edit for edit in intervention.edits}
    modules = dict(model.named_modules())
    handles = []
    try:
        for site in model_map.sites:
            edit = edits.get((site.kind, site.layer))
            if edit is None or edit.strength == 0:
                continue
            for point in site.hooks if placement == "writers" else (site.residual_hook,):
                hook = _hook_for(model, point, intervention.directions[edit.direction], edit.strength)
                module = modules[point.module]
                handles.append(
                    module.register_forward_pre_hook(hook.on_input, with_kwargs=True)
                    if point.on_input
                    else module.register_forward_hook(hook)
                )
        yield
    finally:
        for handle in handles:
            handle.remove()
