"""How far each token of an answer lies along a direction."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from remove_refusals.activations import token_states
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.types import Direction, Intervention


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
