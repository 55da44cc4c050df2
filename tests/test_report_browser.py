"""The report in headless Chromium: no complaint, no request, nothing beyond the edge, and controls that work."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

import report_records as records
import tiny
import zoo
from remove_refusals.examination import analyze
from remove_refusals.report.page import write_html_report
from remove_refusals.settings import DirectionSettings, RunSettings

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

BEYOND_THE_EDGE = """() => [...document.querySelectorAll('body *')]
    .filter((each) => !each.closest('.wide') && !each.closest('pre') && !each.closest('[hidden]'))
    .filter((each) => each.getBoundingClientRect().right > innerWidth + 1)
    .map((each) => each.outerHTML.slice(0, 80))"""
TEXTS_OVER_EACH_OTHER = """() => [...document.querySelectorAll('svg')].flatMap((picture) => {
    const boxes = [...picture.querySelectorAll('text')].map((each) => [each.textContent, each.getBoundingClientRect()]);
    return boxes.flatMap(([name, a], index) => boxes.slice(index + 1)
        .filter(([, b]) => a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
        .map(([other]) => `${name} over ${other}`));
})"""
CONTRAST = """() => {
    const light = (color) => {
        const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const kinds = ['p', 'a', '.note', '.label.base', '.label.edited', '.axis-name'];
    return Object.fromEntries(kinds.map((name) => {
        const ink = light(getComputedStyle(document.querySelector(`main ${name}`)).color);
        return [name, (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)];
    }));
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    directory = records.write(tmp_path_factory.mktemp("records") / "run", n_layers=48)
    answers = records.rows(records.SETS)
    answers[0]["text"] = records.HOSTILE
    answers[-1]["text"] = "unbroken" * 40
    records.write_rows(directory, answers)
    return write_html_report(directory, full_answers=True).as_uri()


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """The page of a mixture of experts that was looked at, without answers."""
    model, seen = (tmp_path_factory.mktemp("experts") / name for name in ("model", "seen"))
    zoo.build("mixtral", max_position_embeddings=512).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    analyze(RunSettings(model=str(model), direction=DirectionSettings(seed=1)), seen, answers=False)
    return (seen / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    # Chromium's sandbox refuses to run as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def page(request, browser, address):
    """The page at a width and in a colour scheme; it must be silent and ask for nothing while a test uses it."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    complaints, requests = [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda made: requests.append(made.url))
    opened.goto(address)
    yield opened
    context.close()
    assert complaints == []
    assert [url.split("#")[0] for url in requests] == [address]


def test_nothing_lies_beyond_the_edge_or_over_other_text(page):
    assert page.evaluate(BEYOND_THE_EDGE) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(TEXTS_OVER_EACH_OTHER) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_an_examination_fits_too(browser, examined, width):
    context = browser.new_context(viewport={"width": width, "height": 900})
    opened = context.new_page()
    complaints, requests = [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("request", lambda made: requests.append(made.url))
    opened.goto(examined)
    assert opened.evaluate(BEYOND_THE_EDGE) == [] and opened.evaluate(TEXTS_OVER_EACH_OTHER) == []
    # By token, of both kinds of site, and of experts: what they can write, what they add, and how often each is chosen.
    assert opened.locator("#origins svg").count() == 6
    assert complaints == [] and requests == [examined]
    context.close()


def test_text_can_be_read_in_both_schemes(page):
    assert min(page.evaluate(CONTRAST).values()) >= 4.5


def test_the_picture_steps_through_the_layers(page):
    slider = page.locator("#picture-layer")
    first = page.locator("#picture-harmful circle").first
    places = set()
    for step in (0, 20, 47):
        slider.evaluate("(each, value) => { each.value = value; each.dispatchEvent(new Event('input')); }", str(step))
        assert page.locator("#picture-said").text_content() == str(step + 1)
        assert page.locator("#picture-auroc").text_content().startswith("AUROC ")
        places.add(first.get_attribute("cx"))
    assert len(places) == 3
    first.click(force=True)
    assert page.locator("#picture-name").text_content() == "Chosen, harmful: The harmful request number 0"


def test_answers_are_filtered(page):
    shown = page.locator("#answer-list article:visible")
    assert shown.count() == 8 and page.locator("#filter-count").text_content() == "8 of 8"
    page.locator("[name=set]").select_option("alarming")
    assert shown.count() == 2
    page.locator("[name=changed]").check()
    assert shown.count() == 1 and page.locator("#filter-count").text_content() == "1 of 8"
    page.locator("[name=set]").select_option("")
    page.locator("[name=base]").select_option("refusal")
    assert shown.count() == 4
    page.locator("[name=text]").fill("HARMFUL REQUEST NUMBER 2")
    assert shown.count() == 1


def test_a_flipped_prompt_leads_to_its_answers(page):
    page.locator("[name=text]").fill("nothing has this")
    page.get_by_text("Refused by the base model alone: 3").click()
    page.locator(".prompts a").nth(1).click()
    target = page.locator("article:target")
    # The page shows it only after it has heard of the new address.
    target.locator(".side.edited").wait_for()
    assert target.locator(".side.edited").is_visible() and "number 1" in target.text_content()


def test_without_its_script_the_page_is_whole(browser, address):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(address)
    assert not opened.locator("#filter").is_visible() and not opened.locator("#picture-layer").is_visible()
    assert opened.locator("article:visible").count() == 8
    assert opened.locator("#picture-harmful circle").count() == 3
    context.close()


def test_it_prints(browser, address):
    context = browser.new_context(color_scheme="dark")
    opened = context.new_page()
    opened.goto(address)
    opened.emulate_media(media="print")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not opened.locator("nav").is_visible() and not opened.locator("#filter").is_visible()
    assert opened.pdf(format="A4").startswith(b"%PDF")
    context.close()
