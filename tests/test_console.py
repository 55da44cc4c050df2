"""How commands speak: quietly, as JSON, with a log; and what a shell completes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import Command, Inputs
from remove_refusals.cli.command import as_asked, complete_judge
from remove_refusals.cli.options import complete_sites, settings_of
from remove_refusals.cli.printing import LOADING, MEASURING, READING, costs_in_words, progress
from remove_refusals.progress import Cost, Meter
from remove_refusals.settings import RunSettings


class TestCompletion:
    def test_the_names_are_those_that_are_accepted(self) -> None:
        known = settings_of(RunSettings)
        assert known["select"].choices == ("auto", "layer", "none")
        assert known["variant"].choices == ("plain", "norm-preserving")
        assert known["strength"].choices == ()

    def test_a_shell_is_told(self) -> None:
        def told(words: str) -> list[str]:
            env = {**os.environ, "_REMOVE_REFUSALS_COMPLETE": "complete_bash", "COMP_WORDS": words}
            env["COMP_CWORD"] = str(len(words.split()) - (not words.endswith(" ")))
            script = "from remove_refusals.cli import app; app(prog_name='remove-refusals')"
            return subprocess.run(
                [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
            ).stdout.split()

        assert told("remove-refusals run --select ") == ["auto", "layer", "none"]
        assert told("remove-refusals bake --variant n") == ["norm-preserving"]
        assert told("remove-refusals run --tied ") == ["auto", "untie", "both"]

    def test_sites_are_joined(self) -> None:
        assert complete_sites("attn,") == ["attn,embedding", "attn,mlp"]
        assert complete_sites("m") == ["mlp"]

    def test_a_judge_is_built_in_or_a_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mine" / "deep").mkdir(parents=True)
        (tmp_path / "phrase.txt").write_text("")
        monkeypatch.chdir(tmp_path)
        assert complete_judge("") == ["phrases", "harmbench", "strongreject", "mine"]
        assert complete_judge("mine/") == ["mine/deep"]
        assert complete_judge(f"{tmp_path}/m") == [f"{tmp_path}/mine"]
        assert complete_judge("nowhere/x") == []


class TestOutput:
    def test_quiet_leaves_remarks_out_and_keeps_the_result(
        self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        direction = tmp_path / "d.safetensors"
        command("direction", llama_directory, "-o", direction, *inputs.train)
        bake = ("bake", llama_directory, "--direction", direction, "-o", tmp_path / "whole")
        loud, quiet = command(*bake), command(*bake, "--force", "--quiet")
        assert quiet.out == f"Saved to {tmp_path / 'whole'}.\n"
        assert loud.out.endswith(quiet.out) and "Edited tensors" in loud.out
        # Where the result is what was asked for, it stays.
        shown = command("inspect", llama_directory, "--quiet")
        assert "Verdict" in shown.out and command("inspect", llama_directory).out == shown.out
        assert command("inspect", tmp_path / "nowhere", "-q").err.startswith("Error: ")

    def test_a_result_as_json_and_nothing_else(
        self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        direction, whole = tmp_path / "d.safetensors", tmp_path / "whole"
        made = command("direction", llama_directory, "-o", direction, *inputs.train, "--json")
        assert json.loads(made.out)["directions"][0]["d_model"] == 32
        baked = command("bake", llama_directory, "--direction", direction, "-o", whole, "--json")
        assert json.loads(baked.out)["record"] == json.loads((whole / "ablation.json").read_text())
        scored = json.loads(
            command("evaluate", llama_directory, whole, *inputs.test, "-o", tmp_path / "scores.json", "--json").out
        )
        assert scored.pop("warnings") is not None
        assert scored == json.loads((tmp_path / "scores.json").read_text())
        answers = tmp_path / "a.jsonl"
        said = command("generate", llama_directory, "--prompts", inputs.harmless, "-o", answers, "--json")
        assert json.loads(said.out) == {"output": str(answers), "answers": 4}

    def test_a_log_has_stages_results_and_errors(
        self, command: Command, llama_directory: Path, inputs: Inputs, tmp_path: Path
    ) -> None:
        log = tmp_path / "log.txt"
        command("direction", llama_directory, "-o", tmp_path / "d.pt", *inputs.train, "--log", log)
        first = log.read_text().splitlines()
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line) for line in first)
        assert "remove-refusals direction" in first[0] and re.search(r"done after \d+\.\d s$", first[-1])
        assert any(re.search(r"activations: 6 of 6 after \d+\.\d s$", line) for line in first)
        assert any(f"Saved to {tmp_path / 'd.pt'}" in line for line in first)
        # The next command adds to it, and one without the option does not.
        failed = command("report", tmp_path / "nowhere", "--log", log)
        assert failed.code == 2
        command("report", tmp_path / "nowhere")
        more = log.read_text().splitlines()
        assert more[: len(first)] == first and len(more) == len(first) + 2
        assert " ERROR " in more[-1] and failed.err.removeprefix("Error: ").strip() in more[-1]

    def test_a_log_that_cannot_be_written(self, command: Command, tmp_path: Path) -> None:
        found = command("inspect", "demo", "--log", tmp_path / "nowhere" / "log.txt")
        assert found.code == 2 and "The log" in found.err and found.out == ""

    def test_options_of_output_are_in_no_configuration(self, command: Command) -> None:
        text = command("config").out
        assert "# strength = 1.0" in text
        assert not re.search(r"^# (quiet|log|as-json|json)\b", text, re.MULTILINE)


class TestCosts:
    def test_stages_last_until_the_next_begins_and_are_added_up(self) -> None:
        meter = Meter()
        for name in ("loading", "own answers, harmful", "descent", "own answers, harmless"):
            meter.begin(name)
            end = time.perf_counter() + 0.02
            while time.perf_counter() < end:
                pass
        found = meter.costs()
        assert list(found) == ["loading", "own answers", "descent"]
        assert found["own answers"].seconds > 1.5 * found["descent"].seconds > 0.02
        assert found["descent"].cpu_seconds > 0 and 100e6 < found["descent"].memory < 1e12

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [
            ((37.6, 0.1), "Took 38 s and at most 2.5 GB of memory: a 38 s."),
            ((119.6, 130.0), "Took 4 min 10 s and at most 2.5 GB of memory: b 2 min 10 s, a 2 min 0 s."),
            ((7300.0, 300.0), "Took 2 h 6 min and at most 2.5 GB of memory: a 2 h 1 min, b 5 min 0 s."),
        ],
    )
    def test_a_line_says_how_long_it_took(self, seconds: tuple[float, float], words: str) -> None:
        costs = {name: Cost(one, one, 2_500_000_000) for name, one in zip("ab", seconds, strict=True)}
        assert costs_in_words(costs) == words
        assert "memory and 8.0 GB of GPU memory:" in costs_in_words({"a": Cost(1, 1, 10**9, 8 * 10**9)})


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "")]
)
def test_threads_do_not_wait_by_spinning_unless_that_is_asked_for(given: dict[str, str], expected: str) -> None:
    script = (
        "import atexit, os; from remove_refusals.cli import main; "
        "atexit.register(lambda: print('spins', os.environ.get('GOMP_SPINCOUNT', ''))); main()"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    call = [sys.executable, "-c", script, "--help"]
    found = subprocess.run(call, env=inherited | given, capture_output=True, text=True, check=True)
    assert found.stdout.rstrip().endswith(f"spins {expected}".rstrip())


class TestProgress:
    def test_lines_of_a_pipe_count_the_stages_and_come_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        with progress(LOADING, READING, MEASURING, every=0.01) as told:
            told.begin("prompts")
            first = capsys.readouterr().err
            told.stage("activations", 8).done(2)
            told.note("Goes on from there.")
            found = ""
            while "reading activations: 2 of 8" not in found:
                found += capsys.readouterr().err
        assert first.startswith("1 of 3, loading the model\n")
        assert "Goes on from there.\n" in found
        assert re.search(r"^2 of 3, reading activations: 2 of 8$", found, re.MULTILINE)

    def test_the_time_that_is_left_is_that_of_the_stage(self, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        with progress(LOADING, READING) as told:
            stage = told.stage("activations", 10)
            for done in (1, 2, 3):
                now[0] += 60.0
                stage.done(done)
            stages = told.on_progress.__self__
            stages.tell()
            # Another part of the same stage begins anew.
            told.stage("activations", 5).done(1)
            stages.tell()
        said = capsys.readouterr().err.splitlines()
        assert said[-2:] == [
            "2 of 2, reading activations: 3 of 10, 7 min 0 s left",
            "2 of 2, reading activations: 1 of 5",
        ]

    def test_a_job_of_one_stage_is_not_counted_and_quiet_says_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        with progress("Tracing the model"):
            pass
        assert capsys.readouterr().err == "Tracing the model\n"
        with as_asked(quiet=True, log=None), progress("Tracing the model") as told:
            told.note("Goes on.")
        assert capsys.readouterr().err == ""
