"""The report as a file: whole, safe against what models say, and silent about what was not measured."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import report_records as records
from remove_refusals.errors import OutputError, RecordError
from remove_refusals.report import sections
from remove_refusals.report.charts import Scale, heat_paths, integer_ticks, integers, scale_of
from remove_refusals.report.page import html_report, write_card, write_html_report
from remove_refusals.report.records import NAMES
from remove_refusals.report.words import first_sentence, number, p_value, percent, tick

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
VOID = {"meta", "input", "br", "img", "link", "hr"}
LOADING = {"src", "href", "xlink:href", "action", "formaction", "poster", "data", "srcset", "background", "ping"}


class Page(HTMLParser):
    """A page taken apart: its elements, its text, and whether every element was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.texts, self.scripts, self._open = [], [], [], []
        self.text = text
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("script", "style"):
            self.scripts.append((self._open[-1], data))
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def words(self):
        return " ".join(self.texts)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def directory(tmp_path):
    return records.write(tmp_path / "run")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(html_report(records.write(tmp_path_factory.mktemp("records") / "run")))


def change(directory, name, edit):
    path = directory / f"{name}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "use", "image"), tag
        for name in LOADING & attributes.keys():
            assert tag == "a" and name == "href" and attributes[name].startswith("#"), (tag, attributes)
    for kind, text in page.scripts:
        assert "url(" not in text and "@import" not in text and "://" not in text, kind
    assert "url(" not in "".join(attributes.get("style") or "" for _, attributes in page.elements)


