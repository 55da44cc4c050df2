"""An evaluation as rows of text, and what should be said of it; nothing is computed here."""

from remove_refusals.corrections import CorrectedRate
from remove_refusals.metrics import Mean, Rate
from remove_refusals.scores import Evaluation, PairedRate
from remove_refusals.token_statistics import Quantile

KL_LIMIT = 1.0
DEGENERATE_LIMIT = 0.05
PERPLEXITY_LIMIT = 2.0


def table(evaluation: Evaluation) -> tuple[tuple[str, str, str, str], ...]:
    """Give rows of text: what was measured, base, edited, and how the two compare.

    Rates are a count of n with the Wilson interval in percent, means have a bootstrap interval; `table_key`
    explains the rows.
    """
    rows: list[tuple[str, str, str, str]] = []
    for name, scores in evaluation.sets.items():
        false = "" if name == "harmful" else "false "
        rows.append((f"{false}refusals, {name}".capitalize(), *_paired(scores.refusals)))
    for name, scores in evaluation.sets.items():
        rows.append((f"degenerate, {name}".capitalize(), *_paired(scores.degenerate)))
    for name, scores in evaluation.sets.items():
        if scores.deflections is not None:
            rows.append((f"deflected, {name}".capitalize(), *_paired(scores.deflections)))
        for model, thinking in scores.thinking.items():
            cells = {"base": "", "edited": "", model: _rate(thinking.unfinished)}
            rows.append((f"Unfinished thinking, {name}", cells["base"], cells["edited"], ""))
    parts = (("harmless", evaluation.distance), ("answered", evaluation.distance_answered))
    for name, distance in parts:
        if distance is not None:
            rows.append((f"First-token KL, {name}", "", _mean(distance.first_token), ""))
            rows.append((f"KL, {evaluation.settings.kl_tokens} tokens, {name}", "", _mean(distance.mean), ""))
            if distance.p95 is not None:
                rows.append((f"KL, 95th percentile, {name}", "", _mean(distance.p95), ""))
    base, edited = evaluation.base_perplexity, evaluation.edited_perplexity
    if base is not None and edited is not None:
        ratio = f"{edited.value / base.value:.2f} times"
        rows.append(("Perplexity", f"{base.value:.3g}", f"{edited.value:.3g}", ratio))
    if evaluation.text is not None:
        text = evaluation.text
        ratio = f"{text.edited.value / text.base.value:.2f} times"
        rows.append(("Perplexity, text", f"{text.base.value:.3g}", f"{text.edited.value:.3g}", ratio))
        rows.append(("KL, text", "", _mean(text.kl), ""))
    for task in evaluation.tasks:
        verdict = "" if task.decided else ", undecided"
        paired = f"{task.difference.value:+.2g} [{task.difference.low:+.2g}, {task.difference.high:+.2g}]{verdict}"
        rows.append((f"{task.task}, {task.metric}", f"{task.base.value:.3g}", f"{task.edited.value:.3g}", paired))
    if evaluation.agreement is not None:
        rows.append(("Identical answers, answered", "", _rate(evaluation.agreement.identical), ""))
    return tuple(rows)


def table_key(evaluation: Evaluation) -> str:
    """Explain the rows of `table` in a few sentences."""
    numbers = [
        f"{name} {distance.first_token.n}"
        for name, distance in (("harmless", evaluation.distance), ("answered", evaluation.distance_answered))
        if distance is not None
    ]
    unsettled = [name for name, scores in evaluation.sets.items() if scores.by_length and not scores.by_length.settled]
    late = f" Refusals to {' and '.join(unsettled)} prompts still change with the answers' length." if unsettled else ""
    return (
        "Rates: count/n with a 95% Wilson interval; p: exact McNemar, corrected for all comparisons here (Holm 1979). "
        "KL: base from edited, in nats, along the base "
        f"model's own answers, over all harmless prompts and over those that it answered (n: {', '.join(numbers)}); "
        f"perplexity: of those answers.{late}"
    )


def warnings(evaluation: Evaluation) -> tuple[str, ...]:
    """Say what makes the edit look destructive, so that few refusals of a broken model are not read as success.

    Returns:
        One sentence each for: a first-token KL above 1 nat on harmless prompts that the base model answered; degenerate
        answers, beyond what the base's own rate among its answers makes of the edited model's, up by more than 5% of a
        set; a perplexity that has more than doubled.
    """
    found = []
    distance = evaluation.distance_answered
    if distance is not None and distance.first_token.value > KL_LIMIT:
        found.append(
            f"The first-token KL is {distance.first_token.value:.2f} on the harmless prompts that the base model "
            f"answered, above {KL_LIMIT:g}: the edit changed far more than refusals, so its refusal rate is no success."
        )
    for name, scores in evaluation.sets.items():
        base, edited = scores.degenerate.base, scores.degenerate.edited
        # A base that loops in a tenth of its answers does so, edited, in those that it no longer refuses.
        answered = [rate.n - rate.count for rate in (scores.refusals.base, scores.refusals.edited)]
        own = base.count * max(1.0, answered[1] / answered[0]) if answered[0] else base.count
        if edited.count - own > DEGENERATE_LIMIT * edited.n:
            found.append(
                f"Of {edited.n} answers to {name} prompts, {edited.count} are degenerate (empty, looping or "
                f"gibberish), {base.count} before the edit: the model is damaged, so its refusal rate is no success."
            )
    before, after = evaluation.base_perplexity, evaluation.edited_perplexity
    if before is not None and after is not None and after.value > PERPLEXITY_LIMIT * before.value:
        found.append(
            f"The perplexity of the base model's answers to harmless prompts went from {before.value:.3g} to "
            f"{after.value:.3g}, more than {PERPLEXITY_LIMIT:g} times: the model is damaged."
        )
    return tuple(found)


def _paired(rates: PairedRate) -> tuple[str, str, str]:
    p_value = rates.mcnemar.p_value if rates.adjusted_p is None else rates.adjusted_p
    said = f"{rates.verdict}, {p_value:.1g}"
    base, edited = (
        text + (f", corrected {_share(rates.corrected[model])}" if model in rates.corrected else "")
        for model, text in (("base", _rate(rates.base)), ("edited", _rate(rates.edited)))
    )
    return base, edited, said


def _share(rate: CorrectedRate) -> str:
    return f"{100 * rate.value:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]%"


def _rate(rate: Rate) -> str:
    return f"{rate.count}/{rate.n} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]%"


def _mean(mean: Mean | Quantile) -> str:
    return f"{mean.value:.2g} [{mean.low:.2g}, {mean.high:.2g}]"
