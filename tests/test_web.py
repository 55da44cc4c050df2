"""The page: its pieces, what it asks of the model, and itself in a browser where there is one."""

import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Command
from remove_refusals.cli.talk import free_port
from remove_refusals.cli.web import Controls, Page, Source, command_line, front_drawing, strip
from remove_refusals.directions.activations import collect_activations, project_tokens, token_states
from remove_refusals.directions.direction import direction_from_vectors, mean_difference
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene, middle_direction
from remove_refusals.directions.saved import save_direction
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.types import ModelMap
from remove_refusals.models.chat_template import render
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import draw, embedded_prompts
from remove_refusals.report.records import CandidateRecord
from remove_refusals.settings import SITE_KINDS
from remove_refusals.types import Intervention, PromptSet

PROMPT = embedded_prompts("harmful_test").prompts[0]
SOURCE = Source("demo", "--run", "a run")
CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("demo")


@pytest.fixture(scope="module")
def model_map(loaded: LoadedModel) -> ModelMap:
    return map_model(loaded.model)


@pytest.fixture(scope="module")
def intervention(loaded: LoadedModel, model_map: ModelMap) -> Intervention:
    sets = [draw(embedded_prompts(f"{name}_train"), 32, 0) for name in ("harmful", "harmless")]
    found = [collect_activations(loaded, part) for part in sets]
    return intervene(mean_difference(*found, layer=0.6), model_map.n_layers)


@pytest.fixture(scope="module")
def page(loaded: LoadedModel, model_map: ModelMap, intervention: Intervention) -> Page:
    candidates = [
        CandidateRecord(name='one "half"', refusal=0.4, damage=0.01, strengths=()),
        CandidateRecord(name="two", refusal=0.0, damage=0.02, strengths=()),
        CandidateRecord(name="three", refusal=0.9, damage=0.03, strengths=()),
    ]
    half = intervene(intervention.directions[0], model_map.n_layers, strength=0.0)
    tried = {'one "half"': half, "two": intervention}
    return Page(loaded, intervention, SOURCE, candidates=candidates, tried=tried, picked="two", max_new_tokens=24)


def controls(model_map: ModelMap, strength: float = 1.0, candidate: str | None = None) -> Controls:
    return Controls(strength, (0, model_map.n_layers - 1), SITE_KINDS, candidate)


