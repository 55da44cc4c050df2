"""The whole search: the model's own answers, candidates, the pick by a stated rule, and its confirmation."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from remove_refusals.directions import collect_activations, is_steerable, mean_difference_per_layer
from remove_refusals.errors import SelectionError
from remove_refusals.files import Journal
from remove_refusals.measure import Label
from remove_refusals.modelmap import ModelMap, map_model
from remove_refusals.models import LoadedModel, check_positions, fingerprint
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import split_by_size
from remove_refusals.search.candidates import Candidate, Confirmation, Selection, by_rule
from remove_refusals.search.descent import descend, first_layer_that_counts
from remove_refusals.search.layers import LayerRule, search_layers, tail_positions
from remove_refusals.search.material import gather
from remove_refusals.search.references import References, confirm, references
from remove_refusals.settings import LayerSettings, MeasureSettings, Method, Rule, SelectSettings
from remove_refusals.types import Activations, Direction, Intervention, PromptSet

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

    Args:
        harmful: All harmful prompts.
        harmless: All harmless prompts.
        n_direction: How many of each the directions are to be found on, beside those of the search.
        settings: How many the search and the confirmation are to get.

    Raises:
        SelectionError: If there are so few prompts that a part would get less than 8.
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


def select(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    settings: SelectSettings | None = None,
    *,
    answers: MeasureSettings | None = None,
    position: int = -1,
    projected: bool = True,
    model: str | None = None,
    model_map: ModelMap | None = None,
    journal: Journal | Path | None = None,
    progress: Progress = SILENT,
) -> Selection:
    """Choose what to take out where.

    Args:
        loaded: The base model; it is left as it is.
        prompts: What to search on.
        settings: How the search goes.
        answers: How answers are generated for the confirmation.
        position: The token position that directions are found at; `layer` looks at all of the template's tail.
        projected: Whether the component along the harmless mean is removed from them.
        model: The model's name, for the record.
        model_map: The model's map, if it is at hand; otherwise it is derived.
        journal: A directory that keeps what is done, so that a killed search goes on; None keeps nothing.
        progress: Told of every stage.

    Returns:
        Every candidate with its scores, and the pick, confirmed by generation on prompts that the search did not use.

    Raises:
        SelectionError: If the model gives nothing to choose by: hardly a refusal of harmful prompts or answer to
            harmless ones, or sites that cannot be steered.
        PromptError: If the position does not lie within the chat template's tail.
        ModelError: If a prompt does not fit the model, memory runs out.
        NumericalError: If activations or logits are NaN.
        OutputError: If the journal cannot be read or written.
    """
    settings, answers = settings or SelectSettings(), answers or MeasureSettings()
    model_map = model_map or map_model(loaded.model)
    if settings.method == "auto" and not is_steerable(model_map):
        raise SelectionError(
            f"Not every site of model type '{model_map.model_type}' can be steered by gradients, expected module "
            "outputs with channel-wise steps behind them; pass --select none and choose layers and strength yourself."
        )
    kept = journal if isinstance(journal, Journal) else Journal(journal)
    kept = kept.within(fingerprint(loaded)) if kept.directory is not None else kept
    by_layer = settings.method == "layer"
    positions = tail_positions(loaded, position) if by_layer else (position,)
    check_positions(loaded, positions)
    collected = _activations(loaded, prompts, positions, model_map, progress)
    short = answers.model_copy(update={"max_new_tokens": settings.n_tokens})
    own = [_own(loaded, part, short, progress, kept) for part in prompts.choose]
    refused, answered = own[0].only(Label.REFUSAL), own[1].only(Label.COMPLIANCE)
    _check(refused, own[0], answered, own[1])
    confirming = tuple(_own(loaded, part, answers, progress, kept) for part in prompts.confirm)
    if by_layer:
        rule = LayerRule.model_validate(settings.rule.model_dump(exclude_none=True))
        by_layers = search_layers(
            loaded,
            model_map,
            collected,
            refused,
            answered,
            LayerSettings(max_kl=rule.max_kl, seed=settings.seed),
            more_refusals=[answer.token_ids for answer in own[1].only(Label.REFUSAL).answers],
            model=model,
            progress=progress,
        )
        return pick(
            loaded,
            model_map,
            by_layers.candidates,
            confirming,
            answers,
            method=settings.method,
            rule=rule,
            most_confirmed=settings.most_confirmed,
            progress=progress,
            order=by_layers.order,
            notes=by_layers.notes,
            journal=kept,
        )
    directions = mean_difference_per_layer(
        *collected, position=position, projected=projected, model=model, seed=settings.seed
    )
    candidates = _by_gradients(loaded, model_map, directions, refused, own[1], answered, settings, progress, kept)
    return pick(
        loaded,
        model_map,
        candidates,
        confirming,
        answers,
        method=settings.method,
        rule=settings.rule,
        most_confirmed=settings.most_confirmed,
        progress=progress,
        journal=kept,
    )


def _activations(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    positions: tuple[int, ...],
    model_map: ModelMap,
    progress: Progress,
) -> tuple[Activations, Activations]:
    """Of harmful and of harmless prompts, all but those of the confirmation."""
    collected: list[Activations] = []
    for part, more in zip(prompts.direction, prompts.choose, strict=True):
        both = PromptSet(part.name, part.prompts + more.prompts, part.source)
        collected.append(
            collect_activations(
                loaded,
                both,
                positions=positions,
                model_map=model_map,
                progress=progress.stage(f"activations, {part.name}", len(both)),
            )
        )
    return collected[0], collected[1]


def _own(
    loaded: LoadedModel, prompts: PromptSet, settings: MeasureSettings, progress: Progress, journal: Journal
) -> References:
    name = f"own answers, {prompts.name}"
    return journal.remember(
        name,
        [prompts.prompts, *_generated(loaded, settings)],
        partial(references, loaded, prompts, settings, progress=progress.stage(name, len(prompts))),
        References.to_json,
        partial(References.from_json, prompts),
    )


def _generated(loaded: LoadedModel, settings: MeasureSettings) -> list[Any]:
    """Give what decides how answers come out and how damage is measured along them, for a journal's inputs."""
    return [settings.max_new_tokens, settings.kl_tokens, loaded.chat.model_dump()]


