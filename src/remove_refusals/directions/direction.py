"""From activations to a direction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from remove_refusals.directions.activations import collect_both
from remove_refusals.errors import DirectionError, NumericalError
from remove_refusals.formula import orthonormal_basis
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, check_positions
from remove_refusals.processes import agreed
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import draw, prompts_from
from remove_refusals.settings import DirectionSettings
from remove_refusals.types import Activations, Direction, DirectionOrigin, PromptSet


def layer_index(layer: float | int, n_layers: int) -> int:
    """Turn a layer, a fraction of depth (float) or an index (int), into an index on the layer axis of `Activations`."""
    if not 0 <= layer <= (1 if isinstance(layer, float) else n_layers):
        raise DirectionError(
            f"Layer {layer} does not lie within a model of {n_layers} layers; "
            f"give a fraction from 0.0 to 1.0 or an index from 0 to {n_layers}."
        )
    return int(layer * n_layers) if isinstance(layer, float) else layer


def direction_from_vectors(vectors: torch.Tensor, origin: DirectionOrigin | None = None) -> Direction:
    """Build a checked direction from `[d_model]` or `[d_model, k]`, independent columns of any length."""
    columns = vectors.detach().to("cpu")
    basis = orthonormal_basis(columns.unsqueeze(1) if columns.dim() == 1 else columns)
    return Direction(basis, origin or DirectionOrigin(method="given"))


def hidden_at(activations: Activations, index: int, position: int) -> torch.Tensor:
    """Give the hidden states at one index of the layer axis and one position: `[n_prompts, d_model]`, float64."""
    if position not in activations.positions:
        raise DirectionError(
            f"Position {position} was not collected, expected one of {list(activations.positions)}; "
            "collect the activations at that position."
        )
    hidden = activations.hidden[:, activations.positions.index(position), index].to(torch.float64)
    bad = ~torch.isfinite(hidden).all(dim=1)
    if bool(bad.any()):
        number = int(bad.nonzero()[0])
        raise NumericalError(
            f"The activations of prompt {number} of set '{activations.prompts.name}' at layer index {index} are NaN or "
            "infinite, expected finite numbers; load the model in float32 or check its weights."
        )
    return hidden


def difference_of_means(harmful: torch.Tensor, harmless: torch.Tensor, *, projected: bool = False) -> torch.Tensor:
    """Give `mean(harmful) - mean(harmless)` of two `[n, d_model]`, without its component along the harmless mean."""
    mean = harmless.mean(dim=0)
    difference = harmful.mean(dim=0) - mean
    if projected:
        unit = mean / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
        difference = difference - unit * (unit @ difference)
    return difference


def mean_difference(
    harmful: Activations,
    harmless: Activations,
    *,
    layer: float | int = 0.6,
    position: int | Sequence[int] = -1,
    projected: bool = False,
    model: str | None = None,
    seed: int | None = None,
) -> Direction:
    """The difference of the mean activations on harmful and harmless prompts (Arditi et al. 2024, section 2.3).

    Args:
        harmful: Activations on prompts that the model refuses.
        harmless: Activations on prompts that it answers.
        layer: A fraction of depth (float) or an index (int) on the layer axis.
        position: The token position, one of those that were collected; for several of them the direction gets a column
            for each.
        projected: Whether the component along the harmless mean is removed first. Where one coordinate holds most of
            the residual stream's norm, the plain difference leans on it and taking it out destroys the model.
        model: The model's name, for the record; by default that of the activations.
        seed: The seed that drew the prompts, for the record.

    Returns:
        The direction: a basis `[d_model, k]`, float32, orthonormal, with where and how it was found.

    Raises:
        DirectionError: If layer or position are not among what was collected, or the means do not differ.
        NumericalError: If an activation is NaN or infinite.

    Example:
        >>> direction = mean_difference(harmful, harmless, layer=0.6)
    """
    if harmful.hidden.shape[2:] != harmless.hidden.shape[2:]:
        raise DirectionError(
            f"The harmful activations have (layers + 1, d_model) {tuple(harmful.hidden.shape[2:])} and the harmless "
            f"ones {tuple(harmless.hidden.shape[2:])}, expected them to be equal; collect both on one model."
        )
    index = layer_index(layer, harmful.n_layers)
    positions = (position,) if isinstance(position, int) else tuple(position)
    differences = [
        difference_of_means(*(hidden_at(part, index, place) for part in (harmful, harmless)), projected=projected)
        for place in positions
    ]
    origin = DirectionOrigin(
        method="projected-mean-difference" if projected else "mean-difference",
        model=model or harmful.model,
        layer=index,
        position=positions if len(positions) > 1 else positions[0],
        seed=seed,
        n_harmful=len(harmful.prompts),
        n_harmless=len(harmless.prompts),
        harmful_sha256=harmful.prompts.sha256,
        harmless_sha256=harmless.prompts.sha256,
    )
    basis = orthonormal_basis(torch.stack(differences, dim=1))
    if len(positions) == 1:
        origin = origin.model_copy(update={"length": float(differences[0].norm())})
    return Direction(basis, origin)


def mean_difference_per_layer(
    harmful: Activations,
    harmless: Activations,
    *,
    position: int | Sequence[int] = -1,
    projected: bool = False,
    model: str | None = None,
    seed: int | None = None,
) -> tuple[Direction, ...]:
    """One direction for each layer: that of layer `i` is found in the stream behind it, at index `i + 1`.

    Args:
        harmful: As for `mean_difference`, like all that follows.
        harmless: Activations on prompts that the model answers.
        position: The token position, or several.
        projected: Whether the component along the harmless mean is removed first.
        model: The model's name, for the record; by default that of the activations.
        seed: The seed that drew the prompts, for the record.

    Returns:
        As many directions as layers were collected.

    Raises:
        DirectionError: As for `mean_difference`.

    Example:
        >>> each = mean_difference_per_layer(harmful, harmless)
        >>> intervention = intervene(each, len(each))
    """
    if harmful.n_layers == 0:
        raise DirectionError("The activations are of 0 layers, expected at least 1; collect them behind every layer.")
    return tuple(
        mean_difference(harmful, harmless, layer=index, position=position, projected=projected, model=model, seed=seed)
        for index in range(1, harmful.n_layers + 1)
    )


def largest_coordinate_share(activations: Sequence[Activations], index: int, position: int) -> float:
    """How much of the stream's mean squared norm lies in one coordinate; near 1, the mean difference leans on it."""
    squares = torch.cat([hidden_at(part, index, position) for part in activations]).square().sum(dim=0)
    return float(squares.max() / squares.sum())


