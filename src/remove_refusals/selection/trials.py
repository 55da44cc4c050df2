"""The trials of the familiar search: what is drawn, by which sampler, and the journal that keeps what came out."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remove_refusals.errors import ModelError, OutputError
from remove_refusals.selection.kernels import SCOPES, Kernel, Parameters

# More than the sampler's default of 24: a draw costs nothing beside a trial.
_N_DRAWS = 128


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


class Trials:
    """A study of Optuna with two objectives, less being better, that goes on where its journal ends."""

    def __init__(
        self,
        journal: Path | None,
        name: str,
        *,
        n_layers: int,
        n_harmful: int,
        seed: int,
        n_random: int,
        multivariate: bool,
    ) -> None:
        """Open the journal, or a study in memory.

        Raises:
            ModelError: If Optuna is not installed.
            OutputError: If the journal cannot be read or written.
        """
        try:
            import optuna
        except ImportError as error:
            raise ModelError(
                "The search 'tpe' found no package optuna, expected it to be installed; run "
                "`pip install 'remove-refusals[search]'`."
            ) from error
        self._optuna, self._seed, self._n_random = optuna, seed, n_random
        self._n_layers, self._n_harmful, self._multivariate = n_layers, n_harmful, multivariate
        with self._quietly():
            try:
                storage = optuna.storages.InMemoryStorage() if journal is None else _open(optuna, journal)
                self._study = optuna.create_study(
                    storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
                )
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"The journal {journal} cannot be used ({error}), expected a file of an earlier search or a new "
                    "one in a directory that can be written to; name another file."
                ) from error
            for trial in self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
                # A trial that was running when its search was killed is drawn anew, unless all was measured.
                self._end(trial.number, self._scores(trial) if "damage" in trial.user_attrs else None)

    def finished(self) -> tuple[Outcome, ...]:
        """Give the trials that were run to their end, in their order."""
        return tuple(
            Outcome(self._parameters(self._optuna.trial.FixedTrial(trial.params)), self._scores(trial))
            for trial in self._study.get_trials(deepcopy=False)
            if "damage" in trial.user_attrs
        )

    def ask(self) -> tuple[Any, Parameters]:
        """Begin a trial; it depends on the seed and on the finished trials alone."""
        number = len(self.finished())
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}:{number}".encode()).digest()[:4], "big")
        with self._quietly():
            self._study.sampler = self._optuna.samplers.TPESampler(
                n_startup_trials=self._n_random,
                n_ei_candidates=_N_DRAWS,
                multivariate=self._multivariate,
                constant_liar=False,
                seed=seed,
            )
            trial = self._study.ask()
            return trial, self._parameters(trial)

    def tell(self, trial: Any, scores: Scores | None) -> None:
        """End a trial with what was measured, or with None if logits were not finite."""
        with self._quietly():
            trial.set_user_attr("refused", scores and scores.refused)
            trial.set_user_attr("degenerate", scores and scores.degenerate)
            trial.set_user_attr("damage", scores and scores.damage)
            self._end(trial, scores)

    def _end(self, trial: Any, scores: Scores | None) -> None:
        if scores is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
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

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        logging = self._optuna.logging
        level = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                yield
        finally:
            logging.set_verbosity(level)


def _open(optuna: Any, journal: Path) -> Any:
    """Open a journal; the half of a line that a killed search may have left at its end is cut off."""
    if journal.exists():
        content = journal.read_bytes()
        if content and not content.endswith(b"\n"):
            journal.write_bytes(content[: content.rfind(b"\n") + 1])
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
