"""What a trial of the familiar search draws, and the intervention that it stands for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from remove_refusals.directions import direction_from_vectors
from remove_refusals.map_types import ModelMap
from remove_refusals.types import Direction, Intervention, SiteEdit

Scope = Literal["global", "per layer"]
SCOPES: tuple[Scope, ...] = ("global", "per layer")


@dataclass(frozen=True)
class Kernel:
    """How much is taken out at the sites of one kind, layer by layer.

    Attributes:
        max_weight: The largest weight.
        position: The layer where it is reached, a fraction of a layer allowed.
        min_weight: The weight at `distance` from there.
        distance: In layers; beyond it nothing is taken out.
    """

    max_weight: float
    position: float
    min_weight: float
    distance: float

    def weight(self, layer: int) -> float:
        """Give a layer's weight: it falls linearly from the position to the distance, and is 0 beyond."""
        away = abs(layer - self.position)
        if away > self.distance:
            return 0.0
        return self.max_weight + (self.min_weight - self.max_weight) * away / self.distance


@dataclass(frozen=True)
class Parameters:
    """What a trial draws.

    Attributes:
        scope: Whether all layers get one direction or each its own.
        direction_index: Which direction all layers get, between two layers; without effect where each has its own.
        attn: The weights at attention.
        mlp: The weights at the MLP.
    """

    scope: Scope
    direction_index: float
    attn: Kernel
    mlp: Kernel


def interpolated(directions: Sequence[Direction], index: float) -> Direction:
    """Give the direction at a fractional index: linear between the two neighbours, normalised.

    Args:
        directions: Directions of one column each.
        index: From 0 to `len(directions) - 1`.

    Returns:
        The direction.
    """
    lower = min(int(index), len(directions) - 1)
    upper = min(lower + 1, len(directions) - 1)
    vector = torch.lerp(directions[lower].basis, directions[upper].basis, index - lower)
    origin = replace(directions[lower].origin, method="interpolated", layer=None, harmless_component=None, length=None)
    return direction_from_vectors(vector, origin)


def build(parameters: Parameters, directions: Sequence[Direction], model_map: ModelMap) -> Intervention:
    """Turn what a trial drew into an intervention; the embedding is left alone.

    Args:
        parameters: What was drawn.
        directions: One for each layer, found in the stream behind it.
        model_map: The model's map.

    Returns:
        The intervention, with an edit at each site whose weight is not 0.
    """
    per_layer = parameters.scope == "per layer"
    used = tuple(directions) if per_layer else (interpolated(directions, parameters.direction_index),)
    edits = []
    for site in model_map.sites:
        if site.layer is not None:
            weight = (parameters.attn if site.kind == "attn" else parameters.mlp).weight(site.layer)
            if weight:
                edits.append(SiteEdit(site.kind, site.layer, weight, site.layer if per_layer else 0))
    return Intervention(used, tuple(edits))
