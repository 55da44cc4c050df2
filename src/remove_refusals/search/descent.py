"""Strengths, one for each layer and kind of site, and the directions with them, found by gradients.

Refusal is the probability of the model's own refusals; damage is the KL along its own answers. Both are differentiable
in the strengths and in the directions. One descent after another, each with the damage weighed less, gives a front.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from remove_refusals.directions import SiteKey, Steer, direction_from_vectors, steered
from remove_refusals.files import Journal
from remove_refusals.modelmap import ModelMap
from remove_refusals.models import Answer, LoadedModel
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.candidates import Candidate
from remove_refusals.search.continuations import frozen, log_probabilities
from remove_refusals.search.material import (
    Material,
    damages,
    first_words,
    refusal_probabilities,
    score,
    unlikelihood,
    with_new_refusals,
)
from remove_refusals.settings import SITE_KINDS, GradientSettings
from remove_refusals.types import Direction, DirectionOrigin, Intervention, SiteEdit


@dataclass(frozen=True, eq=False)
class Steering:
    """What a descent changes.

    Attributes:
        sites: The sites that may be edited.
        strengths: `[n_sites]`, float32, one for each.
        directions: `[n_directions, d_model]`, float32.
        direction_of: For each site the index of its direction.
        origins: Where each direction came from.
        learned: Whether the descent changes the directions.
    """

    sites: tuple[SiteKey, ...]
    strengths: torch.Tensor
    directions: torch.Tensor
    direction_of: tuple[int, ...]
    origins: tuple[DirectionOrigin, ...]
    learned: bool = False

    def steers(self) -> dict[SiteKey, Callable[[], Steer]]:
        """Give what is taken out at each site, as `steered` wants it."""

        def at(index: int) -> Callable[[], Steer]:
            return lambda: Steer(self.strengths[index], self.directions[self.direction_of[index]])

        return {site: at(index) for index, site in enumerate(self.sites)}

    def _origin(self, number: int) -> DirectionOrigin:
        """Say that a direction was changed; the harmless mean's component is not known of it any more."""
        origin = self.origins[number]
        if not self.learned:
            return origin
        return replace(origin, method=f"gradient descent from {origin.method}", length=None)

    def intervention(self, least: float) -> Intervention:
        """Give the intervention; strengths below `least` are left out, as are directions that nothing uses then."""
        strengths = [round(float(value), 4) for value in self.strengths.detach()]
        kept = [index for index, strength in enumerate(strengths) if strength >= least]
        used = sorted({self.direction_of[index] for index in kept})
        directions = tuple(
            direction_from_vectors(self.directions[number].detach().to("cpu"), self._origin(number)) for number in used
        )
        edits = [SiteEdit(*self.sites[index], strengths[index], used.index(self.direction_of[index])) for index in kept]
        return Intervention(directions, tuple(edits))


def start_steering(
    loaded: LoadedModel, model_map: ModelMap, directions: Sequence[Direction], settings: GradientSettings, first: int
) -> Steering:
    """Begin with one strength everywhere.

    Args:
        loaded: The model.
        model_map: Its map.
        directions: One for each layer: of the stream behind it. Only the first column of each is used.
        settings: How the descent goes.
        first: The first layer to edit.
    """
    there = {(site.kind, site.layer) for site in model_map.sites}
    sites = tuple(
        (kind, layer) for layer in range(first, model_map.n_layers) for kind in SITE_KINDS[1:] if (kind, layer) in there
    )
    device = loaded.device
    return Steering(
        sites,
        torch.full((len(sites),), settings.start, device=device),
        torch.stack([direction.basis[:, 0] for direction in directions[first:]]).to(device),
        tuple(layer - first for _, layer in sites if layer is not None),
        tuple(direction.origin for direction in directions[first:]),
        learned=settings.direction_rate > 0,
    )


