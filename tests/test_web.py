"""The page: its pieces, what it asks of the model, and itself in a browser where there is one."""

import html
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from conftest import Command
from remove_refusals.cli import web
from remove_refusals.cli.talk import free_port
from remove_refusals.cli.web import Controls, Page, Source, command_line, front_drawing, strip
from remove_refusals.directions.activations import collect_activations, project_tokens, token_states
from remove_refusals.directions.direction import direction_from_vectors, mean_difference
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene, middle_direction
from remove_refusals.directions.saved import save_direction
from remove_refusals.errors import OutputError
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.types import ModelMap
from remove_refusals.models.chat_template import render
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.progress import Progress
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
    assert re.findall(r'<g class="\w+" data-candidate="([^"]*)"', drawing) == ["one &quot;half&quot;", "two"]
    assert drawing.count('<g class="chosen"') == 1 and drawing.count('class="other"') == 1
    shown = Texts()
    shown.feed(drawing)
    # Ticks on both axes, and each that can be tried by its number and its name.
    assert all(part in shown.text for part in ("20%", "0.01", "0.02", 'one "half": 40.0% refused', "two: 0.0% refused"))
    assert shown.tags.count("li") == 2


MEASURED = st.tuples(st.floats(0, 1), st.floats(1e-4, 2))


@given(measured=st.lists(MEASURED, min_size=2, max_size=8), n_kept=st.integers(0, 8))
@settings(deadline=None)
def test_no_point_of_the_drawing_lies_on_another(measured: list[tuple[float, float]], n_kept: int) -> None:
    candidates = [
        CandidateRecord(name=f"number {at}", refusal=refusal, damage=damage, strengths=())
        for at, (refusal, damage) in enumerate(measured)
    ]
    kept = [candidate.name for candidate in candidates[:n_kept]]
    drawing = front_drawing(candidates, kept, None)
    points = re.findall(r'cx="([\d.]+)%" cy="([\d.]+)" r="(\d+)"', drawing)
    assert len(points) == len(measured)
    # On a phone the drawing is about 300 pixels wide.
    places = [(3 * float(x), float(y), int(r)) for x, y, r in points]
    for at, (x, y, r) in enumerate(places):
        for other_x, other_y, other_r in places[:at]:
            assert math.hypot(x - other_x, y - other_y) > r + other_r


def test_the_command_line_says_what_is_not_the_default(model_map: ModelMap) -> None:
    n_layers = model_map.n_layers
    assert command_line(SOURCE, controls(model_map), n_layers) == "remove-refusals chat demo --run 'a run' --compare"
    changed = Controls(0.5, (2, 4), ("mlp",), 'one "half"')
    told = replace(controls(model_map), system_prompt="Be brief.")
    assert command_line(SOURCE, told, n_layers).endswith("--compare --system-prompt 'Be brief.'")
    assert command_line(SOURCE, changed, n_layers) == (
        "remove-refusals chat demo --run 'a run' --compare --candidate 'one \"half\"' --strength 0.5 --layers 2-4 "
        "--sites mlp"
    )


def test_both_answer_as_they_do_elsewhere(loaded: LoadedModel, model_map: ModelMap, page: Page) -> None:
    ids = render(loaded, [PROMPT])
    plain = generate(loaded, ids, max_new_tokens=24)[0].text
    with ablated(loaded.model, page.intervention):
        edited = generate(loaded, ids, max_new_tokens=24)[0].text
    steps = list(page.answers(PROMPT, ([], []), controls(model_map)))
    last = steps[-1]
    assert [[part["content"] for part in talk] for talk in last.talks] == [[PROMPT, plain], [PROMPT, edited]]
    assert plain != edited and len(steps) > 5
    assert all("strip" in part and "scale" in part for part in last.strips)
    assert not any(step.strips[0] or step.strips[1] for step in steps[:-1])
    for note, label in zip(last.notes, ("refused", "answered"), strict=True):
        assert re.fullmatch(rf'<span class="label \w+">{label}</span> \d+ tokens, \d+ a second', note)
    # At strength 0, or with a candidate that takes nothing out, both are the same.
    for nothing in (controls(model_map, 0.0), controls(model_map, 1.0, 'one "half"')):
        one, other = list(page.answers(PROMPT, ([], []), nothing))[-1].talks
        assert one == other


def test_what_was_said_before_counts(model_map: ModelMap, page: Page) -> None:
    first = list(page.answers("Say hello.", ([], []), controls(model_map)))[-1].talks
    second = list(page.answers(PROMPT, first, controls(model_map)))[-1].talks
    assert [part["role"] for part in second[0]] == ["user", "assistant"] * 2
    assert second[0][:2] == first[0]


def test_a_system_message_and_a_temperature_change_the_answers(
    loaded: LoadedModel, model_map: ModelMap, page: Page
) -> None:
    plain = list(page.answers(PROMPT, ([], []), controls(model_map)))[-1].talks
    told = replace(controls(model_map), system_prompt="Answer in Latin.")
    with_system = replace(loaded, chat=loaded.chat.model_copy(update={"system_prompt": "Answer in Latin."}))
    expected = generate(with_system, render(with_system, [PROMPT]), max_new_tokens=24)[0].text
    assert list(page.answers(PROMPT, ([], []), told))[-1].talks[0][-1]["content"] == expected
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(list(page.answers(PROMPT, ([], []), replace(controls(model_map), temperature=1.8)))[-1].talks)
    assert drawn[0] == drawn[1] != plain


