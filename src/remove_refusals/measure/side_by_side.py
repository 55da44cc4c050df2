"""Any number of models measured on the same prompts, in one table, and which of their differences are real."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remove_refusals.errors import PromptError
from remove_refusals.files import Record
from remove_refusals.measure.judges.labels import Label
from remove_refusals.measure.scores import Agreement, Distances, Evaluation, Perplexities, Which
from remove_refusals.measure.statistics import Rate, Verdict, holm, paired_rates, verdict, wilson_rate
from remove_refusals.types import PromptSet

BASE = "base"


Key = tuple[str, str]
"""The name of a prompt set and a prompt's id."""


class Difference(Record):
    """The second model's rate of a label less the first's, with Newcombe's interval.

    The p-value is that of the exact McNemar test after Holm's correction for all comparisons of the table.
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


class LabelRates(Record):
    """How often each model's answers to one prompt set got a label."""

    set: str
    label: Label
    models: dict[str, Rate]


class Damage(Record):
    """What was measured of the damage that one model took, as in its `scores.json`."""

    kl: Distances | None = None
    perplexity: Perplexities | None = None
    agreement: Agreement | None = None


class SideBySide(Record):
    """Models in one table, the base first; every pair of them compared on every set."""

    models: tuple[str, ...]
    judge: str
    rates: tuple[LabelRates, ...]
    damage: dict[str, Damage]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class _Measured:
    """What the judge called one model's answer to each prompt."""

    name: str
    labels: Mapping[Key, Label]


def side_by_side(directories: Sequence[Path]) -> SideBySide:
    """Put models into one table, from what `run` and `evaluate` leave: one base model, measured in the same way."""
    names = _names(directories)
    read = [Evaluation.load(directory, error=PromptError) for directory in directories]
    bases, edited = (
        [_measured(*each, which) for each in zip(read, names, directories, strict=True)] for which in ("base", "edited")
    )
    for other, directory in zip(bases[1:], directories[1:], strict=True):
        _check_alike(bases[0], other, directories[0], directory)
    judges = {each.settings.judge for each in read}
    if len(judges) > 1:
        raise PromptError(
            f"The answers were labelled by different judges ({', '.join(sorted(judges))}), expected one; evaluate "
            "again with the same --judge."
        )
    models, texts = [bases[0], *edited], {(row.set, row.prompt_id): row.prompt for row in read[0].rows}
    counted = _counted(models)
    rates = [
        LabelRates(set=name, label=label, models={model.name: _rate(model, name, label, texts) for model in models})
        for name, label in counted
    ]
    return SideBySide(
        models=tuple(model.name for model in models),
        judge=judges.pop(),
        rates=tuple(rates),
        damage={
            name: Damage(kl=each.kl, perplexity=each.perplexity, agreement=each.agreement)
            for name, each in zip(names, read, strict=True)
        },
        differences=_differences(models, counted),
    )


def _names(directories: Sequence[Path]) -> list[str]:
    """The last parts of the paths, with more of them where two are the same."""
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PromptError(f"The directory {twice} is named twice, expected different ones; name it once.")
    return names


def _measured(evaluation: Evaluation, name: str, directory: Path, which: Which) -> _Measured:
    labels: dict[Which, dict[Key, Label]] = {"base": {}, "edited": {}}
    for row in evaluation.rows:
        labels[row.model][row.set, row.prompt_id] = row.label
    if not evaluation.rows or labels["base"].keys() != labels["edited"].keys():
        raise PromptError(
            f"The file {directory / 'rows.jsonl'} does not hold one answer of each model to each prompt, expected as "
            "many of base as of edited; evaluate the model again."
        )
    return _Measured(BASE if which == "base" else name, labels[which])


def _check_alike(first: _Measured, second: _Measured, where: Path, other: Path) -> None:
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


def _counted(models: Sequence[_Measured]) -> list[tuple[str, Label]]:
    """Give what is counted: refusals of every set, and the other failures where any model has one."""
    sets = list(dict.fromkeys(name for name, _ in models[0].labels))
    there = {(name, label) for model in models for (name, _), label in model.labels.items()}
    there |= {(name, Label.REFUSAL) for name in sets}
    failures = (Label.REFUSAL, Label.DEFLECTION, Label.DEGENERATE)
    return [(name, label) for label in failures for name in sets if (name, label) in there]


def _rate(model: _Measured, prompt_set: str, label: Label, texts: Mapping[Key, str]) -> Rate:
    found = [own is label for (name, _), own in model.labels.items() if name == prompt_set]
    prompts = tuple(texts[key] for key in model.labels if key[0] == prompt_set)
    rate = wilson_rate(sum(found), len(found), PromptSet(prompt_set, prompts, "").sha256)
    assert rate is not None  # the set has prompts
    return rate


def _differences(models: Sequence[_Measured], counted: Sequence[tuple[str, Label]]) -> tuple[Difference, ...]:
    asked, found = [], []
    for name, label in counted:
        # In the order of the first model's prompts, so that pairs are pairs.
        keys = [key for key in models[0].labels if key[0] == name]
        flags = {model.name: [model.labels[key] is label for key in keys] for model in models}
        for first, second in itertools.combinations(flags, 2) if label is not Label.DEFLECTION else ():
            difference = paired_rates(flags[first], flags[second])
            assert difference is not None  # the set has prompts
            asked.append((first, second, name, label))
            found.append(difference)
    adjusted = holm([difference.test.p_value for difference in found])
    return tuple(
        Difference(
            first=first,
            second=second,
            prompt_set=name,
            label=label,
            value=difference.value,
            low=difference.low,
            high=difference.high,
            adjusted_p=p_value,
            verdict=verdict(difference.test, p_value),
        )
        for (first, second, name, label), difference, p_value in zip(asked, found, adjusted, strict=True)
    )
