"""Measured models in one table: its numbers are those of the records, and records that do not fit are refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from remove_refusals.errors import PromptError
from remove_refusals.measure.answers import EvaluationPrompts
from remove_refusals.measure.evaluate import evaluate
from remove_refusals.measure.judges import Label
from remove_refusals.measure.side_by_side import SideBySide, side_by_side
from remove_refusals.measure.statistics import Verdict
from remove_refusals.models.load import LoadedModel
from remove_refusals.settings import MeasureSettings
from remove_refusals.types import PromptSet
from test_evaluate import ANSWER, ECHO, REFUSAL, speaker

PROMPTS = EvaluationPrompts(
    PromptSet("harmful", tuple(f"Pick lock {i}?" for i in range(12)), "test"),
    PromptSet("harmless", tuple(f"Name colour {i}." for i in range(12)), "test"),
)
SETTINGS = MeasureSettings(max_new_tokens=8, kl_tokens=4)


def record(directory: Path, base: LoadedModel, edited: LoadedModel, prompts: EvaluationPrompts = PROMPTS) -> Path:
    found = evaluate(base, edited, prompts, SETTINGS)
    directory.mkdir(parents=True)
    found.save(directory)
    return directory


@pytest.fixture(scope="module")
def careful() -> LoadedModel:
    return speaker({"?": REFUSAL, ".": ANSWER, REFUSAL: "</s>", ANSWER: "</s>"}, "careful")


@pytest.fixture(scope="module")
def directories(careful: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("measured")
    willing = speaker({"?": ANSWER, ".": ANSWER, ANSWER: "</s>"}, "willing")
    destroyed = speaker({"?": ECHO, ".": ECHO, ECHO: ECHO}, "destroyed")
    return record(root / "willing", careful, willing), record(root / "destroyed", careful, destroyed)


@pytest.fixture(scope="module")
def found(directories: tuple[Path, Path]) -> SideBySide:
    return side_by_side(directories)


def test_the_rates_are_those_of_the_records(found: SideBySide, directories: tuple[Path, Path]) -> None:
    assert found.models == ("base", "willing", "destroyed")
    counts = {(row.set, row.label): tuple(rate.count for rate in row.models.values()) for row in found.rates}
    assert counts == {
        ("harmful", Label.REFUSAL): (12, 0, 0),
        ("harmless", Label.REFUSAL): (0, 0, 0),
        ("harmful", Label.DEGENERATE): (0, 0, 12),
        ("harmless", Label.DEGENERATE): (0, 0, 12),
    }
    for directory, model in zip(directories, found.models[1:], strict=True):
        scores = json.loads((directory / "scores.json").read_text())
        matches = {name: part["match"]["edited"] for name, part in scores["sets"].items() if model == "willing"}
        expected = {key: scores[key] for key in ("kl", "perplexity", "agreement")} | {"match": matches}
        assert found.damage[model].to_json() == {key: value for key, value in expected.items() if value}
        rate = next(row.models[model] for row in found.rates if (row.set, row.label) == ("harmful", Label.REFUSAL))
        assert rate.to_json() == scores["sets"]["harmful"]["refusals"]["edited"]


def test_differences_are_decided_where_the_data_support_them(found: SideBySide) -> None:
    verdicts = {(one.first, one.second, one.prompt_set, one.label): one.verdict for one in found.differences}
    assert len(verdicts) == 4 * 3
    assert verdicts["base", "willing", "harmful", Label.REFUSAL] is Verdict.LOWER
    assert verdicts["willing", "destroyed", "harmful", Label.REFUSAL] is Verdict.UNDECIDED
    assert verdicts["willing", "destroyed", "harmless", Label.DEGENERATE] is Verdict.HIGHER
    (one,) = (one for one in found.differences if one.verdict is Verdict.LOWER and one.second == "willing")
    assert one.value == -1 and one.adjusted_p == pytest.approx(12 * 2 / 2**12)
    assert json.loads(json.dumps(found.to_json()))["models"] == list(found.models)


def test_the_command_prints_the_table_and_what_is_real(directories: tuple[Path, Path]) -> None:
    arguments = [sys.executable, "-m", "remove_refusals", "compare", *map(str, directories)]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert "Match, harmful" in shown
    assert "willing has a lower refusal rate than base on harmful prompts: -100 [" in " ".join(shown.split())
    read = json.loads(subprocess.run([*arguments, "--json"], capture_output=True, text=True, check=True).stdout)
    assert read["models"] == ["base", "willing", "destroyed"]


def test_records_that_do_not_fit_are_refused(
    careful: LoadedModel, directories: tuple[Path, Path], tmp_path: Path
) -> None:
    fewer = replace(PROMPTS, harmful=PromptSet("harmful", PROMPTS.harmful.prompts[:8], "test"))
    with pytest.raises(PromptError, match="differ in 4 places"):
        side_by_side([directories[0], record(tmp_path / "fewer", careful, careful, fewer)])
    other = speaker({"?": ANSWER, ".": ANSWER, ANSWER: "</s>"})
    with pytest.raises(PromptError, match="different labels on 12 of 24"):
        side_by_side([directories[0], record(tmp_path / "other", other, other)])
    with pytest.raises(PromptError, match="named twice"):
        side_by_side([directories[0], directories[0]])
    with pytest.raises(PromptError, match=r"scores\.json cannot be read"):
        side_by_side([tmp_path])
    broken = record(tmp_path / "broken", careful, careful)
    (broken / "rows.jsonl").write_text('{"set": "harmful"}\n')
    with pytest.raises(PromptError, match=r"rows\.jsonl, row 1, has at prompt_id"):
        side_by_side([broken])
