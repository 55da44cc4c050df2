"""The directions that a choice by layer and position tries, and how each is made from activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

import torch

from remove_refusals.chat_template import template_tail_length
from remove_refusals.directions import direction_from_vectors
from remove_refusals.errors import NumericalError
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.plan import intervene
from remove_refusals.types import Activations, ChatFormat, Direction, DirectionOrigin, Intervention

Recipe = Literal["plain", "projected", "winsorised", "scaled"]
"""What is done to the difference of the means; `winsorised` is projected as well."""

RECIPES: tuple[Recipe, ...] = get_args(Recipe)

METHOD_NAMES: dict[Recipe, str] = {
    "plain": "mean-difference",
    "projected": "projected-mean-difference",
    "winsorised": "winsorised-projected-mean-difference",
    "scaled": "variance-scaled-mean-difference",
}
"""What each is called in a direction's origin."""

MOST_POSITIONS = 8
"""How many of the template's last tokens are looked at."""

_QUANTILE = 0.005
_LEAST_VARIANCE = 0.01


def make_vector(harmful: torch.Tensor, harmless: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Make a direction from activations.

    `scaled` is Fisher's linear discriminant with a diagonal covariance: each coordinate of the difference is divided by
    its variance within the two sets, to which a hundredth of the median coordinate's is added so that none is divided
    by nearly nothing. A coordinate that varies a lot between prompts, as outlier coordinates do, then counts little.

    Args:
        harmful: `[n_harmful, d_model]`, floating point.
        harmless: `[n_harmless, d_model]`.
        recipe: `plain` is the difference of the means; for `projected` the component along the harmless mean is
            removed from it; for `winsorised` each coordinate is clipped to its 0.5% and 99.5% quantiles over the
            prompts of its own set before.

    Returns:
        `[d_model]`, float64, not normalised.
    """
    harmful, harmless = harmful.to(torch.float64), harmless.to(torch.float64)
    if recipe == "winsorised":
        harmful, harmless = _clipped(harmful), _clipped(harmless)
    mean = harmless.mean(dim=0)
    difference = harmful.mean(dim=0) - mean
    if recipe == "plain":
        return difference
    if recipe == "scaled":
        centred = torch.cat([harmful - harmful.mean(dim=0), harmless - mean])
        variance = centred.square().mean(dim=0)
        return difference / (variance + _LEAST_VARIANCE * variance.median()).clamp_min(torch.finfo(variance.dtype).tiny)
    unit = mean / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
    projected: torch.Tensor = difference - unit * (unit @ difference)
    return projected


def _clipped(values: torch.Tensor) -> torch.Tensor:
    low, high = (torch.quantile(values, share, dim=0) for share in (_QUANTILE, 1 - _QUANTILE))
    return values.clamp(low, high)


@dataclass(frozen=True, eq=False)
class Option:
    """One direction to be tried.

    Attributes:
        index: Where it was found, on the layer axis of `Activations.hidden`.
        direction: The unit direction.
        push: `[d_model]`, float32: the difference of the means along it, for adding.
        name: What it is called.
    """

    index: int
    direction: Direction
    push: torch.Tensor
    name: str

    def intervention(self, model_map: ModelMap) -> Intervention:
        """Take it out at every site with full strength."""
        return intervene(self.direction, model_map.n_layers)


def tail_positions(loaded: LoadedModel, chat: ChatFormat, position: int) -> tuple[int, ...]:
    """Give the token positions to look at.

    Args:
        loaded: The model.
        chat: How prompts are put before it.
        position: The one to look at where prompts are plain.

    Returns:
        Those of the chat template's tail, the last one first, at most 8.

    Raises:
        PromptError: If the template cannot be rendered.
    """
    if chat.plain:
        return (position,)
    tail = template_tail_length(loaded.tokenizer, **vars(chat))
    return tuple(range(-1, -1 - min(max(tail, 1), MOST_POSITIONS), -1))


def make_options(
    harmful: Activations,
    harmless: Activations,
    *,
    depth: float = 0.8,
    seed: int = 0,
    recipes: Sequence[Recipe] = RECIPES,
    model: str | None = None,
) -> list[Option]:
    """Make a direction for each layer below the limit of depth, each position that was collected, and each recipe.

    Args:
        harmful: Activations on harmful prompts, of every layer.
        harmless: Activations on harmless prompts.
        depth: Only layers below this share of the model's depth are looked at.
        seed: What drew the prompts, for the record.
        recipes: Which recipes.
        model: The model's name, for the record.

    Returns:
        The directions; where the activations do not differ, there is none.

    Raises:
        NumericalError: If an activation is NaN or infinite.
    """
    for part in (harmful, harmless):
        if not bool(torch.isfinite(part.hidden).all()):
            raise NumericalError(
                f"The activations of set '{part.prompts.name}' hold NaN or infinite numbers, expected finite ones; "
                "load the model in float32 or check its weights."
            )
    options = []
    for index in range(1, max(2, ceil(depth * harmful.n_layers))):
        for place, position in enumerate(harmful.positions):
            pair = harmful.hidden[:, place, index], harmless.hidden[:, place, index]
            difference, mean = make_vector(*pair, "plain"), pair[1].to(torch.float64).mean(dim=0)
            for recipe in recipes:
                vector = make_vector(*pair, recipe)
                if not float(vector.norm()) > 0:
                    continue
                unit = vector / vector.norm()
                origin = DirectionOrigin(
                    method=METHOD_NAMES[recipe],
                    model=model,
                    layer=index,
                    position=position,
                    seed=seed,
                    n_harmful=len(harmful.prompts),
                    n_harmless=len(harmless.prompts),
                    harmful_sha256=harmful.prompts.sha256,
                    harmless_sha256=harmless.prompts.sha256,
                    harmless_component=(float(unit @ mean),),
                )
                push = (unit * (unit @ difference)).to(torch.float32)
                name = f"layer {index}, position {position}, {recipe}"
                options.append(Option(index, direction_from_vectors(vector, origin), push, name))
    return options
