"""The prompts to measure on, what a model answers to them, and how far another model is along those answers."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from remove_refusals.errors import PromptError
from remove_refusals.files import Journal
from remove_refusals.measure.judges import Judge, Label
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.measure.statistics import Rate, wilson_rate
from remove_refusals.models import (
    Answer,
    AnswerLogits,
    InTurn,
    LoadedModel,
    answer_logits,
    fingerprint,
    first_batch_size,
    generate,
    in_batches,
    in_order,
)
from remove_refusals.processes import from_first
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import check_disjoint, draw, prompts_from
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import PromptSet

Context = Callable[[], AbstractContextManager[object]]

# How many logits of one model may be held at once, in float32 512 MB on a GPU and 128 MB elsewhere; fewer are compared.
_HELD, _HELD_ELSEWHERE, _COMPARED = {"cuda": 2**27}, 2**25, 2**22


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


def measuring_prompts(
    settings: MeasureSettings, used: tuple[PromptSet, ...] = (), given: Mapping[str, PromptSet] | None = None
) -> EvaluationPrompts:
    """Load the prompts to measure on, but for those given, and check that none was used to find the direction."""
    embedded = {"harmful": "harmful_test", "harmless": "harmless_test", "alarming": "harmless_alarming"}
    harmful, harmless, alarming = (
        (given or {}).get(name) or prompts_from(getattr(settings, name), name, own, settings.language)
        for name, own in embedded.items()
    )
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
        """Give the share of the judged answers with a label, or of all if none is judged; there must be some."""
        judged = self.judged() or self
        rate = wilson_rate(judged.labels.count(label), len(judged), judged.prompts.sha256)
        assert rate is not None
        return rate

    def judged(self) -> "Answered":
        """Give the prompts whose answer the judge could judge."""
        return self.at([index for index, label in enumerate(self.labels) if label is not Label.UNJUDGED])

    def at(self, kept: Sequence[int]) -> "Answered":
        """Give the prompts at some indices."""
        return Answered(
            PromptSet(self.prompts.name, tuple(self.prompts.prompts[i] for i in kept), self.prompts.source),
            tuple(self.token_ids[i] for i in kept),
            tuple(self.answers[i] for i in kept),
            tuple(self.labels[i] for i in kept),
        )

    def only(self, *labels: Label) -> "Answered":
        """Give the prompts whose answer has one of some labels."""
        return self.at([index for index, own in enumerate(self.labels) if own in labels])


def labelled(
    prompts: PromptSet, token_ids: Sequence[Sequence[int]], answers: Sequence[Answer], judge: Judge | None = None
) -> Answered:
    """Put a model's answers together with what a judge calls them, by default the phrase judge."""
    # Others may not have the judge at all.
    judgements = from_first(
        lambda: (judge or PhraseJudge()).judge(prompts.prompts, [answer.text for answer in answers])
    )
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


@dataclass(frozen=True)
class PromptDistance:
    """Along one answer, in nats: KL of base from edited at each token, both summed negative log-likelihoods."""

    kl: tuple[float, ...]
    base_loss: float
    edited_loss: float


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Compute `sum of p (log p - log q)` (Kullback and Leibler 1951) from natural logarithms, `[n, vocabulary]` each.

    It is `[n]`, in nats, in their dtype; never negative, infinite where `q` is 0 and `p` is not.
    """
    terms = log_p.exp() * (log_p - log_q)
    # Where p is 0 the term is 0, and -inf - -inf must not make it NaN.
    terms = torch.where(log_p == -math.inf, torch.zeros_like(terms), terms)
    return terms.sum(-1).clamp(min=0)


def distances_along(
    base: LoadedModel,
    edited: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    edited_context: Context = nullcontext,
    progress: Progress = SILENT,
) -> list[PromptDistance]:
    """Run both models, or one with and without the context, along the first `n_tokens` of given answers, in batches.

    Of two that are in memory in turn the edited one is run first, and what it predicts waits on the host.
    """
    waiting: dict[int, torch.Tensor] = {}

    def run(loaded: LoadedModel, indices: Sequence[int]) -> AnswerLogits:
        ids, along = [token_ids[index] for index in indices], [answer_ids[index] for index in indices]
        return answer_logits(loaded, ids, along, n_tokens)

    def wait(indices: Sequence[int]) -> list[None]:
        with edited_context():
            found = run(edited, indices)
        for row, index in enumerate(indices):
            waiting[index] = found.logits[(found.rows == row).to(found.logits.device)].to("cpu")
        return [None] * len(indices)

    def measure(indices: Sequence[int]) -> list[PromptDistance]:
        of_base = run(base, indices)
        if waiting:
            of_edited = replace(of_base, logits=torch.cat([waiting[index] for index in indices]))
        else:
            with edited_context():
                of_edited = run(edited, indices)
        return distances_between(of_base, of_edited, len(indices))

    lengths = [len(ids) + len(tail) for ids, tail in zip(token_ids, answer_ids, strict=True)]
    if isinstance(edited, InTurn):
        in_order(in_batches(edited, lengths, wait, most=logits_at_once(edited, n_tokens)))
    return in_order(in_batches(base, lengths, measure, most=logits_at_once(base, n_tokens), progress=progress))


def logits_at_once(loaded: LoadedModel, n_tokens: int) -> int:
    """Pick for how many answers of so many tokens logits are held at once."""
    held = _HELD.get(loaded.device.type, _HELD_ELSEWHERE)
    return min(max(1, held // (n_tokens * loaded.vocabulary_size)), first_batch_size(loaded))


def log_likelihoods(found: AnswerLogits, n: int) -> list[float]:
    """Give the log-probability of each of `n` answers in nats, summed over the tokens that were looked at."""
    n_rows, sums = max(1, _COMPARED // found.logits.shape[-1]), torch.zeros(n, dtype=torch.float64)
    for start in range(0, len(found.rows), n_rows):
        part = slice(start, start + n_rows)
        logits = found.logits[part].float()
        targets = found.targets[part].to(logits.device)[:, None]
        along = logits.gather(1, targets)[:, 0] - logits.logsumexp(-1)
        sums.index_add_(0, found.rows[part], along.double().cpu())
    totals: list[float] = sums.tolist()
    return totals


def distances_between(base: AnswerLogits, edited: AnswerLogits, n: int) -> list[PromptDistance]:
    """Compare what two models predict along the same `n` answers."""
    device, n_rows = base.logits.device, max(1, _COMPARED // base.logits.shape[-1])
    columns: tuple[list[float], list[float], list[float]] = ([], [], [])
    with torch.inference_mode():
        # Of all rows together the float32 numbers would take many times the memory of the logits.
        for start in range(0, len(base.rows), n_rows):
            part = slice(start, start + n_rows)
            log_p, log_q = (one.logits[part].to(device).float().log_softmax(-1) for one in (base, edited))
            targets = base.targets[part].to(device)[:, None]
            losses = (-log_p.gather(1, targets)[:, 0], -log_q.gather(1, targets)[:, 0])
            for column, found in zip(columns, (kl_divergence(log_p, log_q), *losses), strict=True):
                column.extend(found.tolist())
    rows = base.rows.tolist()
    of_prompt = [
        [[value for row, value in zip(rows, column, strict=True) if row == index] for column in columns]
        for index in range(n)
    ]
    return [PromptDistance(tuple(kl), sum(first), sum(second)) for kl, first, second in of_prompt]
