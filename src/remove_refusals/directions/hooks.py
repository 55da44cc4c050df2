"""Intervention → context manager: the direction is taken out of what is written to the residual stream, as it runs.

The hooks sit at the write sites, not on the layers' outputs: a layer's output also holds what earlier layers wrote, so
taking a share out there would take it out again at every layer, and would not be what an edit of the weights does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from remove_refusals.directions.intervention import check_fit
from remove_refusals.directions.plan import pull_back
from remove_refusals.errors import ArchitectureError
from remove_refusals.formula import project_out
from remove_refusals.modelmap import ChannelStep, HookPoint, ModelMap, Site, Writer, first_of_width, map_model
from remove_refusals.settings import SiteKind
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
        changed: torch.Tensor = values.reshape(output.shape).to(output.dtype)
        return changed


@contextmanager
def _standing_in(model: PreTrainedModel, writer: Writer, basis: torch.Tensor, strength: float) -> Iterator[None]:
    """Put an edited copy in a parameter's place while the context lasts."""
    original = model.get_parameter(writer.parameter)
    if original.is_meta or not original.is_floating_point() or original.shape != writer.shape:
        raise ArchitectureError(
            f"Parameter '{writer.parameter}' is quantised or not in memory, expected a floating-point tensor of shape "
            f"{writer.shape}; load the model without quantisation and without offloading."
        )
    owner, _, attribute = writer.parameter.rpartition(".")
    module = model.get_submodule(owner)
    edited = project_out(original, basis, strength, writer.axis)
    setattr(module, attribute, torch.nn.Parameter(edited, requires_grad=False))
    try:
        yield
    finally:
        setattr(module, attribute, original)


@contextmanager
def _hooked(model: PreTrainedModel, point: HookPoint, direction: Direction, strength: float) -> Iterator[None]:
    if point.writer is not None:
        basis = pull_back(direction.basis, point.writer.steps, model.get_parameter)
        with _standing_in(model, point.writer, basis, strength):
            yield
        return
    hook = _TakeOut(pull_back(direction.basis, point.steps, model.get_parameter), strength, direction.d_model)
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
                direction = intervention.directions[edit.direction]
                hooks.enter_context(_hooked(model, point, direction, edit.strength))
        yield


def _residual_points(site: Site, model_map: ModelMap) -> tuple[HookPoint, ...]:
    if site.residual_hook is None:
        raise ArchitectureError(
            f"In model type '{model_map.model_type}' '{site.writers[0].parameter}' reaches the residual stream in no "
            "module's output, expected one to hook; use the placement 'writers'."
        )
    return (site.residual_hook,)


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
                hooks.enter_context(_hooked_steering(model, model_map, point, steer))
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
def _hooked_steering(
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


def with_stream(value: Any, module: str, d_model: int, changed: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the residual stream among what a module takes or returns.

    Args:
        value: The arguments or the result.
        module: The module's name, for the error.
        d_model: The width of the residual stream.
        changed: Gives the tensor that takes the stream's place.

    Returns:
        The same structure with the stream changed.

    Raises:
        ArchitectureError: If there is no tensor of that width.
    """
    leaves, structure = tree_flatten(value)
    stream = first_of_width(leaves, d_model)
    if stream is None:
        raise ArchitectureError(
            f"A hooked module '{module}' was run without a tensor of width {d_model}, expected what it took and "
            "returned when the model was mapped; report this model type."
        )
    return tree_unflatten([changed(leaf) if leaf is stream else leaf for leaf in leaves], structure)
