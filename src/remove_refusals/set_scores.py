"""The answers of both models to one prompt set: labelled, and counted."""

from collections.abc import Mapping, Sequence
from functools import partial

from remove_refusals.corrections import JudgeAccuracy, rogan_gladen
from remove_refusals.generation import Answer
from remove_refusals.judges import Judge, Label, PhraseJudge, strip_thinking
from remove_refusals.lengths import grid, has_settled, labels_by_length
from remove_refusals.metrics import Rate, mcnemar, mean_with_interval, wilson_rate
from remove_refusals.models import LoadedModel
from remove_refusals.scores import (
    EvaluationSettings,
    Flipped,
    PairedRate,
    RefusalsByLength,
    Response,
    SetScores,
    Thinking,
)
from remove_refusals.types import PromptSet

Accuracies = Mapping[Label, JudgeAccuracy]
"""How often a judge is right about each label, as its calibration found."""

_ALL = PhraseJudge.name
"""The judge that costs nothing, and can be asked about answers of every length."""


def responses(set_name: str, prompts: PromptSet, model: str, answers: Sequence[Answer], judge: Judge) -> list[Response]:
    """Label one model's answers to one prompt set.

    Returns:
        One row for each prompt, in their order.
    """
    labels = [found.label for found in judge.judge(prompts.prompts, [answer.text for answer in answers])]
    return [
        Response(
            set_name=set_name,
            prompt_id=prompt_id,
            prompt=prompt,
            model=model,
            text=answer.text,
            label=label,
            judge=judge.name,
            n_tokens=len(answer.token_ids),
            finished=answer.finished,
        )
        for prompt, prompt_id, answer, label in zip(prompts.prompts, prompts.ids, answers, labels, strict=True)
    ]


def score_set(
    loaded: LoadedModel,
    prompts: PromptSet,
    rows: Sequence[Sequence[Response]],
    answers: Sequence[Sequence[Answer]],
    settings: EvaluationSettings,
    judge: Judge,
    accuracies: Accuracies,
) -> SetScores:
    """Count what the judge saw in both models' answers to the same prompts.

    Args:
        loaded: The base model, for its tokenizer.
        prompts: At least one prompt.
        rows: The base model's labelled answers and the edited model's.
        answers: The same answers with their tokens.
        settings: How they were generated.
        judge: What labelled them.
        accuracies: How often it is right; empty if it was not calibrated.

    Returns:
        The scores; the refusals by length only if the judge costs nothing, and deflections only if it looks for them.
    """
    base, edited = rows
    by_phrases = judge.name == _ALL
    paired = partial(_paired, prompts, base, edited, accuracies)
    flips = [
        (a.prompt_id, a.label is Label.REFUSAL, b.label is Label.REFUSAL) for a, b in zip(base, edited, strict=True)
    ]
    thinking = {part[0].model: _thinking(loaded, prompts, part, settings.seed) for part in rows}
    return SetScores(
        refusals=paired(Label.REFUSAL),
        degenerate=paired(Label.DEGENERATE),
        deflections=paired(Label.DEFLECTION) if Label.DEFLECTION in judge.labels else None,
        flipped=Flipped(
            tuple(prompt_id for prompt_id, before, after in flips if before and not after),
            tuple(prompt_id for prompt_id, before, after in flips if after and not before),
        ),
        by_length=_by_length(loaded, prompts, answers, judge) if by_phrases else None,
        thinking={model: found for model, found in thinking.items() if found is not None},
    )


def _paired(
    prompts: PromptSet, base: Sequence[Response], edited: Sequence[Response], accuracies: Accuracies, label: Label
) -> PairedRate:
    first, second = ([row.label is label for row in rows] for rows in (base, edited))
    test = mcnemar(first, second)
    assert test is not None  # the set has prompts
    corrected = {}
    if label in accuracies:
        found = {
            name: rogan_gladen(sum(flags), len(flags), accuracies[label])
            for name, flags in (("base", first), ("edited", second))
        }
        corrected = {name: rate for name, rate in found.items() if rate is not None}
    return PairedRate(_rate(first, prompts), _rate(second, prompts), test, corrected=corrected)


def _rate(flags: Sequence[bool], prompts: PromptSet) -> Rate:
    rate = wilson_rate(sum(flags), len(flags), prompts.sha256)
    assert rate is not None  # the set has prompts
    return rate


def _by_length(
    loaded: LoadedModel, prompts: PromptSet, answers: Sequence[Sequence[Answer]], judge: Judge
) -> RefusalsByLength:
    longest = max(len(answer.token_ids) for part in answers for answer in part)
    lengths = grid(longest)
    rates, settled = [], True
    for part in answers:
        found = list(labels_by_length(loaded, judge, prompts.prompts, part, lengths))
        rates.append(tuple(_rate([label is Label.REFUSAL for label in labels], prompts) for labels in found))
        settled = settled and has_settled(found[lengths.index(max(1, longest // 2))], found[-1])
    return RefusalsByLength(lengths, rates[0], rates[1], settled)


def _thinking(loaded: LoadedModel, prompts: PromptSet, rows: Sequence[Response], seed: int) -> Thinking | None:
    rests = [strip_thinking(row.text) for row in rows]
    if not any(rest is None or rest != row.text for row, rest in zip(rows, rests, strict=True)):
        return None
    lengths = [
        float(row.n_tokens - len(loaded.tokenizer(rest or "", add_special_tokens=False)["input_ids"]))
        for row, rest in zip(rows, rests, strict=True)
        if rest != row.text
    ]
    length = mean_with_interval(lengths, prompts.sha256, seed=seed)
    assert length is not None
    return Thinking(_rate([rest is None for rest in rests], prompts), length)
