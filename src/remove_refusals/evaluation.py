"""Measure an edited model against its base on the same prompts."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from remove_refusals.chat_template import render
from remove_refusals.distances import Context, PromptDistance, distances_along
from remove_refusals.errors import ModelError
from remove_refusals.generation import Answer, generate
from remove_refusals.judges import Label, judge_phrases
from remove_refusals.metrics import mcnemar, mean_with_interval, perplexity, wilson_rate
from remove_refusals.models import LoadedModel
from remove_refusals.scores import (
    Distance,
    Evaluation,
    EvaluationSettings,
    PairedRate,
    Response,
    SetScores,
    warnings,
)
from remove_refusals.types import PromptSet

__all__ = ["Evaluation", "EvaluationPrompts", "EvaluationSettings", "evaluate", "warnings"]


@dataclass(frozen=True)
class EvaluationPrompts:
    """What to measure on.

    Attributes:
        harmful: Requests that the base model is expected to refuse.
        harmless: Requests of the same kind that are harmless.
        alarming: Requests that only sound harmful; None leaves them out.
    """

    harmful: PromptSet
    harmless: PromptSet
    alarming: PromptSet | None = None

    def by_name(self) -> dict[str, PromptSet]:
        """Give the sets that have prompts, under their names in the scores."""
        sets = {"harmful": self.harmful, "harmless": self.harmless, "alarming": self.alarming}
        return {name: prompts for name, prompts in sets.items() if prompts is not None and len(prompts)}


def evaluate(
    base: LoadedModel,
    edited: LoadedModel,
    prompts: EvaluationPrompts,
    settings: EvaluationSettings | None = None,
    *,
    edited_context: Context = nullcontext,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Let both models answer the same prompts greedily, label the answers, and compare the models along the base's.

    Both get the same token ids, rendered with the base model's tokenizer and chat template.

    Args:
        base: The base model.
        edited: The edited model; it may be the same one, with the edit in `edited_context`.
        prompts: The prompts.
        settings: How to measure; by default 100 tokens an answer and 32 for the KL.
        edited_context: Entered around every run of the edited model, for example `lambda: ablated(model, …)`.
        on_progress: Called with how many runs of a prompt are done, and of how many.

    Returns:
        The scores and every answer.

    Raises:
        ModelError: If vocabularies or tokenizers differ, a prompt does not fit a model, or memory runs out.
        NumericalError: If logits are NaN; the message names the prompt.
        PromptError: If a prompt cannot be rendered.
    """
    settings = settings or EvaluationSettings()
    _check(base, edited, settings)
    sets = prompts.by_name()
    token_ids = {name: render(base.tokenizer, part.prompts, **vars(settings.chat)) for name, part in sets.items()}
    n_harmless = len(token_ids.get("harmless", ()))
    progress = _Progress(on_progress, 2 * sum(map(len, token_ids.values())) + n_harmless)

    def answer(loaded: LoadedModel, ids: Sequence[Sequence[int]]) -> list[Answer]:
        limit, size = settings.max_new_tokens, settings.batch_size
        answers = generate(loaded, ids, max_new_tokens=limit, batch_size=size, on_progress=progress.within)
        progress.finish(len(ids))
        return answers

    base_answers = {name: answer(base, ids) for name, ids in token_ids.items()}
    with edited_context():
        edited_answers = {name: answer(edited, ids) for name, ids in token_ids.items()}
    rows: list[Response] = []
    scores: dict[str, SetScores] = {}
    for name, part in sets.items():
        of_base = _responses(name, part, "base", base_answers[name])
        of_edited = _responses(name, part, "edited", edited_answers[name])
        scores[name] = _score(part, of_base, of_edited)
        rows += of_base + of_edited
    distances = distances_along(
        base,
        edited,
        token_ids.get("harmless", []),
        [answer.token_ids for answer in base_answers.get("harmless", [])],
        settings.kl_tokens,
        edited_context=edited_context,
        batch_size=settings.batch_size,
        on_progress=progress.within,
    )
    refused = [row.label is Label.REFUSAL for row in rows if row.set_name == "harmless" and row.model == "base"]
    return _conclude(base, edited, settings, prompts.harmless, scores, distances, refused, rows)


