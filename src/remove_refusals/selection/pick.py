"""The pick among candidates: confirmed by generation, on prompts that the search did not use."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from remove_refusals.journal import Journal
from remove_refusals.judges import Label
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.selection.candidates import Candidate, Confirmation, Method, Rule, Selection, by_rule
from remove_refusals.selection.references import AnswerSettings, References, confirm
from remove_refusals.types import Intervention

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


def stage(report: OnProgress, name: str, total: int) -> Callable[[int], None]:
    """Turn the report of how much is done of one stage into that of a search."""
    return lambda done: report(name, done, total)


def pick(
    loaded: LoadedModel,
    model_map: ModelMap,
    candidates: Sequence[Candidate],
    confirming: tuple[References, ...],
    answers: AnswerSettings,
    *,
    method: Method,
    rule: Rule,
    most_confirmed: int,
    report: OnProgress,
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
        report: Told of every stage.
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
            on_progress=stage(report, name, len(harmful) + len(harmless)),
        )
        inputs = [_content(tried[number].intervention), harmful.token_ids, harmless.token_ids, asdict(answers)]
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