def descend(
    loaded: LoadedModel,
    model_map: ModelMap,
    directions: Sequence[Direction],
    material: Material,
    settings: GradientSettings,
    *,
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> list[Candidate]:
    """Search by gradients.

    After each descent the model generates a little. Refusals that open in a new way are learned, for the next descent
    and for the scores of all candidates.

    Args:
        loaded: The model; it is left as it is.
        model_map: Its map.
        directions: One for each layer: of the stream behind it.
        material: What to run on.
        settings: How the descent goes.
        journal: Keeps each descent, so that a killed search goes on with the next.
        progress: Told how many steps are done.

    Returns:
        One candidate for each damage weight. Its refusal is the probability of the model's own refusals, or the share
        of generated answers that refused, whichever is greater.
    """
    steering = start_steering(loaded, model_map, directions, settings, material.first_layer)
    reached: list[tuple[Steering, float]] = []
    journal = journal or Journal()
    inputs = _inputs(directions, material, settings)
    for number in range(len(settings.damage_weights)):
        answers = journal.remember(
            f"descent {number + 1}",
            inputs,
            partial(_one, loaded, model_map, steering, material, settings, number, progress),
            partial(_pack, steering),
            partial(_unpack_into, steering),
        )
        material, share = with_new_refusals(loaded, model_map, answers, material, settings)
        kept = replace(steering, strengths=steering.strengths.clone(), directions=steering.directions.clone())
        reached.append((kept, share))
    candidates = []
    for number, (kept, share) in enumerate(reached):
        name = f"descent {number + 1}, damage weight {settings.damage_weights[number]:g}"
        refusal, damage = score(loaded, model_map, kept.steers(), material)
        candidates.append(Candidate(name, kept.intervention(settings.least), max(refusal, share), damage))
    return candidates


def _one(
    loaded: LoadedModel,
    model_map: ModelMap,
    steering: Steering,
    material: Material,
    settings: GradientSettings,
    number: int,
    progress: Progress,
) -> list[Answer]:
    """Go down once, which changes `steering`, and let the model say its first words there."""
    lengths = [settings.n_steps] + [settings.n_more_steps] * (len(settings.damage_weights) - 1)
    before, n_steps, weight = sum(lengths[:number]), lengths[number], settings.damage_weights[number]
    orders = _orders(material, settings.seed + number)
    for step in _descent(loaded, model_map, steering, material, settings, weight, n_steps, orders):
        progress.stage("descent", sum(lengths)).done(before + step)
    return first_words(loaded, model_map, steering.steers(), material, settings)


def _inputs(directions: Sequence[Direction], material: Material, settings: GradientSettings) -> list[Any]:
    """What the descents depend on; directions are told apart by where they come from."""
    origins = [asdict(replace(direction.origin, length=None)) for direction in directions]
    probes = [[probe.token_ids, probe.paths] for probe in (*material.refusal_probes, *material.damage_probes)]
    return [settings.model_dump(), origins, material.first_layer, probes]


def _pack(steering: Steering, answers: Sequence[Answer]) -> dict[str, Any]:
    """What a descent reached, and the answers after it; a float32 is the same again when read from JSON."""
    reached = {"strengths": steering.strengths.tolist(), "directions": steering.directions.tolist()}
    return reached | {"answers": [answer.to_json() for answer in answers]}


def _unpack_into(steering: Steering, record: Mapping[str, Any]) -> list[Answer]:
    """Put into `steering` what a descent had reached, and give the answers after it."""
    steering.strengths.copy_(torch.tensor(record["strengths"]))
    steering.directions.copy_(torch.tensor(record["directions"]))
    return [Answer.from_json(answer) for answer in record["answers"]]


def _orders(material: Material, seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of a batch of harmful and a batch of harmless prompts, each drawn until none is left, then again."""
    generator = torch.Generator().manual_seed(seed)

    def endless(n: int) -> Iterator[int]:
        while True:
            yield from torch.randperm(n, generator=generator).tolist()

    return zip(endless(len(material.refusal_probes)), endless(len(material.damage_probes)), strict=False)


def _descent(
    loaded: LoadedModel,
    model_map: ModelMap,
    steering: Steering,
    material: Material,
    settings: GradientSettings,
    weight: float,
    n_steps: int,
    orders: Iterator[tuple[int, int]],
) -> Iterator[int]:
    """Change strengths and directions in place, step by step; the rate falls to a tenth along the second half."""
    learned = settings.direction_rate > 0
    groups = [{"params": [steering.strengths.requires_grad_(True)], "lr": settings.rate}]
    if learned:
        each = settings.direction_rate / steering.directions.shape[1] ** 0.5
        groups.append({"params": [steering.directions.requires_grad_(True)], "lr": each})
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2.0 - 1.9 * (step + 1) / n_steps))
    for step in range(n_steps):
        harmful, harmless = next(orders)
        optimizer.zero_grad()
        with frozen(loaded, gradients=True), steered(loaded.model, model_map, steering.steers()):
            probe = material.refusal_probes[harmful]
            found = log_probabilities(loaded, model_map, probe, material.vocabulary, material.first_layer)
            unlikelihood(refusal_probabilities(found, probe, material.openings, material.vocabulary)).backward()  # type: ignore[no-untyped-call]
            probe = material.damage_probes[harmless]
            found = log_probabilities(loaded, model_map, probe, material.vocabulary, material.first_layer)
            (weight * damages(found, material.base[harmless], probe).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            steering.strengths.clamp_(0.0, settings.most)
            steering.directions.div_(steering.directions.norm(dim=-1, keepdim=True))
        yield step + 1
    steering.strengths.requires_grad_(False)
    steering.directions.requires_grad_(False)


def first_layer_that_counts(
    loaded: LoadedModel,
    model_map: ModelMap,
    directions: Sequence[Direction],
    material: Material,
    settings: GradientSettings,
) -> int:
    """Find the layer below which an edit does little good for the damage that it does.

    Half of the direction is taken out at every site, and one gradient says what a little more at each of them would do
    for the logarithm of the refusals' probability, and what it would cost in damage.

    Args:
        loaded: The model.
        model_map: Its map.
        directions: One for each layer.
        material: What to run on, with `first_layer` 0; its first two batches are used.
        settings: How the descent goes.

    Returns:
        The highest layer from which on the sites hold nine tenths of what is won.
    """
    steering = start_steering(loaded, model_map, directions, settings, 0)
    strengths = steering.strengths.requires_grad_(True)
    with frozen(loaded, gradients=True), steered(loaded.model, model_map, steering.steers()):
        probe = material.refusal_probes[0]
        found = log_probabilities(loaded, model_map, probe, material.vocabulary, 0)
        refusal = refusal_probabilities(found, probe, material.openings, material.vocabulary).log().mean()
        probe = material.damage_probes[0]
        found = log_probabilities(loaded, model_map, probe, material.vocabulary, 0)
        damage = damages(found, material.base[0], probe).mean()
        (slopes,) = torch.autograd.grad(refusal + damage, strengths)
    won = [0.0] * model_map.n_layers
    for (_, layer), slope in zip(steering.sites, slopes.tolist(), strict=True):
        assert layer is not None
        won[layer] += max(0.0, -slope)
    from_here = [sum(won[layer:]) for layer in range(model_map.n_layers)]
    return max(layer for layer, rest in enumerate(from_here) if rest >= 0.9 * from_here[0])
