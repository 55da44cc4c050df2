"""Scores of single directions, by forward passes alone: what happens without one, and what happens with more of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from remove_refusals.directions import Steer, ablated, added, is_steerable, steered
from remove_refusals.measure import Answered
from remove_refusals.modelmap import map_model
from remove_refusals.models import in_batches
from remove_refusals.search.continuations import Probe, frozen, log_probabilities, make_probes
from remove_refusals.search.material import N_OPENING_TOKENS, OwnAnswers, damages, gather, refusal_probabilities
from remove_refusals.settings import GradientSettings
from remove_refusals.types import Direction

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
        return [LayerScore(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

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
