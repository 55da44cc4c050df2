"""Intervention → context manager: the direction is taken out of what is written to the residual stream, as it runs.

The hooks sit at the write sites, not on the layers' outputs: a layer's output also holds what earlier layers wrote, so
taking a share out there would take it out again at every layer, and would not be what an edit of the weights does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from remove_refusals.directions.intervention import Taken, as_intervention
from remove_refusals.directions.plan import tied_choice
from remove_refusals.errors import ArchitectureError
from remove_refusals.formula import project_out, pull_back, pulled_back, taken_out
from remove_refusals.modelmap import (
    HookPoint,
    ModelMap,
    Routing,
    Site,
    Writer,
    expert_of_rows,
    first_of_width,
    map_model,
    routing_of,
)
from remove_refusals.models import hooked, is_spread, model_of, whole_parameter
from remove_refusals.settings import EditSettings, SiteKind, Tied
from remove_refusals.types import Intervention, SiteEdit

Placement = Literal["writers", "residual"]
"""Where a norm lies between a writer and the residual stream: `writers` acts before it, as an edit of the weights does;
`residual` acts behind it, on exactly what is added. Elsewhere they are the same."""

SiteKey = tuple[SiteKind, int | None]
"""A kind of site and its layer; None for the embedding."""

Edit = TypeVar("Edit")


@contextmanager
def ablated(
    model: Any, what: Taken, *, strength: float = 1.0, placement: Placement = "writers", tied: Tied = "auto"
) -> Iterator[None]:
    """Run a model with directions taken out while the context lasts; afterwards it is as it was.

    Args:
        model: A `PreTrainedModel`, with an adapter of PEFT or without, a pipeline, or what `load` gave.
        what: An intervention; or a direction, or a plain tensor of one, to be taken out everywhere.
        strength: The share that is taken out; an intervention's own strengths are multiplied by it.
        placement: On which side of a norm between writer and residual stream.
        tied: Whether the unembedding is edited with an embedding that is the same tensor, as in `EditSettings`.

    Raises:
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If the model cannot be mapped, or no hook reaches what is to be taken out.
        ModelError: If it is no model of Transformers.

    Example:
        >>> with ablated(model, direction):
        ...     model.generate(**inputs)
    """
    model = model_of(model)
    model_map, tensor_of = map_model(model), whole_parameter(model)
    intervention = as_intervention(what, model_map, EditSettings(strength=strength))
    wanted = [edit for edit in intervention.edits if edit.strength != 0]
    edits: dict[SiteKey, SiteEdit] = {(edit.kind, edit.layer): edit for edit in wanted if edit.expert is None}
    changes, edited = [], {}
    for point, sharing in _points(model, edits, tied, placement).items():
        edit = sharing[0]
        if any((other.strength, other.direction) != (edit.strength, edit.direction) for other in sharing):
            raise ArchitectureError(
                f"Module '{point.module}' writes to the residual stream at two sites that want two different "
                "edits, expected one edit per module; use the same strength and direction for both."
            )
        basis = intervention.directions[edit.direction].basis
        if point.writer is not None:
            basis = pull_back(basis, point.writer.steps, tensor_of)
            edited[point.writer.parameter] = _edited(model, point.writer, basis, edit.strength)
        else:
            basis = pull_back(basis, point.steps, tensor_of)
            # Moved to each device once, and not at every run.
            changes.append((point, partial(_taken_out, cache(basis.to), edit.strength)))
    # What an expert writes is changed before what its site writes.
    with _experts_changed(model, intervention), _standing_in(model, edited), _changing(model, changes):
        yield


@contextmanager
def _experts_changed(model: PreTrainedModel, intervention: Intervention) -> Iterator[None]:
    """Take what is wanted out of what single experts write, at the module that is told each token's experts."""
    model_map = map_model(model)
    before, behind = [], []
    for mixture in model_map.mixtures:
        edits = [one for one in intervention.edits if one.expert is not None and one.layer == mixture.layer]
        # An index beyond the experts is no expert's.
        kept, taken = torch.ones(mixture.n_experts + 1), dict[int, torch.Tensor]()
        for edit in edits:
            assert edit.expert is not None
            if edit.whole:
                kept[edit.expert] -= edit.strength
            elif edit.strength != 0:
                taken.setdefault(edit.direction, torch.zeros_like(kept))[edit.expert] = edit.strength
        bases = {
            number: pull_back(intervention.directions[number].basis, mixture.writers[0].steps, whole_parameter(model))
            for number in taken
        }
        if mixture.router is not None:
            changes = [(basis, taken[number]) for number, basis in bases.items()]
            behind += [(mixture.module, partial(_rows_changed, kept, changes))] if edits else []
            continue
        if not bool((kept == 1).all()):
            before.append((mixture.module, partial(_silenced, model_map.d_model, kept)))
        for number, basis in bases.items():
            taken_on = cache(basis.to)
            behind.append((mixture.module, partial(_taken_out_of_experts, model_map.d_model, taken_on, taken[number])))
    with hooked(model, before=before, behind=behind):
        yield


