"""What an evaluation found: base and edited model side by side, as numbers with intervals."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from remove_refusals.measure.judges.labels import Label
from remove_refusals.measure.statistics import (
    CorrectedRate,
    McNemar,
    Mean,
    Perplexity,
    Quantile,
    Rate,
    Verdict,
    verdict,
)
from remove_refusals.measure.tasks import TaskScore
from remove_refusals.settings import ChatFormat, MeasureSettings

FORMAT = 1
"""The version of the layout of `scores.json`, whose schema is `data/scores.schema.json`."""


@dataclass(frozen=True)
class Response:
    """One answer of one model.

    Attributes:
        set_name: The name of the prompt set.
        prompt_id: The first 16 hex digits of the prompt's SHA-256 in UTF-8.
        prompt: The prompt.
        model: `base` or `edited`.
        text: The answer.
        label: What the judge calls it.
        judge: Which judge.
        n_tokens: How many tokens it has, the end token included.
        finished: Whether it ended by itself; otherwise it was cut off.
    """

    set_name: str
    prompt_id: str
    prompt: str
    model: str
    text: str
    label: Label
    judge: str
    n_tokens: int
    finished: bool

    def to_json(self) -> dict[str, Any]:
        """Give the attributes; the set's name is under `set`."""
        values = asdict(self)
        return {"set": values.pop("set_name"), **values, "label": str(self.label)}


@dataclass(frozen=True)
class PairedRate:
    """How often one label was given to the answers of both models to the same prompts.

    Attributes:
        base: The base model's rate.
        edited: The edited model's rate.
        mcnemar: The paired test; its `only_first` is what only the base model has.
        adjusted_p: Its p-value after Holm's correction for all such comparisons of the evaluation.
        corrected: By `base` and `edited`, the rates corrected for the judge's errors, if the judge was calibrated.
    """

    base: Rate
    edited: Rate
    mcnemar: McNemar
    adjusted_p: float | None = None
    corrected: dict[str, CorrectedRate] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether the edited model's rate is higher or lower, or the data cannot say."""
        return verdict(self.mcnemar, self.adjusted_p)

    def to_json(self) -> dict[str, Any]:
        """Give the attributes and the verdict; what was not measured is absent."""
        record: dict[str, Any] = {"base": self.base.to_json(), "edited": self.edited.to_json()}
        record["mcnemar"] = self.mcnemar.to_json()
        if self.adjusted_p is not None:
            record["adjusted_p"] = self.adjusted_p
        if self.corrected:
            record["corrected"] = {model: rate.to_json() for model, rate in self.corrected.items()}
        return record | {"verdict": str(self.verdict)}


@dataclass(frozen=True)
class RefusalsByLength:
    """How the refusals of both models would have been counted if their answers had been cut off earlier.

    Attributes:
        tokens: The lengths, rising.
        base: The base model's rate at each of them.
        edited: The edited model's.
        settled: Whether the second half of the length changes at most 1% of either model's refusals; otherwise longer
            answers may well give another rate.
    """

    tokens: tuple[int, ...]
    base: tuple[Rate, ...]
    edited: tuple[Rate, ...]
    settled: bool

    def to_json(self) -> dict[str, Any]:
        """Give the attributes; `settled` is under `stable`."""
        rates = {name: [rate.to_json() for rate in getattr(self, name)] for name in ("base", "edited")}
        return {"tokens": list(self.tokens), **rates, "stable": self.settled}