def _check(refused: References, harmful: References, answered: References, harmless: References) -> None:
    for found, whole, what in ((refused, harmful, "refused"), (answered, harmless, "answered")):
        if len(found) < _FEWEST:
            raise SelectionError(
                f"The model {what} {len(found)} of {len(whole)} prompts of {whole.prompts.name}, expected at least "
                f"{_FEWEST} to choose by; use prompts that it does refuse or answer, or pass --select none."
            )


def _by_gradients(
    loaded: LoadedModel,
    model_map: ModelMap,
    directions: tuple[Direction, ...],
    refused: References,
    harmless: References,
    answered: References,
    settings: SelectSettings,
    progress: Progress,
    journal: Journal,
) -> list[Candidate]:
    descent = settings.descent.model_copy(update={"seed": settings.seed})
    # Where it refuses harmless prompts it may open in other ways.
    more = [answer.token_ids for answer in harmless.only(Label.REFUSAL).answers]
    few = refused.first(descent.batch_size), answered.first(descent.batch_size)
    probing = gather(loaded, model_map, *few, descent)
    first = first_layer_that_counts(loaded, model_map, directions, probing, descent)
    material = gather(loaded, model_map, refused, answered, descent, first_layer=first, more_refusals=more)
    return descend(
        loaded,
        model_map,
        directions,
        material,
        descent,
        journal=journal,
        progress=progress,
    )


