"""What `--help` says: it fits a screen, has an example that can be given, and hides nothing from who asks for all."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import report_records
from conftest import Command
from remove_refusals import cli
from remove_refusals.cli.options import FURTHER

WIDTH, SCREEN = 100, 50
WHOLE = typer.main.get_command(cli.app)


def all_commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Give every command, and every group, with its names."""
    yield before, group
    for name, found in getattr(group, "commands", {}).items():
        yield from all_commands(found, (*before, name))


COMMANDS = dict(all_commands(WHOLE))
ALONE = [names for names, found in COMMANDS.items() if not hasattr(found, "commands")]
WITH_MORE = [names for names in ALONE if any(option.name == "help_all" for option in COMMANDS[names].params)]


def options_of(names: tuple[str, ...]) -> dict[str, str]:
    """Give a command's options: the name of each parameter, and the option's first name."""
    return {option.name: option.opts[0] for option in COMMANDS[names].params if option.param_type_name == "option"}


def shown_on(page: str) -> set[str]:
    """Give the options that have a line of their own."""
    return set(re.findall(r"^│ [* ]*(--[a-z0-9-]+)", page, re.MULTILINE))


@pytest.fixture
def page(command: Command, monkeypatch: pytest.MonkeyPatch):
    def read(*arguments: str) -> str:
        monkeypatch.setenv("COLUMNS", str(WIDTH))
        monkeypatch.setenv("TERM", "dumb")
        found = command(*arguments)
        assert (found.code, found.err) == (0, "")
        return found.out

    return read


@pytest.mark.parametrize("names", COMMANDS, ids=lambda names: " ".join(names) or "all")
def test_fits_a_screen(page, names: tuple[str, ...]) -> None:
    lines = page(*names, "--help").splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("names", ALONE, ids=" ".join)
def test_shows_every_option_or_says_where_they_are(page, names: tuple[str, ...]) -> None:
    said, options = page(*names, "--help"), options_of(names)
    if names not in WITH_MORE:
        assert shown_on(said) == {*options.values(), "--help"}
        return
    left_out = {option for name, option in options.items() if name in FURTHER}
    assert left_out and shown_on(said) == {*options.values(), "--help"} - left_out
    assert f"There are {len(left_out)} more options; --help-all shows every one." in said
    everything = page(*names, "--help-all")
    assert shown_on(everything) == {*options.values(), "--help"}
    assert "more options" not in everything


def test_what_is_left_out_exists() -> None:
    assert {name for names in WITH_MORE for name in options_of(names)} >= FURTHER


def test_every_command_can_be_quiet_and_write_a_log() -> None:
    for names in ALONE:
        options = set(options_of(names).values())
        assert {"--quiet", "--log"} <= options
        assert ("--json" in options) == (names[0] not in ("chat", "ui", "serve"))
        assert ("--verbose" in options) == (names[0] in ("run", "evaluate", "analyze"))


@pytest.mark.parametrize("names", ALONE, ids=" ".join)
def test_has_an_example_that_can_be_given(page, names: tuple[str, ...]) -> None:
    example = re.search(r"Example: (remove-refusals .*)", page(*names, "--help"))
    assert example is not None
    words = shlex.split(example[1])
    assert words[1 : 1 + len(names)] == list(names)
    # It is read like a command line: what is no option, or is no value of one, ends here.
    context = COMMANDS[names].make_context(" ".join(names), words[1 + len(names) :])
    assert context.params


def test_a_shell_completes_the_options_that_a_short_page_leaves_out() -> None:
    words = {"_REMOVE_REFUSALS_COMPLETE": "complete_bash", "COMP_WORDS": "remove-refusals run --", "COMP_CWORD": "2"}
    script = "from remove_refusals.cli import app; app(prog_name='remove-refusals')"
    found = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | words, capture_output=True, text=True, check=False
    )
    assert set(options_of(("run",)).values()) <= set(found.stdout.split())


def imported_by(*words: object, code: int = 0) -> set[str]:
    """Give the packages that a command has imported when it ends with that code."""
    call = [sys.executable, "-X", "importtime", "-m", "remove_refusals", *map(str, words)]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    assert found.returncode == code, found.stderr[-500:]
    return set(re.findall(r"\|\s+(\S+)$", found.stderr, re.MULTILINE))


def test_imports_nothing_heavy() -> None:
    imported = imported_by("-h")
    assert {"typer", "remove_refusals.cli"} <= imported
    assert not imported & {"torch", "pydantic", "gradio", "transformers", "numpy", "huggingface_hub"}


HEAVY = {"torch", "transformers", "scipy.stats", "gradio", "datasets"}


@pytest.mark.parametrize(
    "words",
    [
        ("run", "/no/such/model"),
        ("run", "demo", "--harmful", "no.txt"),
        ("chat", "demo", "--run", "no"),
        ("evaluate", "demo", "/no/such/model"),
        ("certify", "no", "--base", "demo"),
        ("bake", "demo", "--direction", "no.safetensors", "-o", "out"),
    ],
    ids=lambda words: words[0],
)
def test_a_path_that_is_not_there_is_said_before_anything_heavy_is_imported(words: tuple[str, ...]) -> None:
    assert not imported_by(*words, code=2) & HEAVY


def test_records_are_read_and_shown_without_anything_heavy(tmp_path: Path) -> None:
    answers = report_records.rows(report_records.SETS)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps(report_records.scores(answers)))
        (tmp_path / name / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in answers))
    assert not imported_by("config", "-o", tmp_path / "run.toml") & {*HEAVY, "numpy"}
    assert not imported_by("report", tmp_path / "one") & HEAVY
    assert not imported_by("compare", tmp_path / "one", tmp_path / "two") & (HEAVY - {"scipy.stats"})


def test_says_its_version(command: Command) -> None:
    assert re.fullmatch(r"remove-refusals \d+\.\d+\.\d+\n", command("--version").out)
