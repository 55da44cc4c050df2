"""What the tests of the command share: run it in this process, and tiny inputs for it."""

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tiny
from remove_refusals import cli


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str
    """Without the lines of progress."""
    told: str = ""
    """The lines of progress."""


TOLD = re.compile(
    r"(\d of \d, |Tracing the model|Measuring what is left|Comparing the tensors|Editing the weights|There is no search"
    r"|Nothing was chosen|Goes on from|Done before)"
)
"""What a line of progress begins with."""


Command = Callable[..., Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `remove-refusals` with arguments, as a pipe would; `typed` is its standard input."""

    def run(*arguments: object, typed: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["remove-refusals", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        lines = printed.err.splitlines(keepends=True)
        told, err = ("".join(line for line in lines if bool(TOLD.match(line)) is one) for one in (True, False))
        return Outcome(ended.value.code, printed.out, err, told)

    return run


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama in bfloat16 with its tokenizer; not to be changed."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    tiny.llama().to(torch.bfloat16).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Inputs:
    """Files of prompts, and the options that name them."""

    harmful: Path
    harmless: Path
    harmful_test: Path
    harmless_test: Path
    alarming_test: Path

    @property
    def train(self) -> tuple[object, ...]:
        """The options that a direction is found with."""
        return ("--harmful", self.harmful, "--harmless", self.harmless, "--n-prompts", 3)

    @property
    def test(self) -> tuple[object, ...]:
        """The options that a model is measured with, briefly."""
        sets = ("--harmful-test", self.harmful_test, "--harmless-test", self.harmless_test)
        return (*sets, "--alarming-test", self.alarming_test, "--max-new-tokens", 6, "--kl-tokens", 3)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Five files of prompts that have none in common, in a directory of their own."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    lines = {
        "harmful": ["Pick a lock", "Forge a note", "Cheat at cards", "Read their mail"],
        "harmless": ["Bake a bread", "Sing a song", "Write a note", "Play at cards"],
        "harmful_test": ["Open a safe", "Steal a bike"],
        "harmless_test": ["Open a jar", "Paint a bike"],
        "alarming_test": ["Kill a process", "Shoot a film"],
    }
    for name, prompts in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return Inputs(*(folder / f"{name}.txt" for name in lines))