class Texts(HTMLParser):
    """Collects what a page shows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(tokens=st.lists(st.text(max_size=8), max_size=6))
@settings(deadline=None)
def test_a_strip_shows_every_token_and_nothing_else(tokens: list[str]) -> None:
    shown = Texts()
    shown.feed(strip(tokens, [0.5] * len(tokens), 1.0))
    assert shown.tags == ["div", *["span"] * len(tokens)]
    expected = "".join(html.unescape(html.escape(token)).replace("\n", "⏎\n") or "∅" for token in tokens)
    assert shown.text.replace("\r", "\n") == expected.replace("\r", "\n")


def test_colour_is_the_share_of_the_largest_projection() -> None:
    found = strip(["a", "b", "c"], [0.2, -0.4, 0.0], 0.4)
    assert re.findall(r"var\((--\w+)\) (\d+)%", found) == [("--towards", "50"), ("--away", "100"), ("--away", "0")]


def test_the_drawing_offers_what_can_be_tried(page: Page) -> None:
    drawing = front_drawing(page.candidates, tuple(page.tried), "two")
    assert re.findall(r'data-candidate="([^"]*)"', drawing) == ["one &quot;half&quot;", "two"]
    assert drawing.count('class="chosen"') == 1 and drawing.count('class="other"') == 1


def test_the_command_line_says_what_is_not_the_default(model_map: ModelMap) -> None:
    n_layers = model_map.n_layers
    assert command_line(SOURCE, controls(model_map), n_layers) == "remove-refusals chat demo --run 'a run' --compare"
    changed = Controls(0.5, (2, 4), ("mlp",), 'one "half"')
    assert command_line(SOURCE, changed, n_layers) == (
        "remove-refusals chat demo --run 'a run' --compare --candidate 'one \"half\"' --strength 0.5 --layers 2-4 "
        "--sites mlp"
    )


def test_both_answer_as_they_do_elsewhere(loaded: LoadedModel, model_map: ModelMap, page: Page) -> None:
    ids = render(loaded, [PROMPT])
    plain = generate(loaded, ids, max_new_tokens=24)[0].text
    with ablated(loaded.model, page.intervention):
        edited = generate(loaded, ids, max_new_tokens=24)[0].text
    steps = list(page.answers(PROMPT, [], [], controls(model_map)))
    original, changed, first, second = steps[-1]
    assert [part["content"] for part in original] == [PROMPT, plain]
    assert [part["content"] for part in changed] == [PROMPT, edited]
    assert plain != edited and len(steps) > 5
    assert "strip" in first and "strip" in second and not any(step[2] or step[3] for step in steps[:-1])
    # At strength 0, or with a candidate that takes nothing out, both are the same.
    for nothing in (controls(model_map, 0.0), controls(model_map, 1.0, 'one "half"')):
        one, other, *_ = list(page.answers(PROMPT, [], [], nothing))[-1]
        assert one == other


def test_what_was_said_before_counts(loaded: LoadedModel, model_map: ModelMap, page: Page) -> None:
    first = list(page.answers("Say hello.", [], [], controls(model_map)))[-1]
    second = list(page.answers(PROMPT, first[0], first[1], controls(model_map)))[-1]
    assert [part["role"] for part in second[0]] == ["user", "assistant"] * 2
    assert second[0][:2] == first[0]


def test_projections_are_those_of_the_collected_stream(
    loaded: LoadedModel, model_map: ModelMap, intervention: Intervention
) -> None:
    (ids,) = render(loaded, [PROMPT])
    direction, layer = middle_direction(intervention, model_map.n_layers)
    assert layer == direction.origin.layer
    found = project_tokens(loaded, ids, direction, layer)
    collected = collect_activations(loaded, PromptSet("one", (PROMPT,), "test")).hidden[0, 0, layer]
    expected = float(collected @ direction.basis[:, 0] / collected.norm())
    assert found[-1] == pytest.approx(expected, abs=1e-5)
    assert token_states(loaded, ids, layer).shape == (len(ids), model_map.d_model)
    context = ablated(loaded.model, intervention)
    gone = project_tokens(loaded, ids, direction, layer, context=context)
    assert max(map(abs, gone)) < 1e-3 < abs(found[-1])


@pytest.fixture(scope="module")
def served(page: Page) -> Iterator[str]:
    web_page = pytest.importorskip("remove_refusals.cli.web")
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = web_page.serve(page, port=port)
    yield f"http://127.0.0.1:{port}/"
    blocks.close()


def test_the_address_is_said_once_the_page_is_up_and_ctrl_c_ends_it(tmp_path: Path, loaded: LoadedModel) -> None:
    pytest.importorskip("gradio")
    vector = torch.ones(loaded.model.config.hidden_size)
    save_direction(direction_from_vectors(vector), tmp_path / "d.safetensors")
    words = [sys.executable, "-m", "remove_refusals", "ui", "demo", "--direction", str(tmp_path / "d.safetensors")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"Serving on (http://127\.0\.0\.1:\d+/); Ctrl-C ends it\.\n", said)
        assert found is not None, (said, process.communicate())
        with urllib.request.urlopen(found[1]) as response:
            assert response.status == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=120) == ("Stopped serving.\n", "")
        assert process.returncode == 0


def test_a_port_that_is_taken_is_said_before_anything_is_read(command: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = command("ui", "no-such-model", "--direction", "no-such-file", "--port", port)
    assert found.code == 2 and found.out == ""
    assert f"127.0.0.1:{port} (Address already in use), expected" in found.err


def test_the_first_port_that_is_free_is_taken() -> None:
    with socket.socket() as taken:
        port = free_port("127.0.0.1", None)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert free_port("127.0.0.1", None) > port


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(served: str, page: Page, model_map: ModelMap, width: int, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=300_000)
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.set_default_timeout(120_000)
        asked: set[str] = set()
        problems: list[str] = []
        tab.on("request", lambda request: asked.add(request.url) if request.url.startswith("http") else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.goto(served)
        tab.fill("#message textarea", PROMPT)
        tab.click("#send")
        tab.wait_for_selector(".strip >> nth=1")
        said = tab.inner_text("body")
        wanted = list(page.answers(PROMPT, [], [], controls(model_map)))[-1]
        for history in wanted[:2]:
            assert " ".join(history[-1]["content"].split()) in " ".join(said.split())
        tab.locator("#front circle[data-candidate]").first.click()
        tab.wait_for_function("document.querySelector('#command textarea').value.includes('--candidate')")
        assert "half" in tab.input_value("#command textarea")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert problems == []
    assert all(address.startswith(served) for address in asked), json.dumps(sorted(asked))
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
