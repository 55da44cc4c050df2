"""Strengths, one for each layer and kind of site, and directions with them, found by gradients.

One descent after another, each with the damage weighed less, gives a front; the last is the first that frees the model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from remove_refusals.directions import SiteKey, Steer, direction_from_vectors, steered
from remove_refusals.files import Journal, Record, atomic_file
from remove_refusals.measure import labelled
from remove_refusals.modelmap import map_model
from remove_refusals.models import Answer, LoadedModel, generate, render
from remove_refusals.processes import agreed, from_first, is_first, same_everywhere
from remove_refusals.progress import Progress
from remove_refusals.search.candidates import Candidate
from remove_refusals.search.continuations import frozen
from remove_refusals.search.material import Material, unlikelihood, with_declined
from remove_refusals.settings import SITE_KINDS, GradientSettings, SiteKind
from remove_refusals.types import Direction, DirectionOrigin, Intervention, PromptSet, SiteEdit


@dataclass(frozen=True, eq=False)
class Steering:
    """What a descent changes: a strength for each site, and a direction for each layer from `first` on."""

    sites: tuple[tuple[SiteKind, int], ...]
    strengths: torch.Tensor
    """`[n_sites]`, float32."""
    directions: torch.Tensor
    """`[n_directions, d_model]`, float32."""
    origins: tuple[DirectionOrigin, ...]
    first: int
    weight: float
    """What a nat of damage costs beside the refusal."""

    def steers(self) -> dict[SiteKey, Callable[[], Steer]]:
        """Give what is taken out at each site, as `steered` wants it."""

        def at(index: int) -> Steer:
            return Steer(self.strengths[index], self.directions[self.sites[index][1] - self.first])

        return {site: partial(at, index) for index, site in enumerate(self.sites)}

    def intervention(self, settings: GradientSettings) -> Intervention:
        """Give the intervention; low strengths are left out, as are directions that nothing uses then."""
        strengths = [round(float(value), 4) for value in self.strengths]
        kept = [(site, value) for site, value in zip(self.sites, strengths, strict=True) if value >= settings.least]
        used = sorted({layer for (_, layer), _ in kept})
        directions = []
        for layer in used:
            origin = self.origins[layer - self.first]
            if settings.direction_rate > 0:
                changed = {"method": f"gradient descent from {origin.method}", "length": None}
                origin = origin.model_copy(update=changed)
            directions.append(direction_from_vectors(self.directions[layer - self.first].cpu(), origin))
        edits = (
            SiteEdit(kind=kind, layer=layer, strength=strength, direction=used.index(layer))
            for (kind, layer), strength in kept
        )
        return Intervention(tuple(directions), tuple(edits))


class Reached(Record):
    """Where a descent ended, and what the model answers there; a float32 is the same again when read from JSON."""

    strengths: list[float]
    directions: list[list[float]]
    weight: float
    answers: list[Answer]


def start_steering(
    loaded: LoadedModel, directions: Sequence[Direction], settings: GradientSettings, first: int
) -> Steering:
    """Begin with one strength everywhere from layer `first` on; of each layer's direction the first column is used."""
    model_map = map_model(loaded.model)
    there = {(site.kind, site.layer) for site in model_map.sites}
    layers = range(first, model_map.n_layers)
    sites = tuple((kind, layer) for layer in layers for kind in SITE_KINDS[1:] if (kind, layer) in there)
    strengths = torch.full((len(sites),), settings.start, device=loaded.device)
    columns = torch.stack([direction.basis[:, 0] for direction in directions[first:]]).to(loaded.device)
    origins = tuple(direction.origin for direction in directions[first:])
    return Steering(sites, strengths, columns, origins, first, settings.damage_weight)


def descend(
    directions: Sequence[Direction],
    material: Material,
    settings: GradientSettings,
    check: tuple[PromptSet, float | None],
    journal: Journal,
    progress: Progress,
) -> list[Candidate]:
    """Search by gradients from one direction for each layer, found in the stream behind it: once for each target.

    After each descent the model answers prompts that the descent did not see; those that it declines join the next. No
    further one is made where hardly any is declined, if there is a limit. The refusal of a candidate is the probability
    of the model's own refusals, or the share of these prompts that it declined, whichever is greater.
    """
    prompts, most_refusals = check
    token_ids = render(material.loaded, prompts.prompts)
    steering = start_steering(material.loaded, directions, settings, material.first_layer)
    candidates: list[Candidate] = []
    # Directions are told apart by where they come from.
    origins = [direction.origin.model_copy(update={"length": None}).to_json() for direction in directions]
    probes = (*material.refusal_probes, *material.damage_probes)
    batches = [[probe.inputs["input_ids"].tolist(), probe.paths] for probe in probes]
    inputs = [settings.model_dump(), origins, material.first_layer, batches, token_ids]
    lengths = [settings.n_steps] + [settings.n_more_steps] * (len(settings.targets) - 1)
    progress = progress.stage("descent", sum(lengths))
    for number, target in enumerate(settings.targets):
        name, told = f"descent {number + 1}", progress.after(sum(lengths[:number]))
        file = journal.unfinished(name, inputs)
        compute = partial(_go_down, steering, material, settings, number, token_ids, file, told)
        found = journal.remember(name, inputs, compute, Reached.to_json, Reached.model_validate)
        if file is not None and is_first():
            file.unlink(missing_ok=True)
        strengths, vectors = torch.tensor(found.strengths), torch.tensor(found.directions)
        device = material.loaded.device
        steering = replace(steering, strengths=strengths.to(device), directions=vectors.to(device), weight=found.weight)
        material, share = with_declined(labelled(prompts, token_ids, found.answers), material, settings)
        refusal, damage = material.score(steering.steers())
        name = f"descent {number + 1}, to refusals of {target:g}"
        candidates.append(Candidate(name, steering.intervention(settings), max(refusal, share), damage))
        if most_refusals is not None and candidates[-1].refusal <= most_refusals:
            break
    return candidates


