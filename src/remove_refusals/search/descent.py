"""Strengths, one for each layer and kind of site, and the directions with them, found by gradients.

Refusal is the probability of the model's own refusals; damage is the KL along its own answers. Both are differentiable
in the strengths and in the directions. One descent after another, each with the damage weighed less, gives a front.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from remove_refusals.directions import SiteKey, Steer, direction_from_vectors, steered
from remove_refusals.files import Journal
from remove_refusals.modelmap import map_model
from remove_refusals.models import Answer, LoadedModel, generate
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.candidates import Candidate
from remove_refusals.search.continuations import frozen
from remove_refusals.search.material import Material, unlikelihood, with_new_refusals
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

    def copy(self) -> "Steering":
        """Give what was reached, for the descent goes on in the same memory."""
        return replace(self, strengths=self.strengths.clone(), directions=self.directions.clone())

    def _origin(self, number: int) -> DirectionOrigin:
        origin = self.origins[number]
        if not self.learned:
            return origin
        return origin.model_copy(update={"method": f"gradient descent from {origin.method}", "length": None})

    def intervention(self, least: float) -> Intervention:
        """Give the intervention; strengths below `least` are left out, as are directions that nothing uses then."""
        strengths = [round(float(value), 4) for value in self.strengths.detach()]
        kept = [index for index, strength in enumerate(strengths) if strength >= least]
        used = sorted({self.direction_of[index] for index in kept})
        directions = tuple(
            direction_from_vectors(self.directions[number].detach().to("cpu"), self._origin(number)) for number in used
        )
        edits = []
        for index in kept:
            (kind, layer), number = self.sites[index], used.index(self.direction_of[index])
            edits.append(SiteEdit(kind=kind, layer=layer, strength=strengths[index], direction=number))
        return Intervention(directions, tuple(edits))


def start_steering(
    loaded: LoadedModel, directions: Sequence[Direction], settings: GradientSettings, first: int
) -> Steering:
    """Begin with one strength everywhere from layer `first` on; of each layer's direction the first column is used."""
    model_map = map_model(loaded.model)
    there = {(site.kind, site.layer) for site in model_map.sites}
    sites = tuple(
        (kind, layer) for layer in range(first, model_map.n_layers) for kind in SITE_KINDS[1:] if (kind, layer) in there
    )
    return Steering(
        sites,
        torch.full((len(sites),), settings.start, device=loaded.device),
        torch.stack([direction.basis[:, 0] for direction in directions[first:]]).to(loaded.device),
        tuple(layer - first for _, layer in sites if layer is not None),
        tuple(direction.origin for direction in directions[first:]),
        learned=settings.direction_rate > 0,
    )