def test_only_the_script_of_the_page_may_run(page):
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    rules = dict(part.split(maxsplit=1) for part in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    running = [text for kind, text in page.scripts if kind == "script" and not text.lstrip().startswith("[")]
    assert len(running) == 1
    digest = base64.b64encode(hashlib.sha256(running[0].encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_links_lead_somewhere_and_names_are_given_once(page):
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {each["href"][1:] for each in page.all("a")} <= set(names)


def test_every_picture_says_what_it_is(page):
    pictures = page.all("svg")
    assert len(pictures) == 3 + 1 + 1 + 2 + 2 + 1 + 1
    assert all(each["role"] == "img" and each["aria-label"] for each in pictures)


def test_what_was_measured_is_there(page):
    for said in (
        "the-edited", "Made from the-base :", "The base model refuses few harmful prompts.", "100% [44, 100%] 3 of 3",
        "p = 0.25: undecided", "KL, 95th percentile, over all harmless prompts", "share that is the same from the",
        'picked "trial 0" by the rule: the knee of the front', "A limit that none kept.", "As planned.",
        "Refused by the base model alone: 3", "harmful test", "0123456789ab…",
    ):  # fmt: skip
        assert said in page.words, said
    assert "At most 0.00230 of the residual stream's norm is along the direction at any layer's boundary." in page.words
    assert re.search(r"off the plan by at most 0\.1[01]%", page.words)
    assert "Not measured" not in page.words and "Not recorded" not in page.words


def test_dots_lie_where_the_numbers_say(page):
    places = [attributes["style"] for _, attributes in page.elements if attributes.get("class") == "at"]
    assert places[:4] == ["left:100.00%", "left:0.00%", "left:0.00%", "left:0.00%"]
    alarming = places[8:10]
    assert alarming == ["left:50.00%", "left:0.00%"]


def test_answers_stand_side_by_side(page):
    articles = page.all("article")
    assert [each["data-set"] for each in articles] == ["harmful"] * 3 + ["harmless"] * 3 + ["alarming"] * 2
    assert [each["data-base"] for each in articles[-2:]] == ["refusal", "compliance"]
    assert ["data-changed" in each for each in articles] == [True] * 3 + [False] * 3 + [True, False]
    folded = [attributes for tag, attributes in page.elements if tag == "details"][-8:]
    assert ["open" in each for each in folded] == [False] * 3 + [True] * 5


def test_answers_to_harmful_prompts_are_cut_in_the_file_itself(directory):
    short, whole = html_report(directory), html_report(directory, full_answers=True)
    second = "The second sentence tells every detail"
    # Of the three that stand first, one is harmful.
    assert (short.count(second), whole.count(second)) == (2 * 3 + 1 + 2 + 3, 2 * 3 + 1 + 2 + 3 + 4)
    assert "It is wrong." in whole
    assert "holds the answers to harmful requests in full" in whole


def test_three_answers_stand_first(directory):
    answers = records.rows(records.SETS)
    # The first harmful prompt is answered by both, so another is shown.
    answers[0] |= {"label": "compliance", "text": "The base answers."}
    records.write_rows(directory, answers)
    page = html_report(directory)
    first = Page(page.split('<div id="examples">')[1].split("<nav")[0].rsplit("</div>", 1)[0])
    prompts = [records.prompts(name, 3).prompts[at] for name, at in (("harmful", 1), ("harmless", 0), ("alarming", 0))]
    assert [text for text in first.texts if text in prompts] == prompts
    assert [text for text in first.texts if text in ("refusal", "compliance")] == [
        "refusal", "compliance", "compliance", "compliance", "refusal", "compliance",
    ]  # fmt: skip
    assert page.index('class="tiles"') < page.index('id="examples"') < page.index("<main>")
    assert {each["href"][1:] for each in first.all("a")} <= {each["id"] for each in Page(page).all("article")} | {
        "answers"
    }


def test_what_shows_nothing_is_folded(directory, page):
    def one_candidate(selection):
        selection["candidates"] = selection["candidates"][:1]

    def mlp_alone(ablation):
        ablation["intervention"] = [edit for edit in ablation["intervention"] if edit["kind"] == "mlp"]

    assert page.words.count("None of either model: degenerate answers") == 2
    assert page.words.count("None of either model: false refusals, degenerate answers") == 1
    assert page.words.count("Refusals by length: the same at every length") == 3
    change(directory, "selection", one_candidate)
    change(directory, "ablation", mlp_alone)
    found = Page(html_report(directory))
    assert len(found.all("svg")) == len(page.all("svg")) - 2
    assert "With one candidate there is no front to draw." in found.words
    assert "Attention, or the mixer in its place: left alone everywhere." in found.words


def test_a_kl_stands_beside_those_of_real_models(page):
    parts = re.split(r"^## ", RESULTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = "".join(part for part in parts if part.startswith(("0.5b\n", "1.5b\n")))
    rows = re.findall(r"^\| `(run-0|heretic|classic)` (.+) \|$", text, re.MULTILINE)
    measured = {"run-0": [], "heretic": [], "classic": []}
    for name, cells in rows:
        columns = cells.split(" | ")
        if len(columns) == 5 and (found := re.fullmatch(r"([\d.]+) \[[\d., ]+\]", columns[2])):
            measured[name].append(float(found[1]))
    for (_, least, most), found in zip(sections._YARDSTICKS, measured.values(), strict=True):
        assert [least, most] == sorted(found)
    assert "How much is a KL of 0.233?" in page.words and "much: one direction by hand costs 0.03 to 0.07" in page.words
    assert "on geometric average 21% less probable" in page.words
    assert sections.how_much(0.0104).startswith("some") and sections.how_much(0.004).startswith("little")
    assert sections.how_much(0.05).startswith("as much as one direction by hand")


def test_strengths_above_one_are_explained_where_they_are(directory, page):
    assert "Above 1 the site writes against the direction" not in page.words
    change(directory, "ablation", lambda ablation: ablation["intervention"][0].update(strength=1.25))
    assert "at 1.25, the most here, it adds 0.250 of what it used to add" in Page(html_report(directory)).words


def test_the_file_check_is_not_taken_for_a_safety_certificate(page):
    assert "File check as planned" in page.words and "this says nothing of safety" in page.words
    assert "passed" not in page.words.lower()


def test_notes_on_statistics_stand_at_the_foot(page):
    assert page.text.index('id="notes"') > page.text.index('id="answers"')
    assert page.words.count("McNemar") == 1 == page.words.count("Wilson")


def test_the_picture_of_the_summary(command, directory, tmp_path):
    picture = tmp_path / "card.svg"
    done = command("report", directory, "--output", tmp_path / "page.html", "--card", picture)
    assert done.code == 0 and "card.svg" in done.out
    drawn = ElementTree.parse(picture).getroot()
    assert (drawn.get("width"), drawn.get("height")) == ("1200", "630")
    said = " ".join(" ".join(drawn.itertext()).split())
    for text in ("the-edited", "3 harmful prompts", "100% → 0%", "2 harmless but alarming prompts", "0.233", "judge"):
        assert text in said, text
    text = picture.read_text(encoding="utf-8")
    assert "href" not in text and "url(" not in text and text.count("://") == text.count("http://www.w3.org/2000/svg")
    # Names of models come from records, which may hold anything.
    change(directory, "scores", lambda scores: scores.update(edited=records.HOSTILE))
    write_card(directory, picture, force=True)
    drawn = ElementTree.parse(picture).getroot()
    assert {each.tag.rpartition("}")[2] for each in drawn.iter()} == {
        "svg", "title", "style", "rect", "text", "tspan", "g", "line", "circle",
    }  # fmt: skip
    for name, message in (("card.svg", "exists already"), ("card.png", r"expected a name that ends in \.svg")):
        with pytest.raises(OutputError, match=message):
            write_card(directory, tmp_path / name)
    (directory / "scores.json").unlink()
    with pytest.raises(RecordError, match=r"has no scores\.json"):
        write_card(directory, tmp_path / "other.svg")


def test_a_further_set_of_the_scores_is_harmless(directory):
    change(directory, "scores", lambda scores: scores["sets"].update(mine=scores["sets"]["alarming"]))
    records.write_rows(directory, [row | {"set": "mine"} for row in records.rows({"harmful": 2})])
    page = html_report(directory)
    assert page.split('id="answer-list"')[1].count("The second sentence") == 2 and page.count("<details open") == 2
    assert Page(page).words.count("False refusals") == 1 + 3


def test_a_set_that_nobody_knows_is_treated_as_harmful(directory):
    answers = [row | {"set": "mine"} for row in records.rows({"harmful": 2})]
    records.write_rows(directory, answers)
    page = html_report(directory)
    assert "The second sentence" not in page and page.count('data-set="mine"') == 2
    assert "<details open" not in page.split('id="answer-list"')[1]


def test_what_a_model_says_stays_text(directory):
    answers = [row | {"text": records.HOSTILE, "prompt": records.HOSTILE} for row in records.rows(records.SETS)]
    records.write_rows(directory, answers)
    for name in ("ablation", "scores", "selection", "analysis", "certificate"):
        text = (directory / f"{name}.json").read_text()
        for value in (
            "the-base",
            "the-edited",
            "trial 0",
            "The base model refuses few harmful prompts.",
            "not selected",
        ):
            text = text.replace(json.dumps(value), json.dumps(records.HOSTILE))
        (directory / f"{name}.json").write_text(text)
    page = Page(html_report(directory, full_answers=True))
    assert len(page.all("script")) == 2 and not page.all("img")
    assert page.texts.count(records.HOSTILE) > 3 * 8
    assert records.HOSTILE not in page.text and "<script>alert" not in page.text
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_comes_out_as_it_went_in(directory, text, prompt):
    records.write_rows(directory, [row | {"text": text, "prompt": prompt} for row in records.rows({"harmless": 1})])
    page = Page(html_report(directory))
    assert len(page.all("article")) == 1
    # A surrogate or a null is no character of HTML; a parser reads line ends as one kind.
    if " ".join(text.split()) and "\0" not in text:
        assert " ".join(text.split()) in page.texts


def test_half_a_character_is_replaced(directory):
    records.write_rows(directory, [row | {"text": "a\ud800b"} for row in records.rows({"harmless": 1})])
    write_html_report(directory)
    assert Page((directory / "report.html").read_text(encoding="utf-8")).texts.count("a?b") == 2 * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_record_that_is_not_there_was_not_measured(directory, name):
    (directory / name).unlink()
    page = Page(html_report(directory))
    assert f"there is no {name} in the directory" in page.words.replace(" .", ".")
    if name == "scores.json":
        assert not [each for _, each in page.elements if each.get("class") == "at"]


@pytest.mark.parametrize("name", NAMES)
def test_each_record_alone_makes_a_page(directory, name):
    for other in NAMES:
        if other != name:
            (directory / other).unlink()
    page = Page(html_report(directory))
    missing = sum(page.words.count(f"there is no {other}") for other in NAMES)
    assert missing >= 4 and f"there is no {name}" not in page.words


def test_numbers_that_an_older_run_has_not_are_left_out(directory):
    def older(scores):
        for part in scores["sets"].values():
            del part["flipped"], part["by_length"]
        for part in scores["kl"].values():
            del part["p95"], part["by_token"]
        del scores["agreement"], scores["perplexity"]

    change(directory, "scores", older)
    words = Page(html_report(directory)).words
    assert "has no KL by token" in words and "Refusals by length" not in words and "95th" not in words


def test_corrected_rates_deflections_and_thinking_are_shown(directory):
    def newer(scores):
        part = scores["sets"]["harmful"]
        part["deflections"] = part["refusals"]
        part["refusals"]["corrected"] = {"base": {"value": 0.87, "low": 0.61, "high": 0.97, "n": 3, "n_calibration": 9}}
        part["refusals"] |= {"adjusted_p": 0.75, "verdict": "undecided"}
        thought = {"unfinished": part["refusals"]["edited"], "length": scores["kl"]["harmless"]["mean"]}
        mean = scores["kl"]["harmless"]["mean"]
        numbers = {key: mean[key] for key in ("value", "low", "high", "n", "seed")}
        difference = numbers | {"p_value": 0.5, "verdict": "undecided"}
        task = {"task": "mine", "metric": "exact_match", "base": mean, "edited": mean, "difference": difference}
        scores["tasks"] = [task]
        part["thinking"] = {"base": thought, "edited": thought}

    change(directory, "scores", newer)
    words = Page(html_report(directory)).words
    for said in (
        "mine exact_match",
        "p = 0.75: undecided",
    ):
        assert said in words, said
    assert "Deflections" in words and "base, corrected 87% [61, 97%]" in words and "Thinking, base:" in words


def test_lectures_are_shown_where_they_were_counted(directory, page):
    def scored(scores):
        part = scores["sets"]["harmful"]
        part["moralising"] = {**part["refusals"], "edited": part["refusals"]["base"]}

    def confirmed(selection):
        tried = selection["candidates"][0]["confirmation"]
        tried["moralising"] = tried["refusals"] | {"count": 7, "value": 7 / 32}

    change(directory, "scores", scored)
    change(directory, "selection", confirmed)
    words = Page(html_report(directory)).words
    for said in ("Moralising answers", "; 3 more only moralise", "1/32 7/32 1/32 1/32"):
        assert said in words and said not in page.words, said


def test_matches_are_shown_where_they_were_counted(directory, page):
    def scored(scores):
        rate = scores["sets"]["harmless"]["refusals"]["edited"]
        scores["sets"]["harmful"]["match"] = {"edited": rate | {"count": 37, "n": 48, "value": 37 / 48}}

    def confirmed(selection):
        tried = selection["candidates"][0]["confirmation"]
        tried["match"] = tried["refusals"] | {"count": 9, "value": 9 / 32}

    change(directory, "scores", scored)
    change(directory, "selection", confirmed)
    words = Page(html_report(directory)).words
    for said in ("Answers that match their prompts 3 edited 77%", "37 of 48", "1/32 1/32 9/32"):
        assert said in words and said not in page.words, said


def test_more_candidates_than_anybody_reads_are_drawn_and_counted(tmp_path):
    directory = records.write(tmp_path / "run", sets={"harmful": 2, "harmless": 2})
    page = Page(html_report(directory))
    assert "199 more candidates are in selection.json" in page.words
    titles = re.findall(r"<title>trial \d+", page.text)
    assert len(set(titles)) == 200


def test_a_large_run_stays_small(tmp_path):
    directory = records.write(
        tmp_path / "run", sets={"harmful": 150, "harmless": 150, "alarming": 125}, n_layers=80, words=85
    )
    text = html_report(directory)
    assert len(text.encode()) < 2_000_000
    assert len(Page(text).all("article")) == 425
    assert len(html_report(directory, full_answers=True).encode()) < 2_000_000


def test_the_same_records_give_the_same_page(directory):
    assert html_report(directory) == html_report(directory)


def test_what_is_no_run_is_said_in_a_sentence(tmp_path, directory):
    with pytest.raises(RecordError, match="There is no directory"):
        html_report(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"holds none of ablation\.json, scores\.json"):
        html_report(tmp_path / "empty")
    (directory / "selection.json").write_text("[1]")
    with pytest.raises(RecordError, match=r"selection\.json has at the top \[1\]"):
        html_report(directory)
    (directory / "selection.json").write_text('{"method": "auto"}')
    with pytest.raises(RecordError, match=r"selection\.json has at rule .*Field required"):
        html_report(directory)
    (directory / "selection.json").unlink()
    for name, content in (("scores", {"sets": []}), ("ablation", {"base": "mine"})):
        (directory / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises(RecordError, match=rf"{name}\.json has at \w+ .*expected what this version writes"):
            html_report(directory)
        (directory / f"{name}.json").unlink()
    (directory / "rows.jsonl").write_text('{"set": 1}\n[]\n')
    with pytest.raises(RecordError, match="row 1, has at set 1"):
        html_report(directory)


def test_the_page_is_replaced_in_its_directory_and_nowhere_else(directory, tmp_path):
    first = write_html_report(directory)
    assert first == directory / "report.html"
    (directory / "analysis.json").unlink()
    assert write_html_report(directory) == first and "analysis.json" in first.read_text(encoding="utf-8")
    other = tmp_path / "mine.html"
    other.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_html_report(directory, other)
    assert other.read_text() == "mine"
    write_html_report(directory, other, force=True)
    assert other.read_bytes() == first.read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_the_command(command, directory, tmp_path):
    done = command("report", directory)
    assert (done.code, done.err) == (0, "") and f"Saved to {directory / 'report.html'}" in done.out.replace("\n", "")
    done = command("report", directory, "-o", tmp_path / "full.html", "--full-answers")
    assert done.code == 0 and "in full" in (tmp_path / "full.html").read_text(encoding="utf-8")
    failed = command("report", tmp_path / "nothing")
    assert failed.code == 2 and failed.err.startswith("Error: The directory") and failed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One."),
        ("No end", "No end"),
        ("  Version 2.5 is out! More.", "Version 2.5 is out!"),
        ('She said "no." Then', 'She said "no."'),
        ("A list:\n1. First.", "A list:"),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", "\u4f60\u597d\u3002"),
        ("", ""),
        ("a" * 500, "a" * 240),
    ],
)
def test_the_first_sentence(text, sentence):
    assert first_sentence(text) == (sentence, len(text.strip()) - len(sentence))


@given(st.text())
def test_a_first_sentence_is_the_beginning_and_short(text):
    sentence, left_out = first_sentence(text)
    assert text.strip().startswith(sentence) and len(sentence) <= 240
    assert len(sentence) + left_out == len(text.strip())


@given(st.floats(-1e12, 1e12))
def test_printed_numbers_are_near_the_number(value):
    assert float(number(value)) == pytest.approx(value, rel=0.06, abs=1e-300)


@pytest.mark.parametrize(
    ("value", "said"), [(0.5, "50%"), (0.004, "0.4%"), (0.999, "99.9%"), (1, "100%"), (0, "0%"), (0.03333, "3%")]
)
def test_percentages(value, said):
    assert percent(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, "0.5"),
        (0.00025, "0.00025"),
        (12000, "12000"),
        (1e5, "1e5"),
        (250000, "2.5e5"),
        (1e-7, "1e-7"),
        (1e12, "1e12"),
    ],
)
def test_numbers_of_scales(value, said):
    assert tick(value) == said


def test_p_values():
    assert (p_value(1.0), p_value(0.0321), p_value(1e-9)) == ("p = 1", "p = 0.032", "p < 0.0001")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.booleans())
