"""Talking: commands change the next answer, mistakes are said, Ctrl-C stops an answer only."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from remove_refusals.cli.talk import ChatState, Make, converse
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

    converse(loaded, make, typed(), write, state=state, max_new_tokens=24)
    return [text.removesuffix("\n") for text in written]


def answer(loaded: LoadedModel, make: Make, strength: float, layers: tuple[int, int] | None = None) -> str:
    with ablated(loaded.model, make(strength, layers)):
        return generate(loaded, render(loaded, [PROMPT]), max_new_tokens=24)[0].text


def test_strength_and_layers_act_on_the_next_answer(loaded: LoadedModel, make: Make) -> None:
    lines = [PROMPT, "/reset", "/strength 0", PROMPT, "/reset", "/strength 0.7", "/layers 2-4", PROMPT]
    found = talk(loaded, make, *lines)
    assert found[0] == answer(loaded, make, 1.0)
    assert found[2] == "Strength 0 in all layers."
    assert found[3] == answer(loaded, make, 0.0) != found[0]
    assert found[6] == "Strength 0.7 in layers 2-4."
    assert found[7] == answer(loaded, make, 0.7, (2, 4))


def test_both_answer_and_what_was_said_can_be_saved(loaded: LoadedModel, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    found = talk(loaded, make, "/compare", PROMPT, f"/save {path}", f"/save {path}", "/original", PROMPT)
    assert found[1].startswith("[original] ") and "[ablated] " in found[1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["side"], row["strength"]) for row in rows] == [("original", 0.0), ("ablated", 1.0)]
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
    ],
)
def test_what_is_wrong_is_said_and_the_talk_goes_on(loaded: LoadedModel, make: Make, line: str, words: str) -> None:
    found = talk(loaded, make, line, "/strength 0")
    assert words in found[0]
    assert found[1] == "Strength 0 in all layers."


def test_without_a_direction_only_the_original_answers(loaded: LoadedModel) -> None:
    found = talk(loaded, None, "/strength 1", "/compare", PROMPT, state=ChatState(sides="original"))
    assert all("start again with --direction" in text for text in found[:2])
    assert found[2] == generate(loaded, render(loaded, [PROMPT]), max_new_tokens=24)[0].text


def test_ctrl_c_stops_the_answer_and_not_the_talk(loaded: LoadedModel, make: Make) -> None:
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    converse(loaded, make, [PROMPT, "//help"], write, max_new_tokens=24)
    text = "".join(pieces)
    assert " [stopped]\n" in text
    assert len(text.split(" [stopped]\n")[1]) > 10


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
