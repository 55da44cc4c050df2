"""Layer and position of one direction, chosen by forward passes alone (Arditi et al. 2024, section 2.3, appendix C)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

from remove_refusals.directions import intervene, mean_difference
from remove_refusals.errors import DirectionError, SelectionError
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.bench import Bench, LayerScore, Option
from remove_refusals.search.candidates import Candidate
from remove_refusals.search.material import OwnAnswers
from remove_refusals.settings import LayerSettings, Rule, published_name
from remove_refusals.types import Activations

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