def _routing(d_model: int, args: Any, kwargs: Any) -> Routing:
    found = routing_of((args, kwargs), d_model)
    if found is None:
        raise ArchitectureError(
            "A mixture's module was run without the experts of each token, expected what it was told when the model "
            "was mapped; report this model type."
        )
    return found


def _of_chosen(values: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Give for each token's experts their values, `[n_tokens, n_chosen]`."""
    known = values.to(routing.weights)
    return known[routing.chosen.clamp(max=len(known) - 1)]


def _silenced(d_model: int, kept: torch.Tensor, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    routing = _routing(d_model, args, kwargs)
    weights = routing.weights * _of_chosen(kept, routing)
    return routing.arguments(routing.states, routing.chosen, weights)


def _taken_out_of_experts(
    d_model: int,
    basis_on: Callable[[torch.device], torch.Tensor],
    shares: torch.Tensor,
    module: torch.nn.Module,
    args: Any,
    kwargs: Any,
    output: torch.Tensor,
) -> torch.Tensor:
    routing = _routing(d_model, args, kwargs)
    part = routing.written(module.forward, routing.chosen, routing.weights * _of_chosen(shares, routing))
    along = part.to(torch.float32) - taken_out(part.to(torch.float32), basis_on(part.device), 1.0)
    changed: torch.Tensor = (output.to(torch.float32) - along.reshape(output.shape)).to(output.dtype)
    return changed


def _rows_changed(
    kept: torch.Tensor,
    taken: Sequence[tuple[torch.Tensor, torch.Tensor]],
    module: torch.nn.Module,
    args: Any,
    kwargs: Any,
    output: torch.Tensor,
) -> torch.Tensor:
    """Change what single experts give, whose rows lie one expert behind the other."""
    experts, rows = expert_of_rows(module, args, output), output.to(torch.float32)
    changed = rows * kept.to(rows.device)[experts].unsqueeze(-1)
    for basis, shares in taken:
        along = rows - taken_out(rows, basis, 1.0)
        changed = changed - along * shares.to(rows.device)[experts].unsqueeze(-1)
    return changed.to(output.dtype)


def _taken_out(basis_on: Callable[[torch.device], torch.Tensor], strength: float, stream: torch.Tensor) -> torch.Tensor:
    return taken_out(stream, basis_on(stream.device), strength)


def _points(
    model: PreTrainedModel, edits: Mapping[SiteKey, Edit], tied: Tied, placement: Placement = "writers"
) -> dict[HookPoint, list[Edit]]:
    """Where hooks go, each with the edits of all sites that share it."""
    model_map = map_model(model)
    if model_map.unhooked:
        raise ArchitectureError(
            f"Hooks on model type '{model_map.model_type}' are not exact ({model_map.unhooked[0].rstrip('.')}), "
            "expected hooks that are; use another model type."
        )
    found: dict[HookPoint, list[Edit]] = {}
    for site in model_map.sites:
        if (site.kind, site.layer) in edits:
            for point in site.hooks if placement == "writers" else (_behind_norm(site, model_map),):
                found.setdefault(point, []).append(edits[site.kind, site.layer])
    if model_map.tied and tied_choice(model_map, tied).done == "both":
        # (E - s E Q Qᵀ) h = E (h - s Q Qᵀ h): the edit of the rows takes the direction out of what they are read by.
        head = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        for key, writer in (((site.kind, site.layer), writer) for site in model_map.sites for writer in site.writers):
            if key in edits and writer.parameter == model_map.input_embedding:
                found[HookPoint(name, writer.steps, on_input=True)] = [edits[key]]
    return found


def _behind_norm(site: Site, model_map: ModelMap) -> HookPoint:
    if site.residual_hook is None:
        raise ArchitectureError(
            f"In model type '{model_map.model_type}' '{site.writers[0].parameter}' reaches the residual stream in no "
            "module's output, expected one to hook; use the placement 'writers'."
        )
    return site.residual_hook


@contextmanager
def _changing(
    model: PreTrainedModel, changes: Sequence[tuple[HookPoint, Callable[[torch.Tensor], torch.Tensor]]]
) -> Iterator[None]:
    """Change the residual stream among what modules take or return, while the context lasts."""
    d_model = map_model(model).d_model

    def replaced(changed: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, *given: Any) -> Any:
        # `(args, kwargs)` of an input, the last of the three of an output.
        leaves, structure = tree_flatten(given if len(given) == 2 else given[-1])
        stream = first_of_width(leaves, d_model)
        if stream is None:
            raise ArchitectureError(
                f"A hooked module '{type(module).__name__}' was run without a tensor of width {d_model}, expected what "
                "it took and returned when the model was mapped; report this model type."
            )
        return tree_unflatten([changed(leaf) if leaf is stream else leaf for leaf in leaves], structure)

    before, behind = (
        [(point.module, partial(replaced, changed)) for point, changed in changes if point.on_input is side]
        for side in (True, False)
    )
    with hooked(model, before=before, behind=behind):
        yield


def _edited(model: PreTrainedModel, writer: Writer, basis: torch.Tensor, strength: float) -> torch.Tensor:
    if hasattr(model.get_submodule(writer.parameter.rpartition(".")[0]), "base_layer"):
        raise ArchitectureError(
            f"Parameter '{writer.parameter}' has an adapter of PEFT beside it and is no module's output, expected its "
            "weights alone; merge the adapter first (`model = model.merge_and_unload()`)."
        )
    original = model.get_parameter(writer.parameter)
    if original.is_meta or not original.is_floating_point() or original.shape != writer.shape or is_spread(model):
        raise ArchitectureError(
            f"Parameter '{writer.parameter}' is quantised, not in memory or spread over processes, expected a "
            f"floating-point tensor of shape {writer.shape}; load the model whole, without quantisation and offloading."
        )
    return project_out(original, basis, strength, writer.axis)


@contextmanager
def _standing_in(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put edited copies in the place of parameters that no module's output holds."""
    with ExitStack() as stack:
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            stack.callback(setattr, module, attribute, model.get_parameter(name))
            setattr(module, attribute, torch.nn.Parameter(tensor, requires_grad=False))
        yield


@dataclass(frozen=True, eq=False)
class Steer:
    """What is taken out at one site, in float32, which may need gradients; with `n_rows`, for each row of the batch."""

    strength: torch.Tensor
    """`[]` or `[n_rows]`."""
    direction: torch.Tensor
    """`[d_model]` or `[n_rows, d_model]`, of any length but 0."""


@contextmanager
def steered(
    model: PreTrainedModel, steers: Mapping[SiteKey, Callable[[], Steer]], tied: Tied = "auto"
) -> Iterator[None]:
    """Run a model with directions taken out as `ablated` does, in a way that lets gradients through.

    What is taken out at a site is asked for at every run, so that gradients reach what it is computed from.
    """
    changes, tensor_of = [], whole_parameter(model)
    for point, (steer, *_) in _points(model, steers, tied).items():
        if not _is_steerable(point):
            raise ArchitectureError(
                f"In model type '{map_model(model).model_type}' what '{point.module or point.writer}' writes cannot be "
                "steered, expected a module's output with channel-wise steps behind it; choose layer and position only."
            )
        # Fetched once: of a model that is spread every process has to ask, and a norm may lie on another device.
        gains = {step.parameter: cache(tensor_of(step.parameter).to) for step in point.steps if step.parameter}
        changes.append((point, partial(_steered, gains, point, steer)))
    with _changing(model, changes):
        yield


def _steered(
    gains: Mapping[str, Callable[[torch.device], torch.Tensor]],
    point: HookPoint,
    steer: Callable[[], Steer],
    stream: torch.Tensor,
) -> torch.Tensor:
    now = steer()
    device = now.direction.device
    columns = pulled_back(now.direction.unsqueeze(-1), point.steps, lambda name: gains[name](device))
    return taken_out(stream, columns / columns.norm(dim=-2, keepdim=True), now.strength)


def is_steerable(model_map: ModelMap) -> bool:
    """Tell whether every site can be steered: each is a module's output or input, with channel-wise steps behind it."""
    return not model_map.unhooked and all(_is_steerable(point) for site in model_map.sites for point in site.hooks)


def _is_steerable(point: HookPoint) -> bool:
    return point.writer is None and all(step.kind != "taps" for step in point.steps)


@contextmanager
def added(model: PreTrainedModel, vectors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Run a model with vectors, `[d_model]` or one for each row, added at every token, by index on the layer axis."""
    model_map = map_model(model)

    def changed(stream: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        rows = vector.reshape(-1, 1, model_map.d_model).to(stream.device)
        values = stream.to(torch.float32).reshape(len(rows), -1, model_map.d_model)
        return (values + rows).reshape(stream.shape).to(stream.dtype)

    changes = []
    for index, vector in vectors.items():
        behind = index == model_map.n_layers
        point = HookPoint(model_map.layers[index - behind], on_input=not behind)
        changes.append((point, partial(changed, vector=vector)))
    with _changing(model, changes):
        yield
