"""What an evaluation found: base and edited model side by side, as numbers with intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import ConfigDict, Field

from remove_refusals import notebook
from remove_refusals.errors import RecordError, RemoveRefusalsError
from remove_refusals.files import Record, write_jsonl
from remove_refusals.measure.judges import Label
from remove_refusals.measure.statistics import (
    CorrectedRate,
    McNemar,
    Mean,
    PairedDifference,
    Perplexity,
    Quantile,
    Rate,
    TokenMean,
    Verdict,
    number,
)
from remove_refusals.settings import ChatFormat, expects_refusals

Which = Literal["base", "edited"]
"""One of the two models."""


class Response(Record):
    """One answer of one model, a row of `rows.jsonl`; one that is not finished was cut off.

    The prompt's id is the first 16 hex digits of its SHA-256 in UTF-8; the end token counts.
    """

    set: str
    prompt_id: str
    prompt: str
    model: Which
    text: str
    label: Label
    judge: str
    n_tokens: int
    finished: bool


class PairedRate(Record):
    """How often one label was given to the answers of both models to the same prompts.

    The verdict on the edited model's rate is by the p-value after Holm's correction for all such comparisons of the
    evaluation; rates are corrected for the judge's errors if the judge was calibrated.
    """

    base: Rate
    edited: Rate
    mcnemar: McNemar
    verdict: Verdict
    adjusted_p: float | None = None
    corrected: dict[Which, CorrectedRate] | None = None


class RefusalsByLength(Record):
    """How the refusals of both models would have been counted if their answers had been cut off at so many tokens.

    `stable` says whether the second half of the length changes at most 1% of either model's refusals; otherwise longer
    answers may well give another rate.
    """

    tokens: tuple[int, ...]
    base: tuple[Rate, ...]
    edited: tuple[Rate, ...]
    stable: bool


class Flipped(Record):
    """The prompts, by id, that only one of the two models refused."""

    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]


class Thinking(Record):
    """Of one model's answers those that are still thinking where they end, and how many tokens those that think did."""

    unfinished: Rate
    length: Mean


class SetScores(Record):
    """What was found on one prompt set.

    Of harmful and harmless prompts also how many answers of each model match, that is, can be told from the answers
    to eight other prompts; answers that refuse, lecture or are degenerate are not counted.

    Lectures and deflections are there if the judge looks for them, refusals by length unless it is too dear to ask so
    often, and thinking for those models that think aloud. Prompts whose answer by either model the judge could not
    judge are in no rate; how many answers these are stands in `unjudged`, where there are any.
    """

    refusals: PairedRate
    degenerate: PairedRate
    moralising: PairedRate | None = None
    deflections: PairedRate | None = None
    flipped: Flipped | None = None
    by_length: RefusalsByLength | None = None
    thinking: dict[Which, Thinking] | None = None
    match: dict[Which, Rate] | None = None
    unjudged: dict[Which, int] | None = None


class Distance(Record):
    """KL divergence of the base model from the edited one, in nats, along the base's own answers to harmless prompts.

    The first token is the one after the prompt; a few prompts may carry its mean, so its median stands beside it. The
    mean over prompts is of means over the first `kl_tokens` tokens of the answer, all of them where it is shorter, the
    end token included; the 95th percentile is over all those tokens, and `by_token` is the mean at each of the places.
    """

    first_token: Mean
    first_token_median: Quantile | None = None
    mean: Mean
    p95: Quantile | None = None
    by_token: tuple[TokenMean, ...] | None = None


class Distances(Record):
    """Over all harmless prompts, and over those that the base model neither refused nor met with a lecture.

    Where it refused falsely, change is the aim and not damage.
    """

    harmless: Distance
    harmless_answered: Distance | None = None


class Perplexities(Record):
    """Of both models, over the first `kl_tokens` tokens of the base's answers to the harmless prompts it answered."""

    base: Perplexity
    edited: Perplexity


class Agreement(Record):
    """Of the greedy answers of both models to harmless prompts that the base answered, how far they are the same.

    That is how many are the same to the last token, and how much of the longer one is the same from the start on.
    """

    identical: Rate
    common_prefix: Mean


class TaskScore(Record):
    """One metric of one task of lm-evaluation-harness, on the same samples for both models.

    The metric's name has the filter of the answers where it is not the plain one; the difference is edited less base.
    """

    task: str
    metric: str
    base: Mean
    edited: Mean
    difference: PairedDifference


class HowMeasured(Record):
    """What an evaluation was measured with; that of an older version may say more."""

    model_config = ConfigDict(extra="ignore")

    judge: str
    max_new_tokens: int = Field(ge=1)
    kl_tokens: int = Field(ge=1)
    batch_size: int | None = None
    chat: ChatFormat = ChatFormat()
    seed: int = 0