@dataclass(frozen=True, eq=False)
class FoundDirection:
    """A direction, or one for each layer, and its prompts; of directions from a file there are none."""

    directions: tuple[Direction, ...]
    prompts: tuple[PromptSet, ...]
    largest_coordinate: float | None
    """The largest share of the stream's mean squared norm in one coordinate there."""

    @property
    def direction(self) -> Direction:
        """The only direction, or the first layer's."""
        return self.directions[0]


def training_prompts(settings: DirectionSettings) -> tuple[PromptSet, PromptSet]:
    """Load the harmful and the harmless prompts and draw from both."""
    harmful = prompts_from(settings.harmful, "harmful", "harmful_train")
    harmless = prompts_from(settings.harmless, "harmless", "harmless_train")
    return draw(harmful, settings.n_prompts, settings.seed), draw(harmless, settings.n_prompts, settings.seed)


def find_direction(
    loaded: LoadedModel,
    settings: DirectionSettings,
    *,
    prompts: tuple[PromptSet, PromptSet] | None = None,
    progress: Progress = SILENT,
) -> FoundDirection:
    """Collect activations and take the difference of the means; by default on the prompts of `training_prompts`."""
    harmful, harmless = prompts or training_prompts(settings)
    check_positions(loaded, settings.positions)
    n_layers = map_model(loaded.model).n_layers
    indices = range(1, n_layers + 1) if settings.per_layer else (layer_index(settings.layer, n_layers),)
    progress = progress.stage("activations", len(harmful) + len(harmless))
    parts = collect_both(
        loaded, harmful, harmless, positions=settings.positions, n_layers=max(indices), progress=progress
    )
    directions = tuple(
        mean_difference(
            *parts,
            layer=index,
            position=settings.positions,
            projected=settings.projected,
            seed=settings.seed,
        )
        for index in indices
    )
    shares = (largest_coordinate_share(parts, index, place) for index in indices for place in settings.positions)
    return agreed(FoundDirection(directions, (harmful, harmless), max(shares)))