def test_an_answer_can_be_given_again_and_exported(model_map: ModelMap, page: Page) -> None:
    pytest.importorskip("gradio")
    values = (1.0, 0, model_map.n_layers - 1, list(SITE_KINDS), None, 0.0, "")
    *_, (_, *first, _, _, _, _, rows) = web._ask(page, PROMPT, [], [], [], *values)
    weak = (0.0, *values[1:])
    assert [row["strength"] for row in rows] == [0.0, 1.0]
    *_, (typed, base, edited, *_, again) = web._ask_again(page, "typed", *first, rows, *weak)
    assert typed == "typed" and base == first[0] and edited == first[0] != first[1]
    kept = [json.loads(line) for line in web._as_jsonl(again).splitlines()]
    assert [(row["side"], row["prompt"]) for row in kept] == [("base", PROMPT), ("edited", PROMPT)]
    assert kept[1]["answer"] == base[1]["content"] and kept[1]["strength"] == 0.0
    # An answer that was stopped may be the base's alone.
    *_, (_, base, edited, *_, whole) = web._ask_again(page, "", first[0], [], rows[:1], *values)
    assert [base, edited] == first and whole == rows


def test_what_is_set_is_saved(loaded: LoadedModel, model_map: ModelMap, page: Page, tmp_path: Path) -> None:
    stages = []
    told = Progress(lambda name, done, total: stages.append(name))
    now = controls(model_map, 0.5)
    said = page.save(now, str(tmp_path / "edited"), as_lora=False, progress=told)
    assert "the files hold the edit as planned" in said and stages
    saved = load(tmp_path / "edited")
    with ablated(loaded, page.made(now)):
        expected = generate(loaded, render(loaded, [PROMPT]), max_new_tokens=24)[0].text
    assert generate(saved, render(saved, [PROMPT]), max_new_tokens=24)[0].text == expected
    pytest.importorskip("peft")
    assert "a LoRA of" in page.save(now, str(tmp_path / "lora"), as_lora=True)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    with pytest.raises(OutputError, match="exists already"):
        page.save(now, str(tmp_path / "edited"), as_lora=False)
    with pytest.raises(OutputError, match="The directory is missing"):
        page.save(now, " ", as_lora=True)


@pytest.mark.parametrize("may_save", [True, False])
def test_files_are_written_for_this_machine_alone(page: Page, may_save: bool) -> None:
    pytest.importorskip("gradio")
    parts = web.build_page(page, may_save=may_save).get_config_file()["components"]
    assert may_save == any(part["props"].get("elem_id") == "saving" for part in parts)


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
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=tiny.heed_interrupts
    ) as process:
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
        found = command("ui", "no-such-model", "--port", port)
    assert found.code == 2 and found.out == ""
    assert f"127.0.0.1:{port} (Address already in use), expected" in found.err


def test_the_first_port_that_is_free_is_taken() -> None:
    with socket.socket() as taken:
        port = free_port("127.0.0.1", None)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert free_port("127.0.0.1", None) > port


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_in_a_browser(
    served: str,
    page: Page,
    model_map: ModelMap,
    width: int,
    height: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from playwright.sync_api import sync_playwright

    # What is saved lies where the command was started.
    monkeypatch.chdir(tmp_path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=300_000)
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.set_default_timeout(120_000)
        asked: set[str] = set()
        problems: list[str] = []
        tab.on("request", lambda request: asked.add(request.url) if request.url.startswith("http") else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.goto(served)
        tab.locator("#examples button").first.click()
        tab.wait_for_function("document.querySelector('#message textarea').value")
        example = tab.input_value("#message textarea")
        assert [example] == web._examples()[0]
        tab.click("#send")
        tab.wait_for_selector(".strip >> nth=1")
        said = tab.inner_text("body")
        wanted = list(page.answers(example, ([], []), controls(model_map)))[-1]
        for history in wanted.talks:
            assert " ".join(history[-1]["content"].split()) in " ".join(said.split())
        # Both answers, what they are, and the message are on the screen at once.
        for place in (
            ".talk >> nth=0",
            ".talk >> nth=1",
            ".note .label >> nth=0",
            ".note .label >> nth=1",
            "#message",
            "#send",
        ):
            box = tab.locator(place).bounding_box()
            assert box and box["y"] >= 0 and box["y"] + box["height"] <= height, place
        if width > 1000:
            with tab.expect_download() as download:
                tab.click("#export")
            rows = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
            assert [row["side"] for row in rows] == ["base", "edited"]
            tab.click("#saving button")
            tab.click("#save")
            tab.wait_for_function("document.querySelector('#saved').innerText.includes('as planned')")
            assert (tmp_path / "demo-edited" / "certificate.json").is_file()
        tab.locator("#front g[data-candidate]").first.click()
        tab.wait_for_function("document.querySelector('#command textarea').value.includes('--candidate')")
        assert "half" in tab.input_value("#command textarea")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert problems == []
    assert all(address.startswith(served) or address.startswith("blob:") for address in asked), sorted(asked)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
