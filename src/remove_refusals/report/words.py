"""Numbers as a report prints them."""

import math
import re
from typing import get_args

from remove_refusals.measure import Distance, Estimate, Evaluation, PairedRate, Which
from remove_refusals.settings import expects_refusals
from remove_refusals.types import Auroc, Contribution

_WIDE_ENDS = "\u3002\uff01\uff1f"
"""The full stop, exclamation and question mark of Chinese and Japanese, after which no space stands."""

_SENTENCE = re.compile(rf".*?(?:[.!?\u2026]+[\"')\u201d\u2019]*(?=\s|$)|[{_WIDE_ENDS}])")

_CUT_AFTER = 240
"""A first sentence longer than that is cut off there."""


def number(value: float) -> str:
    """Print a number with three significant digits, whole numbers whole, and an exponent only where it is shorter."""
    if value == 0 or (float(value).is_integer() and abs(value) < 1e5):
        return str(int(value))
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return re.sub(r"e([+-])0*(\d)", lambda match: f"e{match[1].lstrip('+')}{match[2]}", f"{value:.2g}")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def tick(value: float) -> str:
    """Print a number of a scale, without digits that say nothing."""
    shown = f"{value:g}" if abs(value) < 1e5 else f"{value:.2e}".replace(".00e", "e").replace("0e", "e")
    return shown.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def percent(value: float) -> str:
    """Print a share from 0 to 1 as a percentage: whole, or with a digit where it is near an end but not at it."""
    shown = 100 * value
    return f"{shown:.1f}%" if 0 < shown < 1 or 99 < shown < 100 else f"{shown:.0f}%"


Measured = Estimate | Auroc | Contribution
"""A number with the ends of its interval."""


def interval(found: Measured) -> str:
    """Print the ends of an interval."""
    return f"[{number(found.low)}, {number(found.high)}]"


def estimate(found: Measured) -> str:
    """Print a number with its interval."""
    return f"{number(found.value)} {interval(found)}"


def percent_interval(found: Measured) -> str:
    """Print the ends of a rate's interval as percentages."""
    return f"[{percent(found.low).removesuffix('%')}, {percent(found.high)}]"


def place(share: float) -> str:
    """Print where a share lies on a line from 0 to 100; a corrected rate may lie beyond its ends."""
    return f"{100 * min(1.0, max(0.0, share)):.2f}"


def p_value(value: float) -> str:
    """Print a p-value."""
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def first_sentence(text: str) -> tuple[str, int]:
    """Give the first sentence of a text's first line, of at most 240 characters, and how many were left out."""
    whole = text.strip()
    line = whole.split("\n", 1)[0]
    found = _SENTENCE.match(line)
    sentence = (found[0] if found else line)[:_CUT_AFTER]
    return sentence, len(whole) - len(sentence)


def table(evaluation: Evaluation) -> tuple[tuple[str, str, str, str], ...]:
    """Give rows of text, which `table_key` explains: what was measured, base, edited, and how the two compare."""
    rows: list[tuple[str, str, str, str]] = []
    for kind in ("refusals", "moralising", "degenerate"):
        for name, scores in evaluation.sets.items():
            false = "false " if kind == "refusals" and not expects_refusals(name) else ""
            if (rates := getattr(scores, kind)) is not None:
                rows.append((f"{false}{kind}, {name}".capitalize(), *_paired(rates)))
    for name, scores in evaluation.sets.items():
        if scores.deflections is not None:
            rows.append((f"Deflected, {name}", *_paired(scores.deflections)))
        unfinished = {model: thinking.unfinished for model, thinking in (scores.thinking or {}).items()}
        counted = {"Match": scores.match, "Not judged": scores.unjudged, "Unfinished thinking": unfinished}
        for title, found in counted.items():
            if found:
                base, edited = (str(found.get(model, "")) for model in get_args(Which))
                rows.append((f"{title}, {name}", base, edited, ""))
    for name, distance in _distances(evaluation):
        rows.append((f"First-token KL, {name}", "", str(distance.first_token), ""))
        rows.append((f"KL, {evaluation.settings.kl_tokens} tokens, {name}", "", str(distance.mean), ""))
        if distance.p95 is not None:
            rows.append((f"KL, 95th percentile, {name}", "", str(distance.p95), ""))
    if (perplexity := evaluation.perplexity) is not None:
        ratio = f"{perplexity.edited.value / perplexity.base.value:.2f} times"
        rows.append(("Perplexity", f"{perplexity.base.value:.3g}", f"{perplexity.edited.value:.3g}", ratio))
    for task in evaluation.tasks or ():
        verdict = "" if task.difference.decided else ", undecided"
        paired = f"{task.difference.value:+.2g} [{task.difference.low:+.2g}, {task.difference.high:+.2g}]{verdict}"
        rows.append((f"{task.task}, {task.metric}", f"{task.base.value:.3g}", f"{task.edited.value:.3g}", paired))
    if evaluation.agreement is not None:
        rows.append(("Identical answers, answered", "", str(evaluation.agreement.identical), ""))
    return tuple(rows)


def table_key(evaluation: Evaluation) -> str:
    """Explain the rows of `table` in a few sentences."""
    numbers = [f"{name} {distance.first_token.n}" for name, distance in _distances(evaluation)]
    unsettled = [name for name, scores in evaluation.sets.items() if scores.by_length and not scores.by_length.stable]
    rates = [scores.moralising for scores in evaluation.sets.values() if scores.moralising is not None]
    lectures = any(rate.base.count or rate.edited.count for rate in rates)
    added = " A moralising answer only lectures: it answers no more than a refusal does." if lectures else ""
    has_match = any(scores.match for scores in evaluation.sets.values())
    match = " Match: of the answers, those that can be told from the answers to 8 other prompts." if has_match else ""
    late = f" Refusals to {' and '.join(unsettled)} prompts still change with the answers' length." if unsettled else ""
    return (
        "Rates: count/n with a 95% Wilson interval; p: exact McNemar, corrected for all comparisons here (Holm 1979). "
        "KL: base from edited, in nats, along the base "
        f"model's own answers, over all harmless prompts and over those that it answered (n: {', '.join(numbers)}); "
        f"perplexity: of those answers.{match}{added}{late}"
    )


def _distances(evaluation: Evaluation) -> list[tuple[str, Distance]]:
    kl = evaluation.kl
    parts = () if kl is None else (("harmless", kl.harmless), ("answered", kl.harmless_answered))
    return [(name, part) for name, part in parts if part is not None]


def _paired(rates: PairedRate) -> tuple[str, str, str]:
    p_value = rates.mcnemar.p_value if rates.adjusted_p is None else rates.adjusted_p
    said = f"{rates.verdict}, {p_value:.1g}"
    cells = {"base": str(rates.base), "edited": str(rates.edited)}
    for model, corrected in (rates.corrected or {}).items():
        cells[model] += f", corrected {corrected}"
    return cells["base"], cells["edited"], said