def _conclude(
    base: LoadedModel,
    edited: LoadedModel,
    settings: EvaluationSettings,
    harmless: PromptSet,
    scores: dict[str, SetScores],
    distances: Sequence[PromptDistance],
    refused: Sequence[bool],
    rows: Sequence[Response],
) -> Evaluation:
    kept = [index for index, was_refused in enumerate(refused) if not was_refused]
    answered = PromptSet(harmless.name, tuple(harmless.prompts[index] for index in kept), harmless.source)
    along = [distances[index] for index in kept]
    counts = [len(distance.kl) for distance in along]
    sha, seed = answered.sha256, settings.seed
    return Evaluation(
        base=base.source,
        edited=edited.source,
        settings=settings,
        sets=scores,
        distance=_distance(distances, harmless, seed),
        distance_answered=_distance(along, answered, seed),
        base_perplexity=perplexity([distance.base_loss for distance in along], counts, sha, seed=seed),
        edited_perplexity=perplexity([distance.edited_loss for distance in along], counts, sha, seed=seed),
        rows=tuple(rows),
    )


def _check(base: LoadedModel, edited: LoadedModel, settings: EvaluationSettings) -> None:
    for name, value in (("max_new_tokens", settings.max_new_tokens), ("kl_tokens", settings.kl_tokens)):
        if value < 1:
            raise ModelError(f"The setting {name} is {value}, expected at least 1; raise it.")
    if base.vocabulary_size != edited.vocabulary_size:
        raise ModelError(
            f"The base model {base.source} has {base.vocabulary_size} tokens and the edited model {edited.source} has "
            f"{edited.vocabulary_size}, expected the same vocabulary; compare a model with an edit of itself."
        )
    if base.tokenizer is not edited.tokenizer and base.tokenizer.get_vocab() != edited.tokenizer.get_vocab():
        raise ModelError(
            f"The tokenizers of {base.source} and {edited.source} give tokens different ids, expected the same "
            "tokenizer; compare a model with an edit of itself."
        )


def _responses(set_name: str, prompts: PromptSet, model: str, answers: Sequence[Answer]) -> list[Response]:
    return [
        Response(
            set_name=set_name,
            prompt_id=hashlib.sha256(prompt.encode()).hexdigest()[:16],
            prompt=prompt,
            model=model,
            text=answer.text,
            label=judge_phrases(answer.text),
            n_tokens=len(answer.token_ids),
            finished=answer.finished,
        )
        for prompt, answer in zip(prompts.prompts, answers, strict=True)
    ]


def _score(prompts: PromptSet, base: Sequence[Response], edited: Sequence[Response]) -> SetScores:
    def paired(label: Label) -> PairedRate:
        first, second = ([row.label is label for row in rows] for rows in (base, edited))
        rates = [wilson_rate(sum(flags), len(flags), prompts.sha256) for flags in (first, second)]
        test = mcnemar(first, second)
        assert rates[0] is not None and rates[1] is not None and test is not None  # the set has prompts
        return PairedRate(rates[0], rates[1], test)

    return SetScores(paired(Label.REFUSAL), paired(Label.DEGENERATE))


def _distance(distances: Sequence[PromptDistance], prompts: PromptSet, seed: int) -> Distance | None:
    first = mean_with_interval([distance.kl[0] for distance in distances], prompts.sha256, seed=seed)
    means = [sum(distance.kl) / len(distance.kl) for distance in distances]
    mean = mean_with_interval(means, prompts.sha256, seed=seed)
    return None if first is None or mean is None else Distance(first, mean)


class _Progress:
    """Counts the runs of a prompt over several stages."""

    def __init__(self, report: Callable[[int, int], None] | None, total: int) -> None:
        self.report, self.total, self.before = report, total, 0

    def within(self, done: int) -> None:
        """Report that so many runs of the current stage are done."""
        if self.report is not None:
            self.report(self.before + done, self.total)

    def finish(self, count: int) -> None:
        """End a stage of so many runs."""
        self.before += count
