"""How far apart harmful and harmless prompts lie in the residual stream, layer by layer; nothing is changed."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import hidden_at, largest_coordinate_share
from remove_refusals.errors import DirectionError
from remove_refusals.modelmap import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import draw
from remove_refusals.types import Activations, Auroc, LayerSeparation, Projection, PromptSet, Separation

MOST_PROMPTS = 128
"""So many prompts of a set are looked at: each layer of each prompt is kept until the end."""


_NO_DIFFERENCE = 1e-6
"""A difference of this share of the states' norm is rounding: the token is the same in every prompt."""


Array = npt.NDArray[np.float64]


Array_roc = npt.NDArray[np.float64]


def auroc(positive: Sequence[float] | Array_roc, negative: Sequence[float] | Array_roc) -> float:
    """Compute the area under the receiver operating characteristic, by ranks (Mann and Whitney 1947).

    Args:
        positive: `[m]`, scores that should be high, at least one.
        negative: `[n]`, scores that should be low, at least one.

    Returns:
        The share of the `m n` pairs in which the first is above the second, ties counted half.
    """
    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def measure_separation(
    loaded: LoadedModel,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    position: int = -1,
    seed: int = 0,
    model: str | None = None,
    model_map: ModelMap | None = None,
    progress: Progress = SILENT,
) -> Separation:
    """Run prompts through a model and measure how far apart the two sets lie at every layer.

    Args:
        loaded: The model.
        harmful: Prompts that it is expected to refuse; of more than `MOST_PROMPTS` so many are drawn.
        harmless: Prompts that it is expected to answer, likewise.
        position: The token position, negative.
        seed: The seed that draws and that cuts the sets into halves.
        model: The model's name, for the record.
        model_map: The model's map, if it is at hand.
        progress: Told how many prompts are done.

    Returns:
        The separation.

    Raises:
        DirectionError: If a set has fewer than two prompts, or the position lies before the shortest prompt.
        NumericalError: If an activation is NaN or infinite.
        PromptError: If a prompt cannot be rendered.
        ModelError: If memory runs out with a single prompt.
    """
    parts = [draw(part, MOST_PROMPTS, seed) if len(part) > MOST_PROMPTS else part for part in (harmful, harmless)]
    progress = progress.stage("separation", sum(map(len, parts)))
    collected = [
        collect_activations(loaded, part, positions=(position,), model_map=model_map, progress=progress.after(before))
        for before, part in zip((0, len(parts[0])), parts, strict=True)
    ]
    return separation(collected[0], collected[1], position=position, seed=seed, model=model)


def separation(
    harmful: Activations, harmless: Activations, *, position: int = -1, seed: int = 0, model: str | None = None
) -> Separation:
    """Measure how far apart two sets lie at every layer, each prompt by a direction that it had no part in.

    Each set is cut into two halves. The difference of the means of one half (Arditi et al. 2024, section 2.3) scores
    the prompts of the other, and the pairs within each half are counted. With the same prompts for both, anything as
    wide as a residual stream separates, noise too.

    Args:
        harmful: Activations on prompts that the model refuses.
        harmless: Activations on prompts that it answers.
        position: The token position, one of those that were collected.
        seed: The seed that cuts the sets into halves; sets of one size are cut alike, so that line `i` of both lies in
            the same half.
        model: The model's name, for the record.

    Returns:
        The separation, for as many layers as were collected.

    Raises:
        DirectionError: If the two sets do not fit together, or have fewer than two prompts.
        NumericalError: If an activation is NaN or infinite.
    """
    if harmful.hidden.shape[2:] != harmless.hidden.shape[2:] or min(len(harmful.prompts), len(harmless.prompts)) < 2:
        raise DirectionError(
            f"The activations on {len(harmful.prompts)} harmful and {len(harmless.prompts)} harmless prompts have "
            f"(layers + 1, d_model) {tuple(harmful.hidden.shape[2:])} and {tuple(harmless.hidden.shape[2:])}, expected "
            "at least 2 prompts of each and equal shapes; collect both on one model."
        )
    layers, differences = [], []
    for index in range(harmful.n_layers + 1):
        states = [hidden_at(part, index, position).numpy() for part in (harmful, harmless)]
        share = largest_coordinate_share((harmful, harmless), index, position)
        layers.append(_layer(index, states[0], states[1], share, seed))
        differences.append(states[0].mean(axis=0) - states[1].mean(axis=0))
    same = [layer.auroc is None for layer in layers]
    return Separation(
        model, position, seed, (harmful.prompts, harmless.prompts), tuple(layers), _cosines(differences, same)
    )


