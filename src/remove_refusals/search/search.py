"""The whole search: the model's own answers, candidates, the pick by a stated rule, and its confirmation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from remove_refusals.directions import collect_both, is_steerable, mean_difference_per_layer
from remove_refusals.errors import SelectionError
from remove_refusals.files import Journal
from remove_refusals.measure import Answered, Label, kept_answers, labelled
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, check_positions, fingerprint, render, tail_positions
from remove_refusals.processes import from_first
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import split_by_size
from remove_refusals.search.candidates import Selection
from remove_refusals.search.confirming import Confirming, pick
from remove_refusals.search.descent import descend, first_layer_that_counts
from remove_refusals.search.experts import expert_candidates, in_turn, writers_of_difference
from remove_refusals.search.layers import LayerRule, search_layers
from remove_refusals.search.material import OwnAnswers, by_opening, gather
from remove_refusals.settings import MAX_KL, LayerSettings, MeasureSettings, SelectSettings, Tied
from remove_refusals.types import Activations, PromptSet

_FEWEST = 8
"""How many prompts each part of a search needs at least, and how many refusals and answers there have to be."""


@dataclass(frozen=True, eq=False)
class SearchPrompts:
    """Prompts of a search, harmful and harmless ones in each pair; directions are found on those of `choose`, too."""

    direction: tuple[PromptSet, PromptSet]
    choose: tuple[PromptSet, PromptSet]
    confirm: tuple[PromptSet, PromptSet]

    def sets(self) -> tuple[PromptSet, ...]:
        """Give all six."""
        return (*self.direction, *self.choose, *self.confirm)


def split_for_search(
    harmful: PromptSet, harmless: PromptSet, n_direction: int, settings: SelectSettings
) -> SearchPrompts:
    """Split prompts, `n_direction` of each beside those of the search; of too few each part gets its share."""
    parts = []
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        n = len(set(prompts.prompts))
        wanted = {"direction": n_direction, "choose": settings.n_choose, "confirm": settings.n_confirm}
        share = min(1.0, n / sum(wanted.values()))
        sizes = {part: max(min(_FEWEST, size), int(share * size)) for part, size in wanted.items()}
        sizes["choose"] -= max(0, sum(sizes.values()) - n)
        if min(sizes.values()) < _FEWEST:
            raise SelectionError(
                f"There are {n} different {name} prompts in {prompts.source}, too few for a search, expected at least "
                f"{3 * _FEWEST} ({sum(wanted.values())} are better) for direction, search and confirmation; add "
                "prompts, or choose layers and strength yourself (--select none)."
            )
        split = split_by_size(prompts, sizes, settings.seed)
        parts.append({part: replace(found, name=f"{name}_{part}") for part, found in split.items()})
    first, second = parts
    return SearchPrompts(*((first[part], second[part]) for part in ("direction", "choose", "confirm")))


@dataclass(frozen=True, eq=False)
class BaseBehaviour:
    """What the base model does on the prompts of a search: activations, and answers to what the search runs on."""

    collected: tuple[Activations, Activations]
    check: PromptSet
    """Harmful prompts that the search does not run on."""
    harmful: Answered
    harmless: Answered
    confirming: Confirming

    @property
    def own(self) -> OwnAnswers:
        """What the search runs on."""
        refused, answered = self.harmful.only(Label.REFUSAL), self.harmless.only(Label.COMPLIANCE)
        firsts = [[answer.token_ids for answer in part.answers] for part in (refused, answered)]
        opening, late = by_opening(self.harmful.only(Label.REFUSAL, Label.MORALISING), *firsts)
        if len(opening) < _FEWEST:
            opening, late = refused, self.harmful.only(Label.MORALISING)
        # Where it refuses harmless prompts it may open in other ways.
        false = by_opening(self.harmless.only(Label.REFUSAL), *firsts)[0]
        more = [answer.token_ids for answer in false.answers]
        return OwnAnswers(self.confirming.loaded, opening, answered, more, self.confirming.tied, late)


def select(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    settings: SelectSettings,
    measure: MeasureSettings,
    *,
    position: int = -1,
    tied: Tied = "auto",
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> Selection:
    """Choose what to take out where, and confirm the pick by generation on prompts that the search did not use."""
    model_map = map_model(loaded.model)
    by_layer = settings.method == "layer"
    if not by_layer and not is_steerable(model_map):
        raise SelectionError(
            f"Not every site of model type '{model_map.model_type}' can be steered by gradients, expected module "
            "outputs with channel-wise steps behind them; pass --select none and choose layers and strength yourself."
        )
    journal = journal or Journal()
    journal = journal.within(fingerprint(loaded)) if journal.directory is not None else journal
    positions = tail_positions(loaded, position) if by_layer else (position,)
    check_positions(loaded, positions)
    shorter = min(measure.max_new_tokens, settings.n_confirm_tokens)
    measure = measure.model_copy(update={"max_new_tokens": shorter})
    base = base_behaviour(loaded, prompts, positions, settings, measure, journal, progress, tied)
    if by_layer:
        searched = _by_layer(base, settings, progress)
    else:
        searched = _by_gradients(base, settings, position, journal, progress)
    return pick(*searched, base.confirming, settings.most_confirmed, journal, progress)


def base_behaviour(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    positions: tuple[int, ...],
    settings: SelectSettings,
    measure: MeasureSettings,
    journal: Journal,
    progress: Progress,
    tied: Tied = "auto",
) -> BaseBehaviour:
    """Run the base model: activations at the positions, short answers for the search, others for the confirmation."""
    first, second = (
        PromptSet(part.name, part.prompts + more.prompts, part.source)
        for part, more in zip(prompts.direction, prompts.choose, strict=True)
    )
    told = progress.stage("activations", len(first) + len(second))
    collected = collect_both(loaded, first, second, positions=positions, progress=told)

    told = progress.stage("own answers", sum(map(len, (*prompts.choose, *prompts.confirm))))

    def answered(part: PromptSet, n_tokens: int) -> Answered:
        nonlocal told
        ids = render(loaded, part.prompts)
        found = labelled(part, ids, kept_answers(loaded, part.name, ids, n_tokens, journal, told))
        told = told.after(len(part))
        return found

    harmful, harmless = (answered(part, settings.n_tokens) for part in prompts.choose)
    for own, label, what in ((harmful, Label.REFUSAL, "refused"), (harmless, Label.COMPLIANCE, "answered")):
        if (n := own.labels.count(label)) < _FEWEST:
            raise SelectionError(
                f"The model {what} {n} of {len(own)} prompts of {own.prompts.name}, expected at least {_FEWEST} to "
                "choose by; use other prompts, or choose layers and strength yourself (--select none)."
            )
    third, fourth = (answered(part, measure.max_new_tokens) for part in prompts.confirm)
    return BaseBehaviour(
        collected, prompts.direction[0], harmful, harmless, Confirming(loaded, third, fourth, measure, tied)
    )


def _by_layer(base: BaseBehaviour, settings: SelectSettings, progress: Progress) -> tuple[Selection, Sequence[int]]:
    """Give the candidates, unconfirmed, and the order in which they are to be tried."""
    max_kl = MAX_KL if settings.rule.max_kl is None else settings.rule.max_kl
    by_layer = LayerSettings(max_kl=max_kl, seed=settings.seed)
    found = search_layers(base.own, base.collected, by_layer, progress)
    rule = LayerRule(max_kl=max_kl, max_refusals=settings.rule.max_refusals)
    return Selection(settings.method, found.candidates, found.order[0], rule, found.notes), found.order


def _by_gradients(
    base: BaseBehaviour, settings: SelectSettings, position: int, journal: Journal, progress: Progress
) -> tuple[Selection, Sequence[int]]:
    """Give the candidates, unconfirmed, and the order in which they are to be tried."""
    progress.begin("first gradients")
    own, descent = base.own, settings.descent.model_copy(update={"seed": settings.seed})
    n = descent.batch_size
    directions = from_first(
        lambda: mean_difference_per_layer(*base.collected, position=position, projected=True, seed=settings.seed)
    )
    probing = replace(
        own,
        refused=own.refused.at(range(min(n, len(own.refused)))),
        answered=own.answered.at(range(min(n, len(own.answered)))),
        more_refusals=(),
        late=None,
    )
    first = first_layer_that_counts(directions, gather(probing, descent), descent)
    check, material = (base.check, settings.rule.max_refusals), gather(own, descent, first)
    candidates = descend(directions, material, descent, check, journal, progress)
    n_directions = len(candidates)
    writers = writers_of_difference(
        own.loaded, base.collected, settings.most_experts, position=position, seed=settings.seed
    )
    if writers is not None:
        if writers.lowest < first:
            material = gather(own, descent, writers.lowest)
        candidates += expert_candidates(writers, candidates, material, settings.rule, own.tied, journal, progress)
    order = in_turn(candidates, n_directions, settings.rule)
    return Selection(settings.method, tuple(candidates), order[0], settings.rule), order
