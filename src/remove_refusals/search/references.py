"""What the base model does on the prompts of a search, and what a candidate does to that."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from remove_refusals.directions import ablated
from remove_refusals.files import Journal
from remove_refusals.measure import Label, Rate, distances_along, judge_phrases, mean_with_interval, wilson_rate
from remove_refusals.models import Answer, LoadedModel, generate, render
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.candidates import Confirmation
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import Intervention, PromptSet


@dataclass(frozen=True, eq=False)
class References:
    """A model's own greedy answers to rendered prompts, and what the phrase judge calls them."""

    prompts: PromptSet
    token_ids: tuple[tuple[int, ...], ...]
    answers: tuple[Answer, ...]
    labels: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.prompts)

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
    max_new_tokens: int,
    journal: Journal | None = None,
    progress: Progress = SILENT,
) -> References:
    """Let a model, as it stands, answer prompts greedily."""
    name = f"own answers, {prompts.name}"
    token_ids = tuple(tuple(ids) for ids in render(loaded, prompts.prompts))
    progress = progress.stage(name, len(prompts))
    answers = (journal or Journal()).remember(
        name,
        [token_ids, max_new_tokens],
        partial(generate, loaded, token_ids, max_new_tokens=max_new_tokens, progress=progress),
        lambda answers: [answer.to_json() for answer in answers],
        lambda record: [Answer.model_validate(answer) for answer in record],
    )
    return labelled(prompts, token_ids, answers)


def labelled(prompts: PromptSet, token_ids: Sequence[tuple[int, ...]], answers: Sequence[Answer]) -> References:
    """Put prompts and answers together with the labels of the phrase judge."""
    labels = tuple(judge_phrases(answer.text, prompt) for answer, prompt in zip(answers, prompts.prompts, strict=True))
    return References(prompts, tuple(token_ids), tuple(answers), labels)


def confirm(
    loaded: LoadedModel,
    intervention: Intervention,
    harmful: References,
    harmless: References,
    settings: MeasureSettings,
    progress: Progress = SILENT,
) -> Confirmation:
    """Generate with an intervention and measure, by hooks, what it does to the base model's own answers."""

    def edited() -> AbstractContextManager[None]:
        return ablated(loaded, intervention)

    now: list[References] = []
    with edited():
        for part in (harmful, harmless):
            told = progress.after(sum(map(len, now)))
            answers = generate(loaded, part.token_ids, max_new_tokens=settings.max_new_tokens, progress=told)
            now.append(labelled(part.prompts, part.token_ids, answers))
    answered = harmless.only(Label.COMPLIANCE)
    distances = distances_along(
        loaded,
        loaded,
        answered.token_ids,
        [answer.token_ids for answer in answered.answers],
        settings.kl_tokens,
        edited_context=edited,
    )
    kept = [label for label, before in zip(now[1].labels, harmless.labels, strict=True) if before is Label.COMPLIANCE]
    sha = answered.prompts.sha256
    return Confirmation(
        refusals=_rate(now[0], Label.REFUSAL),
        degenerate=_rate(now[0], Label.DEGENERATE),
        false_refusals=_rate(now[1], Label.REFUSAL),
        degenerate_harmless=_rate(now[1], Label.DEGENERATE),
        broken=wilson_rate(sum(label is not Label.COMPLIANCE for label in kept), len(kept), sha),
        damage=mean_with_interval([sum(distance.kl) / len(distance.kl) for distance in distances], sha),
    )


def _rate(part: References, label: Label) -> Rate:
    rate = wilson_rate(part.labels.count(label), len(part), part.prompts.sha256)
    assert rate is not None
    return rate