def _layer(index: int, harmful: Array, harmless: Array, share: float, seed: int) -> LayerSeparation:
    difference = harmful.mean(axis=0) - harmless.mean(axis=0)
    norms = [float(np.linalg.norm(part, axis=1).mean()) for part in (harmful, harmless)]
    found = LayerSeparation(
        layer=index,
        difference_norm=float(np.linalg.norm(difference)),
        norm_harmful=norms[0],
        norm_harmless=norms[1],
        largest_coordinate_share=share,
    )
    halves = [_halves(len(part), seed) for part in (harmful, harmless)]
    along: list[Array] = [np.empty(len(harmful)), np.empty(len(harmless))]
    values, sizes = [], []
    for scored in (0, 1):
        means = [part[own[1 - scored]].mean(axis=0) for part, own in zip((harmful, harmless), halves, strict=True)]
        direction = means[0] - means[1]
        length = float(np.linalg.norm(direction))
        if min(length, found.difference_norm) <= _NO_DIFFERENCE * max(norms):
            return found
        for part, own, line in zip((harmful, harmless), halves, along, strict=True):
            line[own[scored]] = (part[own[scored]] - (means[0] + means[1]) / 2) @ direction / length
        scores = [line[own[scored]] for line, own in zip(along, halves, strict=True)]
        values.append(auroc(scores[0], scores[1]))
        sizes.append((len(scores[0]), len(scores[1])))
    value = float(np.average(values, weights=[m * n for m, n in sizes]))
    low, high = auroc_interval(value, sizes)
    across = _first_component(np.concatenate([harmful, harmless]), difference)
    points = list(zip(np.concatenate(along).tolist(), across.tolist(), strict=True))
    measured = Auroc(value, low, high, len(harmful), len(harmless), seed)
    drawn = Projection(tuple(points[: len(harmful)]), tuple(points[len(harmful) :]))
    return replace(found, auroc=measured, projection=drawn)


def _halves(n: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    order: npt.NDArray[np.int64] = np.random.default_rng(seed).permutation(n)
    return order[: n // 2], order[n // 2 :]


def _first_component(states: Array, difference: Array) -> Array:
    """Give `[n]`: the states along the first principal component of what is left without the difference's component."""
    unit = difference / np.linalg.norm(difference)
    rest = states - states.mean(axis=0)
    rest = rest - np.outer(rest @ unit, unit)
    # As many numbers as prompts: the vectors of the small matrix are the scores, up to their length.
    lengths, vectors = np.linalg.eigh(rest @ rest.T)
    scores: Array = vectors[:, -1] * np.sqrt(max(float(lengths[-1]), 0.0))
    # The sign is free; the farthest prompt lies above.
    return scores if scores[np.argmax(np.abs(scores))] >= 0 else -scores


def _cosines(differences: Sequence[Array], same: Sequence[bool]) -> tuple[tuple[float | None, ...], ...]:
    units = np.stack([each / max(float(np.linalg.norm(each)), 1e-300) for each in differences])
    cosines = np.clip(units @ units.T, -1, 1)
    return tuple(
        tuple(None if same[i] or same[j] else float(cosines[i, j]) for j in range(len(same))) for i in range(len(same))
    )


def auroc_interval(value: float, sizes: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Compute a 95% score interval of an AUROC (Newcombe 2006, part 2, method 5), which has a width at 0 and 1 too.

    The variance is that of Hanley and McNeil (1982) with both sizes' excess replaced by their mean, taken at the end of
    the interval and not at the estimate.

    Args:
        value: The AUROC: the mean over groups, each with as much weight as it has pairs.
        sizes: For each group how many positive and how many negative scores it has; the groups are independent.

    Returns:
        The lower and the upper end.
    """
    pairs = sum(m * n for m, n in sizes)
    square = float(norm.ppf(0.975)) ** 2

    def outside(at: float) -> float:
        variance = sum(
            (m * n / pairs) ** 2
            * at * (1 - at) / (m * n)
            * (1 + ((m + n) / 2 - 1) * ((1 - at) / (2 - at) + at / (1 + at)))
            for m, n in sizes
        )  # fmt: skip
        return float((value - at) ** 2 - square * variance)

    # At the estimate the score is inside, at 0 and 1 outside; the estimate may itself be 0 or 1.
    low = brentq(outside, 0, value * (1 - 1e-9)) if value > 0 else 0.0
    high = brentq(outside, value + (1 - value) * 1e-9, 1) if value < 1 else 1.0
    return min(float(low), value), max(float(high), value)
