"""From prompts and a model to hidden states of the residual stream, in one batched pass without logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.modelmap import ModelMap, Routing, first_of_width, map_model, routing_of, routing_within
from remove_refusals.models import (
    Beginning,
    LoadedModel,
    accepts,
    begin,
    continued,
    hooked,
    in_batches,
    is_fetched,
    render,
    without_gradients,
)
from remove_refusals.progress import SILENT, Progress
from remove_refusals.settings import published_name
from remove_refusals.types import Activations, Direction, PromptSet

_N_PROBE_TOKENS = 16


class _EnoughError(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def _residual_stream(
    loaded: LoadedModel, positions: Sequence[int], n_layers: int, *, stop: bool = False
) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the stream before each of the first layers and after them; `stop` ends the run there quietly."""
    found: dict[int, torch.Tensor] = {}
    model_map = map_model(loaded.model)
    # Indexed on the device that the stream is on: no copy, no wait for the device between layers.
    wanted = list(positions)

    def keep(index: int, module: torch.nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        taken = (*args, *kwargs.values()) if index < model_map.n_layers else output
        for value in taken if isinstance(taken, tuple) else (taken,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1] == model_map.d_model:
                if value.dim() != 3:
                    raise ArchitectureError(
                        f"The residual stream of model type '{model_map.model_type}' has shape {tuple(value.shape)}, "
                        "expected [batch, tokens, d_model]; directions of several streams are not supported."
                    )
                found[index] = value[:, wanted]
                break
        else:
            raise ArchitectureError(
                f"Layer {index} of model type '{model_map.model_type}' was called without a tensor of width "
                f"{model_map.d_model}, expected the residual stream; this model type is not supported."
            )
        if stop and index == n_layers:
            raise _EnoughError

    before = [(name, partial(keep, index)) for index, name in enumerate(model_map.layers[: n_layers + 1])]
    behind = [(model_map.layers[-1], partial(keep, n_layers))] if n_layers == model_map.n_layers else []
    with suppress(_EnoughError), hooked(loaded.model, before=before, behind=behind):
        yield found


def collect_activations(
    loaded: LoadedModel,
    prompts: PromptSet,
    *,
    positions: Sequence[int] = (-1,),
    n_layers: int | None = None,
    progress: Progress = SILENT,
) -> Activations:
    """Run prompts through the decoder, without its head, and keep the stream of the first layers, by default of all."""
    token_ids = render(loaded, prompts.prompts)
    model_map = map_model(loaded.model)
    depth = model_map.n_layers if n_layers is None else n_layers
    _check_places(token_ids, positions, depth, model_map)
    # Where weights come from elsewhere, none is spent on looking whether the rest may be left out.
    stop = depth < model_map.n_layers and bool(token_ids) and not loaded.is_offloaded and not is_fetched(loaded.model)
    stop = stop and _runs_each_layer_once(loaded, token_ids)
    hidden = torch.empty(len(token_ids), len(positions), depth + 1, model_map.d_model)
    begun = _begin_before(loaded, token_ids, min(positions))

    def run(indices: Sequence[int]) -> torch.Tensor:
        with without_gradients(loaded.model), _residual_stream(loaded, positions, depth, stop=stop) as found:
            run_decoder(loaded, [token_ids[index] for index in indices], begun)
        return torch.stack([found[index].to("cpu", torch.float32) for index in range(depth + 1)], dim=2)

    # Where weights come from the disk, one pass serves all prompts.
    most = len(token_ids) if loaded.is_offloaded and loaded.batch_size is None else None
    lengths = [len(ids) for ids in token_ids]
    for indices, result in in_batches(loaded, lengths, run, most=most, progress=progress):
        hidden[list(indices)] = result
    return Activations(hidden, tuple(positions), prompts, published_name(loaded.source))


def collect_both(
    loaded: LoadedModel,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    positions: Sequence[int] = (-1,),
    n_layers: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Activations, Activations]:
    """Collect the activations of two sets in one go, which reads weights that lie on the disk once."""
    both = PromptSet("both", harmful.prompts + harmless.prompts, harmful.source)
    found = collect_activations(loaded, both, positions=positions, n_layers=n_layers, progress=progress)
    cut = len(harmful)
    return (
        replace(found, hidden=found.hidden[:cut], prompts=harmful),
        replace(found, hidden=found.hidden[cut:], prompts=harmless),
    )


def token_states(loaded: LoadedModel, token_ids: Sequence[int], layer: int) -> torch.Tensor:
    """Run one text and give the stream at every token, `[n_tokens, d_model]`, at one index of the layer axis."""
    positions = tuple(range(-len(token_ids), 0))
    _check_places([token_ids], positions or (-1,), layer, map_model(loaded.model))
    with without_gradients(loaded.model), _residual_stream(loaded, positions, layer) as found:
        run_decoder(loaded, [token_ids])
    return found[layer][0].to("cpu", torch.float32)


def _check_places(
    token_ids: Sequence[Sequence[int]], positions: Sequence[int], depth: int, model_map: ModelMap
) -> None:
    shortest = min((len(ids) for ids in token_ids), default=0)
    for position in positions:
        if not -shortest <= position <= -1:
            raise DirectionError(
                f"Token position {position} does not lie within the shortest prompt of {shortest} tokens, expected a "
                f"number from {-shortest} to -1; count from the end."
            )
    if not 0 <= depth <= model_map.n_layers:
        raise DirectionError(
            f"The activations of {depth} layers were asked for, expected 0 to {model_map.n_layers} as the model has; "
            "ask for fewer."
        )


def run_decoder(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], begun: Beginning | None = None) -> None:
    """Run prompts, or what follows their beginning, through the decoder for what hooks see of it, without the head."""
    decoder = getattr(loaded.model, loaded.model.base_model_prefix, loaded.model)
    inputs = continued(loaded, token_ids, begun)
    if is_fetched(loaded.model):
        decoder, inputs = loaded.model, inputs | ({"logits_to_keep": 1} if accepts(loaded, "logits_to_keep") else {})
    decoder(**inputs)


