"""Layer and position of one direction, chosen by forward passes alone (Arditi et al. 2024, section 2.3, appendix C).

Every candidate is one direction, taken out at every site with full strength. What is clearly worse is dropped after a
few prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import ceil

import torch

from remove_refusals.directions import (
    METHOD_NAMES,
    RECIPES,
    Recipe,
    Steer,
    ablated,
    added,
    direction_from_vectors,
    intervene,
    is_steerable,
    make_vector,
    steered,
)
from remove_refusals.errors import NumericalError, SelectionError
from remove_refusals.modelmap import ModelMap
from remove_refusals.models import LoadedModel, in_batches, template_tail_length
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.candidates import Candidate
from remove_refusals.search.continuations import Probe, frozen, log_probabilities, make_probes
from remove_refusals.search.material import (
    N_OPENING_TOKENS,
    Material,
    Openings,
    damages,
    gather,
    learn_openings,
    refusal_probabilities,
)
from remove_refusals.search.references import References
from remove_refusals.settings import MAX_KL, GradientSettings, LayerSettings, Rule
from remove_refusals.types import Activations, Direction, DirectionOrigin, Intervention

_TIE = 0.01


class LayerRule(Rule):
    """The rule of this search: `max_kl` is a filter, `max_refusals` counts in the confirmation only.

    Attributes:
        max_kl: The most damage.
    """

    max_kl: float = MAX_KL

    def __str__(self) -> str:
        """Say the rule in words."""
        return f"lowest odds of a refusal without the direction, at a KL of at most {self.max_kl:g}"


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


@dataclass(frozen=True, eq=False)
class LayerSearch:
    """What the choice found.

    Attributes:
        candidates: All that were tried, those that came farthest first.
        scores: Theirs, each on the prompts of the last round that it was in.
        order: The indices of those to be confirmed, the preferred one first.
        notes: What should be said of it, a sentence each.
    """

    candidates: tuple[Candidate, ...]
    scores: tuple[LayerScore, ...]
    order: tuple[int, ...]
    notes: tuple[str, ...]


def ranked(scores: Sequence[LayerScore], max_kl: float) -> tuple[int, ...]:
    """Put directions in the order in which they are preferred.

    Those that keep the limits come first, by how far they lower the odds of a refusal; of those within 1% of the best
    that is left, the least damage. Then those that lower them at least half as much as the best, by damage; then the
    rest, by damage.

    Args:
        scores: What was measured.
        max_kl: The most damage.

    Returns:
        Their indices.
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
    loaded: LoadedModel,
    model_map: ModelMap,
    collected: tuple[Activations, Activations],
    refused: References,
    answered: References,
    settings: LayerSettings,
    *,
    more_refusals: Sequence[Sequence[int]] = (),
    model: str | None = None,
    progress: Progress = SILENT,
) -> LayerSearch:
    """Choose layer, position and recipe.

    Args:
        loaded: The model; it is left as it is.
        model_map: Its map.
        collected: Activations on harmful and on harmless prompts, of every layer, at each position to be tried.
        refused: Harmful prompts that the model refused.
        answered: Harmless prompts that it answered.
        settings: How the choice goes.
        more_refusals: The tokens of other refusals, for their openings.
        model: The model's name, for the record.
        progress: Told the number of prompts times directions that are done.

    Returns:
        What was found.

    Raises:
        SelectionError: If the activations differ at no layer and position.
        NumericalError: If an activation is NaN or infinite.
        ArchitectureError: If hooks cannot be exact on the model.
        ModelError: If memory runs out with a single prompt.
    """
    options = make_options(*collected, depth=settings.depth, seed=settings.seed, model=model)
    if not options:
        raise SelectionError(
            "The mean activations on harmful and harmless prompts differ at no layer and position, expected a "
            "difference to choose by; check the prompts, or pass --select none."
        )
    bench = Bench(loaded, model_map, refused, answered, settings.kl_tokens, more_refusals)
    n = max(len(refused), len(answered))
    return narrow_down(bench, model_map, options, n, settings, progress=progress)


@dataclass(frozen=True, eq=False)
class Option:
    """One direction to be tried.

    Attributes:
        index: Where it was found, on the layer axis of `Activations.hidden`.
        direction: The unit direction.
        push: `[d_model]`, float32: the difference of the means along it, for adding.
        name: What it is called.
    """

    index: int
    direction: Direction
    push: torch.Tensor
    name: str

    def intervention(self, model_map: ModelMap) -> Intervention:
        """Take it out at every site with full strength."""
        return intervene(self.direction, model_map.n_layers)


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

            for rows, result in in_batches(self._loaded, lengths * n_each, run):
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