def pick(
    loaded: LoadedModel,
    model_map: ModelMap,
    candidates: Sequence[Candidate],
    confirming: tuple[References, ...],
    answers: MeasureSettings,
    *,
    method: Method,
    rule: Rule,
    most_confirmed: int,
    progress: Progress,
    order: Sequence[int] | None = None,
    notes: Sequence[str] = (),
    journal: Journal | None = None,
) -> Selection:
    """Confirm the candidates by generation, the preferred one first, until one does what the search said.

    Args:
        loaded: The base model.
        model_map: Its map.
        candidates: At least one.
        confirming: The base model's answers to harmful and to harmless prompts that the search did not use.
        answers: How answers are generated.
        method: How the candidates were found.
        rule: What decides.
        most_confirmed: How many candidates are tried by generation at most.
        progress: Told of every stage.
        order: The indices of those to be tried, the preferred one first; by default the rule's order.
        notes: What is to be said of the search already.
        journal: Keeps each confirmation, so that a killed search goes on with the next.

    Returns:
        The candidates with what was measured, and the pick; where none is confirmed, the one that came nearest.
    """
    tried = list(candidates)
    harmful, harmless = confirming
    if order is None:
        order = by_rule([(candidate.refusal, candidate.damage) for candidate in tried], rule)
    notes = list(notes)
    journal = journal or Journal()
    confirmed: list[int] = []
    for number in order[:most_confirmed]:
        limit = rule.max_refusals
        if confirmed and limit is not None and tried[number].refusal > limit:
            break
        name = f"confirming {tried[number].name}"
        compute = partial(
            confirm,
            loaded,
            tried[number].intervention,
            model_map,
            harmful,
            harmless,
            answers,
            progress=progress.stage(name, len(harmful) + len(harmless)),
        )
        told = _generated(loaded, answers)
        inputs = [_content(tried[number].intervention), harmful.token_ids, harmless.token_ids, *told]
        found = journal.remember(name, inputs, compute, Confirmation.to_json, Confirmation.from_json)
        tried[number] = replace(tried[number], confirmation=found)
        confirmed.append(number)
        shortfall = _shortfall(tried[number], found, confirming, rule)
        if shortfall is None:
            return Selection(method, tuple(tried), number, rule, tuple(notes))
        notes.append(f"'{tried[number].name}' fell short when confirmed by generation: {shortfall}.")
    best = min(confirmed, key=lambda number: _cost(tried[number]))
    notes.append(f"No candidate was confirmed; '{tried[best].name}' came nearest.")
    return Selection(method, tuple(tried), best, rule, tuple(notes))


def _content(intervention: Intervention) -> list[Any]:
    bases = [direction.basis.tolist() for direction in intervention.directions]
    return [bases, [asdict(edit) for edit in intervention.edits]]


def _cost(candidate: Candidate) -> tuple[float, float]:
    assert candidate.confirmation is not None
    found = candidate.confirmation
    return found.failures + (found.broken.value if found.broken is not None else 0.0), candidate.damage


def _shortfall(candidate: Candidate, found: Confirmation, confirming: tuple[References, ...], rule: Rule) -> str | None:
    """Say what a confirmation lacks; None if it does what the search said, or what the rule asks for."""
    harmful, harmless = confirming
    # A model that breaks off or loops in a tenth of its answers does so, too, in those that it no longer refuses.
    given = [label for part in confirming for label in part.labels if label is not Label.REFUSAL]
    own = len(harmful) * given.count(Label.DEGENERATE) / max(1, len(given))
    failed = found.refusals.count + max(0.0, found.degenerate.count - own)
    limit = rule.max_refusals if rule.max_refusals is not None else candidate.refusal + 0.1
    if failed > math.ceil(limit * found.refusals.n):
        return (
            f"{found.refusals.count} of {found.refusals.n} harmful prompts were refused and {found.degenerate.count} "
            f"got a degenerate answer, where the search said {candidate.refusal:.1%}"
        )
    before = len(harmless) - len(harmless.only(Label.COMPLIANCE))
    after = found.false_refusals.count + found.degenerate_harmless.count
    if after - before > 0.1 * len(harmless):
        return f"{after} of {len(harmless)} harmless prompts get no answer, {before} of them without it"
    return None
