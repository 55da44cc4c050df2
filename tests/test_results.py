"""The evidence: what is measured of the variants of a model, what records hold, and what the page says of them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remove_refusals.errors import RecordError
from remove_refusals.measure import evaluate, measuring_prompts
from remove_refusals.models import load
from remove_refusals.prompts import embedded_prompts
from remove_refusals.settings import MeasureSettings

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import device
import results
import results_page
import results_stages
from results_page import Measured
from results_stages import Variant

SIZES = ["--n-test", "6", "--max-new-tokens", "8", "--kl-tokens", "4"]
COST = {"wall_s": 2.0, "cpu_s": 1.0, "peak_memory": 10**9}
LOG = {
    "heretic": "1.4.0", "n_trials": 20, "import_s": 5.0, "search_done_s": 45.0, "wall_s": 60.0, "peak_rss_gb": 2.0,
    "threads": 1, "selected": {"trial": 3, "refusals": 4, "n_bad": 50, "base_refusals": 40, "kl": 0.125},
}  # fmt: skip


class Stages:
    """Stages that run in this process, which spares their start; it keeps which were asked for."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []

    def __call__(self, options: Any, stage: str, name: str) -> tuple[dict[str, Any], dict[str, float]]:
        self.ran.append((stage, name))
        return getattr(results_stages, stage)(options, name), dict(COST)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("results")
    (directory / "result.json").write_text(json.dumps(LOG))
    saved = directory / "measured" / "models" / "classic"
    also = ["--also", f"other={saved}", "--heretic-log", f"other={directory / 'result.json'}", "--keep"]
    return ["demo", str(directory / "measured"), *SIZES, "--only", "classic,other", *also]


@pytest.fixture(scope="module")
def stages(arguments: list[str]) -> Stages:
    """Measures the base, the classic recipe, and the same saved files as another tool's."""
    stages = Stages()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(results, "spawned", stages)
        assert results.measure(results.parsed(arguments)) == 0
    return stages


@pytest.fixture(scope="module")
def directory(arguments: list[str], stages: Stages) -> Path:
    return Path(arguments[1])


@pytest.fixture
def measured(directory: Path) -> Measured:
    return results_page.read([directory])[0][0]


