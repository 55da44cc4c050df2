"""The pick: candidates are tried by generation, the preferred one first, until one does what the search said."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from remove_refusals.directions import ablated
from remove_refusals.files import Journal
from remove_refusals.measure import (
    POOR_MATCH,
    Answered,
    Label,
    answer_match,
    distances_along,
    is_poor_match,
    labelled,
    mean_with_interval,
    wilson_rate,
)
from remove_refusals.models import LoadedModel, generate
from remove_refusals.progress import SILENT, Progress
from remove_refusals.report import Confirmation
from remove_refusals.search.candidates import Candidate, Selection
from remove_refusals.settings import MeasureSettings, Tied
from remove_refusals.types import Intervention


@dataclass(frozen=True, eq=False)
class Confirming:
    """What candidates are confirmed on: the base model's answers to prompts that the search did not use."""

    loaded: LoadedModel
    harmful: Answered
    harmless: Answered
    settings: MeasureSettings
    tied: Tied = "auto"


def confirm(on: Confirming, intervention: Intervention, progress: Progress = SILENT) -> Confirmation:
    """Generate with an intervention and measure, by hooks, what it does to the base model's own answers."""
    loaded, settings = on.loaded, on.settings

    def edited() -> AbstractContextManager[None]:
        return ablated(loaded, intervention, tied=on.tied)

    now: list[Answered] = []
    with edited():
        for part in (on.harmful, on.harmless):
            told = progress.after(sum(map(len, now)))
            answers = generate(loaded, part.token_ids, max_new_tokens=settings.max_new_tokens, progress=told)
            now.append(labelled(part.prompts, part.token_ids, answers))
    harmful, harmless = now
    answered = on.harmless.only(Label.COMPLIANCE)
    along = [answer.token_ids for answer in answered.answers]
    distances = distances_along(loaded, loaded, answered.token_ids, along, settings.kl_tokens, edited_context=edited)
    kept = harmless.at([index for index, has in enumerate(on.harmless.flags(Label.COMPLIANCE)) if has])
    sha = answered.prompts.sha256
    match, of_base = answer_match(loaded, harmful, on.harmless, by_words=True)
    if match is not None and match.value < POOR_MATCH:
        # Likelihoods cost as much as a descent, and only where words tell of few answers can they change the verdict.
        match, of_base = answer_match(loaded, harmful, on.harmless)
    return Confirmation(
        refusals=harmful.rate(Label.REFUSAL),
        degenerate=harmful.rate(Label.DEGENERATE),
        false_refusals=harmless.rate(Label.REFUSAL),
        degenerate_harmless=harmless.rate(Label.DEGENERATE),
        moralising=harmful.rate(Label.MORALISING),
        moralising_harmless=harmless.rate(Label.MORALISING),
        broken=wilson_rate(len(kept) - kept.labels.count(Label.COMPLIANCE), len(kept), sha),
        match=match,
        match_of_base=of_base,
        damage=mean_with_interval([sum(distance.kl) / len(distance.kl) for distance in distances], sha),
    )


def pick(
    selection: Selection, order: Sequence[int], on: Confirming, most: int, journal: Journal, progress: Progress
) -> Selection:
    """Confirm at most so many candidates, in an order; where none is confirmed, the pick is what came nearest."""
    candidates, notes, confirmed = list(selection.candidates), list(selection.notes), list[int]()
    limit = selection.rule.max_refusals
    for number in order[:most]:
        candidate = candidates[number]
        if confirmed and limit is not None and candidate.refusal > limit:
            break
        name, intervention = f"confirming {candidate.name}", candidate.intervention
        told = progress.stage(name, len(on.harmful) + len(on.harmless))
        found = journal.remember(
            name,
            [
                [direction.basis.tolist() for direction in intervention.directions],
                [edit.to_json() for edit in intervention.edits],
                [on.harmful.token_ids, on.harmless.token_ids],
                [on.settings.max_new_tokens, on.settings.kl_tokens, on.tied],
            ],
            partial(confirm, on, intervention, told),
            Confirmation.to_json,
            Confirmation.model_validate,
        )
        candidates[number] = replace(candidate, confirmation=found)
        confirmed.append(number)
        shortfall = _shortfall(candidate, found, on, limit)
        if shortfall is None:
            return replace(selection, candidates=tuple(candidates), picked=number, notes=tuple(notes))
        notes.append(f"'{candidate.name}' fell short when confirmed by generation: {shortfall}.")
    best = min(confirmed, key=lambda number: _cost(candidates[number]))
    notes.append(f"No candidate was confirmed; '{candidates[best].name}' came nearest.")
    return replace(selection, candidates=tuple(candidates), picked=best, notes=tuple(notes))


def _cost(candidate: Candidate) -> tuple[float, float]:
    found = candidate.confirmation
    assert found is not None
    return found.failures + (found.broken.value if found.broken is not None else 0.0), candidate.damage


def _shortfall(candidate: Candidate, found: Confirmation, on: Confirming, limit: float | None) -> str | None:
    """Say what a confirmation lacks; None if it does what the search said, or what the rule asks for."""
    # A model that breaks off or loops in a tenth of its answers does so, too, in those that it no longer refuses.
    given = [
        label
        for part in (on.harmful, on.harmless)
        for label in part.labels
        if label not in (Label.REFUSAL, Label.MORALISING)
    ]
    own = len(on.harmful) * given.count(Label.DEGENERATE) / max(1, len(given))
    lectures, preached = (0 if rate is None else rate.count for rate in (found.moralising, found.moralising_harmless))
    failed = found.refusals.count + lectures + max(0.0, found.degenerate.count - own)
    if failed > math.ceil((candidate.refusal + 0.1 if limit is None else limit) * found.refusals.n):
        return (
            f"of {found.refusals.n} harmful prompts {found.refusals.count} were refused, {lectures} got a lecture and "
            f"{found.degenerate.count} a degenerate answer, where the search said {candidate.refusal:.1%}"
        )
    match, of_base = found.match, found.match_of_base
    if match is not None and of_base is not None and is_poor_match(match, of_base):
        return (
            f"{match.count} of {match.n} answers to harmful prompts match their prompts, and {of_base.count} of "
            f"{of_base.n} of the model's own to harmless ones"
        )
    n = len(on.harmless)
    before = n - on.harmless.labels.count(Label.COMPLIANCE)
    after = found.false_refusals.count + preached + found.degenerate_harmless.count
    if after - before > 0.1 * n:
        return f"{after} of {n} harmless prompts get no answer, {before} of them without it"
    return None
