"""From prompts and a model to hidden states of the residual stream, in one batched pass without logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.modelmap import ModelMap, first_of_width, map_model
from remove_refusals.models import (
    LoadedModel,
    accepts,
    in_batches,
    left_padded,
    render,
)
from remove_refusals.progress import SILENT, Progress
from remove_refusals.types import Activations, Direction, Intervention, PromptSet

_N_PROBE_TOKENS = 16


class _EnoughError(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def _residual_stream(
    loaded: LoadedModel, model_map: ModelMap, positions: Sequence[int], n_layers: int, *, stop: bool = False
) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the stream before each of the first layers and after them, at some positions, while the context lasts.

    Only the positions that are asked for are kept, so that a batch costs no memory beyond the forward pass's own. With
    `stop`, the context ends quietly before the layer behind them runs.
    """
    found: dict[int, torch.Tensor] = {}
    modules = dict(loaded.model.named_modules())
    # Indexed on the device that the stream is on: no copy, no wait for the device between layers.
    wanted = list(positions)

    def keep(index: int, values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1] == model_map.d_model:
                if value.dim() != 3:
                    raise ArchitectureError(
                        f"The residual stream of model type '{model_map.model_type}' has shape {tuple(value.shape)}, "
                        "expected [batch, tokens, d_model]; directions of several streams are not supported."
                    )
                found[index] = value[:, wanted]
                return
        raise ArchitectureError(
            f"Layer {index} of model type '{model_map.model_type}' was called without a tensor of width "
            f"{model_map.d_model}, expected the residual stream; this model type is not supported."
        )

    def before(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            keep(index, (*args, *kwargs.values()))
            if stop and index == n_layers:
                raise _EnoughError

        return hook

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        keep(model_map.n_layers, output if isinstance(output, tuple) else (output,))

    handles = [
        modules[name].register_forward_pre_hook(before(index), with_kwargs=True)
        for index, name in enumerate(model_map.layers[: n_layers + 1])
    ]
    if n_layers == model_map.n_layers:
        handles.append(modules[model_map.layers[-1]].register_forward_hook(after))
    try:
        with suppress(_EnoughError):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def collect_activations(
    loaded: LoadedModel,
    prompts: PromptSet,
    *,
    positions: Sequence[int] = (-1,),
    n_layers: int | None = None,
    model_map: ModelMap | None = None,
    progress: Progress = SILENT,
) -> Activations:
    """Run prompts through the decoder, without its head and without generating, and keep the residual stream.

    Args:
        loaded: The model.
        prompts: The prompts.
        positions: Negative token positions, counted from the end of the rendered prompt.
        n_layers: How many layers to look at; by default all. Those behind them are not run.
        model_map: The model's map, if it is at hand; otherwise it is derived.
        progress: Told how many prompts are done.

    Returns:
        `hidden` of shape `[n_prompts, n_positions, n_layers + 1, d_model]`, float32, on the CPU. Batch size and padding
        do not change it beyond float tolerance.

    Raises:
        DirectionError: If a position is not negative or reaches before the start of the shortest prompt, or if the
            model has fewer layers.
        ArchitectureError: If the model's layers cannot be found or hand on several streams.
        PromptError: If the prompts cannot be rendered.
        ModelError: If memory runs out with a single prompt.
    """
    token_ids = render(loaded, prompts.prompts)
    model_map = model_map or map_model(loaded.model)
    depth = model_map.n_layers if n_layers is None else n_layers
    _check_places(token_ids, positions, depth, model_map)
    # Where weights come from the disk, one pass serves all prompts, and none is spent on looking.
    most = len(token_ids) if loaded.is_offloaded and loaded.batch_size is None else None
    stop = (
        depth < model_map.n_layers
        and bool(token_ids)
        and not loaded.is_offloaded
        and _runs_each_layer_once(loaded, model_map, token_ids)
    )
    hidden = torch.empty(len(token_ids), len(positions), depth + 1, model_map.d_model)

    def run(indices: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode(), _residual_stream(loaded, model_map, positions, depth, stop=stop) as found:
            run_decoder(loaded, [token_ids[index] for index in indices])
        return torch.stack([found[index].to("cpu", torch.float32) for index in range(depth + 1)], dim=2)

    lengths = [len(ids) for ids in token_ids]
    for indices, result in in_batches(loaded, lengths, run, most=most, progress=progress):
        hidden[list(indices)] = result
    return Activations(hidden, tuple(positions), prompts)


def token_states(
    loaded: LoadedModel, token_ids: Sequence[int], layer: int, *, model_map: ModelMap | None = None
) -> torch.Tensor:
    """Run one text and keep the residual stream at every token of it.

    Args:
        loaded: The model.
        token_ids: The tokens, at least one.
        layer: The index of the layer axis: 0 is before the first layer, `i` before layer `i`, the last behind the last.
        model_map: The model's map, if it is at hand; otherwise it is derived.

    Returns:
        `[n_tokens, d_model]`, float32, on the CPU.

    Raises:
        DirectionError: If the layer does not lie within the model, or there are no tokens.
        ArchitectureError: If the model's layers cannot be found or hand on several streams.
    """
    model_map = model_map or map_model(loaded.model)
    positions = tuple(range(-len(token_ids), 0))
    _check_places([token_ids], positions or (-1,), layer, model_map)
    with torch.inference_mode(), _residual_stream(loaded, model_map, positions, layer) as found:
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


def run_decoder(loaded: LoadedModel, token_ids: Sequence[Sequence[int]]) -> None:
    """Run prompts through the decoder for what hooks see of it, padded on the left, without head and cache."""
    decoder = getattr(loaded.model, loaded.model.base_model_prefix, loaded.model)
    extra = {"use_cache": False} if accepts(loaded, "use_cache") else {}
    decoder(**left_padded(loaded, token_ids), **extra)


def _runs_each_layer_once(loaded: LoadedModel, model_map: ModelMap, token_ids: Sequence[Sequence[int]]) -> bool:
    """Look at the shortest prompt's forward pass: where a model loops over its layers, the last call is what counts."""
    calls: list[str] = []
    modules = dict(loaded.model.named_modules())

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: calls.append(name)

    handles = [modules[name].register_forward_pre_hook(note(name)) for name in model_map.layers]
    try:
        with torch.inference_mode():
            run_decoder(loaded, [min(token_ids, key=len)])
    finally:
        for handle in handles:
            handle.remove()
    return calls == list(model_map.layers)


def measure_boundaries(loaded: LoadedModel, direction: Direction, model_map: ModelMap) -> tuple[float, ...]:
    """Run a model on a few tokens and measure what the residual stream holds along a direction.

    Args:
        loaded: The model.
        direction: The direction, of the model's width.
        model_map: The model's map.

    Returns:
        For the stream before each layer and behind the last, the largest `‖Qᵀh‖ / ‖h‖` over the tokens.

    Raises:
        ArchitectureError: If the layers hand on several streams.
    """
    tokens = [[(7 * index + 3) % min(loaded.vocabulary_size, 1000) for index in range(_N_PROBE_TOKENS)]]
    positions = tuple(range(-_N_PROBE_TOKENS, 0))
    with torch.inference_mode(), _residual_stream(loaded, model_map, positions, model_map.n_layers) as found:
        loaded.model(**left_padded(loaded, tokens))
    basis = direction.basis.to(loaded.device)
    shares = [found[index].to(torch.float32) for index in range(model_map.n_layers + 1)]
    return tuple(float(((h @ basis).norm(dim=-1) / h.norm(dim=-1).clamp_min(1e-30)).max()) for h in shares)


@dataclass(frozen=True)
class Tap:
    """What is measured of a module.

    Attributes:
        module: The module's name.
        on_input: Whether its input is measured, or else its output.
        measure: From the states at the position, `[batch, d_model]`, float32, to `[batch, …]`.
    """

    module: str
    on_input: bool
    measure: Callable[[torch.Tensor], torch.Tensor]


def collect_at(
    loaded: LoadedModel,
    prompts: PromptSet,
    taps: Mapping[Any, Tap],
    position: int,
    model_map: ModelMap,
) -> dict[Any, torch.Tensor]:
    """Run prompts through the decoder and measure at modules, at one token.

    Args:
        loaded: The model.
        prompts: The prompts.
        taps: What is measured, by any keys.
        position: The token position, negative.
        model_map: The model's map.

    Returns:
        For each key `[n_prompts, …]`, float32, on the CPU; of a module that is run again, what its last run gave. Keys
        of modules that were not run are absent.

    Raises:
        PromptError: If the prompts cannot be rendered.
        ModelError: If memory runs out with a single prompt.
    """
    token_ids = render(loaded, prompts.prompts)
    found: dict[Any, torch.Tensor] = {}

    def hook_for(key: Any, tap: Tap, n_prompts: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, *values: Any) -> None:
            stream = first_of_width(values[:2] if tap.on_input else values[-1], model_map.d_model)
            if stream is not None:
                # Some mixtures of experts run all tokens in one row.
                states = stream.reshape(n_prompts, -1, model_map.d_model)[:, position]
                found[key] = tap.measure(states.to(torch.float32)).to("cpu")

        return hook

    def run(indices: Sequence[int]) -> dict[Any, torch.Tensor]:
        found.clear()
        handles = []
        for key, tap in taps.items():
            module, hook = loaded.model.get_submodule(tap.module), hook_for(key, tap, len(indices))
            if tap.on_input:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        try:
            with torch.inference_mode():
                run_decoder(loaded, [token_ids[index] for index in indices])
        finally:
            for handle in handles:
                handle.remove()
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
    model_map: ModelMap | None = None,
    context: AbstractContextManager[None] | None = None,
) -> list[float]:
    """Measure the residual stream's component along a direction at every token.

    Args:
        loaded: The model.
        token_ids: A prompt and an answer, or any tokens.
        direction: The direction; of several columns the first counts.
        layer: Where, as an index of the layer axis: 0 is the embedding's output, `i` the stream behind layer `i - 1`.
        model_map: The model's map, if it is at hand.
        context: Entered around the run, for example `ablated(model, …)`.

    Returns:
        For each token `h · q` in units of the stream's norm there, from -1 to 1.

    Raises:
        DirectionError: If the layer does not lie within the model.
        ModelError: If memory runs out.
    """
    with context or nullcontext():
        states = token_states(loaded, token_ids, layer, model_map=model_map)
    norms = states.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return [float(value) for value in (states @ direction.basis[:, 0]) / norms]


def middle_direction(intervention: Intervention, n_layers: int) -> tuple[Direction, int]:
    """Choose what to look at: the direction that was found nearest to 60% of the depth, where refusal is decided.

    Args:
        intervention: What is taken out.
        n_layers: The model's number of layers.

    Returns:
        The direction and the index of the layer axis; 60% of the depth (Arditi et al. 2024 find it between 50% and 70%)
        for directions that do not know where they were found.
    """
    middle = round(0.6 * n_layers)

    def place(direction: Direction) -> int:
        layer = direction.origin.layer
        return middle if layer is None else min(max(int(layer), 0), n_layers)

    chosen = min(intervention.directions, key=lambda direction: abs(place(direction) - middle))
    return chosen, place(chosen)
