"""What is measured of directions by forward passes alone: many in one batch, a row for each with each prompt."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from remove_refusals.apply.hooks import ablated
from remove_refusals.apply.steering import Steer, added, is_steerable, steered
from remove_refusals.batching import MOST_PROMPTS, fitting_pass, longest_first, with_backoff
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.selection.material import GradientSettings, Material, gather
from remove_refusals.selection.objectives import damages, refusal_probabilities
from remove_refusals.selection.openings import N_OPENING_TOKENS, Openings, learn_openings
from remove_refusals.selection.probes import Probe, frozen, log_probabilities, make_probes
from remove_refusals.selection.recipes import Option
from remove_refusals.selection.references import References

_SMALLEST_ODDS = 1e-6


@dataclass(frozen=True)
class LayerScore:
    """What was measured of one direction.

    Attributes:
        bypass: How far the log-odds of a refusal of harmful prompts rise when it is taken out; negative if they fall.
        induce: How far those of its first tokens rise on harmless prompts when it is added.
        refusal: The mean probability of a refusal of harmful prompts when it is taken out.
        damage: The mean KL on harmless prompts when it is taken out, in nats.
    """

    bypass: float
    induce: float
    refusal: float
    damage: float

    def passes(self, max_kl: float) -> bool:
        """Tell whether it keeps the limits: little damage, and adding it induces refusals."""
        return self.damage <= max_kl and self.induce > 0


class Bench:
    """Scores directions on prompts: what the model does as it stands is measured once."""

    def __init__(
        self,
        loaded: LoadedModel,
        model_map: ModelMap,
        refused: References,
        answered: References,
        kl_tokens: int,
        more_refusals: Sequence[Sequence[int]] = (),
    ) -> None:
        """Prepare.

        Args:
            loaded: The model; it is left as it is.
            model_map: Its map.
            refused: Harmful prompts that it refused.
            answered: Harmless prompts that it answered.
            kl_tokens: How many tokens of each answer the damage goes along.
            more_refusals: The tokens of other refusals, for their openings.
        """
        self._loaded, self._map = loaded, model_map
        self._refused, self._answered = refused, answered
        self._material: Material = gather(
            loaded,
            model_map,
            refused,
            answered,
            GradientSettings(kl_tokens=kl_tokens),
            more_refusals=more_refusals,
        )
        self._own: dict[int, torch.Tensor] = {}
        for probe, base in zip(self._material.damage_probes, self._material.base, strict=True):
            self._own |= {prompt: base[probe.rows == row] for row, prompt in enumerate(probe.prompts)}
        self._paths = [answer.token_ids[:N_OPENING_TOKENS] for answer in refused.answers]
        # Harmless prompts have no refusal of their own: the most frequent opening is gone along, others branch off.
        self._few = first_tokens(self._material.openings, [answer.token_ids for answer in answered.answers])
        self._induced = [self._few.prefixes[0]] * len(answered)
        self._answers = [answer.token_ids[:kl_tokens] for answer in answered.answers]
        none = [lambda rows: _nothing()]
        self._before = _log_odds(self._along(refused, self._paths, len(refused), none, 1, self._refusals))
        self._before_induced = _log_odds(
            self._along(answered, self._induced, len(answered), none, 1, self._induced_refusals)
        )

    def score(self, options: Sequence[Option], n: int) -> list[LayerScore]:
        """Measure directions on the first `n` harmful and the first `n` harmless prompts.

        A direction's scores do not depend on what others are measured with it, beyond float tolerance.
        """
        n_harmful, n_harmless = min(n, len(self._refused)), min(n, len(self._answered))
        # Where sites cannot be steered row by row, one direction after another is taken out as an intervention.
        together = is_steerable(self._map)
        out = [self._taking_out(options)] if together else [self._taking_out([option]) for option in options]
        each = len(options) if together else 1
        refusals = self._along(self._refused, self._paths, n_harmful, out, each, self._refusals)
        kls = self._along(self._answered, self._answers, n_harmless, out, each, self._damages)
        induced = self._along(
            self._answered, self._induced, n_harmless, [self._adding(options)], len(options), self._induced_refusals
        )
        bypass = (_log_odds(refusals) - self._before[:, :n_harmful]).mean(dim=1)
        induce = (_log_odds(induced) - self._before_induced[:, :n_harmless]).mean(dim=1)
        columns = (bypass, induce, refusals.mean(dim=1), kls.mean(dim=1))
        return [LayerScore(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def _along(
        self,
        part: References,
        paths: Sequence[Sequence[int]],
        n: int,
        contexts: Sequence[Callable[[Sequence[int]], AbstractContextManager[None]]],
        n_each: int,
        measure: Callable[[torch.Tensor, Probe, Sequence[int]], torch.Tensor],
    ) -> torch.Tensor:
        """Run the first `n` prompts with every candidate: `[n_candidates, n]`, float64.

        Args:
            part: The prompts.
            paths: What is gone along.
            n: How many prompts.
            contexts: Each makes, from the candidate of every row, the context that a batch runs in.
            n_each: How many candidates each of the contexts knows.
            measure: Given log-probabilities, batch and the prompt of every row, gives a number for each row.
        """
        lengths = [len(ids) + len(path) for ids, path in zip(part.token_ids[:n], paths[:n], strict=True)]
        order = longest_first([range(length) for _ in range(n_each) for length in lengths])
        values = torch.empty(len(contexts), n_each * n, dtype=torch.float64)
        for number, context in enumerate(contexts):

            def run(
                rows: Sequence[int], context: Callable[..., AbstractContextManager[None]] = context
            ) -> torch.Tensor:
                prompts = [row % n for row in rows]
                ids, along = [part.token_ids[i] for i in prompts], [paths[i] for i in prompts]
                (probe,) = make_probes(self._loaded, ids, along, max(map(len, along)), len(rows))
                # The batch has an order of its own.
                rows, prompts = [rows[i] for i in probe.prompts], [prompts[i] for i in probe.prompts]
                with frozen(self._loaded, gradients=False), context([row // n for row in rows]):
                    found = log_probabilities(self._loaded, self._map, probe, self._material.vocabulary, 0)
                    measured = measure(found, probe, prompts).to("cpu", torch.float64)
                return torch.empty_like(measured).index_copy(0, torch.tensor(probe.prompts), measured)

            def fitting(rows: Sequence[int]) -> int:
                return fitting_pass(self._loaded, [lengths[row % n] for row in rows])

            for rows, result in with_backoff(run, order, MOST_PROMPTS, fitting=fitting):
                values[number, list(rows)] = result
        return values.reshape(-1, n)

    def _taking_out(self, options: Sequence[Option]) -> Callable[[Sequence[int]], AbstractContextManager[None]]:
        if len(options) == 1 and not is_steerable(self._map):
            return lambda rows: ablated(self._loaded.model, options[0].intervention(self._map), model_map=self._map)
        directions = torch.stack([option.direction.basis[:, 0] for option in options]).to(self._loaded.device)
        full = torch.ones((), device=self._loaded.device)

        def context(rows: Sequence[int]) -> AbstractContextManager[None]:
            steer = Steer(full, directions[list(rows)])
            return steered(
                self._loaded.model, self._map, {(site.kind, site.layer): lambda: steer for site in self._map.sites}
            )

        return context

    def _adding(self, options: Sequence[Option]) -> Callable[[Sequence[int]], AbstractContextManager[None]]:
        pushes = torch.stack([option.push for option in options]).to(self._loaded.device)
        indices = torch.tensor([option.index for option in options])

        def context(rows: Sequence[int]) -> AbstractContextManager[None]:
            own, there = pushes[list(rows)], indices[list(rows)]
            vectors = {index: own * (there == index).to(own.device)[:, None] for index in torch.unique(there).tolist()}
            return added(self._loaded.model, self._map, vectors)

        return context

    def _refusals(self, found: torch.Tensor, probe: Probe, prompts: Sequence[int]) -> torch.Tensor:
        return refusal_probabilities(found, probe, self._material.openings, self._material.vocabulary)

    def _induced_refusals(self, found: torch.Tensor, probe: Probe, prompts: Sequence[int]) -> torch.Tensor:
        return refusal_probabilities(found, probe, self._few, self._material.vocabulary)

    def _damages(self, found: torch.Tensor, probe: Probe, prompts: Sequence[int]) -> torch.Tensor:
        return damages(found, torch.cat([self._own[prompt] for prompt in prompts]), probe)


def first_tokens(openings: Openings, answers: Sequence[Sequence[int]]) -> Openings:
    """Cut openings down to the tokens that tell a refusal from an answer.

    The paper looks at the first token. A direction that is added at its full length can make a model repeat that token,
    which is a refusal begun, though no opening in full. Where answers begin as refusals do, more tokens are needed.

    Args:
        openings: How refusals open.
        answers: The tokens of answers that are none.

    Returns:
        The openings with as few tokens as a tenth of the answers at most begin with, or in full.
    """
    for n_tokens in range(1, N_OPENING_TOKENS):
        few = learn_openings(openings.prefixes, n_tokens)
        alike = sum(any(tuple(answer[: len(head)]) == head for head in few.prefixes) for answer in answers)
        if alike <= 0.1 * len(answers):
            return few
    return openings


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _log_odds(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.logit(probabilities, eps=_SMALLEST_ODDS)