def _orders(material: Material, seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of a batch of harmful and a batch of harmless prompts, each drawn until none is left, then again."""
    generator = torch.Generator().manual_seed(seed)

    def endless(n: int) -> Iterator[int]:
        while True:
            yield from torch.randperm(n, generator=generator).tolist()

    return zip(endless(len(material.refusal_probes)), endless(len(material.damage_probes)), strict=False)


class _Descent:
    """Adam on strengths and directions, the rate falling to a tenth along the second half; it can be kept half-way.

    Of the strengths and directions the mean over the last quarter is what it gives: a batch is a few prompts only.
    """

    def __init__(self, steering: Steering, settings: GradientSettings, n_steps: int) -> None:
        self.n_steps, self._n_averaged, self._most = n_steps, max(1, n_steps // 4), settings.most
        strengths, directions = steering.strengths.clone().requires_grad_(), steering.directions.clone()
        groups = [{"params": [strengths], "lr": settings.rate}]
        if settings.direction_rate > 0:
            each = settings.direction_rate / directions.shape[1] ** 0.5
            groups.append({"params": [directions.requires_grad_()], "lr": each})
        self.optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, 2.0 - 1.9 * (step + 1) / n_steps)
        )
        self.now = replace(steering, strengths=strengths, directions=directions)
        self.step, self.weight = 0, steering.weight
        self._means = [torch.zeros_like(strengths), torch.zeros_like(directions)]

    def go(self, weight: float) -> None:
        """Make the step that the gradients say; the next one has this weight."""
        strengths, directions = self.now.strengths, self.now.directions
        self.optimizer.step()
        self._schedule.step()
        self.weight = weight
        same_everywhere(strengths, directions)
        with torch.no_grad():
            strengths.clamp_(0.0, self._most)
            directions.div_(directions.norm(dim=-1, keepdim=True))
            if self.step >= self.n_steps - self._n_averaged:
                pairs = zip(self._means, (strengths, directions), strict=True)
                self._means = [mean + now / self._n_averaged for mean, now in pairs]
        self.step += 1

    def reached(self) -> Steering:
        """Give the mean of where it was in the end."""
        strengths, directions = self._means
        return replace(self.now, strengths=strengths, directions=directions / directions.norm(dim=-1, keepdim=True))

    def keep(self, file: Path) -> None:
        """Write down all that the next steps depend on, over what was there."""
        own = {"step": self.step, "weight": self.weight, "means": self._means}
        now = [self.now.strengths.detach(), self.now.directions.detach()]
        state = own | {"now": now, "optimizer": self.optimizer.state_dict(), "schedule": self._schedule.state_dict()}
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, force=True) as staging:
            torch.save(state, staging)

    def go_on(self, file: Path) -> None:
        """Go on from what was written down; the same steps follow."""
        state = from_first(lambda: torch.load(file, map_location="cpu", weights_only=True))
        device = self.now.strengths.device
        self.step, self.weight, self._means = state["step"], state["weight"], [one.to(device) for one in state["means"]]
        with torch.no_grad():
            for tensor, kept in zip((self.now.strengths, self.now.directions), state["now"], strict=True):
                tensor.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def _go_down(
    steering: Steering,
    material: Material,
    settings: GradientSettings,
    number: int,
    check: Sequence[Sequence[int]],
    file: Path | None,
    progress: Progress,
) -> Reached:
    """Go down, each step kept in a file if there is one, and let the model say its first words there."""
    loaded, target = material.loaded, settings.targets[number]
    descent = _Descent(steering, settings, settings.n_more_steps if number else settings.n_steps)
    if file is not None and from_first(file.is_file):
        descent.go_on(file)
        progress.note(f"Descent {number + 1} goes on at step {descent.step + 1} of {descent.n_steps}.")
    orders, steers = _orders(material, settings.seed + number), descent.now.steers()
    for harmful, harmless in islice(orders, descent.step, descent.n_steps):
        descent.optimizer.zero_grad()
        with frozen(loaded, gradients=True), steered(loaded.model, steers):
            refusals, damage = material.refusals(harmful), material.damages(harmless).mean()
            unlikelihood(refusals).backward()  # type: ignore[no-untyped-call]
            (descent.weight * damage).backward()  # type: ignore[no-untyped-call]
        mean = refusals.detach().mean()
        same_everywhere(mean)
        likely = float(mean)
        followed = descent.weight * math.exp(settings.weight_rate * (target - likely) / (target + likely))
        descent.go(max(followed, settings.least_weight))
        if file is not None and is_first():
            descent.keep(file)
        progress.done(descent.step)
    reached = descent.reached()
    with torch.no_grad(), steered(loaded.model, reached.steers()):
        answers = generate(loaded, check, max_new_tokens=settings.n_check_tokens)
    strengths, directions = reached.strengths.tolist(), reached.directions.tolist()
    return Reached(strengths=strengths, directions=directions, weight=descent.weight, answers=answers)


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
        won[layer] += max(0.0, -slope)
    from_here = [sum(won[layer:]) for layer in range(len(won))]
    return agreed(max(layer for layer, rest in enumerate(from_here) if rest >= 0.9 * from_here[0]))
