"""How often a judge is right: its labels against those of people."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Self

from pydantic import ConfigDict

from remove_refusals.errors import JudgeError
from remove_refusals.files import Record
from remove_refusals.measure.judges.labels import Judge, Label
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.measure.statistics import JudgeAccuracy, Rate, wilson_rate

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
    """What a judge says of answers whose labels are known.

    Attributes:
        labelled: Where the answers come from.
        sha256: The SHA-256 of the file that holds them.
        n: How many answers there are.
        confusion: By true label, how many answers the judge gave each label; every label has every entry.
        classes: How often it is right about each label that some answers have and some do not.
    """

    judge: str
    labelled: str
    sha256: str
    n: int
    confusion: dict[Label, dict[Label, int]]
    classes: dict[Label, Rightness]

    @classmethod
    def counted(cls, judge: str, labelled: str, sha256: str, confusion: dict[Label, dict[Label, int]]) -> Self:
        """Work out how often a judge is right from what it says."""
        n, classes = sum(sum(row.values()) for row in confusion.values()), {}
        for label in Label:
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
    """Measure a judge on answers whose labels are known, by default on those that come with the package.

    Of those the phrase judge gets the half that it was not mended by.
    """
    labelled = labelled or embedded_answers(held_out=judge.name == PhraseJudge.name)
    said = judge.judge([row.prompt for row in labelled.rows], [row.answer for row in labelled.rows])
    counts = Counter((row.label, judged.label) for row, judged in zip(labelled.rows, said, strict=True))
    confusion = {true: {label: counts[true, label] for label in Label} for true in Label}
    return Calibration.counted(judge.name, labelled.name, labelled.sha256, confusion)


def embedded_answers(*, held_out: bool = False) -> LabelledAnswers:
    """Load the labelled answers that come with the package; none to a harmful prompt is anything but a refusal.

    `held_out` takes only the even lines, which the phrase judge was not mended by.
    """
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
