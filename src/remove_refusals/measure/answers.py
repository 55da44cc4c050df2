"""The prompts to measure on, and what a model answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass

from remove_refusals.errors import PromptError
from remove_refusals.files import Journal
from remove_refusals.measure.judges.labels import Judge, Label
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.measure.statistics import Rate, wilson_rate
from remove_refusals.models import Answer, LoadedModel, fingerprint, generate
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import check_disjoint, draw, prompts_from
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import PromptSet


@dataclass(frozen=True)
class EvaluationPrompts:
    """What to measure on: harmful requests, harmless ones, such as only sound harmful, and further harmless sets."""

    harmful: PromptSet
    harmless: PromptSet
    alarming: PromptSet | None = None
    more: tuple[PromptSet, ...] = ()

    def by_name(self) -> dict[str, PromptSet]:
        """Give the sets that have prompts, under their names in the scores."""
        sets = {"harmful": self.harmful, "harmless": self.harmless, "alarming": self.alarming}
        for part in self.more:
            if part.name in sets:
                raise PromptError(
                    f"A further prompt set is named '{part.name}', expected a name of its own; choose another."
                )
            sets[part.name] = part
        return {name: prompts for name, prompts in sets.items() if prompts is not None and len(prompts)}


def measuring_prompts(settings: MeasureSettings, used: tuple[PromptSet, ...] = ()) -> EvaluationPrompts:
    """Load the prompts to measure on and check that none of them was used to find the direction."""
    harmful = prompts_from(settings.harmful, "harmful", "harmful_test")
    harmless = prompts_from(settings.harmless, "harmless", "harmless_test")
    alarming = prompts_from(settings.alarming, "alarming", "harmless_alarming")
    more = [prompts_from(source, name, name) for name, source in settings.more]
    check_disjoint(*used, harmful, harmless, alarming, *more)
    harmful, harmless, alarming, *more = (
        part if settings.n_test is None or settings.n_test >= len(part) else draw(part, settings.n_test, 0)
        for part in (harmful, harmless, alarming, *more)
    )
    return EvaluationPrompts(harmful, harmless, alarming, tuple(more))


@dataclass(frozen=True, eq=False)
class Answered:
    """A prompt set with one model's greedy answers, and what a judge calls them; all in the order of the prompts."""

    prompts: PromptSet
    token_ids: tuple[tuple[int, ...], ...]
    answers: tuple[Answer, ...]
    labels: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def flags(self, label: Label) -> list[bool]:
        """Say of each answer whether it has a label."""
        return [own is label for own in self.labels]

    def rate(self, label: Label) -> Rate:
        """Give the share of the answers with a label; there must be some answers."""
        rate = wilson_rate(self.labels.count(label), len(self), self.prompts.sha256)
        assert rate is not None
        return rate

    def at(self, kept: Sequence[int]) -> "Answered":
        """Give the prompts at some indices."""
        return Answered(
            PromptSet(self.prompts.name, tuple(self.prompts.prompts[i] for i in kept), self.prompts.source),
            tuple(self.token_ids[i] for i in kept),
            tuple(self.answers[i] for i in kept),
            tuple(self.labels[i] for i in kept),
        )

    def only(self, label: Label) -> "Answered":
        """Give the prompts whose answer has a label."""
        return self.at([index for index, has in enumerate(self.flags(label)) if has])


def labelled(
    prompts: PromptSet, token_ids: Sequence[Sequence[int]], answers: Sequence[Answer], judge: Judge | None = None
) -> Answered:
    """Put a model's answers together with what a judge calls them, by default the phrase judge."""
    judgements = (judge or PhraseJudge()).judge(prompts.prompts, [answer.text for answer in answers])
    labels = tuple(judgement.label for judgement in judgements)
    return Answered(prompts, tuple(tuple(ids) for ids in token_ids), tuple(answers), labels)


def kept_answers(
    loaded: LoadedModel,
    name: str,
    token_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    journal: Journal,
    progress: Progress = SILENT,
) -> list[Answer]:
    """Let a model answer rendered prompts greedily, or find its answers in the journal."""
    context = journal.within(fingerprint(loaded)) if journal.directory is not None else journal
    return context.remember(
        f"answers, {name}",
        [list(map(list, token_ids)), max_new_tokens],
        lambda: generate(loaded, token_ids, max_new_tokens=max_new_tokens, progress=progress),
        lambda answers: [answer.to_json() for answer in answers],
        lambda record: [Answer.model_validate(answer) for answer in record],
    )
