"""What the base model does on the prompts of a search, and what a candidate does to that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remove_refusals.directions import ablated
from remove_refusals.measure import Label, distances_along, judge_phrases, mean_with_interval, wilson_rate
from remove_refusals.modelmap import ModelMap
from remove_refusals.models import Answer, LoadedModel, generate, render
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.candidates import Confirmation
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import Intervention, PromptSet


@dataclass(frozen=True, eq=False)
class References:
    """A model's own answers to prompts.

    Attributes:
        prompts: The prompts.
        token_ids: The rendered prompts.
        answers: The greedy answers.
        labels: What the phrase judge calls them.
    """

    prompts: PromptSet
    token_ids: tuple[tuple[int, ...], ...]
    answers: tuple[Answer, ...]
    labels: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def to_json(self) -> list[Any]:
        """Give all but the prompts."""
        labels = [str(label) for label in self.labels]
        return [self.token_ids, [answer.to_json() for answer in self.answers], labels]

    @staticmethod
    def from_json(prompts: PromptSet, record: Sequence[Any]) -> "References":
        """Read what `to_json` gave."""
        token_ids, answers, labels = record
        return References(
            prompts,
            tuple(tuple(ids) for ids in token_ids),
            tuple(Answer.from_json(answer) for answer in answers),
            tuple(Label(label) for label in labels),
        )

    def only(self, label: Label) -> "References":
        """Give the prompts whose answer has a label."""
        return self._at([index for index, own in enumerate(self.labels) if own is label])

    def first(self, n: int) -> "References":
        """Give the first prompts, at most `n` of them."""
        return self._at(range(min(n, len(self))))

    def _at(self, kept: Sequence[int]) -> "References":
        return References(
            PromptSet(self.prompts.name, tuple(self.prompts.prompts[i] for i in kept), self.prompts.source),
            tuple(self.token_ids[i] for i in kept),
            tuple(self.answers[i] for i in kept),
            tuple(self.labels[i] for i in kept),
        )


def references(
    loaded: LoadedModel,
    prompts: PromptSet,
    settings: MeasureSettings,
    *,
    progress: Progress = SILENT,
) -> References:
    """Let a model, as it stands, answer prompts greedily.

    Returns:
        Its answers with their labels.

    Raises:
        PromptError: If a prompt cannot be rendered.
        ModelError: If a prompt does not fit the model, or memory runs out.
        NumericalError: If logits are NaN.
    """
    token_ids = [tuple(ids) for ids in render(loaded, prompts.prompts)]
    answers = generate(loaded, token_ids, max_new_tokens=settings.max_new_tokens, progress=progress)
    labels = tuple(judge_phrases(answer.text, prompt) for answer, prompt in zip(answers, prompts.prompts, strict=True))
    return References(prompts, tuple(token_ids), tuple(answers), labels)


def confirm(
    loaded: LoadedModel,
    intervention: Intervention,
    model_map: ModelMap,
    harmful: References,
    harmless: References,
    settings: MeasureSettings,
    *,
    progress: Progress = SILENT,
) -> Confirmation:
    """Generate with an intervention and measure what it does, by hooks.

    Args:
        loaded: The base model.
        intervention: What to take out where.
        model_map: The model's map.
        harmful: The base model's answers to harmful prompts.
        harmless: Its answers to harmless prompts.
        settings: How to generate; as in `references`.
        progress: Told how many prompts are done.

    Returns:
        What was measured.

    Raises:
        As `references`; ArchitectureError if hooks cannot be exact on the model.
    """
    labels: list[list[Label]] = []
    with ablated(loaded.model, intervention, model_map=model_map):
        for part in (harmful, harmless):
            told = progress.after(sum(map(len, labels)))
            answers = generate(loaded, part.token_ids, max_new_tokens=settings.max_new_tokens, progress=told)
            pairs = zip(answers, part.prompts.prompts, strict=True)
            labels.append([judge_phrases(answer.text, prompt) for answer, prompt in pairs])
    answered = harmless.only(Label.COMPLIANCE)
    distances = distances_along(
        loaded,
        loaded,
        answered.token_ids,
        [answer.token_ids for answer in answered.answers],
        settings.kl_tokens,
        edited_context=lambda: ablated(loaded.model, intervention, model_map=model_map),
    )
    now = [label for label, before in zip(labels[1], harmless.labels, strict=True) if before is Label.COMPLIANCE]
    rates = [
        wilson_rate(found.count(label), len(found), part.prompts.sha256)
        for part, found in zip((harmful, harmless), labels, strict=True)
        for label in (Label.REFUSAL, Label.DEGENERATE)
    ]
    assert rates[0] is not None and rates[1] is not None and rates[2] is not None and rates[3] is not None
    means = [sum(distance.kl) / len(distance.kl) for distance in distances]
    return Confirmation(
        refusals=rates[0],
        degenerate=rates[1],
        false_refusals=rates[2],
        degenerate_harmless=rates[3],
        broken=wilson_rate(sum(label is not Label.COMPLIANCE for label in now), len(now), answered.prompts.sha256),
        damage=mean_with_interval(means, answered.prompts.sha256),
    )
