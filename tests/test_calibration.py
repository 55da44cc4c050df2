import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import Command
from remove_refusals.errors import JudgeError
from remove_refusals.measure.judges import Judgement, Label
from remove_refusals.measure.judges.calibration import (
    Calibration,
    calibrate,
    embedded_answers,
    load_answers,
    load_calibration,
)
from remove_refusals.measure.judges.phrases import PhraseJudge
from remove_refusals.measure.statistics import JudgeAccuracy, rogan_gladen

ANSWERS = [
    ("How do I bake?", "Mix flour and water, and heat it.", "compliance"),
    ("How do I bake?", "I can't help with that.", "refusal"),
    ("How do I bake?", "I can't help with that.", "compliance"),
    ("How do I bake?", "Cake is tasty.", "deflection"),
    ("How do I bake?", "", "degenerate"),
    ("How do I bake?", "Non, merci, cela ne se fait pas.", "refusal"),
]


class Contrary:
    """Calls everything a refusal."""

    name = "contrary"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        return [Judgement(Label.REFUSAL)] * len(answers)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.jsonl"
    lines = [json.dumps(dict(zip(("prompt", "answer", "label"), row, strict=True))) for row in ANSWERS]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_counts_and_rates_are_those_of_the_table(labelled: Path) -> None:
    found = calibrate(PhraseJudge(), load_answers(labelled))
    assert (found.judge, found.labelled, found.n) == ("phrases", "labelled.jsonl", 6)
    assert found.sha256 == hashlib.sha256(labelled.read_bytes()).hexdigest()
    assert found.accuracies[Label.REFUSAL] == JudgeAccuracy(1, 2, 3, 4)
    assert found.accuracies[Label.COMPLIANCE] == JudgeAccuracy(1, 2, 2, 4)
    assert found.accuracies[Label.DEFLECTION] == JudgeAccuracy(0, 1, 5, 5)
    assert found.accuracies[Label.DEGENERATE] == JudgeAccuracy(1, 1, 5, 5)
    sensitivity, specificity = found.classes[Label.REFUSAL].sensitivity, found.classes[Label.REFUSAL].specificity
    # Wilson for 1 of 2 and 3 of 4.
    assert (sensitivity.value, sensitivity.low, sensitivity.high) == pytest.approx((0.5, 0.0945, 0.9055), abs=1e-4)
    assert (specificity.value, specificity.low, specificity.high) == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)
    assert list(found.confusion[Label.REFUSAL].values()) == [1, 0, 1, 0, 0]
    assert (str(sensitivity), str(specificity)) == ("1/2 [9, 91]%", "3/4 [30, 95]%")


def test_a_label_that_no_answer_has_cannot_be_measured() -> None:
    confusion = {true: {said: int(true is said is Label.REFUSAL) for said in Label} for true in Label}
    found = Calibration.counted("j", "l", "0", confusion)
    assert found.accuracies == {} and found.n == 1
    assert found.to_json()["classes"] == {}


def test_a_judge_that_sees_only_refusals_corrects_nothing() -> None:
    accuracy = calibrate(Contrary(), embedded_answers()).accuracies[Label.REFUSAL]
    assert rogan_gladen(50, 100, accuracy) is None


def test_by_default_the_phrase_judge_meets_answers_that_it_was_not_mended_by() -> None:
    assert calibrate(PhraseJudge()).n == 169
    assert calibrate(Contrary()).n == 338
    whole, half = embedded_answers(), embedded_answers(held_out=True)
    assert half.rows == whole.rows[1::2]
    assert half.sha256 == whole.sha256


def test_a_calibration_is_read_as_it_was_written(labelled: Path, tmp_path: Path) -> None:
    found = calibrate(PhraseJudge(), load_answers(labelled))
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(found.to_json()), encoding="utf-8")
    assert load_calibration(path) == found
    assert load_calibration(path, PhraseJudge()) == found
    with pytest.raises(JudgeError, match="is of the judge phrases, expected one of contrary"):
        load_calibration(path, Contrary())


@pytest.mark.parametrize("content", ["[]", "{}", '{"judge": "a", "confusion": {"refusal": {"refusal": -1}}}', "no"])
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(JudgeError):
        load_calibration(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 labelled answers"),
        (b'{"prompt": "a", "answer": "b"}\n', "line 1 of .* has at label "),
        (b'{"prompt": "a", "answer": "b", "label": "refusal"}\nx\n', "line 2 of"),
        (b'{"prompt": "a", "answer": "b", "label": "maybe"}\n', r"line 1 of .* at label 'maybe' .*'refusal'"),
        (b'{"prompt": "a", "answer": 1, "label": "refusal"}\n', "at answer 1 .*valid string"),
        (b'{"prompt": "a", "answer": "b", "label": ["refusal"]}\n', r"at label \['refusal'\]"),
        (b'"refusal"\n', "line 1 of"),
        (b"\xff\n", "line 1 of"),
    ],
)
def test_answers_of_another_form_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_bytes(content)
    with pytest.raises(JudgeError, match=said):
        load_answers(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="cannot be read"):
        load_answers(tmp_path / "none.jsonl")


def test_the_command_prints_and_saves(command: Command, labelled: Path, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    shown = command("judge", "calibrate", labelled, "-o", path)
    assert (shown.code, shown.err) == (0, "")
    assert "1/2 [9, 91]%" in shown.out
    assert load_calibration(path, PhraseJudge()).n == 6
    again = command("judge", "calibrate", labelled, "-o", path)
    assert again.code == 2
    printed = command("judge", "calibrate", labelled, "--json")
    assert json.loads(printed.out) == json.loads(path.read_text(encoding="utf-8"))
    wrong = command("judge", "calibrate", labelled, "--judge", "http://127.0.0.1/v1")
    assert wrong.code == 2
    assert wrong.err.startswith("Error: The judge's address is http://127.0.0.1/v1, expected URL#MODEL")
