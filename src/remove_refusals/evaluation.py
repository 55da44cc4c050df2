"""Measure an edited model against its base on the same prompts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from remove_refusals.chat_template import render
from remove_refusals.comparisons import holm
from remove_refusals.distances import Context, PromptDistance, distances_along
from remove_refusals.errors import ModelError, PromptError
from remove_refusals.generation import Answer, generate
from remove_refusals.journal import Journal, fingerprint
from remove_refusals.judges import Judge, Label, PhraseJudge
from remove_refusals.lengths import go_on, has_settled
from remove_refusals.metrics import mean_with_interval, perplexity, wilson_rate
from remove_refusals.models import LoadedModel
from remove_refusals.score_table import warnings
from remove_refusals.scores import Agreement, Distance, Evaluation, EvaluationSettings, Response, SetScores
from remove_refusals.set_scores import Accuracies, responses, score_set
from remove_refusals.token_statistics import common_prefix, means_by_token, token_quantile
from remove_refusals.types import PromptSet

__all__ = ["Evaluation", "EvaluationPrompts", "EvaluationSettings", "evaluate", "warnings"]

Answers = Mapping[str, Sequence[Answer]]
"""Answers by the name of the prompt set."""


@dataclass(frozen=True)
class EvaluationPrompts:
    """What to measure on.

    Attributes:
        harmful: Requests that the base model is expected to refuse.
        harmless: Requests of the same kind that are harmless.
        alarming: Requests that only sound harmful; None leaves them out.
        more: Further sets of harmless requests, under names of their own.
    """

    harmful: PromptSet
    harmless: PromptSet
    alarming: PromptSet | None = None
    more: tuple[PromptSet, ...] = ()

    def by_name(self) -> dict[str, PromptSet]:
        """Give the sets that have prompts, under their names in the scores.

        Raises:
            PromptError: If a further set has a name that is taken.
        """
        sets = {"harmful": self.harmful, "harmless": self.harmless, "alarming": self.alarming}
        for part in self.more:
            if part.name in sets:
                raise PromptError(
                    f"A further prompt set is named '{part.name}', expected a name of its own; choose another."
                )
            sets[part.name] = part
        return {name: prompts for name, prompts in sets.items() if prompts is not None and len(prompts)}


def evaluate(
    base: LoadedModel,
    edited: LoadedModel,
    prompts: EvaluationPrompts,
    settings: EvaluationSettings | None = None,
    *,
    edited_context: Context = nullcontext,
    judge: Judge | None = None,
    accuracies: Accuracies | None = None,
    journal: Journal | None = None,
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
        judge: What labels the answers; by default the phrase judge.
        accuracies: How often the judge is right about each label; rates then also come corrected for its errors.
        journal: Keeps the answers, so that a killed evaluation goes on; not those of a model edited in a context.
        on_progress: Called with how many runs of a prompt are done, and of how many.

    Returns:
        The scores and every answer.

    Raises:
        ModelError: If vocabularies or tokenizers differ, a prompt does not fit a model, or memory runs out.
        NumericalError: If logits are NaN; the message names the prompt.
        PromptError: If a prompt cannot be rendered, or two sets have one name.
        OutputError: If the journal cannot be written.
        JudgeError: If the judge cannot label an answer.
    """
    judge = judge or PhraseJudge()
    settings = settings or EvaluationSettings()
    _check(base, edited, settings)
    sets = prompts.by_name()
    token_ids = {name: render(base.tokenizer, part.prompts, **vars(settings.chat)) for name, part in sets.items()}
    n_harmless = len(token_ids.get("harmless", ()))
    progress = _Progress(on_progress, 2 * sum(map(len, token_ids.values())) + n_harmless)
    journal = journal or Journal()
    of_base = _answers(base, token_ids, settings, journal, progress)
    with edited_context():
        kept = journal if edited_context is nullcontext else Journal()
        of_edited = _answers(edited, token_ids, settings, kept, progress)
    if settings.longest is not None:
        of_base, of_edited = _longer(base, edited, sets, token_ids, of_base, of_edited, settings, edited_context, judge)
    rows: list[Response] = []
    scores: dict[str, SetScores] = {}
    for name, part in sets.items():
        both = [
            responses(name, part, which, of[name], judge) for which, of in (("base", of_base), ("edited", of_edited))
        ]
        scores[name] = score_set(base, part, both, (of_base[name], of_edited[name]), settings, judge, accuracies or {})
        rows += both[0] + both[1]
    along = [answer.token_ids[: settings.kl_tokens] for answer in of_base.get("harmless", ())]
    distances = distances_along(
        base,
        edited,
        token_ids.get("harmless", []),
        along,
        settings.kl_tokens,
        edited_context=edited_context,
        batch_size=settings.batch_size,
        on_progress=progress.within,
    )
    refused = [row.label is Label.REFUSAL for row in rows if row.set_name == "harmless" and row.model == "base"]
    pairs = list(zip(of_base.get("harmless", ()), of_edited.get("harmless", ()), strict=True))
    found = _conclude(base, edited, settings, prompts.harmless, _adjusted(scores), distances, pairs, refused, rows)
    usage = getattr(judge, "usage", None)
    return replace(found, judge=judge.name, judge_usage=None if usage is None else str(usage))


