"""The whole search: the model's own answers, candidates, the pick by a stated rule, and its confirmation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from remove_refusals.directions import collect_activations, is_steerable, mean_difference_per_layer
from remove_refusals.errors import SelectionError
from remove_refusals.files import Journal
from remove_refusals.measure import Label
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, check_positions, fingerprint
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import split_by_size
from remove_refusals.search.candidates import Candidate, Confirmation, Selection, by_rule
from remove_refusals.search.descent import descend, first_layer_that_counts
from remove_refusals.search.layers import LayerRule, search_layers, tail_positions
from remove_refusals.search.material import gather
from remove_refusals.search.references import References, confirm, references
from remove_refusals.settings import MAX_KL, LayerSettings, MeasureSettings, SelectSettings, published_name
from remove_refusals.types import Activations, Intervention, PromptSet

_FEWEST = 8
"""How many prompts each part of a search needs at least, and how many refusals and answers there have to be."""


@dataclass(frozen=True, eq=False)
class SearchPrompts:
    """Prompts of a search, harmful and harmless ones in each pair; no prompt is in two of them.

    Attributes:
        direction: What the directions are found on, beside those of `choose`.
        choose: What the search runs on.
        confirm: What the pick is confirmed on.
    """

    direction: tuple[PromptSet, PromptSet]
    choose: tuple[PromptSet, PromptSet]
    confirm: tuple[PromptSet, PromptSet]

    def sets(self) -> tuple[PromptSet, ...]:
        """Give all six."""
        return (*self.direction, *self.choose, *self.confirm)


def split_for_search(
    harmful: PromptSet, harmless: PromptSet, n_direction: int, settings: SelectSettings
) -> SearchPrompts:
    """Split prompts for a search; where there are too few, each part gets its share of them.

    `n_direction` of each are for the directions, beside those of the search.
    """
    parts = []
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        n = len(set(prompts.prompts))
        wanted = {"direction": n_direction, "choose": settings.n_choose, "confirm": settings.n_confirm}
        share = min(1.0, n / sum(wanted.values()))
        sizes = {part: int(share * size) for part, size in wanted.items()}
        if min(sizes.values()) < _FEWEST:
            raise SelectionError(
                f"There are {n} different {name} prompts, too few for a search, expected at least {_FEWEST} each for "
                f"direction, search and confirmation ({sum(wanted.values())} in all are better); add prompts, or pass "
                "--select none."
            )
        split = split_by_size(prompts, sizes, settings.seed)
        parts.append({part: replace(found, name=f"{name}_{part}") for part, found in split.items()})
    first, second = parts
    return SearchPrompts(*((first[part], second[part]) for part in ("direction", "choose", "confirm")))


@dataclass(frozen=True, eq=False)
class BaseBehaviour:
    """The base model, and what it does on the prompts of a search.

    Attributes:
        loaded: The model.
        collected: Activations on harmful and on harmless prompts.
        harmful: Its answers to the harmful prompts that the search runs on.
        harmless: Its answers to the harmless ones.
        confirming: Its answers to the harmful and the harmless prompts of the confirmation.
    """

    loaded: LoadedModel
    collected: tuple[Activations, Activations]
    harmful: References
    harmless: References
    confirming: tuple[References, References]

    @property
    def refused(self) -> References:
        """The harmful prompts that it refused."""
        return self.harmful.only(Label.REFUSAL)

    @property
    def answered(self) -> References:
        """The harmless prompts that it answered."""
        return self.harmless.only(Label.COMPLIANCE)

    @property
    def more_refusals(self) -> list[tuple[int, ...]]:
        """The tokens of its refusals of harmless prompts, which may open in other ways."""
        return [answer.token_ids for answer in self.harmless.only(Label.REFUSAL).answers]


def select(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    settings: SelectSettings,
    measure: MeasureSettings,
    *,
    position: int = -1,
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> Selection:
    """Choose what to take out where; the model is left as it is.

    Args:
        loaded: The base model.
        prompts: What to search on.
        settings: How the search goes.
        measure: How answers are generated and damage is measured for the confirmation.
        position: The token position that directions are found at; `layer` looks at all of the template's tail.
        journal: Keeps what is done, so that a killed search goes on.
        progress: Told of every stage.

    Returns:
        Every candidate with its scores, and the pick, confirmed by generation on prompts that the search did not use.

    Raises:
        SelectionError: If the model gives nothing to choose by: hardly a refusal of harmful prompts or answer to
            harmless ones, or sites that cannot be steered.
    """
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
    base = base_behaviour(loaded, prompts, positions, settings, measure, journal, progress)
    if by_layer:
        searched = _by_layer(base, settings, progress)
    else:
        searched = _by_gradients(base, settings, position, journal, progress)
    return pick(*searched, base, measure, settings.most_confirmed, journal, progress)


def base_behaviour(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    positions: tuple[int, ...],
    settings: SelectSettings,
    measure: MeasureSettings,
    journal: Journal,
    progress: Progress,
) -> BaseBehaviour:
    """Run the base model: activations at the positions, short answers for the search, others for the confirmation."""
    collected: list[Activations] = []
    for part, more in zip(prompts.direction, prompts.choose, strict=True):
        both = PromptSet(part.name, part.prompts + more.prompts, part.source)
        told = progress.stage(f"activations, {part.name}", len(both))
        collected.append(collect_activations(loaded, both, positions=positions, progress=told))
    own = [references(loaded, part, settings.n_tokens, journal, progress) for part in prompts.choose]
    base = BaseBehaviour(loaded, (collected[0], collected[1]), own[0], own[1], (own[0], own[1]))
    for found, whole, what in ((base.refused, own[0], "refused"), (base.answered, own[1], "answered")):
        if len(found) < _FEWEST:
            raise SelectionError(
                f"The model {what} {len(found)} of {len(whole)} prompts of {whole.prompts.name}, expected at least "
                f"{_FEWEST} to choose by; use prompts that it does refuse or answer, or pass --select none."
            )
    first, second = (references(loaded, part, measure.max_new_tokens, journal, progress) for part in prompts.confirm)
    return replace(base, confirming=(first, second))


def _by_layer(base: BaseBehaviour, settings: SelectSettings, progress: Progress) -> tuple[Selection, Sequence[int]]:
    """Give the candidates, unconfirmed, and the order in which they are to be tried."""
    given = settings.rule
    max_kl = MAX_KL if given.max_kl is None else given.max_kl
    found = search_layers(
        base.loaded,
        base.collected,
        base.refused,
        base.answered,
        LayerSettings(max_kl=max_kl, seed=settings.seed),
        more_refusals=base.more_refusals,
        progress=progress,
    )
    rule = LayerRule(max_kl=max_kl, max_refusals=given.max_refusals)
    return Selection(settings.method, found.candidates, found.order[0], rule, found.notes), found.order


def _by_gradients(
    base: BaseBehaviour, settings: SelectSettings, position: int, journal: Journal, progress: Progress
) -> tuple[Selection, Sequence[int]]:
    """Give the candidates, unconfirmed, and the order in which they are to be tried."""
    loaded, descent = base.loaded, settings.descent.model_copy(update={"seed": settings.seed})
    directions = mean_difference_per_layer(
        *base.collected, position=position, projected=True, model=published_name(loaded.source), seed=settings.seed
    )
    few = base.refused.first(descent.batch_size), base.answered.first(descent.batch_size)
    first = first_layer_that_counts(directions, gather(loaded, *few, descent), descent)
    material = gather(loaded, base.refused, base.answered, descent, first_layer=first, more_refusals=base.more_refusals)
    candidates = tuple(descend(directions, material, descent, journal, progress))
    order = by_rule([(candidate.refusal, candidate.damage) for candidate in candidates], settings.rule)
    return Selection(settings.method, candidates, order[0], settings.rule), order


def pick(
    selection: Selection,
    order: Sequence[int],
    base: BaseBehaviour,
    measure: MeasureSettings,
    most_confirmed: int,
    journal: Journal,
    progress: Progress,
) -> Selection:
    """Confirm candidates by generation, in an order, until one does what the search said.

    Where none is confirmed, the pick is the one that came nearest.
    """
    tried, notes = list(selection.candidates), list(selection.notes)
    confirmed: list[int] = []
    harmful, harmless = base.confirming
    limit = selection.rule.max_refusals
    for number in order[:most_confirmed]:
        candidate = tried[number]
        if confirmed and limit is not None and candidate.refusal > limit:
            break
        name = f"confirming {candidate.name}"
        lengths = [measure.max_new_tokens, measure.kl_tokens]
        told = progress.stage(name, len(harmful) + len(harmless))
        found = journal.remember(
            name,
            [_content(candidate.intervention), harmful.token_ids, harmless.token_ids, lengths],
            partial(confirm, base.loaded, candidate.intervention, harmful, harmless, measure, told),
            Confirmation.to_json,
            Confirmation.model_validate,
        )
        tried[number] = replace(candidate, confirmation=found)
        confirmed.append(number)
        shortfall = _shortfall(candidate, found, base.confirming, limit)
        if shortfall is None:
            return replace(selection, candidates=tuple(tried), picked=number, notes=tuple(notes))
        notes.append(f"'{candidate.name}' fell short when confirmed by generation: {shortfall}.")
    best = min(confirmed, key=lambda number: _cost(tried[number]))
    notes.append(f"No candidate was confirmed; '{tried[best].name}' came nearest.")
    return replace(selection, candidates=tuple(tried), picked=best, notes=tuple(notes))


def _content(intervention: Intervention) -> list[Any]:
    bases = [direction.basis.tolist() for direction in intervention.directions]
    return [bases, [edit.to_json() for edit in intervention.edits]]


def _cost(candidate: Candidate) -> tuple[float, float]:
    found = candidate.confirmation
    assert found is not None
    return found.failures + (found.broken.value if found.broken is not None else 0.0), candidate.damage


def _shortfall(
    candidate: Candidate, found: Confirmation, confirming: tuple[References, References], limit: float | None
) -> str | None:
    """Say what a confirmation lacks; None if it does what the search said, or what the rule asks for."""
    harmful, harmless = confirming
    # A model that breaks off or loops in a tenth of its answers does so, too, in those that it no longer refuses.
    given = [label for part in confirming for label in part.labels if label is not Label.REFUSAL]
    own = len(harmful) * given.count(Label.DEGENERATE) / max(1, len(given))
    failed = found.refusals.count + max(0.0, found.degenerate.count - own)
    if failed > math.ceil((candidate.refusal + 0.1 if limit is None else limit) * found.refusals.n):
        return (
            f"{found.refusals.count} of {found.refusals.n} harmful prompts were refused and {found.degenerate.count} "
            f"got a degenerate answer, where the search said {candidate.refusal:.1%}"
        )
    before = len(harmless) - len(harmless.only(Label.COMPLIANCE))
    after = found.false_refusals.count + found.degenerate_harmless.count
    if after - before > 0.1 * len(harmless):
        return f"{after} of {len(harmless)} harmless prompts get no answer, {before} of them without it"
    return None
