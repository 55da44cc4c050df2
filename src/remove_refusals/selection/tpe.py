"""The familiar search: a sampler proposes interventions, each is tried by generating with it.

It is the yardstick for searches that need no generation. Each trial draws where a direction is taken out and how much,
counts refusals in whole answers and measures the first token's divergence on harmless prompts; a multivariate
tree-structured Parzen estimator (Bergstra et al. 2011; for several objectives Ozaki et al. 2022) learns from both.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from remove_refusals.apply.hooks import ablated
from remove_refusals.batching import first_batch_size, longest_first, with_backoff
from remove_refusals.distances import distances_along
from remove_refusals.errors import DirectionError, ModelError, NumericalError, PromptError
from remove_refusals.generation import answer_logits, generate
from remove_refusals.judges import Label, judge_phrases
from remove_refusals.map_types import ModelMap
from remove_refusals.metrics import kl_divergence
from remove_refusals.models import LoadedModel
from remove_refusals.selection.candidates import Candidate, Rule, Selection, by_rule
from remove_refusals.selection.kernels import build
from remove_refusals.selection.references import AnswerSettings, References
from remove_refusals.selection.trials import Outcome, Scores, Trials
from remove_refusals.types import Direction, Intervention

# Up to 4 GB of log-probabilities are kept on the CPU; beyond that the base model is run again in each trial.
_MOST_KEPT = 2**30


@dataclass(frozen=True)
class TpeSettings:
    """How the search goes.

    Attributes:
        n_trials: How many trials there are, those of an earlier run on the same journal included.
        n_startup_trials: How many of them are random; at most a third of the trials.
        seed: What draws the parameters.
        multivariate: Whether parameters are drawn together, as they were good together, or each for itself.
    """

    n_trials: int = 200
    n_startup_trials: int = 60
    seed: int = 0
    multivariate: bool = True


def select_tpe(
    loaded: LoadedModel,
    model_map: ModelMap,
    directions: Sequence[Direction],
    harmful: References,
    harmless: References,
    settings: TpeSettings,
    *,
    rule: Rule,
    answers: AnswerSettings,
    journal: Path | None = None,
    deadline_s: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_trial: Callable[[Candidate], None] | None = None,
) -> Selection:
    """Search by trial: draw parameters, generate with them, learn from what came out.

    A killed search goes on where its journal ends, and gets the candidates that it would have got: each draw depends
    on the seed and on the finished trials alone.

    Args:
        loaded: The base model.
        model_map: Its map.
        directions: One for each layer, of one column, found in the stream behind it.
        harmful: The base model's answers to the harmful prompts of the search.
        harmless: Its answers to the harmless ones; leave out those that it refused, or their cure counts as damage.
        settings: How the search goes.
        rule: What decides between less refusal and less damage.
        answers: How answers are generated; as in `references`.
        journal: The file that keeps the trials; None keeps them in memory. A search of other prompts, directions, seed
            or answers in the same file is left alone.
        deadline_s: No trial but the first begins after so many seconds.
        on_progress: Called with how many runs of a prompt are done, and of how many.
        on_trial: Called with each new candidate.

    Returns:
        One candidate for each trial: the share of harmful prompts that is refused, and the mean KL of the first token
        on the harmless prompts.

    Raises:
        ModelError: If Optuna is not installed, there is less than one trial, or memory runs out.
        PromptError: If there are no prompts.
        DirectionError: If there is not one direction of one column for each layer.
        NumericalError: If no trial gave finite logits.
        OutputError: If the journal cannot be read or written.
    """
    started = time.monotonic()
    _check(model_map, directions, harmful, harmless, settings)
    trials = Trials(
        journal,
        _name(loaded, directions, harmful, harmless, settings, answers),
        n_layers=model_map.n_layers,
        n_harmful=len(harmful),
        seed=settings.seed,
        n_random=max(1, min(settings.n_startup_trials, settings.n_trials // 3)),
        multivariate=settings.multivariate,
    )
    measure = _Measure(loaded, model_map, harmful, harmless, answers)
    while (done := len(trials.finished())) < settings.n_trials:
        if done and deadline_s is not None and time.monotonic() - started >= deadline_s:
            break
        trial, parameters = trials.ask()
        scores = measure.scores(
            build(parameters, directions, model_map), _progress(on_progress, measure.n_runs, done, settings.n_trials)
        )
        trials.tell(trial, scores)
        if on_trial is not None and scores is not None:
            on_trial(_candidate(done, Outcome(parameters, scores), directions, model_map, len(harmful)))
    return _conclude(trials.finished(), directions, model_map, len(harmful), settings, rule)


def _conclude(
    outcomes: Sequence[Outcome],
    directions: Sequence[Direction],
    model_map: ModelMap,
    n_harmful: int,
    settings: TpeSettings,
    rule: Rule,
) -> Selection:
    outcomes = outcomes[: settings.n_trials]
    candidates = tuple(
        _candidate(number, outcome, directions, model_map, n_harmful)
        for number, outcome in enumerate(outcomes)
        if outcome.scores is not None
    )
    if not candidates:
        raise NumericalError(
            f"None of {len(outcomes)} trials gave finite logits, expected at least one that does; load the model in "
            "float32."
        )
    notes = []
    if len(outcomes) < settings.n_trials:
        notes.append(f"The time was up after {len(outcomes)} of {settings.n_trials} trials.")
    if len(candidates) < len(outcomes):
        notes.append(f"{len(outcomes) - len(candidates)} of {len(outcomes)} trials gave logits that are not finite.")
    picked = by_rule([(candidate.refusal, candidate.damage) for candidate in candidates], rule)[0]
    scores = [outcome.scores for outcome in outcomes if outcome.scores is not None][picked]
    if scores.degenerate:
        notes.append(
            f"The pick gave no answer (empty, or caught in a loop) to {scores.degenerate} of {n_harmful} harmful "
            "prompts; they do not count as refusals."
        )
    return Selection("tpe", candidates, picked, rule, tuple(notes))


def _candidate(
    number: int, outcome: Outcome, directions: Sequence[Direction], model_map: ModelMap, n_harmful: int
) -> Candidate:
    assert outcome.scores is not None
    intervention = build(outcome.parameters, directions, model_map)
    return Candidate(f"trial {number + 1}", intervention, outcome.scores.refused / n_harmful, outcome.scores.damage)


class _Measure:
    """Tries an intervention by hooks; what the base model does is computed once."""

    def __init__(
        self,
        loaded: LoadedModel,
        model_map: ModelMap,
        harmful: References,
        harmless: References,
        answers: AnswerSettings,
    ) -> None:
        self.loaded, self.model_map, self.answers = loaded, model_map, answers
        self.harmful, self.harmless = harmful, harmless
        self.n_runs = len(harmful) + len(harmless)
        fits = len(harmless) * loaded.vocabulary_size <= _MOST_KEPT
        self.base = self._first_tokens() if fits else None

    def scores(self, intervention: Intervention, report: Callable[[int], None]) -> Scores | None:
        """Generate and compare; None if logits are not finite."""
        try:
            with ablated(self.loaded.model, intervention, model_map=self.model_map):
                found = generate(
                    self.loaded,
                    self.harmful.token_ids,
                    max_new_tokens=self.answers.max_new_tokens,
                    batch_size=self.answers.batch_size,
                    on_progress=report,
                )
            kl = self._divergences(intervention)
        except NumericalError:
            return None
        finally:
            report(self.n_runs)
        damage = sum(kl) / len(kl)
        prompts = self.harmful.prompts.prompts
        labels = [judge_phrases(answer.text, prompt) for answer, prompt in zip(found, prompts, strict=True)]
        scores = Scores(labels.count(Label.REFUSAL), labels.count(Label.DEGENERATE), damage)
        return scores if math.isfinite(damage) else None

    def _divergences(self, intervention: Intervention) -> list[float]:
        def context() -> AbstractContextManager[None]:
            return ablated(self.loaded.model, intervention, model_map=self.model_map)

        if self.base is None:
            tokens = [answer.token_ids[:1] for answer in self.harmless.answers]
            size = self.answers.batch_size
            found = distances_along(
                self.loaded, self.loaded, self.harmless.token_ids, tokens, 1, edited_context=context, batch_size=size
            )
            return [distance.kl[0] for distance in found]
        with context():
            edited = self._first_tokens()
        return [float(value) for value in kl_divergence(self.base, edited)]

    def _first_tokens(self) -> torch.Tensor:
        """The first answer token's log-probabilities: `[n_harmless, vocabulary]`, float32, on the CPU."""
        ids = self.harmless.token_ids
        found = torch.empty(len(ids), 0)

        def run(indices: Sequence[int]) -> torch.Tensor:
            logits = answer_logits(self.loaded, [ids[i] for i in indices], [(0,)] * len(indices), 1)
            return logits.log_probabilities.cpu()

        size = first_batch_size(self.loaded, self.answers.batch_size)
        for indices, rows in with_backoff(run, longest_first(ids), size):
            if not found.shape[1]:
                found = torch.empty(len(ids), rows.shape[1])
            found[list(indices)] = rows
        return found