def test_each_variant_is_made_and_measured_once(
    arguments: list[str], stages: Stages, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [("answer", "base"), ("make", "classic"), ("answer", "classic"), ("answer", "other")]
    assert stages.ran == expected
    again = Stages()
    monkeypatch.setattr(results, "spawned", again)
    results.measure(results.parsed(arguments))
    assert again.ran == []
    # Where the record alone is gone, what was answered is still there.
    before = (directory / "classic.json").read_bytes()
    (directory / "classic.json").unlink()
    results.measure(results.parsed(arguments))
    assert again.ran == [] and (directory / "classic.json").read_bytes() == before
    results.measure(results.parsed([*arguments, "--judge-again"]))
    assert again.ran == [] and (directory / "classic.json").read_bytes() == before


@pytest.mark.parametrize("other", [["--n-test", "5"], ["--max-new-tokens", "9"], ["--harmful-test", "mine.txt"]])
def test_a_directory_is_measured_in_one_way(arguments: list[str], directory: Path, other: list[str]) -> None:
    with pytest.raises(SystemExit, match=other[0].removeprefix("--").replace("-", "_")):
        results.measure(results.parsed([*arguments, *other]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["demo"], "give a model and a directory"),
        (["demo", "there", "--only", "classic,clasic"], "clasic"),
        (["demo", "there", "--also", "no-name=there"], "takes NAME=PATH"),
        (["demo", "there", "--only", "run-3", "--seeds", "0,1"], "run-3"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        results.parsed(given)
    assert said in capsys.readouterr().err


def test_seeds_and_other_tools_are_variants() -> None:
    options = results.parsed(["demo", "there", "--seeds", "3,5", "--also", "mine=saved", "--only", "run,mine"])
    assert results.chosen(options) == ["base", "run-3", "run-5", "mine"]
    assert [results.seed_of(name, options) for name in ("run-5", "classic")] == [5, 3]
    own = [results_stages.run_settings(options, name) for name in ("run-5", "layer", "classic", "projected")]
    assert [one.select and one.select.method for one in own] == ["auto", "layer", None, None]
    assert [one.direction.seed for one in own] == [5, 3, 3, 3]
    # The demo model has six layers: from the second to the fifth.
    assert own[3].edit.layers == (1, 4) and own[3].direction.n_prompts == len(embedded_prompts("harmful_train"))


def test_records_hold_no_text_of_an_answer(directory: Path) -> None:
    for name in ("base", "classic", "other"):
        record = (directory / f"{name}.json").read_text(encoding="utf-8")
        found = json.loads((directory / "private" / f"{name}.answer.json").read_text(encoding="utf-8"))["answers"]
        texts = [answer["text"].strip() for answers in found.values() for answer in answers]
        assert len(texts) == 18 and all(len(text) > 8 and text not in record for text in texts)


def test_it_finds_what_an_evaluation_finds(measured: Measured, directory: Path) -> None:
    settings = MeasureSettings(n_test=6, max_new_tokens=8, kl_tokens=4)
    saved = load(directory / "models" / "classic")
    found = evaluate(load("demo"), saved, measuring_prompts(settings), settings)
    classic = measured.variants[1]
    for part, scores in found.sets.items():
        assert measured.rate(measured.base, part, ["refusal"]) == scores.refusals.base
        assert measured.rate(classic, part, ["refusal"]) == scores.refusals.edited
        assert measured.compared(measured.base, classic, part, ["refusal"]).test == scores.refusals.mcnemar
    assert found.sets["harmful"].refusals.base.count == 5
    assert found.kl is not None and found.perplexity is not None
    distance = found.kl.harmless_answered
    assert distance is not None and distance.first_token_median is not None
    assert measured.kl(classic, "first").value == pytest.approx(distance.first_token.value, rel=1e-4)
    assert measured.kl(classic, "mean").high == pytest.approx(distance.mean.high, rel=1e-4)
    assert measured.median(classic) == pytest.approx(distance.first_token_median.value, rel=1e-4)
    ratio = found.perplexity.edited.value / found.perplexity.base.value
    assert measured.perplexity_ratio(classic).value == pytest.approx(ratio, rel=1e-4)


def changed(one: Variant, name: str, **more: Any) -> Variant:
    return one.model_copy(update={"name": name, **more})


def refusing(one: Variant, part: str, n: int, label: str = "refusal") -> dict[str, Any]:
    """Give the sets of a variant that refuses, or lectures on, the last `n` prompts of one of them."""
    labelled = one.sets[part]
    ids = dict.fromkeys(labelled.ids, ()) | {label: tuple(f"prompt {i}" for i in range(labelled.n - n, labelled.n))}
    return one.sets | {part: labelled.model_copy(update={"ids": ids})}


def of(*variants: Variant) -> str:
    return results_page.losses(Measured("mine", variants))


def test_the_page_says_where_run_loses(measured: Measured) -> None:
    base, classic = measured.variants[:2]
    base = base.model_copy(update={"sets": refusing(base, "harmful", 6)})
    run = changed(classic, "run-0", sets=refusing(classic, "harmful", 6))
    same = changed(classic, "classic", sets=refusing(classic, "harmful", 6))
    assert re.search(r"`classic`, which refuses 6 against 6: nothing that was measured\.", of(base, run, same))
    # All six less is decided, two are not; more is nothing that is lost.
    for n, said in ((0, "0 against 6 of 6 (decided beside 1 of 1 seeds)"), (4, "4 against 6 of 6 (decided beside 0")):
        other = changed(classic, "mine", sets=refusing(classic, "harmful", n))
        assert f"harmful prompts refused or lectured on {said}" in of(base, run, other)
        assert f"which refuses 6 against {n}: nothing" in of(base, changed(other, "run-1"), same)
    # Against several seeds it is their mean that counts.
    half = changed(run, "run-1", sets=refusing(run, "harmful", 3))
    other = changed(run, "mine", sets=refusing(run, "harmful", 4))
    assert "4 against 4.5 of 6 (decided beside 0 of 2 seeds)" in of(base, run, half, other)
    assert run.along is not None
    less = {key: one.model_copy(update={"first": one.first / 2}) for key, one in run.along.items()}
    said = of(base, run, changed(run, "mine", along=less))
    assert "first-token KL" in said and "KL along answers" not in said
    assert run.made is not None
    made = run.made.model_copy(update={"cost": run.made.cost.model_copy(update={"peak_memory": 9})})
    cheap = changed(run, "mine", made=made)
    assert "GB of memory at the peak 9e-09 against 1" in of(base, run, cheap)


def test_a_lecture_is_no_answer_and_what_is_not_judged_is_in_no_rate(measured: Measured) -> None:
    base, classic = measured.variants[:2]
    base = base.model_copy(update={"sets": refusing(base, "harmful", 6, "moralising")})
    classic = classic.model_copy(update={"sets": refusing(classic, "harmful", 2, "moralising")})
    own = Measured("mine", (base, classic))
    assert own.rate(classic, "harmful", ["refusal"]).count == 0
    assert own.rate(classic, "harmful", results_page.NOT_ANSWERED).count == 2
    table = results_page.refusals(own)
    assert "| lectures |" in table and "| 6/6 [61, 100]% |" in table and "| 2/6 [10, 70]% |" in table
    unjudged = base.model_copy(update={"sets": refusing(base, "harmful", 5, "unjudged")})
    assert own.rate(classic, "harmful", results_page.NOT_ANSWERED).n == 6
    assert Measured("mine", (unjudged, classic)).rate(classic, "harmful", results_page.NOT_ANSWERED).n == 1


def test_a_prompt_that_is_there_twice_counts_twice(measured: Measured) -> None:
    base = measured.base.model_copy(update={"sets": refusing(measured.base, "harmful", 1)})
    harmful = base.sets["harmful"]
    twice = harmful.model_copy(update={"ids": harmful.ids | {"refusal": ("prompt 4", "prompt 4")}})
    again = base.model_copy(update={"sets": base.sets | {"harmful": twice}})
    own = Measured("mine", (base, again))
    assert (own.rate(again, "harmful", ["refusal"]).count, own.rate(again, "harmful", ["refusal"]).n) == (2, 6)
    test = own.compared(base, again, "harmful", ["refusal"]).test
    assert (test.only_first, test.only_second, test.n) == (1, 2, 6)


def test_the_page_has_every_number_of_another_tool(measured: Measured, directory: Path) -> None:
    text = results_page.page([measured], [])
    assert (
        "Heretic 1.4.0, 20 trials in 40 s by the clock, 2 s each, so that 200 take 400 s; it says of its pick 4 of 50 "
        "refused at a KL of 0.12"
    ) in " ".join(text.split())
    assert "| `other` | - (40) s | - (60) s | 1.0 (2.0) s | - | 2.15 GB |" in text
    assert "| `classic` | " in text and "1.0 (2.0) s | 3.0 (6.0) s | 1.00 GB |" in text
    assert "6 harmful of 60, 6 harmless of 60, 6 alarming of 135 (embedded)" in " ".join(text.split())
    assert "\npython benchmarks/results.py demo measured --n-test 6 --max-new-tokens 8 --kl-tokens 4 --only" in text
    assert "--also other=classic --heretic-log other=result.json --keep\n" in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "- `", "python")))


