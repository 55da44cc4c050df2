"""Tasks of lm-evaluation-harness, before and after: the same samples, compared in pairs."""

import hashlib
import io
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

from remove_refusals.errors import ModelError, PromptError, require_package
from remove_refusals.measure.answers import Context
from remove_refusals.measure.scores import TaskScore
from remove_refusals.measure.statistics import mean_with_interval, paired_difference
from remove_refusals.models import LoadedModel
from remove_refusals.settings import MeasureSettings

# What the package and `datasets` raise for data that cannot be found or task files that are wrong.
_TASK_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, AssertionError)


def run_tasks(
    base: LoadedModel, edited: LoadedModel, settings: MeasureSettings, *, edited_context: Context = nullcontext
) -> tuple[TaskScore, ...]:
    """Score both models by each metric that every sample of a task has a number for; others have no pairs."""
    names, directory = settings.tasks, settings.task_directory
    lm_eval_tasks = require_package("lm_eval.tasks", "tasks", "the option tasks", ModelError)
    with _quietly():
        manager = lm_eval_tasks.TaskManager(include_path=directory)
        unknown = sorted(set(names) - set(manager.all_tasks))
        if unknown:
            raise ModelError(
                f"The task '{unknown[0]}' is not among the {len(manager.all_tasks)} tasks of lm-evaluation-harness"
                f"{f' or in {directory}' if directory else ''}, expected one of them; run `lm-eval ls tasks`."
            )
        options = {"tasks": list(names), "task_manager": manager, "limit": settings.task_limit, "bootstrap_iters": 0}
        options["fewshot_random_seed"] = settings.seed
        try:
            before = _samples(base, base.batch_size, options)
            with edited_context():
                after = _samples(edited, base.batch_size, options)
        except _TASK_ERRORS as error:
            text = textwrap.shorten(str(error), 200, placeholder=" …").rstrip(".")
            raise ModelError(
                f"The tasks {', '.join(names)} cannot be run ({type(error).__name__}: {text}), expected task files and "
                "data that lm-evaluation-harness can read; check them, or the network."
            ) from error
    return tuple(_scores(before, after, settings.seed))


def _samples(loaded: LoadedModel, batch_size: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size or 8, device=str(loaded.device)
    )
    samples: dict[str, Any] = simple_evaluate(model=harness, **options)["samples"]
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
            values = [[part[metric][key] for key in keys] for part in (first, second)]
            base, edited = (mean_with_interval(part, sha, seed=seed) for part in values)
            difference = paired_difference(*values, seed=seed)
            assert base is not None and edited is not None and difference is not None  # a metric has samples
            yield TaskScore(task=task, metric=metric, base=base, edited=edited, difference=difference)


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
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
