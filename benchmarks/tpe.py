"""The familiar search, as a yardstick for those that need no generation: Optuna proposes, generation tries.

Each trial draws where a direction is taken out and how much, counts refusals in whole answers and measures the first
token's divergence on harmless prompts; a multivariate tree-structured Parzen estimator (Bergstra et al. 2011; for
several objectives Ozaki et al. 2022) learns from both. `benchmarks/results.py` runs it.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch

from remove_refusals.directions import ablated, direction_from_vectors, mean_difference_per_layer
from remove_refusals.errors import NumericalError
from remove_refusals.files import Journal
from remove_refusals.measure import Answered, Label, distances_along, labelled
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, fingerprint, generate
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.candidates import Candidate, Selection, by_rule
from remove_refusals.search.confirming import pick
from remove_refusals.search.search import SearchPrompts, base_behaviour
from remove_refusals.settings import MeasureSettings, SelectSettings
from remove_refusals.types import Direction, Intervention, SiteEdit

Scope = Literal["global", "per layer"]
SCOPES: tuple[Scope, ...] = ("global", "per layer")

N_DRAWS = 128
"""More than the sampler's default of 24: a draw costs nothing beside a trial."""


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


@dataclass(frozen=True)
class Kernel:
    """How much is taken out at the sites of one kind, layer by layer.

    Attributes:
        max_weight: The largest weight.
        position: The layer where it is reached, a fraction of a layer allowed.
        min_weight: The weight at `distance` from there.
        distance: In layers; beyond it nothing is taken out.
    """

    max_weight: float
    position: float
    min_weight: float
    distance: float

    def weight(self, layer: int) -> float:
        """Give a layer's weight: it falls linearly from the position to the distance, and is 0 beyond."""
        away = abs(layer - self.position)
        if away > self.distance:
            return 0.0
        return self.max_weight + (self.min_weight - self.max_weight) * away / self.distance


@dataclass(frozen=True)
class Parameters:
    """What a trial draws.

    Attributes:
        scope: Whether all layers get one direction or each its own.
        direction_index: Which direction all layers get, between two layers; without effect where each has its own.
        attn: The weights at attention.
        mlp: The weights at the MLP.
    """

    scope: Scope
    direction_index: float
    attn: Kernel
    mlp: Kernel


@dataclass(frozen=True)
class Scores:
    """What a trial measured: harmful prompts refused, or without an answer; the mean KL on harmless ones in nats."""

    refused: int
    degenerate: int
    damage: float


@dataclass(frozen=True)
class Outcome:
    """A trial that was run to its end; `scores` is None if the model's logits were not finite with it."""

    parameters: Parameters
    scores: Scores | None


def interpolated(directions: Sequence[Direction], index: float) -> Direction:
    """Give the direction at a fractional index: linear between the two neighbours, normalised."""
    lower = min(int(index), len(directions) - 1)
    upper = min(lower + 1, len(directions) - 1)
    vector = torch.lerp(directions[lower].basis, directions[upper].basis, index - lower)
    changed = {"method": "interpolated", "layer": None, "length": None}
    return direction_from_vectors(vector, directions[lower].origin.model_copy(update=changed))


def build(parameters: Parameters, directions: Sequence[Direction], loaded: LoadedModel) -> Intervention:
    """Turn what a trial drew into an intervention; the embedding is left alone."""
    per_layer = parameters.scope == "per layer"
    used = tuple(directions) if per_layer else (interpolated(directions, parameters.direction_index),)
    edits = []
    for site in map_model(loaded.model).sites:
        if site.layer is not None:
            weight = (parameters.attn if site.kind == "attn" else parameters.mlp).weight(site.layer)
            if weight:
                number = site.layer if per_layer else 0
                edits.append(SiteEdit(kind=site.kind, layer=site.layer, strength=weight, direction=number))
    return Intervention(used, tuple(edits))