def narrow_down(
    bench: Bench,
    model_map: ModelMap,
    options: Sequence[Option],
    n_prompts: int,
    settings: LayerSettings,
    *,
    progress: Progress = SILENT,
) -> LayerSearch:
    """Score directions, dropping those that are clearly worse after a few prompts.

    Args:
        bench: What scores them.
        model_map: The model's map.
        options: At least one direction.
        n_prompts: How many harmful or harmless prompts there are, whichever is more.
        settings: How the choice goes.
        progress: Told the number of prompts times directions that are done.

    Returns:
        What was found. Only those that reached the last round are to be confirmed, and of them only those that keep the
        limits, unless none does.
    """
    kept = list(range(len(options)))
    sizes = [len(options), min(len(options), max(settings.fewest, ceil(settings.share * len(options))))]
    sizes.append(min(sizes[-1], settings.finalists))
    rounds = (*settings.rounds, n_prompts)
    total, done = sum(size * n for size, n in zip(sizes, rounds, strict=True)), 0
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
        progress.stage("directions", total).done(done)
    found = [scores[index] for index in (*kept, *dropped)]
    candidates = tuple(
        Candidate(options[index].name, options[index].intervention(model_map), scores[index].refusal, score.damage)
        for index, score in zip((*kept, *dropped), found, strict=True)
    )
    passing = tuple(place for place in range(len(kept)) if found[place].passes(settings.max_kl))
    notes = () if passing else (_none_passes(len(kept), len(options), settings.max_kl),)
    return LayerSearch(candidates, tuple(found), passing or tuple(range(len(kept))), notes)


def _none_passes(n_kept: int, n: int, max_kl: float) -> str:
    return (
        f"None of the {n_kept} directions that came farthest, of {n}, kept the limits of the choice by layer (a KL of "
        f"at most {max_kl:g}, and refusals when it is added); those that lower refusals at least half as much as the "
        "best were ranked by KL."
    )


_SMALLEST_ODDS = 1e-6


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


MOST_POSITIONS = 8
"""How many of the template's last tokens are looked at."""


def tail_positions(loaded: LoadedModel, position: int) -> tuple[int, ...]:
    """Give the token positions to look at.

    Args:
        loaded: The model.
        position: The one to look at where prompts are plain.

    Returns:
        Those of the chat template's tail, the last one first, at most 8.

    Raises:
        PromptError: If the template cannot be rendered.
    """
    if loaded.chat.plain:
        return (position,)
    tail = template_tail_length(loaded)
    return tuple(range(-1, -1 - min(max(tail, 1), MOST_POSITIONS), -1))


def make_options(
    harmful: Activations,
    harmless: Activations,
    *,
    depth: float = 0.8,
    seed: int = 0,
    recipes: Sequence[Recipe] = RECIPES,
    model: str | None = None,
) -> list[Option]:
    """Make a direction for each layer below the limit of depth, each position that was collected, and each recipe.

    Args:
        harmful: Activations on harmful prompts, of every layer.
        harmless: Activations on harmless prompts.
        depth: Only layers below this share of the model's depth are looked at.
        seed: What drew the prompts, for the record.
        recipes: Which recipes.
        model: The model's name, for the record.

    Returns:
        The directions; where the activations do not differ, there is none.

    Raises:
        NumericalError: If an activation is NaN or infinite.
    """
    for part in (harmful, harmless):
        if not bool(torch.isfinite(part.hidden).all()):
            raise NumericalError(
                f"The activations of set '{part.prompts.name}' hold NaN or infinite numbers, expected finite ones; "
                "load the model in float32 or check its weights."
            )
    options = []
    for index in range(1, max(2, ceil(depth * harmful.n_layers))):
        for place, position in enumerate(harmful.positions):
            pair = harmful.hidden[:, place, index], harmless.hidden[:, place, index]
            difference = make_vector(*pair, "plain")
            for recipe in recipes:
                vector = make_vector(*pair, recipe)
                if not float(vector.norm()) > 0:
                    continue
                unit = vector / vector.norm()
                origin = DirectionOrigin(
                    method=METHOD_NAMES[recipe],
                    model=model,
                    layer=index,
                    position=position,
                    seed=seed,
                    n_harmful=len(harmful.prompts),
                    n_harmless=len(harmless.prompts),
                    harmful_sha256=harmful.prompts.sha256,
                    harmless_sha256=harmless.prompts.sha256,
                )
                push = (unit * (unit @ difference)).to(torch.float32)
                name = f"layer {index}, position {position}, {recipe}"
                options.append(Option(index, direction_from_vectors(vector, origin), push, name))
    return options
