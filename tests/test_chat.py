"""Talking: commands change the next answer, mistakes are said, Ctrl-C stops an answer only."""

import dataclasses
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from remove_refusals.cli.printing import Wrapped
from remove_refusals.cli.talk import HELP, ChatState, Make, Talk, converse
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import direction_from_vectors, mean_difference
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import as_intervention
from remove_refusals.models.chat_template import render
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.settings import ChatFormat, EditSettings

PROMPT = embedded_prompts("harmful_test").prompts[0]
ABOUT = "Model: demo. Taken out: a run."


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def make(loaded: LoadedModel) -> Make:
    sets = [draw(embedded_prompts(f"{name}_train"), 32, 0) for name in ("harmful", "harmless")]
    found = [collect_activations(loaded, part) for part in sets]
    direction = mean_difference(*found, layer=0.6)
    return lambda strength, layers: as_intervention(direction, loaded, EditSettings(strength=strength, layers=layers))


def talk(loaded: LoadedModel, make: Make | None, *lines: str, state: ChatState | None = None) -> list[str]:
    """Talk; give what was written for each line."""
    written: list[str] = []

    def typed() -> Iterator[str]:
        for line in lines:
            written.append("")
            yield line

    def write(piece: str) -> None:
        written[-1] += piece

    converse(Talk(loaded, make, ABOUT, 24), typed(), write, state)
    return [text.removesuffix("\n") for text in written]


def answer(loaded: LoadedModel, make: Make, strength: float, layers: tuple[int, int] | None = None) -> str:
    with ablated(loaded.model, make(strength, layers)):
        return generate(loaded, render(loaded, [PROMPT]), max_new_tokens=24)[0].text


def test_strength_and_layers_act_on_the_next_answer(loaded: LoadedModel, make: Make) -> None:
    lines = [PROMPT, "/reset", "/strength 0", PROMPT, "/reset", "/strength 0.7", "/layers 2-4", PROMPT]
    found = talk(loaded, make, *lines)
    assert found[0] == answer(loaded, make, 1.0)
    assert found[2].startswith("Strength 0 in all layers. The edited model answers. ")
    assert found[3] == answer(loaded, make, 0.0) != found[0]
    assert found[6].startswith("Strength 0.7 in layers 2-4. ")
    assert found[7] == answer(loaded, make, 0.7, (2, 4))


def test_both_answer_and_what_was_said_can_be_saved(loaded: LoadedModel, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    found = talk(loaded, make, "/compare", PROMPT, f"/save {path}", f"/save {path}", "/base", PROMPT)
    assert found[1].startswith("[base] ") and "[edited] " in found[1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["side"], row["strength"]) for row in rows] == [("base", 0.0), ("edited", 1.0)]
    assert rows[1]["answer"] == answer(loaded, make, 1.0)
    assert found[2] == f"Saved 2 answers to {path}." and "exists already" in found[3]
    assert "[" not in found[5][:1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/strength much", "expected a number"),
        ("/layers 3", "expected a range"),
        ("/layers 90-99", "layers"),
        ("/save", "file is missing"),
        ("/sing", "no command /sing"),
        ("/help", "/strength 0.5"),
        ("/system Be brief.", "System message: Be brief."),
        ("/regenerate", "no message yet"),
        ("word " * 3000, "expected"),
    ],
)
def test_what_is_wrong_is_said_and_the_talk_goes_on(loaded: LoadedModel, make: Make, line: str, words: str) -> None:
    found = talk(loaded, make, line, "/strength 0")
    assert words in found[0]
    assert found[1].startswith("Strength 0 in all layers")


def test_without_a_direction_only_the_original_answers(loaded: LoadedModel) -> None:
    found = talk(loaded, None, "/strength 1", "/compare", PROMPT, state=ChatState(sides="base"))
    assert all("start again with --run" in text for text in found[:2])
    assert found[2] == generate(loaded, render(loaded, [PROMPT]), max_new_tokens=24)[0].text


def test_ctrl_c_stops_the_answer_and_not_the_talk(loaded: LoadedModel, make: Make) -> None:
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    converse(Talk(loaded, make, max_new_tokens=24), [PROMPT, "//help"], write)
    text = "".join(pieces)
    assert " [stopped]\n" in text
    assert len(text.split(" [stopped]\n")[1]) > 10