def test_scales_hold_their_numbers_and_ticks(values, from_zero):
    scale = scale_of(values, from_zero=from_zero, may_be_logarithmic=True)
    # Numbers that no chart tells from 0 are drawn as 0.
    assert all(scale.low - 1e-290 <= value <= scale.high + 1e-290 for value in values)
    shares = [scale.share(value) for value in sorted(values)]
    assert shares == sorted(shares) and all(0 <= share <= 1 for share in shares)
    ticks = scale.ticks()
    assert len(ticks) <= 8 and ticks == sorted(set(ticks))


def test_a_logarithmic_scale():
    scale = scale_of([0.002, 5.0], may_be_logarithmic=True)
    assert scale == Scale(0.001, 10.0, logarithmic=True)
    assert [scale.share(value) for value in (0.001, 0.1, 10.0, 0.0)] == pytest.approx([0, 0.5, 1, 0])
    assert scale.ticks() == pytest.approx([0.001, 0.01, 0.1, 1.0, 10.0])


@given(st.integers(0, 3), st.integers(1, 200))
def test_ticks_of_layers_are_whole(first, more):
    ticks = integer_ticks(integers(first, first + more))
    assert ticks and all(float(tick).is_integer() and first <= tick <= first + more for tick in ticks)
    assert len(ticks) <= 12


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.lists(st.lists(st.floats(-1, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_every_cell_is_drawn_once_in_its_shade(cells):
    drawn = {}
    for sign, opacity, path in heat_paths(cells):
        for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            for x in range(int(column), int(column) + int(width)):
                assert (x, int(row)) not in drawn
                drawn[x, int(row)] = opacity if sign == "plus" else -opacity
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            assert drawn.get((x, y), 0.0) == pytest.approx(value, abs=0.0501)