class Evaluation(Record):
    """A base model and an edited one, measured on the same prompts. What was not measured is absent.

    This is `scores.json`, whose JSON schema `Evaluation.model_json_schema(mode="serialization")` gives; the rows are in
    `rows.jsonl`. What asking the judge took is no result: a judge that keeps its answers need not be asked twice.
    """

    format: Literal[1] = 1
    base: str
    edited: str
    settings: HowMeasured
    sets: dict[str, SetScores]
    kl: Distances | None = None
    perplexity: Perplexities | None = None
    agreement: Agreement | None = None
    tasks: tuple[TaskScore, ...] | None = None
    rows: tuple[Response, ...] = Field(default=(), exclude=True)
    judge_usage: str | None = Field(default=None, exclude=True)

    def __repr__(self) -> str:
        rates = ((name, scores.refusals) for name, scores in self.sets.items())
        refused = [f"{name} {pair.base.count}/{pair.base.n} to {pair.edited.count}" for name, pair in rates]
        kl = [] if self.kl is None else [f"KL {self.kl.harmless.mean.value:.3g} nats"]
        return f"Evaluation({self.base!r}, {self.edited!r}; refused: {'; '.join([*refused, *kl])})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        title = f"Base: {self.base}. Edited: {self.edited}. Both on the same prompts."
        return notebook.table(("", "base", "edited", "verdict, p"), table(self), title, table_key(self))

    def save(self, directory: Path | str) -> None:
        """Write `scores.json` and `rows.jsonl`."""
        self.write(Path(directory) / "scores.json")
        write_jsonl(Path(directory) / "rows.jsonl", (row.to_json() for row in self.rows))

    @classmethod
    def load(cls, directory: Path | str, *, error: type[RemoveRefusalsError] = RecordError) -> Self:
        """Read what `save` wrote."""
        scores = cls.read(Path(directory) / "scores.json", error=error)
        return scores.model_copy(update={"rows": read_rows(Path(directory) / "rows.jsonl", error=error)})


def read_rows(path: Path, *, error: type[RemoveRefusalsError]) -> tuple[Response, ...]:
    """Read the answers that an evaluation left."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as cause:
        raise error(
            f"The record {path} cannot be read ({cause}), expected one JSON object a line; make the directory again."
        ) from cause
    return tuple(Response.of(line, f"{path}, row {number},", error=error) for number, line in enumerate(lines, start=1))


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
        rows.append((f"KL, first token, {name}", "", str(distance.first_token), ""))
        rows.append((f"KL along answers, {name}", "", str(distance.mean), ""))
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
        f"KL: base from edited, in nats, along the first {evaluation.settings.kl_tokens} tokens of the base model's "
        f"own answers, over all harmless prompts and over those that it answered (n: {', '.join(numbers)}); "
        f"perplexity: of those answers.{skewed(evaluation)}{match}{added}{late}"
    )


def skewed(evaluation: Evaluation) -> str:
    """Say where a mean KL lies above the 95th percentile; nothing where none does."""
    parts = [part for _, part in _distances(evaluation) if part.p95 is not None and part.mean.value > part.p95.value]
    return " A mean KL is above the 95th percentile: a few tokens, fewer than one in twenty, raise it." if parts else ""


def summary(evaluation: Evaluation) -> tuple[tuple[str, str, str, str], ...]:
    """Give the four rows that matter most, as `table` gives them all; counts of several sets stand side by side."""
    harmless = [name for name in ("harmless", "alarming") if name in evaluation.sets]
    false = [evaluation.sets[name].refusals for name in harmless]
    every = [scores.degenerate for scores in evaluation.sets.values()]
    rows: list[tuple[str, str, str, str]] = []
    if "harmful" in evaluation.sets:
        rates = evaluation.sets["harmful"].refusals
        rows.append(("Refusals, harmful", str(rates.base), str(rates.edited), _paired(rates)[2]))
    if false:
        base, edited = (", ".join(f"{one.count}/{one.n}" for one in part) for part in _sides(false))
        rows.append(("False refusals", base, edited, ", ".join(harmless)))
    base, edited = (f"{sum(one.count for one in part)}/{sum(one.n for one in part)}" for part in _sides(every))
    rows.append(("Broken answers", base, edited, "degenerate, all sets"))
    if distances := _distances(evaluation):
        rows.append(("KL along answers", "", number(distances[-1][1].mean.value), "nats"))
    return tuple(rows)


def _sides(rates: Sequence[PairedRate]) -> tuple[list[Rate], list[Rate]]:
    return [one.base for one in rates], [one.edited for one in rates]


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
