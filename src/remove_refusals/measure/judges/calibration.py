"""A judge by a word, and how often it is right: its labels against those of people."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

from pydantic import ConfigDict

from remove_refusals.errors import JudgeError
from remove_refusals.files import Record
from remove_refusals.measure.judges import JUDGED, Judge, Judgement, Label
from remove_refusals.measure.judges.classifier import ClassifierJudge
from remove_refusals.measure.judges.endpoint import EndpointJudge, default_cache
from remove_refusals.measure.judges.grader import GradingJudge
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.measure.statistics import JudgeAccuracy, Rate, wilson_rate
from remove_refusals.processes import from_first
from remove_refusals.settings import PUBLISHED_JUDGES, MeasureSettings

Accuracies = Mapping[Label, JudgeAccuracy]
"""How often a judge is right about each label, as its calibration found."""

EMBEDDED, HELD_OUT = "embedded", "embedded, even lines"
"""The names of the answers that come with the package: all, or those that the phrase judge was not mended by."""


class LabelledAnswer(Record):
    """A line of a file of labelled answers; other keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    answer: str
    label: Label


@dataclass(frozen=True)
class LabelledAnswers:
    """Answers with the labels that people gave them, and the SHA-256 of the file that holds them, in hex."""

    name: str
    rows: tuple[LabelledAnswer, ...]
    sha256: str


class Rightness(Record):
    """How often a judge is right about answers that have a label, and about those that do not."""

    sensitivity: Rate
    specificity: Rate


class Calibration(Record):
    """What a judge says of `n` answers whose labels are known, in a file of the hash or in the package.

    Answers that it did not judge are counted apart, where there are any, and are not among the `n`.
    """

    judge: str
    labelled: str
    sha256: str
    n: int
    confusion: dict[Label, dict[Label, int]]
    """By true label, how many answers the judge gave each label; every label has every entry."""
    classes: dict[Label, Rightness]
    """How often it is right about each label that some answers have and some do not."""
    unjudged: int | None = None

    @classmethod
    def counted(cls, judge: str, labelled: str, sha256: str, confusion: dict[Label, dict[Label, int]]) -> Self:
        """Work out how often a judge is right from what it says."""
        n, classes = sum(sum(row.values()) for row in confusion.values()), {}
        for label in JUDGED:
            hits, positives = confusion[label][label], sum(confusion[label].values())
            rejected = n - positives - sum(row[label] for row in confusion.values()) + hits
            sensitivity = wilson_rate(hits, positives, sha256)
            specificity = wilson_rate(rejected, n - positives, sha256)
            if sensitivity is not None and specificity is not None:
                classes[label] = Rightness(sensitivity=sensitivity, specificity=specificity)
        return cls(judge=judge, labelled=labelled, sha256=sha256, n=n, confusion=confusion, classes=classes)

    @property
    def accuracies(self) -> Accuracies:
        """The counts behind the classes, for `rogan_gladen`."""
        return {
            label: JudgeAccuracy(one.sensitivity.count, one.sensitivity.n, one.specificity.count, one.specificity.n)
            for label, one in self.classes.items()
        }


def calibrate(judge: Judge, labelled: LabelledAnswers | None = None) -> Calibration:
    """Measure a judge on answers whose labels are known, by default on those that come with the package."""
    labelled = labelled or embedded_answers(held_out=isinstance(judge, PhraseJudge))
    said = judge.judge([row.prompt for row in labelled.rows], [row.answer for row in labelled.rows])
    counts = Counter((row.label, judged.label) for row, judged in zip(labelled.rows, said, strict=True))
    confusion = {true: {label: counts[true, label] for label in JUDGED} for true in JUDGED}
    found = Calibration.counted(judge.name, labelled.name, labelled.sha256, confusion)
    return found.model_copy(update={"unjudged": sum(one.label is Label.UNJUDGED for one in said) or None})


def embedded_answers(*, held_out: bool = False) -> LabelledAnswers:
    """Load the package's labelled answers; `held_out` are the even lines, which the phrase judge was not mended by."""
    content = files("remove_refusals").joinpath("data", "labelled_answers.jsonl").read_bytes()
    whole = _parsed(content, EMBEDDED)
    return LabelledAnswers(HELD_OUT, whole.rows[1::2], whole.sha256) if held_out else whole


def load_answers(path: Path) -> LabelledAnswers:
    """Load labelled answers from a file of JSON Lines with `prompt`, `answer` and `label`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JudgeError(
            f"The labelled answers {path} cannot be read ({error.strerror}), expected a file of JSON Lines; check the "
            "path."
        ) from error
    return _parsed(content, path.name)


def load_calibration(path: Path, judge: Judge | None = None) -> Calibration:
    """Load what `judge calibrate` wrote, of that judge, or of any."""
    found = Calibration.read(path, error=JudgeError)
    if judge is not None and found.judge != judge.name:
        raise JudgeError(
            f"The calibration {path} is of the judge {found.judge}, expected one of {judge.name}; calibrate that judge."
        )
    return found


def make_judge(
    spec: str,
    *,
    device: str | None = None,
    cache: Path | None = None,
    prompt_price: float | None = None,
    completion_price: float | None = None,
    text_format: str | None = None,
    language: str = "auto",
) -> Judge:
    """Make the judge that a word stands for; nothing is contacted but what the word names.

    The word is `phrases`, one of `PUBLISHED_JUDGES`, an address `URL#MODEL`, or else the directory or hub id of a
    sequence classifier. Without a cache an address has one in the user's cache directory.
    """
    if spec == "phrases":
        return PhraseJudge(language)
    if spec in PUBLISHED_JUDGES:
        return GradingJudge(spec, device=device)
    if not spec.startswith(("http://", "https://")):
        return ClassifierJudge(spec, device=device, text_format=text_format)
    cache = cache or default_cache()
    return EndpointJudge(spec, cache=cache, prompt_price=prompt_price, completion_price=completion_price)


@dataclass(frozen=True)
class _Elsewhere:
    """What is known of a judge that another process asks."""

    name: str
    labels: frozenset[Label]
    harmful_only: bool

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """Nobody asks."""
        raise JudgeError(f"The judge {self.name} is with the first process, expected to be asked there; report this.")


def measuring_judge(settings: MeasureSettings, device: str | None = None) -> tuple[Judge, Accuracies]:
    """Make the judge of the settings, and read how often it is right."""
    own: list[Judge] = []

    def make() -> tuple[str, frozenset[Label], bool]:
        own.append(make_judge(settings.judge, device=device, language=settings.language))
        return own[0].name, own[0].labels, getattr(own[0], "harmful_only", False)

    # Of several processes the first alone judges, so that a classifier is in memory once.
    told = from_first(make)
    judge: Judge = own[0] if own else _Elsewhere(*told)
    if settings.judge == "phrases":
        judge = PhraseJudge(settings.language)
    if settings.calibration is None:
        return judge, {}
    return judge, load_calibration(Path(settings.calibration), judge).accuracies


def _parsed(content: bytes, name: str) -> LabelledAnswers:
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise JudgeError(
                f"The line {number} of {name} is no JSON ({error}), expected an object with prompt, answer and label; "
                "correct it."
            ) from error
        rows.append(LabelledAnswer.of(data, f"in line {number} of {name}", error=JudgeError))
    if not rows:
        raise JudgeError(f"The file {name} has 0 labelled answers, expected at least 1; add some.")
    return LabelledAnswers(name, tuple(rows), hashlib.sha256(content).hexdigest())
