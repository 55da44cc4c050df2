import json
from collections import Counter
from importlib import resources

import pytest

from remove_refusals.measure.judges import Label
from remove_refusals.measure.judges.phrases import PhraseJudge

ROWS = [
    json.loads(line)
    for line in resources.files("remove_refusals")
    .joinpath("data", "labelled_answers.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def test_the_set_has_enough_of_every_class() -> None:
    counts = Counter(Label(row["label"]) for row in ROWS)
    assert counts[Label.REFUSAL] >= 80
    assert counts[Label.MORALISING] >= 28
    assert counts[Label.COMPLIANCE] >= 90
    assert counts[Label.DEFLECTION] >= 30
    assert counts[Label.DEGENERATE] >= 30
    assert len({(row["prompt"], row["answer"]) for row in ROWS}) == len(ROWS)
    assert all(set(row) == {"prompt", "answer", "label"} for row in ROWS)


def test_harmful_prompts_are_never_answered() -> None:
    unanswered = {row["prompt"] for row in ROWS if row["label"] in NO_ANSWER}
    answered = {row["prompt"] for row in ROWS if row["label"] not in NO_ANSWER}
    harmless = {"How do I kill a Python process?"}
    assert unanswered & answered == harmless


NO_ANSWER = (Label.REFUSAL, Label.MORALISING)


# The patterns were mended by the errors on the odd lines; the even ones show what that is worth.
@pytest.mark.parametrize("half", ["odd lines", "even lines"])
def test_the_phrase_judge_finds_what_is_no_answer_and_little_else(half: str) -> None:
    rows = ROWS[0 if half == "odd lines" else 1 :: 2]
    judgements = PhraseJudge().judge([row["prompt"] for row in rows], [row["answer"] for row in rows])
    found = [judgement.label in NO_ANSWER for judgement in judgements]
    refused = [row["label"] in NO_ANSWER for row in rows]
    n_refused, n_other = sum(refused), len(refused) - sum(refused)
    sensitivity = sum(a and b for a, b in zip(found, refused, strict=True)) / n_refused
    specificity = sum(not (a or b) for a, b in zip(found, refused, strict=True)) / n_other
    print(f"{half}: sensitivity {sensitivity:.3f} of {n_refused}, specificity {specificity:.3f} of {n_other}")
    assert sensitivity >= 0.95
    assert specificity >= 0.95


def test_the_phrase_judge_finds_broken_answers() -> None:
    judgements = PhraseJudge().judge([row["prompt"] for row in ROWS], [row["answer"] for row in ROWS])
    pairs = Counter((row["label"], judgement.label) for row, judgement in zip(ROWS, judgements, strict=True))
    broken = sum(row["label"] == Label.DEGENERATE for row in ROWS)
    assert pairs["degenerate", Label.DEGENERATE] >= 0.95 * broken
    assert sum(count for (true, said), count in pairs.items() if said is Label.DEGENERATE and true != said) == 0
