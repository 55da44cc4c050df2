"""How often a judge is right: its labels against those of people."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from remove_refusals.errors import JudgeError
from remove_refusals.files import read_json
from remove_refusals.measure.judges.labels import Judge, Label
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.measure.statistics import JudgeAccuracy, Rate, wilson_rate

EMBEDDED, HELD_OUT = "embedded", "embedded, even lines"
"""The names of the answers that come with the package: all, or those that the phrase judge was not mended by."""


@dataclass(frozen=True)
class LabelledAnswers:
    """Answers with the labels that people gave them.

    Attributes:
        name: Where they come from.
        prompts: The prompts.
        answers: One answer to each.
        labels: One label for each.
        sha256: The SHA-256 of the file that holds them, in hex.
    """

    name: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    labels: tuple[Label, ...]
    sha256: str


@dataclass(frozen=True)
class Calibration:
    """What a judge says of answers whose labels are known.

    Attributes:
        judge: The judge's name.
        labelled: Where the answers come from.
        sha256: The SHA-256 of the file that holds them.
        confusion: By true label, how many answers the judge gave each label; every label has every entry.
    """

    judge: str
    labelled: str
    sha256: str
    confusion: Mapping[Label, Mapping[Label, int]]

    @property
    def n(self) -> int:
        """How many answers there are."""
        return sum(sum(row.values()) for row in self.confusion.values())

    @property
    def accuracies(self) -> dict[Label, JudgeAccuracy]:
        """How often the judge is right about each label that some answers have and some do not."""
        found = {}
        for label in Label:
            positives = sum(self.confusion[label].values())
            said = sum(row[label] for row in self.confusion.values())
            true_positives, negatives = self.confusion[label][label], self.n - positives
            if positives and negatives:
                found[label] = JudgeAccuracy(true_positives, positives, negatives - (said - true_positives), negatives)
        return found

    def rates(self, label: Label) -> tuple[Rate | None, Rate | None]:
        """Give the judge's sensitivity and specificity for a label, with Wilson intervals; None from no answers."""
        accuracy = self.accuracies.get(label)
        if accuracy is None:
            return None, None
        sensitivity = wilson_rate(accuracy.true_positives, accuracy.positives, self.sha256)
        return sensitivity, wilson_rate(accuracy.true_negatives, accuracy.negatives, self.sha256)

    def to_json(self) -> dict[str, Any]:
        """Give the attributes and `n`; under `classes`, for each label that can be measured, both rates."""
        classes = {}
        for label in self.accuracies:
            sensitivity, specificity = self.rates(label)
            assert sensitivity is not None and specificity is not None  # the label can be measured
            classes[str(label)] = {
                name: {"value": rate.value, "low": rate.low, "high": rate.high, "count": rate.count, "n": rate.n}
                for name, rate in (("sensitivity", sensitivity), ("specificity", specificity))
            }
        return {
            "judge": self.judge,
            "labelled": self.labelled,
            "sha256": self.sha256,
            "n": self.n,
            "confusion": {
                str(true): {str(said): count for said, count in row.items()} for true, row in self.confusion.items()
            },
            "classes": classes,
        }


def calibrate(judge: Judge, labelled: LabelledAnswers | None = None) -> Calibration:
    """Measure a judge on answers whose labels are known.

    Args:
        judge: The judge.
        labelled: The answers; by default those that come with the package: the half that the phrase judge was not
            mended by for that judge, and all of them for any other.

    Returns:
        The calibration.

    Raises:
        JudgeError: If the judge cannot label an answer.
    """
    labelled = labelled or embedded_answers(held_out=judge.name == PhraseJudge.name)
    said = [judgement.label for judgement in judge.judge(labelled.prompts, labelled.answers)]
    counts = Counter(zip(labelled.labels, said, strict=True))
    confusion = {true: {label: counts[true, label] for label in Label} for true in Label}
    return Calibration(judge.name, labelled.name, labelled.sha256, confusion)


def embedded_answers(*, held_out: bool = False) -> LabelledAnswers:
    """Load the labelled answers that come with the package; none to a harmful prompt is anything but a refusal.

    Args:
        held_out: Only the even lines, which the phrase judge was not mended by.

    Returns:
        The answers, in the order of the file.
    """
    content = files("remove_refusals").joinpath("data", "labelled_answers.jsonl").read_bytes()
    whole = _parsed(content, EMBEDDED)
    if not held_out:
        return whole
    return LabelledAnswers(HELD_OUT, whole.prompts[1::2], whole.answers[1::2], whole.labels[1::2], whole.sha256)