def descend(
    directions: Sequence[Direction],
    material: Material,
    settings: GradientSettings,
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> list[Candidate]:
    """Search by gradients from one direction for each layer, found in the stream behind it: once for each weight.

    After each descent the model generates a little. Refusals that open in a new way are learned, for the next descent
    and for the scores of all candidates. The refusal of a candidate is the probability of the model's own refusals, or
    the share of generated answers that refused, whichever is greater.
    """
    steering = start_steering(material.loaded, directions, settings, material.first_layer)
    reached: list[tuple[Steering, float]] = []
    journal = journal or Journal()
    # Directions are told apart by where they come from.
    origins = [direction.origin.model_copy(update={"length": None}).to_json() for direction in directions]
    probes = (*material.refusal_probes, *material.damage_probes)
    batches = [[probe.inputs["input_ids"].tolist(), probe.paths] for probe in probes]
    inputs = [settings.model_dump(), origins, material.first_layer, batches]
    lengths = [settings.n_steps] + [settings.n_more_steps] * (len(settings.damage_weights) - 1)
    progress = progress.stage("descent", sum(lengths))
    for number in range(len(lengths)):
        answers = journal.remember(
            f"descent {number + 1}",
            inputs,
            partial(_go_down, steering, material, settings, number, progress.after(sum(lengths[:number]))),
            partial(_pack, steering),
            partial(_unpack_into, steering),
        )
        material, share = with_new_refusals(answers, material, settings)
        reached.append((steering.copy(), share))
    candidates = []
    for number, (kept, share) in enumerate(reached):
        name = f"descent {number + 1}, damage weight {settings.damage_weights[number]:g}"
        refusal, damage = material.score(kept.steers())
        candidates.append(Candidate(name, kept.intervention(settings.least), max(refusal, share), damage))
    return candidates


def _pack(steering: Steering, answers: Sequence[Answer]) -> dict[str, Any]:
    """What a descent reached, and the answers after it; a float32 is the same again when read from JSON."""
    reached = {"strengths": steering.strengths.tolist(), "directions": steering.directions.tolist()}
    return reached | {"answers": [answer.to_json() for answer in answers]}


def _unpack_into(steering: Steering, record: Mapping[str, Any]) -> list[Answer]:
    """Put into `steering` what a descent had reached, and give the answers after it."""
    steering.strengths.copy_(torch.tensor(record["strengths"]))
    steering.directions.copy_(torch.tensor(record["directions"]))
    return [Answer.model_validate(answer) for answer in record["answers"]]


def _orders(material: Material, seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of a batch of harmful and a batch of harmless prompts, each drawn until none is left, then again."""
    generator = torch.Generator().manual_seed(seed)

    def endless(n: int) -> Iterator[int]:
        while True:
            yield from torch.randperm(n, generator=generator).tolist()

    return zip(endless(len(material.refusal_probes)), endless(len(material.damage_probes)), strict=False)


def _go_down(
    steering: Steering, material: Material, settings: GradientSettings, number: int, progress: Progress
) -> list[Answer]:
    """Change `steering` in place, step by step, and let the model say its first words there.

    The rate falls to a tenth along the second half.
    """
    loaded, weight = material.loaded, settings.damage_weights[number]
    n_steps = settings.n_more_steps if number else settings.n_steps
    groups = [{"params": [steering.strengths.requires_grad_(True)], "lr": settings.rate}]
    if steering.learned:
        each = settings.direction_rate / steering.directions.shape[1] ** 0.5
        groups.append({"params": [steering.directions.requires_grad_(True)], "lr": each})
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2.0 - 1.9 * (step + 1) / n_steps))
    orders = _orders(material, settings.seed + number)
    for step in range(n_steps):
        harmful, harmless = next(orders)
        optimizer.zero_grad()
        with frozen(loaded, gradients=True), steered(loaded.model, steering.steers()):
            unlikelihood(material.refusals(harmful)).backward()  # type: ignore[no-untyped-call]
            (weight * material.damages(harmless).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            steering.strengths.clamp_(0.0, settings.most)
            steering.directions.div_(steering.directions.norm(dim=-1, keepdim=True))
        progress.done(step + 1)
    steering.strengths.requires_grad_(False)
    steering.directions.requires_grad_(False)
    with steered(loaded.model, steering.steers()):
        first = material.refused.token_ids[: settings.n_check]
        return generate(loaded, first, max_new_tokens=settings.n_check_tokens)


def first_layer_that_counts(directions: Sequence[Direction], material: Material, settings: GradientSettings) -> int:
    """Find the highest layer from which on the sites hold nine tenths of what is won.

    Half of the direction is taken out at every site, and one gradient on the first two batches says what a little more
    at each of them would do for the logarithm of the refusals' probability, and what it would cost in damage.
    """
    loaded = material.loaded
    steering = start_steering(loaded, directions, settings, 0)
    strengths = steering.strengths.requires_grad_(True)
    with frozen(loaded, gradients=True), steered(loaded.model, steering.steers()):
        loss = material.refusals(0).log().mean() + material.damages(0).mean()
        (slopes,) = torch.autograd.grad(loss, strengths)
    won = [0.0] * map_model(loaded.model).n_layers
    for (_, layer), slope in zip(steering.sites, slopes.tolist(), strict=True):
        assert layer is not None
        won[layer] += max(0.0, -slope)
    from_here = [sum(won[layer:]) for layer in range(len(won))]
    return max(layer for layer, rest in enumerate(from_here) if rest >= 0.9 * from_here[0])