def _check(
    model_map: ModelMap,
    directions: Sequence[Direction],
    harmful: References,
    harmless: References,
    settings: TpeSettings,
) -> None:
    if settings.n_trials < 1:
        raise ModelError(f"The setting n_trials is {settings.n_trials}, expected at least 1; raise it.")
    if not len(harmful) or not len(harmless):
        raise PromptError(
            f"The search has {len(harmful)} harmful and {len(harmless)} harmless prompts, expected at least one of "
            "each; add prompts."
        )
    columns = [direction.basis.shape[1] for direction in directions]
    if columns != [1] * model_map.n_layers:
        raise DirectionError(
            f"The directions have {columns} columns, expected one direction of 1 column for each of "
            f"{model_map.n_layers} layers; find them with `mean_difference_per_layer` at one position."
        )


def _name(
    loaded: LoadedModel,
    directions: Sequence[Direction],
    harmful: References,
    harmless: References,
    settings: TpeSettings,
    answers: AnswerSettings,
) -> str:
    """What the search is called in its journal: another one of whatever decides a trial's result.

    Directions are told apart by where they come from, for their numbers may differ in the last digit when found anew.
    """
    origins = [replace(direction.origin, harmless_component=None, length=None) for direction in directions]
    content = {
        "model": Path(loaded.source).name,
        "directions": [asdict(origin) for origin in origins],
        "prompts": [harmful.token_ids, harmless.token_ids],
        "max_new_tokens": answers.max_new_tokens,
        "seed": settings.seed,
        "multivariate": settings.multivariate,
    }
    return f"search {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"


def _progress(
    on_progress: Callable[[int, int], None] | None, n_runs: int, done: int, n_trials: int
) -> Callable[[int], None]:
    def report(within: int) -> None:
        if on_progress is not None:
            on_progress(done * n_runs + within, n_trials * n_runs)

    return report