def _begin_before(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], position: int) -> Beginning | None:
    """Run what prompts begin with, if none of it lies at a position, from the end, or behind it."""
    begun = begin(loaded, token_ids)
    shortest = min((len(ids) for ids in token_ids), default=0)
    return begun if begun is not None and begun.n_tokens <= shortest + position else None


def _runs_each_layer_once(loaded: LoadedModel, token_ids: Sequence[Sequence[int]]) -> bool:
    """Look at the shortest prompt's forward pass: where a model loops over its layers, the last call is what counts."""
    calls: list[str] = []
    layers = map_model(loaded.model).layers

    def note(name: str, *given: Any) -> None:
        calls.append(name)

    with without_gradients(loaded.model), hooked(loaded.model, before=[(name, partial(note, name)) for name in layers]):
        run_decoder(loaded, [min(token_ids, key=len)])
    return calls == list(layers)


def measure_boundaries(loaded: LoadedModel, direction: Direction) -> tuple[float, ...]:
    """Measure on a few tokens, before each layer and behind the last, the largest `‖Qᵀh‖ / ‖h‖` of a direction."""
    tokens = [(7 * index + 3) % min(loaded.vocabulary_size, 1000) for index in range(_N_PROBE_TOKENS)]
    n_layers = map_model(loaded.model).n_layers
    with without_gradients(loaded.model), _residual_stream(loaded, range(-_N_PROBE_TOKENS, 0), n_layers) as found:
        run_decoder(loaded, [tokens])
    shares = []
    for index in range(n_layers + 1):
        h = found[index].to(torch.float32)
        along = (h @ direction.basis.to(h.device)).norm(dim=-1)
        shares.append(float((along / h.norm(dim=-1).clamp_min(1e-30)).max()))
    return tuple(shares)


@dataclass(frozen=True)
class Tap:
    """What is measured of a module: from the states at a position, `[batch, d_model]` in float32, to `[batch, …]`."""

    module: str
    on_input: bool
    measure: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExpertsTap:
    """What is measured of an experts module: from what it is told of the tokens at a position to `[batch, …]`.

    `measure` is also given the module's own way to run, which no hook sees. Where a `router` of this name in the module
    sorts the tokens, the module is the block of both.
    """

    module: str
    measure: Callable[[Routing, Callable[..., Any]], torch.Tensor]
    router: str | None = None


def collect_at(
    loaded: LoadedModel, prompts: PromptSet, taps: Mapping[Any, Tap | ExpertsTap], position: int
) -> dict[Any, torch.Tensor]:
    """Run prompts through the decoder and measure at modules, at one token: `[n_prompts, …]`, float32, on the CPU.

    Of a module that is run again it is what its last run gave. Keys of modules that were not run are absent.
    """
    token_ids = render(loaded, prompts.prompts)
    d_model = map_model(loaded.model).d_model
    found: dict[Any, torch.Tensor] = {}

    def measure(key: Any, n_prompts: int, module: torch.nn.Module, *given: Any) -> None:
        tap = taps[key]
        if isinstance(tap, ExpertsTap) and tap.router is not None:
            states = first_of_width(given[:2], d_model)
            assert states is not None
            here = states.reshape(n_prompts, -1, d_model)[:, position]
            found[key] = tap.measure(*routing_within(module, tap.router, here)).to("cpu", torch.float32)
            return
        if isinstance(tap, ExpertsTap):
            if (routing := routing_of(given[:2], d_model)) is not None:
                tokens = torch.arange(len(routing.chosen), device=routing.chosen.device)
                rows = tokens.reshape(n_prompts, -1)[:, position]
                found[key] = tap.measure(routing.at(rows), module.forward).to("cpu", torch.float32)
            return
        stream = first_of_width(given[:2] if tap.on_input else given[-1], d_model)
        if stream is not None:
            # Some mixtures of experts run all tokens in one row.
            states = stream.reshape(n_prompts, -1, d_model)[:, position]
            found[key] = tap.measure(states.to(torch.float32)).to("cpu")

    begun = _begin_before(loaded, token_ids, position)

    def run(indices: Sequence[int]) -> dict[Any, torch.Tensor]:
        found.clear()
        hooks = [
            (isinstance(tap, ExpertsTap) or tap.on_input, (tap.module, partial(measure, key, len(indices))))
            for key, tap in taps.items()
        ]
        before, behind = ([hook for on_input, hook in hooks if on_input is side] for side in (True, False))
        with without_gradients(loaded.model), hooked(loaded.model, before=before, behind=behind):
            run_decoder(loaded, [token_ids[index] for index in indices], begun)
        return dict(found)

    whole: dict[Any, torch.Tensor] = {}
    for indices, part in in_batches(loaded, [len(ids) for ids in token_ids], run):
        for key, value in part.items():
            whole.setdefault(key, torch.empty(len(token_ids), *value.shape[1:]))[list(indices)] = value
    return whole


def project_tokens(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    direction: Direction,
    layer: int,
    *,
    context: AbstractContextManager[None] | None = None,
) -> list[float]:
    """Give for each token `h · q` in units of the stream's norm there, at one index of the layer axis, in a context."""
    with context or nullcontext():
        states = token_states(loaded, token_ids, layer)
    norms = states.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return [float(value) for value in (states @ direction.basis[:, 0]) / norms]
