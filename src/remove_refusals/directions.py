"""From activations to a direction."""

from collections.abc import Sequence

import torch

from remove_refusals.errors import DirectionError, NumericalError
from remove_refusals.linalg import orthonormal_basis
from remove_refusals.types import Activations, Direction, DirectionOrigin


def layer_index(layer: float | int, n_layers: int) -> int:
    """Turn a layer given as a fraction of depth or as an index into an index.

    Args:
        layer: A float is a fraction of depth from 0.0 to 1.0, rounded down; an int is an index.
        n_layers: The model's number of layers.

    Returns:
        The index on the layer axis of `Activations.hidden`: the residual stream before that layer, and `n_layers` for
        the stream after the last.

    Raises:
        DirectionError: If it does not lie within the model.
    """
    if not 0 <= layer <= (1 if isinstance(layer, float) else n_layers):
        raise DirectionError(
            f"Layer {layer} does not lie within a model of {n_layers} layers; "
            f"give a fraction from 0.0 to 1.0 or an index from 0 to {n_layers}."
        )
    return int(layer * n_layers) if isinstance(layer, float) else layer


def direction_from_vectors(vectors: torch.Tensor, origin: DirectionOrigin) -> Direction:
    """Build a checked direction.

    Args:
        vectors: `[d_model]` or `[d_model, k]`, any floating-point dtype, independent columns of any length.
        origin: Where they came from.

    Returns:
        The direction, with an orthonormal basis of the columns' span.

    Raises:
        DirectionError: If the vectors are not finite or not independent.
    """
    columns = vectors.detach().to("cpu")
    return Direction(orthonormal_basis(columns.unsqueeze(1) if columns.dim() == 1 else columns), origin)


def hidden_at(activations: Activations, index: int, position: int) -> torch.Tensor:
    """Give the hidden states at one layer and position.

    Args:
        activations: What was collected.
        index: The index on the layer axis.
        position: The token position.

    Returns:
        `[n_prompts, d_model]`, float64.

    Raises:
        DirectionError: If the position was not collected.
        NumericalError: If an activation is NaN or infinite.
    """
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
        model: The model's name, for the record.
        seed: The seed that drew the prompts, for the record.

    Returns:
        The direction: an orthonormal basis of the differences, computed in float64 and kept in float32.

    Raises:
        DirectionError: If the two sets do not fit together, were not collected there, or have equal means, or if the
            differences at several positions are linearly dependent.
        NumericalError: If an activation is NaN or infinite.
    """
    if harmful.hidden.shape[2:] != harmless.hidden.shape[2:]:
        raise DirectionError(
            f"The harmful activations have (layers + 1, d_model) {tuple(harmful.hidden.shape[2:])} and the harmless "
            f"ones {tuple(harmless.hidden.shape[2:])}, expected them to be equal; collect both on one model."
        )
    index = layer_index(layer, harmful.n_layers)
    positions = (position,) if isinstance(position, int) else tuple(position)
    harmless_means, harmful_means = (
        torch.stack([hidden_at(part, index, place).mean(dim=0) for place in positions], dim=1)
        for part in (harmless, harmful)
    )
    differences = harmful_means - harmless_means
    if projected:
        units = harmless_means / harmless_means.norm(dim=0)
        differences = differences - units * (units * differences).sum(dim=0)
    basis = orthonormal_basis(differences)
    return Direction(
        basis,
        DirectionOrigin(
            method="projected-mean-difference" if projected else "mean-difference",
            model=model,
            layer=index,
            position=positions if len(positions) > 1 else positions[0],
            seed=seed,
            n_harmful=len(harmful.prompts),
            n_harmless=len(harmless.prompts),
            harmful_sha256=harmful.prompts.sha256,
            harmless_sha256=harmless.prompts.sha256,
            length=float(differences.norm()) if len(positions) == 1 else None,
            harmless_component=tuple((basis.T.to(torch.float64) @ harmless_means.mean(dim=1)).tolist()),
        ),
    )


def mean_difference_per_layer(
    harmful: Activations,
    harmless: Activations,
    *,
    position: int | Sequence[int] = -1,
    projected: bool = False,
    model: str | None = None,
    seed: int | None = None,
) -> tuple[Direction, ...]:
    """One direction for each layer: the difference of the mean activations in the stream behind it.

    Args:
        harmful: Activations on prompts that the model refuses, of every layer.
        harmless: Activations on prompts that it answers, of every layer.
        position: As for `mean_difference`.
        projected: As for `mean_difference`.
        model: The model's name, for the record.
        seed: The seed that drew the prompts, for the record.

    Returns:
        As many directions as layers were looked at; that of layer `i` is found at index `i + 1` on the layer axis.

    Raises:
        DirectionError: As from `mean_difference`, or if no layer was looked at.
        NumericalError: If an activation is NaN or infinite.
    """
    if harmful.n_layers == 0:
        raise DirectionError("The activations are of 0 layers, expected at least 1; collect them behind every layer.")
    return tuple(
        mean_difference(harmful, harmless, layer=index, position=position, projected=projected, model=model, seed=seed)
        for index in range(1, harmful.n_layers + 1)
    )


def largest_coordinate_share(activations: Sequence[Activations], index: int, position: int) -> float:
    """How much of the residual stream's mean squared norm lies in one coordinate.

    Args:
        activations: One or more sets from one model.
        index: The layer axis's index.
        position: The token position.

    Returns:
        The largest coordinate's share of the summed squares, from `1 / d_model` to 1. Near 1, the plain mean difference
        leans on that coordinate.

    Raises:
        DirectionError: If the position was not collected.
        NumericalError: If an activation is NaN or infinite.
    """
    squares = torch.cat([hidden_at(part, index, position) for part in activations]).square().sum(dim=0)
    return float(squares.max() / squares.sum())
