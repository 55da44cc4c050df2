"""Any number of models measured on the same prompts, in one table, and which of their differences are real."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from remove_refusals.errors import PromptError
from remove_refusals.files import Record
from remove_refusals.measure.judges import Label
from remove_refusals.measure.scores import Agreement, Distances, Evaluation, Perplexities, Which
from remove_refusals.measure.statistics import Difference, Rate, holm, paired_rates, verdict, wilson_rate
from remove_refusals.types import PromptSet

BASE = "base"

Key = tuple[str, str]
"""The name of a prompt set and a prompt's id."""

Labels = Mapping[Key, Label]
"""What the judge called one model's answer to each prompt."""


class RateDifference(Difference):
    """The second model's rate of a label less the first's; the p-value is corrected for all of the table (Holm)."""

    first: str
    second: str
    prompt_set: str
    label: Label
    adjusted_p: float


class LabelRates(Record):
    """How often each model's answers to one prompt set got a label."""

    set: str
    label: Label
    models: dict[str, Rate]


class Damage(Record):
    """What was measured of the damage that one model took, as in its `scores.json`; how its answers match, by set."""

    kl: Distances | None = None
    perplexity: Perplexities | None = None
    agreement: Agreement | None = None
    match: dict[str, Rate] | None = None


class SideBySide(Record):
    """Models in one table, the base first; every pair of them compared on every set."""

    models: tuple[str, ...]
    judge: str
    rates: tuple[LabelRates, ...]
    damage: dict[str, Damage]
    differences: tuple[RateDifference, ...]


def side_by_side(directories: Sequence[Path]) -> SideBySide:
    """Put models into one table, from what `run` and `evaluate` leave: one base model, measured in the same way."""
    names = _names(directories)
    read = [Evaluation.load(directory, error=PromptError) for directory in directories]
    labels = [_labels(each, directory) for each, directory in zip(read, directories, strict=True)]
    for (other, _), directory in zip(labels[1:], directories[1:], strict=True):
        _check_alike(labels[0][0], other, directories[0], directory)
    judges = {each.settings.judge for each in read}
    if len(judges) > 1:
        raise PromptError(
            f"The answers were labelled by different judges ({', '.join(sorted(judges))}), expected one; evaluate "
            "again with the same --judge."
        )
    models = {BASE: labels[0][0], **{name: edited for name, (_, edited) in zip(names, labels, strict=True)}}
    # What was not judged of any model is compared of none.
    left_out = {key for own in models.values() for key, label in own.items() if label is Label.UNJUDGED}
    models = {name: {key: label for key, label in own.items() if key not in left_out} for name, own in models.items()}
    texts, counted = {(row.set, row.prompt_id): row.prompt for row in read[0].rows}, _counted(models)
    return SideBySide(
        models=tuple(models),
        judge=judges.pop(),
        rates=tuple(
            LabelRates(
                set=name, label=label, models={model: _rate(own, name, label, texts) for model, own in models.items()}
            )
            for name, label in counted
        ),
        damage={
            name: Damage(kl=each.kl, perplexity=each.perplexity, agreement=each.agreement, match=_matches(each))
            for name, each in zip(names, read, strict=True)
        },
        differences=_differences(models, counted),
    )


def _names(directories: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or the paths where two are the same or one is called like the base."""
    names = [directory.resolve().name for directory in directories]
    if len({BASE, *names}) <= len(names):
        names = [str(directory.resolve()) for directory in directories]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PromptError(f"The directory {twice} is named twice, expected different ones; name it once.")
    return names


def _matches(evaluation: Evaluation) -> dict[str, Rate] | None:
    """Give how many of the edited model's answers match, by set; None where that was not counted."""
    rates = ((name, (scores.match or {}).get("edited")) for name, scores in evaluation.sets.items())
    return {name: rate for name, rate in rates if rate is not None} or None


def _labels(evaluation: Evaluation, directory: Path) -> tuple[Labels, Labels]:
    """Give the labels of the base's answers and of the edited model's."""
    labels: dict[Which, dict[Key, Label]] = {"base": {}, "edited": {}}
    for row in evaluation.rows:
        labels[row.model][row.set, row.prompt_id] = row.label
    if not evaluation.rows or labels["base"].keys() != labels["edited"].keys():
        raise PromptError(
            f"The file {directory / 'rows.jsonl'} does not hold one answer of each model to each prompt, expected as "
            "many of base as of edited; evaluate the model again."
        )
    return labels["base"], labels["edited"]


def _check_alike(first: Labels, second: Labels, where: Path, other: Path) -> None:
    if first.keys() != second.keys():
        raise PromptError(
            f"The prompts of {where} and {other} differ in {len(first.keys() ^ second.keys())} places, expected the "
            "same; evaluate both with the same prompts."
        )
    differing = sum(first[key] is not second[key] for key in first)
    if differing:
        raise PromptError(
            f"The base models of {where} and {other} got different labels on {differing} of {len(first)} prompts, "
            "expected one base model, measured in the same way; evaluate both with the same base and settings."
        )


def _counted(models: Mapping[str, Labels]) -> list[tuple[str, Label]]:
    """Give what is counted: refusals of every set, and the other failures where any model has one."""
    sets = list(dict.fromkeys(name for name, _ in models[BASE]))
    there = {(name, label) for labels in models.values() for (name, _), label in labels.items()}
    there |= {(name, Label.REFUSAL) for name in sets}
    failures = (Label.REFUSAL, Label.MORALISING, Label.DEFLECTION, Label.DEGENERATE)
    return [(name, label) for label in failures for name in sets if (name, label) in there]


def _rate(labels: Labels, prompt_set: str, label: Label, texts: Mapping[Key, str]) -> Rate:
    keys = [key for key in labels if key[0] == prompt_set]
    sha = PromptSet(prompt_set, tuple(texts[key] for key in keys), "").sha256
    rate = wilson_rate(sum(labels[key] is label for key in keys), len(keys), sha)
    assert rate is not None  # the set has prompts
    return rate


def _differences(models: Mapping[str, Labels], counted: Sequence[tuple[str, Label]]) -> tuple[RateDifference, ...]:
    asked, found = [], []
    for name, label in counted:
        # In the order of the first model's prompts, so that pairs are pairs.
        keys = [key for key in models[BASE] if key[0] == name]
        flags = {model: [labels[key] is label for key in keys] for model, labels in models.items()}
        for first, second in itertools.combinations(flags, 2) if label is not Label.DEFLECTION else ():
            difference = paired_rates(flags[first], flags[second])
            assert difference is not None  # the set has prompts
            asked.append((first, second, name, label))
            found.append(difference)
    adjusted = holm([difference.test.p_value for difference in found])
    return tuple(
        RateDifference(
            **difference.model_dump(include={"value", "low", "high", "n"}),
            first=first,
            second=second,
            prompt_set=name,
            label=label,
            adjusted_p=p_value,
            verdict=verdict(difference.test, p_value),
        )
        for (first, second, name, label), difference, p_value in zip(asked, found, adjusted, strict=True)
    )
