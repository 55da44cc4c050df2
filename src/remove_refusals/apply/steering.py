"""Strengths and directions that a search still changes → context manager: differentiable, one for each row or for all.

What the hooks do is what `hooks.ablated` does with an intervention of the same strengths and directions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from remove_refusals.apply.streams import with_stream
from remove_refusals.errors import ArchitectureError
from remove_refusals.map_types import ChannelStep, HookPoint, ModelMap
from remove_refusals.types import SiteKind

SiteKey = tuple[SiteKind, int | None]
"""A kind of site and its layer; None for the embedding."""


@dataclass(frozen=True, eq=False)
class Steer:
    """What is taken out at one site.

    Attributes:
        strength: `[]`, or `[n_rows]` for a strength of its own for each row of the batch; float32, may need gradients.
        direction: `[d_model]`, or `[n_rows, d_model]`; float32, of any length but 0, may need gradients.
    """

    strength: torch.Tensor
    direction: torch.Tensor


@contextmanager
def steered(
    model: PreTrainedModel, model_map: ModelMap, steers: Mapping[SiteKey, Callable[[], Steer]]
) -> Iterator[None]:
    """Run a model with directions taken out while the context lasts; nothing of it stays.

    Args:
        model: The model; when the context ends it is as it was.
        model_map: The model's map.
        steers: For each site to be edited a function that gives what is taken out there; it is called at every run, so
            that gradients reach what it is computed from.

    Yields:
        Nothing.

    Raises:
        ArchitectureError: If what is to be taken out is no module's output or input, or lies behind steps between
            tokens, where no gradients are computed.
    """
    if model_map.unhooked:
        raise ArchitectureError(
            f"Hooks on model type '{model_map.model_type}' are not exact ({model_map.unhooked[0].rstrip('.')}), "
            "expected hooks that are; use another model type."
        )
    done: set[HookPoint] = set()
    with ExitStack() as hooks:
        for site in model_map.sites:
            steer = steers.get((site.kind, site.layer))
            for point in site.hooks if steer is not None else ():
                # A module that several sites share is hooked once.
                if point in done:
                    continue
                done.add(point)
                assert steer is not None
                hooks.enter_context(_hooked(model, model_map, point, steer))
        yield


def is_steerable(model_map: ModelMap) -> bool:
    """Tell whether every site can be steered: each is a module's output or input, with channel-wise steps behind it."""
    return not model_map.unhooked and all(
        point.writer is None and all(step.kind != "taps" for step in point.steps)
        for site in model_map.sites
        for point in site.hooks
    )


@contextmanager
def added(model: PreTrainedModel, model_map: ModelMap, vectors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Run a model with vectors added to the residual stream at every token while the context lasts; nothing stays.

    Args:
        model: The model; when the context ends it is as it was.
        model_map: The model's map.
        vectors: By index on the layer axis of `Activations.hidden` (the stream before that layer, and `n_layers` for
            the stream behind the last): `[d_model]`, or `[n_rows, d_model]` for a vector of its own for each row of the
            batch; float32.

    Yields:
        Nothing.

    Raises:
        ArchitectureError: If a layer is run without the residual stream.
    """
    with ExitStack() as hooks:
        for index, vector in vectors.items():
            hooks.callback(_adding(model, model_map, index, vector).remove)
        yield


def _adding(model: PreTrainedModel, model_map: ModelMap, index: int, vector: torch.Tensor) -> RemovableHandle:
    behind = index == model_map.n_layers
    name = model_map.layers[index - 1 if behind else index]

    def changed(stream: torch.Tensor) -> torch.Tensor:
        rows = vector.reshape(-1, 1, model_map.d_model).to(stream.device)
        values = stream.to(torch.float32).reshape(len(rows), -1, model_map.d_model)
        return (values + rows).reshape(stream.shape).to(stream.dtype)

    def replaced(value: Any) -> Any:
        return with_stream(value, name, model_map.d_model, changed)

    layer = model.get_submodule(name)
    handle: RemovableHandle
    if behind:
        handle = layer.register_forward_hook(lambda _, args, output: replaced(output))
    else:
        handle = layer.register_forward_pre_hook(lambda _, args, kwargs: replaced((args, kwargs)), with_kwargs=True)
    return handle


@contextmanager
def _hooked(
    model: PreTrainedModel, model_map: ModelMap, point: HookPoint, steer: Callable[[], Steer]
) -> Iterator[None]:
    if point.writer is not None or any(step.kind == "taps" for step in point.steps):
        raise ArchitectureError(
            f"In model type '{model_map.model_type}' what '{point.module or point.writer}' writes cannot be steered, "
            "expected a module's output with channel-wise steps behind it; choose layer and position only."
        )
    gains: dict[str | None, torch.Tensor] = {
        step.parameter: model.get_parameter(step.parameter).detach().to(torch.float32)
        for step in point.steps
        if step.parameter is not None
    }

    def changed(output: torch.Tensor) -> torch.Tensor:
        now = steer()
        direction = _pulled_back(now.direction, point.steps, gains).to(output.device)
        strength = now.strength.to(output.device)
        n_rows = max(strength.numel(), direction.numel() // model_map.d_model)
        values = output.to(torch.float32).reshape(n_rows, -1, model_map.d_model)
        columns = direction.reshape(-1, model_map.d_model, 1)
        component = values @ columns
        taken = values - strength.reshape(-1, 1, 1) * component * columns.transpose(1, 2)
        return taken.reshape(output.shape).to(output.dtype)

    def replaced(value: Any) -> Any:
        return with_stream(value, point.module, model_map.d_model, changed)

    module = model.get_submodule(point.module)
    handle = (
        module.register_forward_pre_hook(lambda _, args, kwargs: replaced((args, kwargs)), with_kwargs=True)
        if point.on_input
        else module.register_forward_hook(lambda _, args, output: replaced(output))
    )
    try:
        yield
    finally:
        handle.remove()


def _pulled_back(
    direction: torch.Tensor, steps: tuple[ChannelStep, ...], gains: Mapping[str | None, torch.Tensor]
) -> torch.Tensor:
    """Do what `plan.pull_back` does to one direction, in a way that lets gradients through; unit length."""
    for step in reversed(steps):
        if step.kind == "center":
            direction = direction - direction.mean(dim=-1, keepdim=True)
        else:
            direction = (gains[step.parameter].reshape(-1) + step.offset).to(direction.device) * direction
    unit: torch.Tensor = direction / direction.norm(dim=-1, keepdim=True)
    return unit
