"""Intervention → context manager: the direction is taken out of what is written to the residual stream, as it runs.

The hooks sit at the write sites, not on the layers' outputs: a layer's output also holds what earlier layers wrote, so
taking a share out there would take it out again at every layer, and would not be what an edit of the weights does.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from remove_refusals.apply.scales import embedding_scale, stream_scale
from remove_refusals.apply.streams import with_stream
from remove_refusals.errors import ArchitectureError
from remove_refusals.linalg import project_out
from remove_refusals.map_types import HookPoint, ModelMap, Site, Writer
from remove_refusals.modelmap import map_model
from remove_refusals.plan import check_fit, pull_back
from remove_refusals.types import Direction, Intervention, SiteEdit

Placement = Literal["writers", "residual"]
"""Where a norm lies between a writer and the residual stream: `writers` acts before it, as an edit of the weights does;
`residual` acts behind it, on exactly what is added. Elsewhere they are the same."""


@dataclass(frozen=True)
class _TakeOut:
    """A forward hook: takes the component along `basis` out of the residual stream in a module's output or input."""

    basis: torch.Tensor
    strength: float
    d_model: int
    offset: tuple[float, ...] = ()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        return self._replaced(output, module)

    def on_input(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        """Do the same to the module's input, as a forward pre-hook."""
        return self._replaced((args, kwargs), module)

    def _replaced(self, value: Any, module: torch.nn.Module) -> Any:
        return with_stream(value, type(module).__name__, self.d_model, self._changed)

    def _changed(self, output: torch.Tensor) -> torch.Tensor:
        values = output.to(torch.float32).reshape(*output.shape[:-1], -1, self.d_model)
        basis = self.basis.to(output.device)
        values = values - self.strength * (values @ basis) @ basis.T
        if self.offset:
            values = values + basis @ torch.tensor(self.offset, device=basis.device)
        changed: torch.Tensor = values.reshape(output.shape).to(output.dtype)
        return changed


@contextmanager
def _standing_in(
    model: PreTrainedModel, writer: Writer, basis: torch.Tensor, strength: float, offset: tuple[float, ...]
) -> Iterator[None]:
    """Put an edited copy in a parameter's place while the context lasts."""
    original = model.get_parameter(writer.parameter)
    if original.is_meta or not original.is_floating_point() or original.shape != writer.shape:
        raise ArchitectureError(
            f"Parameter '{writer.parameter}' is quantised or not in memory, expected a floating-point tensor of shape "
            f"{writer.shape}; load the model without quantisation and without offloading."
        )
    owner, _, attribute = writer.parameter.rpartition(".")
    module = model.get_submodule(owner)
    edited = project_out(original, basis, strength, writer.axis, offset=offset)
    setattr(module, attribute, torch.nn.Parameter(edited, requires_grad=False))
    try:
        yield
    finally:
        setattr(module, attribute, original)


@contextmanager
def _hooked(
    model: PreTrainedModel, point: HookPoint, direction: Direction, strength: float, offset: tuple[float, ...]
) -> Iterator[None]:
    if point.writer is not None:
        basis = pull_back(direction.basis, point.writer.steps, model.get_parameter)
        with _standing_in(model, point.writer, basis, strength, offset):
            yield
        return
    hook = _TakeOut(pull_back(direction.basis, point.steps, model.get_parameter), strength, direction.d_model, offset)
    module = model.get_submodule(point.module)
    handle = (
        module.register_forward_pre_hook(hook.on_input, with_kwargs=True)
        if point.on_input
        else module.register_forward_hook(hook)
    )
    try:
        yield
    finally:
        handle.remove()


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
        model: The model; when the context ends it is as it was.
        intervention: What to take out where.
        model_map: The model's map, if it is at hand; otherwise it is derived.
        placement: On which side of a norm between writer and residual stream.

    Yields:
        Nothing.

    Raises:
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If the model cannot be mapped, or no hook reaches what is to be taken out.
    """
    model_map = model_map or map_model(model)
    if model_map.unhooked:
        raise ArchitectureError(
            f"Hooks on model type '{model_map.model_type}' are not exact ({model_map.unhooked[0].rstrip('.')}), "
            "expected hooks that are; use another model type."
        )
    check_fit(intervention, model_map)
    edits = {(edit.kind, edit.layer): edit for edit in intervention.edits}
    done: dict[HookPoint, SiteEdit] = {}
    with ExitStack() as hooks:
        for site in model_map.sites:
            edit = edits.get((site.kind, site.layer))
            if edit is None or edit.strength == 0:
                continue
            for point in site.hooks if placement == "writers" else _residual_points(site, model_map):
                # A module that several sites share is hooked once.
                known = done.setdefault(point, edit)
                if (known.strength, known.direction) != (edit.strength, edit.direction):
                    raise ArchitectureError(
                        f"Module '{point.module}' writes to the residual stream at two sites that want two different "
                        "edits, expected one edit per module; use the same strength and direction for both."
                    )
                if known is not edit:
                    continue
                offset = _offset_at(point, site, edit, model, model_map)
                direction = intervention.directions[edit.direction]
                hooks.enter_context(_hooked(model, point, direction, edit.strength, offset))
        yield


def _offset_at(
    point: HookPoint, site: Site, edit: SiteEdit, model: PreTrainedModel, model_map: ModelMap
) -> tuple[float, ...]:
    """What is to be added at a point so that the stream gets the edit's offset: the embedding's own site carries it."""
    if not edit.offset or all(writer.parameter != model_map.input_embedding for writer in site.writers):
        return ()
    if point.writer is not None:
        scale = embedding_scale(model, model_map)
    else:
        scale = stream_scale(model, model_map, point.module)
    return tuple(number / scale for number in edit.offset)


def _residual_points(site: Site, model_map: ModelMap) -> tuple[HookPoint, ...]:
    if site.residual_hook is None:
        raise ArchitectureError(
            f"In model type '{model_map.model_type}' '{site.writers[0].parameter}' reaches the residual stream in no "
            "module's output, expected one to hook; use the placement 'writers'."
        )
    return (site.residual_hook,)