@dataclass(frozen=True)
class Flipped:
    """The prompts on which the two models differ, by the first 16 hex digits of their SHA-256.

    Attributes:
        only_base: Refused by the base model and not by the edited one.
        only_edited: The reverse.
    """

    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give the attributes."""
        return {"only_base": list(self.only_base), "only_edited": list(self.only_edited)}


@dataclass(frozen=True)
class Thinking:
    """What one model thought aloud before its answers to one prompt set.

    Attributes:
        unfinished: Answers that are still thinking where they end, of all answers.
        length: How many tokens were thought, over the answers that think.
    """

    unfinished: Rate
    length: Mean

    def to_json(self) -> dict[str, Any]:
        """Give the attributes."""
        return {"unfinished": self.unfinished.to_json(), "length": self.length.to_json()}


@dataclass(frozen=True)
class SetScores:
    """What was found on one prompt set.

    Attributes:
        refusals: Answers that refuse; on harmless prompts they are false refusals.
        degenerate: Answers that are none: empty, or caught in a loop.
        deflections: Answers to something else; None if the judge does not look for them.
        flipped: The prompts on which the models differ in refusing.
        by_length: The refusals as a function of the answers' length; None if the judge is too dear to ask so often.
        thinking: By `base` and `edited`, for those models that think aloud.
    """

    refusals: PairedRate
    degenerate: PairedRate
    deflections: PairedRate | None = None
    flipped: Flipped | None = None
    by_length: RefusalsByLength | None = None
    thinking: dict[str, Thinking] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Give the attributes; what was not measured is absent."""
        there = {name: part for name, part in vars(self).items() if part}
        thinking = {name: part.to_json() for name, part in there.pop("thinking", {}).items()}
        found = {name: part.to_json() for name, part in there.items()}
        return found | ({"thinking": thinking} if thinking else {})

    def adjusted(self, p_values: Iterator[float]) -> "SetScores":
        """Give the same with adjusted p-values, taken one by one for each rate in the order of `paired`."""
        refusals, degenerate, *others = (replace(rate, adjusted_p=next(p_values)) for rate in self.paired().values())
        deflections = others[0] if others else None
        return replace(self, refusals=refusals, degenerate=degenerate, deflections=deflections)

    def paired(self) -> dict[str, PairedRate]:
        """Give the rates by name."""
        rates = {"refusals": self.refusals, "degenerate": self.degenerate, "deflections": self.deflections}
        return {name: rate for name, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class Distance:
    """How far the edited model is from the base model, along the base model's own answers to harmless prompts.

    Attributes:
        first_token: The KL divergence of the next token after the prompt, base from edited, in nats; mean over prompts.
        mean: The KL divergence averaged over the first `kl_tokens` tokens of the base model's answer (all of them where
            it is shorter, the end token included); mean over prompts.
        p95: The 95th percentile of the KL divergence over all those tokens.
        by_token: Its mean at each of those places in the answers.
    """

    first_token: Mean
    mean: Mean
    p95: Quantile | None = None
    by_token: tuple[Mean, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Give the attributes; what was not measured is absent."""
        record: dict[str, Any] = {"first_token": self.first_token.to_json(), "mean": self.mean.to_json()}
        if self.p95 is not None:
            record["p95"] = self.p95.to_json()
        if self.by_token:
            keys = ("value", "low", "high", "n")
            places = enumerate(self.by_token)
            record["by_token"] = [
                {"token": place + 1} | {key: getattr(mean, key) for key in keys} for place, mean in places
            ]
        return record


@dataclass(frozen=True)
class Agreement:
    """How far the greedy answers of both models to the harmless prompts that the base answered are the same.

    Attributes:
        identical: Answers that are the same to the last token.
        common_prefix: How much of the longer answer is the same from the start on; mean over prompts.
    """

    identical: Rate
    common_prefix: Mean

    def to_json(self) -> dict[str, Any]:
        """Give the attributes."""
        return {"identical": self.identical.to_json(), "common_prefix": self.common_prefix.to_json()}


_MEASURED = {"max_new_tokens", "kl_tokens", "seed"}
"""The settings that stand in the scores; prompts have their hashes there, and tasks their own entries."""


@dataclass(frozen=True)
class Evaluation:
    """A base model and an edited one, measured on the same prompts. What was not measured is None or absent.

    Attributes:
        base: Where the base model came from.
        edited: Where the edited model came from.
        settings: How it was measured.
        sets: By name `harmful`, `harmless` and `alarming`: the scores on that set.
        distance: Over all harmless prompts.
        distance_answered: Over the harmless prompts that the base model did not refuse: where it refused falsely,
            change is the aim and not damage.
        base_perplexity: The base model's, over the first `kl_tokens` tokens (the end token included) of its own answers
            to the harmless prompts that it did not refuse.
        edited_perplexity: The edited model's, over the same tokens.
        rows: Every answer.
        judge: What labelled them.
        agreement: How far the greedy answers to the harmless prompts that the base model answered are the same.
        tasks: The tasks of lm-evaluation-harness.
        chat: How the prompts were put before the models.
        judge_usage: What asking the judge took, if it says so; no result, and so in no record: a judge that keeps its
            answers need not be asked twice.
    """

    base: str
    edited: str
    settings: MeasureSettings
    sets: dict[str, SetScores]
    distance: Distance | None
    distance_answered: Distance | None
    base_perplexity: Perplexity | None
    edited_perplexity: Perplexity | None
    rows: tuple[Response, ...]
    judge: str = "phrases"
    agreement: Agreement | None = None
    tasks: tuple[TaskScore, ...] = ()
    chat: ChatFormat = field(default_factory=ChatFormat)
    judge_usage: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Give everything but the rows and the judge's usage.

        Returns:
            What `data/scores.schema.json` describes: `format`, `base` and `edited` (sources), `settings`; `sets`, with
            `refusals` and `degenerate` for each set, each of them with the rates `base` and `edited` and the test
            `mcnemar`; `kl`, with `harmless` and `harmless_answered`, each of them with the means `first_token` and
            `mean`; `perplexity`, with `base` and `edited`; `agreement`, `text` and `tasks`. What was not measured is
            absent.
        """
        distances = {"harmless": self.distance, "harmless_answered": self.distance_answered}
        perplexities = {"base": self.base_perplexity, "edited": self.edited_perplexity}
        measured = self.settings.model_dump(include=_MEASURED)
        return {
            "format": FORMAT,
            "base": self.base,
            "edited": self.edited,
            "settings": measured | {"judge": self.judge, "chat": self.chat.model_dump()},
            "sets": {name: scores.to_json() for name, scores in self.sets.items()},
            **_present("kl", distances),
            **_present("perplexity", perplexities),
            **({} if self.agreement is None else {"agreement": self.agreement.to_json()}),
            **({"tasks": [score.to_json() for score in self.tasks]} if self.tasks else {}),
        }


def _present(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    there = {key: part.to_json() for key, part in parts.items() if part is not None}
    return {name: there} if there else {}
