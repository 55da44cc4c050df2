import functools
import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from remove_refusals.measure.judges import Label
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.measure.statistics import wilson_rate


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


WRITTEN = rows_of(
    resources.files("remove_refusals").joinpath("data", "labelled_answers.jsonl").read_text(encoding="utf-8")
)
# What models said; answers_of_models.md says which and how they were labelled.
SAID = rows_of(Path(__file__).with_name("answers_of_models.jsonl").read_text(encoding="utf-8"))
NO_ANSWER = (Label.REFUSAL, Label.MORALISING)


@functools.cache
def label_of(prompt: str, answer: str) -> Label:
    return PhraseJudge().judge([prompt], [answer])[0].label


def judged(rows: list[dict[str, Any]]) -> list[Label]:
    return [label_of(row["prompt"], row["answer"]) for row in rows]


def test_the_sets_have_enough_of_every_class() -> None:
    counts, said = (Counter(Label(row["label"]) for row in rows) for rows in (WRITTEN, SAID))
    assert counts[Label.REFUSAL] >= 80
    assert counts[Label.MORALISING] >= 28
    assert counts[Label.COMPLIANCE] >= 90
    assert counts[Label.DEFLECTION] >= 30
    assert counts[Label.DEGENERATE] >= 30
    assert len(SAID) >= 300 and said[Label.REFUSAL] >= 80 and said[Label.COMPLIANCE] >= 80
    for rows, more in ((WRITTEN, set()), (SAID, {"model", "harmful"})):
        assert len({(row["prompt"], row["answer"], row.get("model")) for row in rows}) == len(rows)
        assert all(set(row) == {"prompt", "answer", "label", *more} for row in rows)


def test_harmful_prompts_are_never_answered() -> None:
    unanswered = {row["prompt"] for row in WRITTEN if row["label"] in NO_ANSWER}
    answered = {row["prompt"] for row in WRITTEN if row["label"] not in NO_ANSWER}
    harmless = {"How do I kill a Python process?"}
    assert unanswered & answered == harmless
    assert {row["label"] for row in SAID if row["harmful"]} == {*NO_ANSWER, Label.DEFLECTION}
    assert not {row["prompt"] for row in SAID if row["harmful"]} & {row["prompt"] for row in SAID if not row["harmful"]}


def test_no_prompt_of_the_models_is_in_both_halves() -> None:
    assert not {row["prompt"] for row in SAID[0::2]} & {row["prompt"] for row in SAID[1::2]}


# The patterns were mended by the errors on the odd lines; the even ones show what that is worth.
@pytest.mark.parametrize("half", ["odd lines", "even lines"])
@pytest.mark.parametrize("of", ["written", "of models"])
def test_the_phrase_judge_finds_what_is_no_answer_and_little_else(of: str, half: str) -> None:
    rows = (WRITTEN if of == "written" else SAID)[half == "even lines" :: 2]
    true, said = [row["label"] in NO_ANSWER for row in rows], [label in NO_ANSWER for label in judged(rows)]
    pairs = Counter(zip(true, said, strict=True))
    sensitivity = wilson_rate(pairs[True, True], sum(true), "")
    specificity = wilson_rate(pairs[False, False], len(true) - sum(true), "")
    assert sensitivity is not None and specificity is not None
    print(f"refusal or lecture, {of}, {half}: sensitivity {sensitivity}, specificity {specificity}")
    assert sensitivity.value >= 0.95
    assert specificity.value >= 0.95


@pytest.mark.parametrize("half", ["odd lines", "even lines"])
def test_lectures_are_told_from_refusals_and_from_answers(half: str) -> None:
    rows = [row for rows in (WRITTEN, SAID) for row in rows[half == "even lines" :: 2]]
    pairs = Counter(zip((row["label"] == Label.MORALISING for row in rows), judged(rows), strict=True))
    n = sum(count for (true, _), count in pairs.items() if true)
    found, others = wilson_rate(pairs[True, Label.MORALISING], n, ""), pairs[False, Label.MORALISING]
    assert found is not None
    print(f"lectures, {half}: found {found}, called so beside them {others} of {len(rows) - n}")
    assert found.value >= 0.85
    assert others <= 0.01 * (len(rows) - n)


def test_the_phrase_judge_finds_broken_answers() -> None:
    pairs = Counter((row["label"], label) for row, label in zip(WRITTEN, judged(WRITTEN), strict=True))
    broken = sum(row["label"] == Label.DEGENERATE for row in WRITTEN)
    assert pairs["degenerate", Label.DEGENERATE] >= 0.95 * broken
    assert sum(count for (true, said), count in pairs.items() if said is Label.DEGENERATE and true != said) == 0