class Trials:
    """A study of Optuna with two objectives, less being better, that goes on where its journal ends."""

    def __init__(self, journal: Path | None, name: str, n_layers: int, n_harmful: int, settings: TpeSettings) -> None:
        """Open the journal, or a study in memory."""
        self._settings, self._n_layers, self._n_harmful = settings, n_layers, n_harmful
        self._n_random = max(1, min(settings.n_startup_trials, settings.n_trials // 3))
        with quietly():
            self._study = optuna.create_study(
                storage=optuna.storages.InMemoryStorage() if journal is None else opened(journal),
                study_name=name,
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            for trial in self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
                # A trial that was running when its search was killed is drawn anew, unless all was measured.
                self._end(trial.number, self._scores(trial) if "damage" in trial.user_attrs else None)

    def finished(self) -> tuple[Outcome, ...]:
        """Give the trials that were run to their end, in their order."""
        return tuple(
            Outcome(self._parameters(optuna.trial.FixedTrial(trial.params)), self._scores(trial))
            for trial in self._study.get_trials(deepcopy=False)
            if "damage" in trial.user_attrs
        )

    def ask(self) -> tuple[Any, Parameters]:
        """Begin a trial; it depends on the seed and on the finished trials alone."""
        content = f"{self._settings.seed}:{len(self.finished())}"
        seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big")
        with quietly():
            self._study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=self._n_random,
                n_ei_candidates=N_DRAWS,
                multivariate=self._settings.multivariate,
                constant_liar=False,
                seed=seed,
            )
            trial = self._study.ask()
            return trial, self._parameters(trial)

    def tell(self, trial: Any, scores: Scores | None) -> None:
        """End a trial with what was measured, or with None if logits were not finite."""
        with quietly():
            for name in ("refused", "degenerate", "damage"):
                trial.set_user_attr(name, scores and getattr(scores, name))
            self._end(trial, scores)

    def _end(self, trial: Any, scores: Scores | None) -> None:
        if scores is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, [scores.refused / self._n_harmful, scores.damage])

    def _parameters(self, trial: Any) -> Parameters:
        # All parameters have fixed ranges and are always drawn: the multivariate sampler can learn from no others.
        last = self._n_layers - 1

        def kernel(kind: str) -> Kernel:
            most = trial.suggest_float(f"{kind}.max_weight", 0.8, 1.5)
            position = trial.suggest_float(f"{kind}.max_weight_position", 0.6 * last, 1.0 * last)
            share = trial.suggest_float(f"{kind}.min_weight_share", 0.0, 1.0)
            distance = trial.suggest_float(f"{kind}.min_weight_distance", 1.0, max(1.0, 0.6 * last))
            return Kernel(most, position, share * most, distance)

        scope = trial.suggest_categorical("direction_scope", SCOPES)
        index = trial.suggest_float("direction_index", 0.4 * last, 0.9 * last)
        return Parameters(scope, index, kernel("attn"), kernel("mlp"))

    def _scores(self, trial: Any) -> Scores | None:
        kept = trial.user_attrs
        return None if kept["damage"] is None else Scores(kept["refused"], kept["degenerate"], kept["damage"])


def opened(journal: Path) -> optuna.storages.BaseStorage:
    """Open a journal; the half of a line that a killed search may have left at its end is cut off."""
    content = journal.read_bytes() if journal.exists() else b""
    if content and not content.endswith(b"\n"):
        journal.write_bytes(content[: content.rfind(b"\n") + 1])
    journal.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Optuna's own log and its warnings of experimental features to itself."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def tried(
    loaded: LoadedModel,
    intervention: Intervention,
    harmful: Answered,
    harmless: Answered,
    max_new_tokens: int,
    progress: Progress = SILENT,
) -> Scores | None:
    """Try an intervention by hooks: generate, and compare the first tokens; None if logits are not finite."""
    try:
        with ablated(loaded, intervention):
            answers = generate(loaded, harmful.token_ids, max_new_tokens=max_new_tokens, progress=progress)
        distances = distances_along(
            loaded,
            loaded,
            harmless.token_ids,
            [answer.token_ids[:1] for answer in harmless.answers],
            1,
            edited_context=lambda: ablated(loaded, intervention),
        )
    except NumericalError:
        return None
    damage = sum(distance.kl[0] for distance in distances) / len(distances)
    labels = labelled(harmful.prompts, harmful.token_ids, answers).labels
    scores = Scores(labels.count(Label.REFUSAL), labels.count(Label.DEGENERATE), damage)
    return scores if math.isfinite(damage) else None


