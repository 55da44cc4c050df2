"""Layer and position of one direction, chosen by forward passes alone (Arditi et al. 2024, section 2.3, appendix C).

A direction is scored by what happens without it, and with more of it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch

from remove_refusals.directions import Steer, ablated, added, intervene, is_steerable, mean_difference, steered
from remove_refusals.errors import DirectionError, SelectionError
from remove_refusals.measure import Answered
from remove_refusals.modelmap import map_model
from remove_refusals.models import in_batches
from remove_refusals.processes import agreed
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.candidates import Candidate
from remove_refusals.search.continuations import Probe, frozen, log_probabilities, make_probes
from remove_refusals.search.material import N_OPENING_TOKENS, OwnAnswers, damages, gather, refusal_probabilities
from remove_refusals.settings import GradientSettings, LayerSettings, Rule, published_name
from remove_refusals.types import Activations, Direction

_SMALLEST_ODDS = 1e-6


@dataclass(frozen=True, eq=False)
class Option:
    """One direction, found at an index of the layer axis; the push, `[d_model]`, is the means' difference along it."""

    index: int
    direction: Direction
    push: torch.Tensor
    name: str


@dataclass(frozen=True)
class LayerScore:
    """What was measured of one direction: means over prompts, when it is taken out or, for `induce`, added."""

    bypass: float
    """How far the log-odds of a refusal of harmful prompts rise."""
    induce: float
    """How far those of a refusal's first tokens rise on harmless prompts."""
    refusal: float
    damage: float
    """The KL on harmless prompts, in nats."""

    def passes(self, max_kl: float) -> bool:
        """Tell whether it keeps the limits: little damage, and adding it induces refusals."""
        return self.damage <= max_kl and self.induce > 0


Context = Callable[[list[int]], AbstractContextManager[None]]
"""Makes, from the candidate of every row, the context that a batch runs in."""


@dataclass(frozen=True, eq=False)
class _Course:
    """Prompts, what is gone along, and what is measured: a number for each row, whose prompts are given."""

    part: Answered
    paths: Sequence[Sequence[int]]
    measure: Callable[[torch.Tensor, Probe, Sequence[int]], torch.Tensor]