@pytest.mark.parametrize("line", ["/quit", "exit", " /exit", "quit"])
def test_the_talk_can_be_ended(loaded: LoadedModel, line: str) -> None:
    assert talk(loaded, None, "/status", line, "/status", state=ChatState(sides="base"))[1:] == [""]


def test_the_last_message_is_answered_again_as_things_are_set_now(loaded: LoadedModel, make: Make) -> None:
    found = talk(loaded, make, PROMPT, "/strength 0", "/regenerate", "/status")
    assert found[0] == answer(loaded, make, 1.0) != found[2] == answer(loaded, make, 0.0)
    assert found[3].startswith(f"{ABOUT}\nStrength 0 in all layers") and found[3].endswith("Messages so far: 1.")


def test_both_sides_know_the_whole_talk(loaded: LoadedModel, make: Make) -> None:
    found = talk(loaded, make, "Hello.", "/compare", PROMPT, PROMPT)
    with ablated(loaded.model, make(1.0, None)):
        first = generate(loaded, render(loaded, ["Hello."]), max_new_tokens=24)[0].text
    assert found[0] == first
    own = {}
    for side, strength in (("base", 0.0), ("edited", 1.0)):
        turns = [("Hello.", first)]
        with ablated(loaded.model, make(strength, None)):
            for _ in range(2):
                said = generate(loaded, render(loaded, [PROMPT], turns), max_new_tokens=24)[0].text
                turns.append((PROMPT, said))
        own[side] = [said for _, said in turns[1:]]
    for asked, written in enumerate(found[2:]):
        assert written == f"[base] {own['base'][asked]}\n[edited] {own['edited'][asked]}"


def test_help_fits_a_terminal() -> None:
    assert max(map(len, HELP.splitlines())) <= 80


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_line_ends_between_words(size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "[base] Some words of an answer,\n\n  one " + "x" * 45 + " and 日本語日本語日本語日本語日本語\n"
    write = Wrapped()
    for start in range(0, len(text), size):
        write(text[start : start + size])
    lines = capsys.readouterr().out.split("\n")
    assert [line.strip() for line in lines[:3]] == ["[base] Some words of", "an answer,", ""]
    assert all(cell_len(line.rstrip()) <= 20 for line in lines if "x" not in line)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert "  one" in [line.rstrip() for line in lines]


@pytest.mark.skipif(sys.platform == "win32", reason="no terminal of Unix")
def test_a_terminal_takes_pasted_lines_as_one_and_ctrl_c_clears_the_line() -> None:
    import pty

    script = (
        "from remove_refusals.cli.printing import typed_lines\nfor line in typed_lines(): print([line], flush=True)"
    )
    main, side = pty.openpty()
    # A terminal is told of bracketed paste when the prompt is up.
    left, seen, up = "", "", "\x1b[?2004h"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=side, stdout=side, stderr=side)
    os.close(side)
    try:
        for typed, *awaited in (
            ("", up),
            ("lost", "lost"),
            ("\x03", up),
            ("\x1b[200~first\nsecond\x1b[201~", "second"),
            ("\r", "['first\\nsecond']", up),
            ("kept\r", "['kept']", up),
        ):
            os.write(main, typed.encode())
            for text in awaited:
                while text not in left:
                    assert select.select([main], [], [], 120)[0], seen
                    part = os.read(main, 4096).decode()
                    left, seen = left + part, seen + part
                left = left.partition(text)[2]
        os.write(main, b"\x04")
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert "['lost" not in seen and "WARNING" not in seen


def test_the_system_message_is_put_before_the_prompt() -> None:
    loaded = load("demo")
    vector = torch.randn(loaded.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    direction = direction_from_vectors(vector)

    def make(strength: float, layers: tuple[int, int] | None) -> object:
        return as_intervention(direction, loaded, EditSettings(strength=strength, layers=layers))

    found = talk(loaded, make, "/strength 0", "/system Answer.", PROMPT)  # type: ignore[arg-type]
    asked = dataclasses.replace(loaded, chat=ChatFormat(system_prompt="Answer."))
    ids = render(asked, [PROMPT])
    assert found[2] == generate(loaded, ids, max_new_tokens=24)[0].text
