"""How far apart harmful and harmless prompts lie in the residual stream, layer by layer; nothing is changed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from remove_refusals.directions.activations import collect_both
from remove_refusals.directions.direction import difference_of_means, hidden_at, largest_coordinate_share
from remove_refusals.errors import DirectionError
from remove_refusals.models import LoadedModel
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import draw
from remove_refusals.types import Activations, Auroc, LayerSeparation, Projection, PromptSet, Separation

MOST_PROMPTS = 128
"""So many prompts of a set are looked at: each layer of each prompt is kept until the end."""

_NO_DIFFERENCE = 1e-6
"""A difference of this share of the states' norm is rounding: the token is the same in every prompt."""

Array = npt.NDArray[np.float64]


def measure_separation(
    loaded: LoadedModel,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    position: int = -1,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Separation:
    """Run prompts, at most `MOST_PROMPTS` of each set, and measure how far apart the two lie at every layer."""
    parts = [draw(part, MOST_PROMPTS, seed) if len(part) > MOST_PROMPTS else part for part in (harmful, harmless)]
    progress = progress.stage("separation", sum(map(len, parts)))
    collected = collect_both(loaded, *parts, positions=(position,), progress=progress)
    return separation(*collected, position=position, seed=seed)


def separation(harmful: Activations, harmless: Activations, *, position: int = -1, seed: int = 0) -> Separation:
    """Measure how far apart two sets lie at every layer, each prompt by a direction that it had no part in.

    The difference of the means of one half (Arditi et al. 2024, section 2.3) scores the prompts of the other, and the
    pairs within each half are counted: with the same prompts for both, anything as wide as a residual stream separates,
    noise too. Sets of one size are cut alike, so that line `i` of both lies in the same half.
    """
    if harmful.hidden.shape[2:] != harmless.hidden.shape[2:] or min(len(harmful.prompts), len(harmless.prompts)) < 2:
        raise DirectionError(
            f"The activations on {len(harmful.prompts)} harmful and {len(harmless.prompts)} harmless prompts have "
            f"(layers + 1, d_model) {tuple(harmful.hidden.shape[2:])} and {tuple(harmless.hidden.shape[2:])}, expected "
            "at least 2 prompts of each and equal shapes; collect both on one model."
        )
    layers, differences = [], []
    for index in range(harmful.n_layers + 1):
        states = [hidden_at(part, index, position) for part in (harmful, harmless)]
        differences.append(difference_of_means(*states))
        share = largest_coordinate_share((harmful, harmless), index, position)
        layers.append(_layer(index, states, differences[-1], share, seed))
    return Separation(
        model=harmful.model,
        position=position,
        seed=seed,
        prompts=(harmful.prompts, harmless.prompts),
        layers=tuple(layers),
        cosines=_cosines(differences, [layer.auroc is None for layer in layers]),
    )


def _layer(
    index: int, states: Sequence[torch.Tensor], difference: torch.Tensor, share: float, seed: int
) -> LayerSeparation:
    norms = [float(part.norm(dim=1).mean()) for part in states]
    found = LayerSeparation(
        layer=index,
        difference_norm=float(difference.norm()),
        norm_harmful=norms[0],
        norm_harmless=norms[1],
        largest_coordinate_share=share,
    )
    halves = [_halves(len(part), seed) for part in states]
    along = [np.empty(len(part)) for part in states]
    values, sizes = [], []
    for scored in (0, 1):
        others = [part[own[1 - scored]] for part, own in zip(states, halves, strict=True)]
        direction = difference_of_means(*others)
        length = float(direction.norm())
        if min(length, found.difference_norm) <= _NO_DIFFERENCE * max(norms):
            return found
        middle = others[1].mean(dim=0) + direction / 2
        for part, own, line in zip(states, halves, along, strict=True):
            line[own[scored]] = ((part[own[scored]] - middle) @ direction / length).numpy()
        scores = [line[own[scored]] for line, own in zip(along, halves, strict=True)]
        values.append(auroc(scores[0], scores[1]))
        sizes.append((len(scores[0]), len(scores[1])))
    value = float(np.average(values, weights=[m * n for m, n in sizes]))
    low, high = auroc_interval(value, sizes)
    across = _first_component(torch.cat([*states]).numpy(), difference.numpy())
    points = tuple(zip(np.concatenate(along).tolist(), across.tolist(), strict=True))
    n_harmful, n_harmless = map(len, states)
    measured = Auroc(value=value, low=low, high=high, n_harmful=n_harmful, n_harmless=n_harmless, seed=seed)
    projection = Projection(harmful=points[:n_harmful], harmless=points[n_harmful:])
    return found.model_copy(update={"auroc": measured, "projection": projection})


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


def _cosines(differences: Sequence[torch.Tensor], same: Sequence[bool]) -> tuple[tuple[float | None, ...], ...]:
    units = torch.stack([each / each.norm().clamp_min(1e-300) for each in differences])
    cosines = (units @ units.T).clamp(-1, 1)
    return tuple(
        tuple(None if same[i] or same[j] else float(cosines[i, j]) for j in range(len(same))) for i in range(len(same))
    )


def auroc(positive: Sequence[float] | Array, negative: Sequence[float] | Array) -> float:
    """Compute by ranks (Mann and Whitney 1947) how often positive scores are above negative ones, ties counted half."""
    from scipy.stats import rankdata

    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def auroc_interval(value: float, sizes: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Compute a 95% score interval of an AUROC (Newcombe 2006, part 2, method 5), which has a width at 0 and 1 too.

    The variance is that of Hanley and McNeil (1982) with both sizes' excess replaced by their mean. `value` is the mean
    over independent groups, weighed by their pairs; `sizes` are their numbers of positive and negative scores.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

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
