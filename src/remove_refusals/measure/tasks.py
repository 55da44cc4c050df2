"""Tasks of lm-evaluation-harness, before and after: the same samples, compared in pairs."""

import hashlib
import io
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remove_refusals.errors import ModelError, PromptError, require_package
from remove_refusals.measure.divergence import Context
from remove_refusals.measure.statistics import Mean, PairedDifference, mean_with_interval, paired_difference
from remove_refusals.models import LoadedModel

# What the package and `datasets` raise for data that cannot be found or task files that are wrong.
_TASK_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, AssertionError)


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, on the same samples for both models.

    Attributes:
        task: The task.
        metric: The metric, with the filter of the answers where it is not the plain one.
        base: The base model's mean over samples.
        edited: The edited model's.
        difference: Edited less base, sample by sample, and whether the data tell them apart.
    """

    task: str
    metric: str
    base: Mean
    edited: Mean
    difference: PairedDifference

    @property
    def decided(self) -> bool:
        """Whether the data support a difference."""
        return self.difference.decided

    def to_json(self) -> dict[str, Any]:
        """Give the attributes, and whether the difference is decided."""
        return asdict(self) | {"difference": self.difference.to_json(), "decided": self.decided}


def run_tasks(
    base: LoadedModel,
    edited: LoadedModel,
    tasks: Sequence[str],
    *,
    directory: Path | None = None,
    limit: int | None = None,
    edited_context: Context = nullcontext,
    seed: int = 0,
) -> tuple[TaskScore, ...]:
    """Run tasks of lm-evaluation-harness on both models.

    Args:
        base: The base model.
        edited: The edited model; it may be the same one, with the edit in `edited_context`.
        tasks: Their names.
        directory: A directory with task files of the user's own, beside those that come with the package.
        limit: How many samples of each task at most; None takes all.
        edited_context: Entered around the run of the edited model.
        seed: The seed of the intervals and of the few-shot samples.

    Returns:
        One score for each metric that every sample has a number for. Metrics of a whole set have no pairs and are left
        out.

    Raises:
        ModelError: If lm-evaluation-harness is not installed, does not know a task, or cannot run one.
        PromptError: If a task has no metric that can be compared sample by sample.
    """
    lm_eval_tasks = require_package("lm_eval.tasks", "tasks", "the option tasks", ModelError)
    with _quietly():
        manager = lm_eval_tasks.TaskManager(include_path=str(directory) if directory is not None else None)
        unknown = sorted(set(tasks) - set(manager.all_tasks))
        if unknown:
            raise ModelError(
                f"The task '{unknown[0]}' is not among the {len(manager.all_tasks)} tasks of lm-evaluation-harness"
                f"{f' or in {directory}' if directory else ''}, expected one of them; run `lm-eval ls tasks`."
            )
        options = {"limit": limit, "seed": seed}
        try:
            before = _samples(base, tasks, manager, options)
            with edited_context():
                after = _samples(edited, tasks, manager, options)
        except _TASK_ERRORS as error:
            text = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(".")
            raise ModelError(
                f"The tasks {', '.join(tasks)} cannot be run ({type(error).__name__}: {text}), expected task files and "
                "data that lm-evaluation-harness can read; check them, or the network."
            ) from error
    return tuple(_scores(before, after, seed))


def _samples(loaded: LoadedModel, tasks: Sequence[str], manager: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=loaded.batch_size or 8,
        device=str(loaded.device),
    )
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=options["limit"],
        bootstrap_iters=0,
        fewshot_random_seed=options["seed"],
    )
    samples: dict[str, Any] = found["samples"]
    return samples


def _scores(before: Mapping[str, Any], after: Mapping[str, Any], seed: int) -> Iterator[TaskScore]:
    for task, samples in before.items():
        first, second = _by_metric(samples), _by_metric(after[task])
        shared = [metric for metric in first if first[metric].keys() == second.get(metric, {}).keys()]
        if not shared:
            raise PromptError(
                f"The task '{task}' gives no number for each sample, expected a metric such as acc or exact_match; "
                "leave the task out."
            )
        for metric in shared:
            keys = sorted(first[metric])
            sha = hashlib.sha256(repr(keys).encode()).hexdigest()
            base, edited = ([part[metric][key] for key in keys] for part in (first, second))
            means = [mean_with_interval(values, sha, seed=seed) for values in (base, edited)]
            difference = paired_difference(base, edited, seed=seed)
            assert means[0] is not None and means[1] is not None and difference is not None  # a metric has samples
            yield TaskScore(task, metric, means[0], means[1], difference)


def _by_metric(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[int, str, str], float]]:
    """Sort the samples' numbers by metric and filter; a sample is known by its number and hashes."""
    found: dict[str, dict[tuple[int, str, str], float]] = {}
    for sample in samples:
        plain = sample.get("filter", "none") == "none"
        for metric in sample["metrics"]:
            value = sample.get(metric)
            if isinstance(value, bool | int | float):
                name = metric if plain else f"{metric}, {sample['filter']}"
                key = (int(sample["doc_id"]), str(sample["prompt_hash"]), str(sample["doc_hash"]))
                found.setdefault(name, {})[key] = float(value)
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the package's progress bars and warnings off the screen; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