def _adjusted(scores: Mapping[str, SetScores]) -> dict[str, SetScores]:
    """Correct the p-values of all paired rates for how many they are."""
    p_values = iter(holm([rate.mcnemar.p_value for part in scores.values() for rate in part.paired().values()]))
    return {name: part.adjusted(p_values) for name, part in scores.items()}


def _answers(
    loaded: LoadedModel,
    token_ids: Mapping[str, Sequence[Sequence[int]]],
    settings: EvaluationSettings,
    journal: Journal,
    progress: "_Progress",
) -> dict[str, list[Answer]]:
    found = {}
    context = journal.within(fingerprint(loaded)) if journal.directory is not None else journal
    for name, ids in token_ids.items():
        compute = partial(
            generate,
            loaded,
            ids,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            on_progress=progress.within,
        )
        found[name] = context.remember(
            f"answers, {name}",
            [list(map(list, ids)), settings.max_new_tokens],
            compute,
            lambda answers: [answer.to_json() for answer in answers],
            lambda record: [Answer.from_json(answer) for answer in record],
        )
        progress.finish(len(ids))
    return found


def _longer(
    base: LoadedModel,
    edited: LoadedModel,
    sets: Mapping[str, PromptSet],
    token_ids: Mapping[str, Sequence[Sequence[int]]],
    of_base: dict[str, list[Answer]],
    of_edited: dict[str, list[Answer]],
    settings: EvaluationSettings,
    edited_context: Context,
    judge: Judge,
) -> tuple[dict[str, list[Answer]], dict[str, list[Answer]]]:
    """Double the length of the answers until neither model's refusals change with it, or they are long enough."""
    assert settings.longest is not None
    found = []
    for loaded, answers, context in ((base, of_base, nullcontext), (edited, of_edited, edited_context)):
        now = dict(answers)
        for name, part in sets.items():
            length = settings.max_new_tokens
            before = _labels(judge, part, now[name])
            while length < settings.longest:
                length = min(2 * length, settings.longest)
                with context():
                    now[name] = go_on(loaded, token_ids[name], now[name], length, batch_size=settings.batch_size)
                after = _labels(judge, part, now[name])
                if has_settled(before, after):
                    break
                before = after
        found.append(now)
    return found[0], found[1]


def _labels(judge: Judge, prompts: PromptSet, answers: Sequence[Answer]) -> list[Label]:
    return [found.label for found in judge.judge(prompts.prompts, [answer.text for answer in answers])]


def _conclude(
    base: LoadedModel,
    edited: LoadedModel,
    settings: EvaluationSettings,
    harmless: PromptSet,
    scores: dict[str, SetScores],
    distances: Sequence[PromptDistance],
    pairs: Sequence[tuple[Answer, Answer]],
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
        agreement=_agreement([pairs[index] for index in kept], answered, seed),
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


def _distance(distances: Sequence[PromptDistance], prompts: PromptSet, seed: int) -> Distance | None:
    along = [distance.kl for distance in distances]
    first = mean_with_interval([kl[0] for kl in along], prompts.sha256, seed=seed)
    mean = mean_with_interval([sum(kl) / len(kl) for kl in along], prompts.sha256, seed=seed)
    if first is None or mean is None:
        return None
    p95 = token_quantile(along, 0.95, prompts.sha256, seed=seed)
    return Distance(first, mean, p95, means_by_token(along, prompts.sha256, seed=seed))


def _agreement(pairs: Sequence[tuple[Answer, Answer]], prompts: PromptSet, seed: int) -> Agreement | None:
    tokens = [(first.token_ids, second.token_ids) for first, second in pairs]
    identical = wilson_rate(sum(first == second for first, second in tokens), len(tokens), prompts.sha256)
    common = mean_with_interval([common_prefix(*pair) for pair in tokens], prompts.sha256, seed=seed)
    return None if identical is None or common is None else Agreement(identical, common)


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