def search_trials(
    loaded: LoadedModel,
    directions: Sequence[Direction],
    harmful: Answered,
    harmless: Answered,
    settings: TpeSettings,
    max_new_tokens: int,
    *,
    journal: Path | None = None,
    deadline_s: float | None = None,
    progress: Progress = SILENT,
) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """Search by trial: draw parameters, generate with them, learn from what came out.

    A killed search goes on where its journal ends, and gets the candidates that it would have got. After `deadline_s`
    seconds no trial but the first begins. Leave harmless prompts out that the base model refused, or their cure counts
    as damage.

    Returns:
        One candidate for each trial, and notes.
    """
    started = time.monotonic()
    # Directions are told apart by where they come from, for their numbers may differ in the last digit when found anew.
    origins = [direction.origin.model_copy(update={"length": None}).to_json() for direction in directions]
    content = [fingerprint(loaded), origins, harmful.token_ids, harmless.token_ids, max_new_tokens]
    content += [settings.seed, settings.multivariate]
    name = f"search {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"
    trials = Trials(journal, name, map_model(loaded.model).n_layers, len(harmful), settings)
    progress = progress.stage("trials", settings.n_trials * len(harmful))
    while (done := len(trials.finished())) < settings.n_trials:
        if done and deadline_s is not None and time.monotonic() - started >= deadline_s:
            break
        trial, parameters = trials.ask()
        intervention = build(parameters, directions, loaded)
        told = progress.after(done * len(harmful))
        trials.tell(trial, tried(loaded, intervention, harmful, harmless, max_new_tokens, told))
    outcomes = trials.finished()[: settings.n_trials]
    candidates = tuple(
        Candidate(
            f"trial {number}",
            build(outcome.parameters, directions, loaded),
            outcome.scores.refused / len(harmful),
            outcome.scores.damage,
        )
        for number, outcome in enumerate(outcomes, start=1)
        if outcome.scores is not None
    )
    if not candidates:
        raise NumericalError(f"None of {len(outcomes)} trials gave finite logits; load the model in float32.")
    notes = []
    if len(outcomes) < settings.n_trials:
        notes.append(f"The time was up after {len(outcomes)} of {settings.n_trials} trials.")
    if len(candidates) < len(outcomes):
        notes.append(f"{len(outcomes) - len(candidates)} of {len(outcomes)} trials gave logits that are not finite.")
    return candidates, tuple(notes)


def select_tpe(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    settings: SelectSettings,
    measure: MeasureSettings,
    trials: TpeSettings,
    *,
    journal: Journal | None = None,
    deadline_s: float | None = None,
    progress: Progress = SILENT,
) -> Selection:
    """Choose what to take out where, as `remove_refusals.search.select` does, by trials of whole answers."""
    whole = settings.model_copy(update={"n_tokens": measure.max_new_tokens})
    journal = (journal or Journal()).within(fingerprint(loaded))
    base = base_behaviour(loaded, prompts, (-1,), whole, measure, journal, progress)
    directions = mean_difference_per_layer(*base.collected, projected=True, seed=settings.seed)
    candidates, notes = search_trials(
        loaded,
        directions,
        base.harmful,
        base.own.answered,
        trials,
        measure.max_new_tokens,
        journal=None if journal.directory is None else journal.directory / "trials.log",
        deadline_s=deadline_s,
        progress=progress,
    )
    order = by_rule([(candidate.refusal, candidate.damage) for candidate in candidates], settings.rule)
    selection = Selection("tpe", candidates, order[0], settings.rule, notes)
    return pick(selection, order, base.confirming, settings.most_confirmed, journal, progress)
