"""Tasks of lm-evaluation-harness, against direct computations."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from remove_refusals.errors import ModelError
from remove_refusals.measure.statistics import paired_difference
from remove_refusals.measure.tasks import _scores, run_tasks
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.settings import MeasureSettings

ROWS = [{"question": f"Name {word}", "choices": [" a fish", " a very long stone"], "answer": i % 2} for i, word in
        enumerate("one two three four five six seven eight".split())]  # fmt: skip


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def edited(base: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(base.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.add_(0.3 * torch.randn_like(layer.mlp.down_proj.weight))
    return LoadedModel(model, base.tokenizer, "edited")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task": "own_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "own_task.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def asked(directory: Path, **settings: object) -> MeasureSettings:
    return MeasureSettings(**{"tasks": ("own_task",), "task_directory": str(directory), **settings})  # type: ignore[arg-type]


def accuracy(loaded: LoadedModel) -> list[float]:
    """One sequence at a time: which continuation is likelier."""
    found = []
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            start = loaded.tokenizer(row["question"])["input_ids"]
            whole = loaded.tokenizer(str(row["question"]) + choice)["input_ids"]
            with torch.no_grad():
                logs = loaded.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logs[place - 1, whole[place]]) for place in range(len(start), len(whole))))
        found.append(float(sums.index(max(sums)) == row["answer"]))
    return found


def test_a_task_gives_what_a_direct_computation_gives_in_pairs(
    base: LoadedModel, edited: LoadedModel, tasks: Path
) -> None:
    (found,) = run_tasks(replace(base, batch_size=3), edited, asked(tasks))
    before, after = accuracy(base), accuracy(edited)
    assert (found.task, found.metric, found.base.n) == ("own_task", "acc", len(ROWS))
    assert (found.base.value, found.edited.value) == (sum(before) / len(ROWS), sum(after) / len(ROWS))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    assert found.difference.value == pytest.approx(sum(differences) / len(ROWS))
    assert found.difference == paired_difference(before, after)
    (again,) = run_tasks(base, base, asked(tasks, task_limit=5))
    assert again.base.n == 5
    assert not again.difference.decided
    assert (again.difference.low, again.difference.high) == (0, 0)


def sample(number: int, value: float) -> dict[str, object]:
    return {"metrics": ["acc"], "acc": value, "doc_id": number, "prompt_hash": "", "doc_hash": ""}


def test_few_samples_decide_nothing() -> None:
    """Two models that differ on every sample: eight of them tell, and five cannot."""
    first, second = ([sample(number, value) for number in range(8)] for value in (0.0, 1.0))
    for n, decided in ((8, True), (5, False)):
        (found,) = _scores({"own": first[:n]}, {"own": second[:n]}, 0)
        assert (found.difference.value, found.difference.decided) == (1.0, decided)


def test_a_task_whose_data_are_missing_is_refused_in_a_sentence(base: LoadedModel, tasks: Path) -> None:
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(ModelError, match="The tasks own_task cannot be run"):
        run_tasks(base, base, asked(tasks))


def test_a_task_that_is_not_known_is_refused_by_name(base: LoadedModel, tasks: Path) -> None:
    with pytest.raises(ModelError, match="'another_task' is not among"):
        run_tasks(base, base, asked(tasks, tasks=("own_task", "another_task")))