class Bench:
    """Scores directions on prompts: what the model does as it stands is measured once."""

    def __init__(self, own: OwnAnswers, kl_tokens: int) -> None:
        """Prepare; the damage goes along the first `kl_tokens` of each answer."""
        self._loaded, self._map, self._tied = own.loaded, map_model(own.loaded.model), own.tied
        refused, answered = own.refused, own.answered
        self.n_layers = self._map.n_layers
        material = gather(own, GradientSettings(kl_tokens=kl_tokens))
        self._vocabulary = material.vocabulary
        bases = {
            prompt: base[probe.rows == row]
            for probe, base in zip(material.damage_probes, material.base, strict=True)
            for row, prompt in enumerate(probe.prompts)
        }
        answers = [answer.token_ids for answer in answered.answers]
        beginnings = material.openings.telling_apart(answers)
        self._refusals = _Course(
            refused,
            [answer.token_ids[:N_OPENING_TOKENS] for answer in refused.answers],
            lambda found, probe, _: refusal_probabilities(found, probe, material.openings, material.vocabulary),
        )
        self._damages = _Course(
            answered,
            [answer[:kl_tokens] for answer in answers],
            lambda found, probe, prompts: damages(found, torch.cat([bases[prompt] for prompt in prompts]), probe),
        )
        # Harmless prompts have no refusal of their own: the most frequent opening is gone along, others branch off.
        self._induced = _Course(
            answered,
            [beginnings.prefixes[0]] * len(answered),
            lambda found, probe, _: refusal_probabilities(found, probe, beginnings, material.vocabulary),
        )
        as_it_is: list[Context] = [lambda _: nullcontext()]
        self._before = _log_odds(self._along(self._refusals, len(refused), as_it_is, 1))
        self._before_induced = _log_odds(self._along(self._induced, len(answered), as_it_is, 1))

    def score(self, options: Sequence[Option], n: int) -> list[LayerScore]:
        """Measure directions on the first `n` harmful and harmless prompts; no score depends on the others."""
        n_harmful, n_harmless = min(n, len(self._refusals.part)), min(n, len(self._damages.part))
        # Where sites cannot be steered row by row, one direction after another is taken out as an intervention.
        together = is_steerable(self._map)
        out = [self._steering(options)] if together else [self._taking_out(option) for option in options]
        each = len(options) if together else 1
        refusals = self._along(self._refusals, n_harmful, out, each)
        kls = self._along(self._damages, n_harmless, out, each)
        induced = self._along(self._induced, n_harmless, [self._adding(options)], len(options))
        bypass = (_log_odds(refusals) - self._before[:, :n_harmful]).mean(dim=1)
        induce = (_log_odds(induced) - self._before_induced[:, :n_harmless]).mean(dim=1)
        columns = (bypass, induce, refusals.mean(dim=1), kls.mean(dim=1))
        return agreed([LayerScore(*values) for values in zip(*(column.tolist() for column in columns), strict=True)])

    def _along(self, course: _Course, n: int, contexts: Sequence[Context], n_each: int) -> torch.Tensor:
        """Run the first `n` prompts with every candidate, `n_each` in each context: `[n_candidates, n]`, float64."""
        part, paths = course.part, course.paths
        lengths = [len(ids) + len(path) for ids, path in zip(part.token_ids[:n], paths[:n], strict=True)]
        values = torch.empty(len(contexts), n_each * n, dtype=torch.float64)
        for number, context in enumerate(contexts):

            def run(rows: Sequence[int], context: Context = context) -> torch.Tensor:
                prompts = [row % n for row in rows]
                ids, along = [part.token_ids[i] for i in prompts], [paths[i] for i in prompts]
                (probe,) = make_probes(self._loaded, ids, along, max(map(len, along)), len(rows))
                # The batch has an order of its own.
                rows, prompts = [rows[i] for i in probe.prompts], [prompts[i] for i in probe.prompts]
                with frozen(self._loaded, gradients=False), context([row // n for row in rows]):
                    found = log_probabilities(self._loaded, probe, self._vocabulary)
                    measured = course.measure(found, probe, prompts).to("cpu", torch.float64)
                return torch.empty_like(measured).index_copy(0, torch.tensor(probe.prompts), measured)

            for rows, result in in_batches(self._loaded, lengths * n_each, run):
                values[number, list(rows)] = result
        return values.reshape(-1, n)

    def _taking_out(self, option: Option) -> Context:
        return lambda _: ablated(self._loaded, option.direction, tied=self._tied)

    def _steering(self, options: Sequence[Option]) -> Context:
        directions = torch.stack([option.direction.basis[:, 0] for option in options]).to(self._loaded.device)
        full = torch.ones((), device=self._loaded.device)

        def context(rows: list[int]) -> AbstractContextManager[None]:
            steer = Steer(full, directions[rows])
            sites = {(site.kind, site.layer): lambda: steer for site in self._map.sites}
            return steered(self._loaded.model, sites, self._tied)

        return context

    def _adding(self, options: Sequence[Option]) -> Context:
        pushes = torch.stack([option.push for option in options]).to(self._loaded.device)
        indices = torch.tensor([option.index for option in options])

        def context(rows: list[int]) -> AbstractContextManager[None]:
            own, there = pushes[rows], indices[rows]
            vectors = {index: own * (there == index).to(own.device)[:, None] for index in torch.unique(there).tolist()}
            return added(self._loaded.model, vectors)

        return context


def _log_odds(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.logit(probabilities, eps=_SMALLEST_ODDS)


_TIE = 0.01


class LayerRule(Rule):
    """The rule of this search: `max_kl` is a filter, `max_refusals` counts in the confirmation only."""

    def __str__(self) -> str:
        """Say the rule in words."""
        return f"lowest odds of a refusal without the direction, at a KL of at most {self.max_kl:g}"


@dataclass(frozen=True, eq=False)
class LayerSearch:
    """What was tried, the farthest first, with its last scores; `order` are the indices of those to be confirmed."""

    candidates: tuple[Candidate, ...]
    scores: tuple[LayerScore, ...]
    order: tuple[int, ...]
    notes: tuple[str, ...]


def ranked(scores: Sequence[LayerScore], max_kl: float) -> tuple[int, ...]:
    """Put directions in the order in which they are preferred.

    Those that keep the limits come first, the lowest bypass first, and by damage within 1% of the best that is left.
    Then, by damage, those that lower the odds at least half as much as the best; then, by damage, the rest.
    """
    order: list[int] = []
    left = [index for index, score in enumerate(scores) if score.passes(max_kl)]
    while left:
        best = min(scores[index].bypass for index in left)
        ties = [index for index in left if scores[index].bypass <= best + _TIE * abs(best)]
        order.append(min(ties, key=lambda index: scores[index].damage))
        left.remove(order[-1])
    rest = [index for index, score in enumerate(scores) if not score.passes(max_kl)]
    best = min((scores[index].bypass for index in rest), default=0.0)
    enough = best / 2 if best < 0 else best
    return (*order, *sorted(rest, key=lambda index: (scores[index].bypass > enough, scores[index].damage)))


def search_layers(
    own: OwnAnswers, collected: tuple[Activations, Activations], settings: LayerSettings, progress: Progress = SILENT
) -> LayerSearch:
    """Choose layer, position and recipe by activations of every layer at each position to be tried."""
    model = published_name(own.loaded.source)
    options = make_options(*collected, depth=settings.depth, seed=settings.seed, model=model)
    if not options:
        raise SelectionError(
            "The mean activations on harmful and harmless prompts differ at no layer and position, expected a "
            "difference to choose by; check the prompts, or pass --select none."
        )
    n = max(len(own.refused), len(own.answered))
    return narrow_down(Bench(own, settings.kl_tokens), options, n, settings, progress)


def narrow_down(
    bench: Bench, options: Sequence[Option], n_prompts: int, settings: LayerSettings, progress: Progress = SILENT
) -> LayerSearch:
    """Score directions, dropping those that are clearly worse after a few prompts.

    Of those that reached the last round, those that keep the limits are to be confirmed, or all where none does.
    """
    kept = list(range(len(options)))
    sizes = [len(options), min(len(options), max(settings.fewest, ceil(settings.share * len(options))))]
    sizes.append(min(sizes[-1], settings.finalists))
    rounds = (*settings.rounds, n_prompts)
    progress, done = progress.stage("directions", sum(size * n for size, n in zip(sizes, rounds, strict=True))), 0
    scores: dict[int, LayerScore] = {}
    dropped: list[int] = []
    for number, n in enumerate(rounds):
        scores |= dict(zip(kept, bench.score([options[index] for index in kept], n), strict=True))
        last = number == len(rounds) - 1
        order = ranked([scores[index] for index in kept], settings.max_kl if last else 2 * settings.max_kl)
        best = [kept[place] for place in order]
        kept = best if last else best[: sizes[number + 1]]
        dropped = best[len(kept) :] + dropped
        done += sizes[number] * n
        progress.done(done)
    found = tuple(scores[index] for index in (*kept, *dropped))
    candidates = tuple(
        Candidate(options[index].name, intervene(options[index].direction, bench.n_layers), score.refusal, score.damage)
        for index, score in zip((*kept, *dropped), found, strict=True)
    )
    passing = tuple(place for place in range(len(kept)) if found[place].passes(settings.max_kl))
    if passing:
        return LayerSearch(candidates, found, passing, ())
    note = (
        f"None of the {len(kept)} directions that came farthest, of {len(options)}, kept the limits of the choice by "
        f"layer (a KL of at most {settings.max_kl:g}, and refusals when it is added); those that lower refusals at "
        "least half as much as the best were ranked by KL."
    )
    return LayerSearch(candidates, found, tuple(range(len(kept))), (note,))


def make_options(
    harmful: Activations, harmless: Activations, *, depth: float = 0.8, seed: int = 0, model: str | None = None
) -> list[Option]:
    """Make a direction for each layer below a share of the depth, position and recipe, where the activations differ."""
    options = []
    for index in range(1, max(2, ceil(depth * harmful.n_layers))):
        for position in harmful.positions:
            made = partial(mean_difference, harmful, harmless, layer=index, position=position, model=model, seed=seed)
            try:
                plain, projected = made(), made(projected=True)
            except DirectionError:
                # The two means are the same.
                continue
            difference = plain.basis[:, 0] * (plain.origin.length or 0.0)
            for recipe, direction in (("plain", plain), ("projected", projected)):
                unit = direction.basis[:, 0]
                name = f"layer {index}, position {position}, {recipe}"
                options.append(Option(index, direction, unit * (unit @ difference), name))
    return options
