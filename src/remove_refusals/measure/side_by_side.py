"""Any number of models measured on the same prompts, in one table, and which of their differences are real."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remove_refusals.errors import PromptError
from remove_refusals.files import read_json
from remove_refusals.measure.judges.labels import Label
from remove_refusals.measure.statistics import Rate, Verdict, holm, paired_rates, verdict, wilson_rate
from remove_refusals.types import PromptSet

BASE = "base"


Key = tuple[str, str]
"""The name of a prompt set and a prompt's hash."""


@dataclass(frozen=True)
class Measured:
    """One model's answers, from its records.

    Attributes:
        name: The directory's name, or `base`.
        labels: For each prompt what the judge called the answer.
        prompts: The prompts by the same keys.
        scores: The content of `scores.json`; empty for the base.
    """

    name: str
    labels: Mapping[Key, Label]
    prompts: Mapping[Key, str]
    scores: Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One comparison of two models.

    Attributes:
        first: A model.
        second: Another.
        prompt_set: The prompt set.
        label: The label whose rates are compared.
        value: The second's rate less the first's.
        low: The lower end of Newcombe's interval.
        high: The upper end.
        adjusted_p: The p-value of the exact McNemar test after Holm's correction for all comparisons of the table.
        verdict: Whether the second's rate is higher or lower, or the data cannot say.
    """

    first: str
    second: str
    prompt_set: str
    label: Label
    value: float
    low: float
    high: float
    adjusted_p: float
    verdict: Verdict


@dataclass(frozen=True)
class SideBySide:
    """Models in one table.

    Attributes:
        models: Their names, the base first.
        rates: By prompt set and label, a rate for each model.
        damage: For each model but the base, what was measured of its damage, as in `scores.json`: `kl`, `perplexity`,
            `agreement`.
        differences: Every pair of models on every set, for refusals and degenerate answers.
        judge: What labelled the answers.
    """

    models: tuple[str, ...]
    rates: dict[tuple[str, Label], tuple[Rate, ...]]
    damage: dict[str, dict[str, Any]]
    differences: tuple[Difference, ...]
    judge: str

    def to_json(self) -> dict[str, Any]:
        """Give the attributes; the rates as a list."""
        rates = [
            {
                "set": name,
                "label": str(label),
                "models": {model: rate.to_json() for model, rate in zip(self.models, rates, strict=True)},
            }
            for (name, label), rates in self.rates.items()
        ]
        differences = [asdict(one) | {"label": str(one.label), "verdict": str(one.verdict)} for one in self.differences]
        return {
            "models": list(self.models),
            "judge": self.judge,
            "rates": rates,
            "damage": self.damage,
            "differences": differences,
        }


def side_by_side(directories: Sequence[Path]) -> SideBySide:
    """Put models into one table, from the records that `run` and `evaluate` leave.

    Args:
        directories: Each with `scores.json` and `rows.jsonl`; all of one base model, measured on the same prompts in
            the same way.

    Returns:
        The table.

    Raises:
        PromptError: If records are missing or broken, or were not measured alike; the message says in what they differ.
    """
    names = _names(directories)
    read = [_read(directory, name) for directory, name in zip(directories, names, strict=True)]
    base = read[0][0]
    for (other, _), directory in zip(read[1:], directories[1:], strict=True):
        _check_alike(base, other, directories[0], directory)
    models = [base, *(edited for _, edited in read)]
    judges = {str(edited.scores["settings"]["judge"]) for _, edited in read}
    if len(judges) > 1:
        raise PromptError(
            f"The answers were labelled by different judges ({', '.join(sorted(judges))}), expected one; evaluate "
            "again with the same --judge."
        )
    counted = _counted(models)
    return SideBySide(
        models=tuple(model.name for model in models),
        rates={(name, label): tuple(_rate(model, name, label) for model in models) for name, label in counted},
        damage={
            model.name: {key: model.scores[key] for key in ("kl", "perplexity", "agreement") if key in model.scores}
            for model in models[1:]
        },
        differences=tuple(_differences(models, counted)),
        judge=judges.pop(),
    )


def _counted(models: Sequence[Measured]) -> list[tuple[str, Label]]:
    """Give what is counted: refusals of every set, and the other failures where any model has one."""
    sets = list(dict.fromkeys(name for name, _ in models[0].labels))
    there = {(name, label) for model in models for (name, _), label in model.labels.items()}
    there |= {(name, Label.REFUSAL) for name in sets}
    failures = (Label.REFUSAL, Label.DEFLECTION, Label.DEGENERATE)
    return [(name, label) for label in failures for name in sets if (name, label) in there]


def _names(directories: Sequence[Path]) -> list[str]:
    """The last parts of the paths, with more of them where two are the same."""
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PromptError(f"The directory {twice} is named twice, expected different ones; name it once.")
    return names


def _read(directory: Path, name: str) -> tuple[Measured, Measured]:
    """The base and the edited model of one directory."""
    scores = read_json(directory / "scores.json", error=PromptError)
    path = directory / "rows.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        labels: dict[str, dict[Key, Label]] = {BASE: {}, "edited": {}}
        prompts: dict[Key, str] = {}
        for row in rows:
            key = (row["set"], row["prompt_id"])
            labels[row["model"]][key] = Label(row["label"])
            prompts[key] = row["prompt"]
        assert isinstance(scores, dict)
        scores["settings"]["judge"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise PromptError(
            f"The records in {directory} cannot be read ({type(error).__name__}: {error}), expected scores.json and "
            "rows.jsonl as `run` or `evaluate -o DIR` leaves them; evaluate the model again."
        ) from error
    if not prompts or labels[BASE].keys() != labels["edited"].keys():
        raise PromptError(
            f"The file {path} does not hold one answer of each model to each prompt, expected as many of base as of "
            "edited; evaluate the model again."
        )
    return Measured(BASE, labels[BASE], prompts, {}), Measured(name, labels["edited"], prompts, scores)


def _check_alike(first: Measured, second: Measured, where: Path, other: Path) -> None:
    if first.labels.keys() != second.labels.keys():
        apart = len(first.labels.keys() ^ second.labels.keys())
        raise PromptError(
            f"The prompts of {where} and {other} differ in {apart} places, expected the same; evaluate both with the "
            "same prompts."
        )
    differing = sum(first.labels[key] is not second.labels[key] for key in first.labels)
    if differing:
        raise PromptError(
            f"The base models of {where} and {other} got different labels on {differing} of {len(first.labels)} "
            "prompts, expected one base model, measured in the same way; evaluate both with the same base and settings."
        )


def _flags(model: Measured, prompt_set: str, label: Label) -> list[bool]:
    return [found is label for (name, _), found in model.labels.items() if name == prompt_set]


def _rate(model: Measured, prompt_set: str, label: Label) -> Rate:
    flags = _flags(model, prompt_set, label)
    prompts = PromptSet(prompt_set, tuple(text for (name, _), text in model.prompts.items() if name == prompt_set), "")
    rate = wilson_rate(sum(flags), len(flags), prompts.sha256)
    assert rate is not None  # the set has prompts
    return rate


def _differences(models: Sequence[Measured], counted: Sequence[tuple[str, Label]]) -> Iterator[Difference]:
    asked = [
        (first, second, name, label)
        for name, label in counted
        if label in (Label.REFUSAL, Label.DEGENERATE)
        for first, second in itertools.combinations(models, 2)
    ]
    found = []
    for first, second, name, label in asked:
        # In the order of the first model's prompts, so that pairs are pairs.
        keys = [key for key in first.labels if key[0] == name]
        difference = paired_rates(
            [first.labels[key] is label for key in keys], [second.labels[key] is label for key in keys]
        )
        assert difference is not None  # the set has prompts
        found.append(difference)
    adjusted = holm([difference.test.p_value for difference in found])
    for (first, second, name, label), difference, p_value in zip(asked, found, adjusted, strict=True):
        yield Difference(
            first.name,
            second.name,
            name,
            label,
            difference.value,
            difference.low,
            difference.high,
            p_value,
            verdict(difference.test, p_value),
        )