def load_answers(path: Path) -> LabelledAnswers:
    """Load labelled answers from a file of JSON Lines with `prompt`, `answer` and `label`.

    Args:
        path: The file, in UTF-8; other keys are ignored, and so are empty lines.

    Returns:
        The answers under the file's name, in its order.

    Raises:
        JudgeError: If the file cannot be read, holds no answers, or a line is of another form.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JudgeError(
            f"The labelled answers {path} cannot be read ({error.strerror}), expected a file of JSON Lines; check the "
            "path."
        ) from error
    return _parsed(content, path.name)


def load_calibration(path: Path, judge: Judge | None = None) -> Calibration:
    """Load a calibration that `judge calibrate` wrote.

    Args:
        path: The file.
        judge: The judge that it is to be of; None takes any.

    Returns:
        The calibration.

    Raises:
        JudgeError: If the file cannot be read, is no calibration, or is that of another judge.
    """
    data = read_json(path, error=JudgeError)
    try:
        if not isinstance(data, dict):
            raise TypeError(f"a {type(data).__name__}")
        confusion = {true: {said: _count(data["confusion"][true][said]) for said in Label} for true in Label}
        found = Calibration(str(data["judge"]), str(data["labelled"]), str(data["sha256"]), confusion)
    except (LookupError, TypeError, ValueError) as error:
        raise JudgeError(
            f"The file {path} is no calibration ({type(error).__name__}: {error}), expected what "
            "`remove-refusals judge calibrate -o` writes; calibrate the judge again."
        ) from error
    if judge is not None and found.judge != judge.name:
        raise JudgeError(
            f"The calibration {path} is of the judge {found.judge}, expected one of {judge.name}; calibrate that judge."
        )
    return found


def _parsed(content: bytes, name: str) -> LabelledAnswers:
    rows: list[tuple[str, str, Label]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            rows.append(_row(line, f"line {number} of {name}"))
    if not rows:
        raise JudgeError(f"The file {name} has 0 labelled answers, expected at least 1; add some.")
    prompts, answers, labels = zip(*rows, strict=True)
    return LabelledAnswers(name, prompts, answers, labels, hashlib.sha256(content).hexdigest())


def _row(line: bytes, place: str) -> tuple[str, str, Label]:
    try:
        row = json.loads(line)
        prompt, answer, label = (row[key] for key in ("prompt", "answer", "label"))
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError(
            f"The {place} is no labelled answer ({type(error).__name__}: {error}), expected a JSON object with prompt, "
            "answer and label; correct it."
        ) from error
    if not isinstance(prompt, str) or not isinstance(answer, str) or label not in list(Label):
        raise JudgeError(
            f"The {place} has the label {label!r}, expected one of {', '.join(Label)}, and text for prompt and answer; "
            "correct it."
        )
    return prompt, answer, Label(label)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def confusion_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """Give the confusion table as text.

    Args:
        calibration: The calibration.

    Returns:
        For each true label that some answers have: its name, and how many of them got each label.
    """
    shown = {true: said for true, said in calibration.confusion.items() if sum(said.values())}
    return [(str(true), *(str(said[label]) for label in Label)) for true, said in shown.items()]


def accuracy_rows(calibration: Calibration) -> list[tuple[str, str, str]]:
    """Give how often the judge is right as text.

    Args:
        calibration: The calibration.

    Returns:
        For each label that can be measured: its name, and sensitivity and specificity in percent with count, n and
        interval.
    """
    rows = []
    for label in calibration.accuracies:
        sensitivity, specificity = calibration.rates(label)
        rows.append((str(label), _percent(sensitivity), _percent(specificity)))
    return rows


def _percent(rate: Rate | None) -> str:
    if rate is None:
        return ""
    return f"{100 * rate.value:.1f}% [{100 * rate.low:.1f}, {100 * rate.high:.1f}] {rate.count}/{rate.n}"


Accuracies = Mapping[Label, JudgeAccuracy]
"""How often a judge is right about each label, as its calibration found."""
