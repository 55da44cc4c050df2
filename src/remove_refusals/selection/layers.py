"""Layer and position of one direction, chosen by forward passes alone (Arditi et al. 2024, section 2.3, appendix C).

Every candidate is one direction, taken out at every site with full strength. What is clearly worse is dropped after a
few prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from remove_refusals.errors import SelectionError
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.selection.bench import Bench, LayerScore
from remove_refusals.selection.candidates import Candidate, Rule
from remove_refusals.selection.recipes import Option, make_options
from remove_refusals.selection.references import References
from remove_refusals.types import Activations

MAX_KL = 0.1
"""The paper's limit on the damage."""

_TIE = 0.01


@dataclass(frozen=True)
class LayerSettings:
    """How the choice goes.

    Attributes:
        max_kl: The most damage that a candidate may do; twice as much until all prompts are looked at.
        depth: Only layers below this share of the model's depth are looked at, as in the paper.
        rounds: On how many harmful and as many harmless prompts the first rounds run; the last one runs on all.
        share: The share of the candidates that the second round gets.
        fewest: How many it gets at least.
        finalists: How many the last one gets.
        kl_tokens: The damage is the mean over so many tokens of the model's own answers; the paper looks at the first
            alone, which misses damage that begins behind it.
        seed: What drew the prompts, for the record.
    """

    max_kl: float = MAX_KL
    depth: float = 0.8
    rounds: tuple[int, int] = (4, 16)
    share: float = 0.25
    fewest: int = 12
    finalists: int = 4
    kl_tokens: int = 4
    seed: int = 0


@dataclass(frozen=True)
class LayerRule(Rule):
    """The rule of this search: `max_kl` is a filter, `max_refusals` counts in the confirmation only.

    Attributes:
        max_kl: The most damage.
    """

    max_kl: float = MAX_KL

    def __str__(self) -> str:
        """Say the rule in words."""
        return f"lowest odds of a refusal without the direction, at a KL of at most {self.max_kl:g}"


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
    on_progress: Callable[[int, int], None] | None = None,
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
        on_progress: As for `narrow_down`.

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
    return narrow_down(bench, model_map, options, n, settings, on_progress=on_progress)


def narrow_down(
    bench: Bench,
    model_map: ModelMap,
    options: Sequence[Option],
    n_prompts: int,
    settings: LayerSettings,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> LayerSearch:
    """Score directions, dropping those that are clearly worse after a few prompts.

    Args:
        bench: What scores them.
        model_map: The model's map.
        options: At least one direction.
        n_prompts: How many harmful or harmless prompts there are, whichever is more.
        settings: How the choice goes.
        on_progress: Called with the number of prompts times directions that are done, and all of them.

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
        if on_progress is not None:
            on_progress(done, total)
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