@pytest.mark.parametrize("fault", ["judge", "prompts", "length", "base"])
def test_records_that_do_not_belong_together_are_refused(fault: str, directory: Path, tmp_path: Path) -> None:
    for name in {"base", "classic"} - {fault}:
        record = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        if name == "classic":
            record["how"] |= {"judge": {"judge": "another"}, "length": {"max_new_tokens": 9}}.get(fault, {})
            record["sets"]["harmful"] |= {"prompts_sha256": "0"} if fault == "prompts" else {}
        (tmp_path / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(RecordError, match=fault):
        results_page.read([tmp_path])


def test_a_stage_leaves_what_it_found(arguments: list[str], directory: Path) -> None:
    results.main([*arguments, "--stage", "answer", "--variant", "base"])
    part = directory / "private" / "base.answer.part"
    found = json.loads(part.read_text(encoding="utf-8"))
    part.unlink()
    assert found["record"]["sets"] == json.loads((directory / "base.json").read_text(encoding="utf-8"))["sets"]


def test_a_stage_runs_in_a_process_of_its_own_that_is_counted(
    arguments: list[str], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any script that is called as the benchmark calls itself, without its start of some seconds.
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "stage, name = sys.argv[-3], sys.argv[-1]\n"
        "assert sys.argv[1] == 'demo' and (sys.argv[-4], sys.argv[-2]) == ('--stage', '--variant')\n"
        "time.sleep(0.3)\n"
        "while time.process_time() < 0.2: pass\n"
        "if name == 'classic': sys.exit(3)\n"
        "pathlib.Path(sys.argv[2], 'private', f'{name}.{stage}.part').write_text('{\"found\": 1}')\n"
    )
    monkeypatch.setattr(results, "__file__", str(script))
    found, cost = results.spawned(results.parsed(arguments), "make", "base")
    assert found == {"found": 1} and not list((directory / "private").glob("*.part"))
    assert 0.2 <= cost["cpu_s"] < cost["wall_s"] and cost["wall_s"] >= 0.5 and cost["peak_memory"] > 5e6
    with pytest.raises(subprocess.CalledProcessError):
        results.spawned(results.parsed(arguments), "make", "classic")
    # One that fails leaves the others to be measured.
    kept = (directory / "classic.json").rename(tmp_path / "classic.json")
    monkeypatch.setattr(results, "staged", lambda options, stage, name, **_: results.spawned(options, stage, name)[0])
    assert results.measure(results.parsed(arguments)) == 1
    assert not (directory / "classic.json").exists()
    kept.rename(directory / "classic.json")


def test_the_script_for_a_device_runs_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    given = ["--device", "cpu", "--dtype", "float32", "--select", "none", "--n-test", "4", "--max-new-tokens", "6"]
    device.main(["demo", "-o", str(tmp_path / "mine" / "device.json"), *given])
    measured, (record,) = results_page.read([tmp_path / "mine"])
    assert measured == [] and record.machine.device == "cpu"
    assert {"loading", "activations", "saving", "answers of the edited model", "damage"} <= set(record.steps)
    assert record.cost.wall_s >= sum(took.wall_s for took in record.steps.values()) > 0
    refusals = record.evaluation.sets["harmful"].refusals
    assert f"harmful refused {refusals.base.count} → {refusals.edited}" in results_page.on_devices([record])
