"""Looking at a model: what is recorded of it, that it stays as it was, and the page of it."""

import json

import pytest
import torch

import tiny
import zoo
from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import mean_difference
from remove_refusals.directions.separation import separation
from remove_refusals.errors import OutputError
from remove_refusals.examination import analyze
from remove_refusals.models.load import load
from remove_refusals.progress import Progress
from remove_refusals.prompts import prompts_from
from remove_refusals.report.page import html_report
from remove_refusals.settings import DirectionSettings, MeasureSettings, RunSettings
from test_report_page import Page


@pytest.fixture
def settings(inputs, tmp_path):
    def made(model):
        model.save_pretrained(tmp_path / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "model")
        return RunSettings(
            model=str(tmp_path / "model"),
            direction=DirectionSettings(harmful=str(inputs.harmful), harmless=str(inputs.harmless), seed=5),
            measure=MeasureSettings(
                harmful=str(inputs.harmful_test), harmless=str(inputs.harmless_test),
                alarming=str(inputs.alarming_test),
                max_new_tokens=6, kl_tokens=3,
            ),
        )  # fmt: skip

    return made


def test_what_an_examination_leaves(settings, tmp_path):
    chosen, stages = settings(tiny.llama()), []
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    found = analyze(chosen, tmp_path / "seen", progress=Progress(lambda *stage: stages.append(stage)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    names = {path.name for path in (tmp_path / "seen").iterdir()}
    assert names == {"analysis.json", "scores.json", "rows.jsonl", "report.html"}
    record = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    assert record == json.loads(json.dumps(found.analysis.to_json()))
    assert [part["position"] for part in record["positions"]] == list(range(-1, -9, -1))
    assert "".join(part["token"] for part in reversed(record["positions"])) == "istant: "
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2]
    assert record["expert_choices"] == [] and len(record["writer_shares"]) == 1 + 2 * 2
    assert str(tmp_path) not in json.dumps(record)
    done = [stage for stage in stages if stage[0] == "activations"]
    assert done[-1][1] == done[-1][2] == 8 and {stage[0] for stage in stages} == {"activations", "evaluation"}
    rows = [json.loads(line) for line in (tmp_path / "seen" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 6


def test_the_numbers_are_those_of_the_parts(settings):
    chosen = settings(tiny.llama())
    found = analyze(chosen, answers=False)
    assert found.evaluation is None
    loaded = load(chosen.model)
    prompts = (
        prompts_from(chosen.direction.harmful, "harmful", ""),
        prompts_from(chosen.direction.harmless, "harmless", ""),
    )
    for part in found.analysis.positions:
        collected = [collect_activations(loaded, each, positions=(part.position,)) for each in prompts]
        again = separation(*collected, position=part.position, seed=5)
        assert list(part.auroc) == [layer.auroc for layer in again.layers]
    best = max(layer.auroc.value for layer in found.analysis.layers if layer.auroc is not None)
    layer = found.direction.origin.layer
    assert found.analysis.direction.taken_out_of == (0, 1)
    assert found.analysis.layers[layer].auroc.value >= best - 0.005
    collected = [collect_activations(loaded, each) for each in prompts]
    assert torch.allclose(found.direction.basis, mean_difference(*collected, layer=layer).basis, atol=1e-5)


def test_where_one_coordinate_holds_the_stream_its_part_is_removed_first(settings):
    model = tiny.llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 7] = 300.0
    found = analyze(settings(model), answers=False)
    assert found.direction.origin.method == "projected-mean-difference"
    assert found.analysis.to_json()["direction"]["taken_out_of"] == [1, 1]


def test_a_mixture_of_experts(settings, tmp_path):
    found = analyze(settings(zoo.build("mixtral")), tmp_path / "seen", answers=False)
    experts = {(share.layer, share.expert) for share in found.analysis.writer_shares if share.expert is not None}
    assert experts == {(choice.layer, choice.expert) for choice in found.analysis.expert_choices} and experts
    page = Page(html_report(tmp_path / "seen"))
    assert "Which experts are chosen" in page.words and "times chance" in page.words


def test_the_page_of_an_examination(settings, tmp_path):
    analyze(settings(tiny.llama()), tmp_path / "seen")
    page = Page((tmp_path / "seen" / "report.html").read_text(encoding="utf-8"))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {"separation", "origins", "refusals", "answers"} <= set(names)
    assert not {"front", "strengths", "certificate", "done"} & set(names)
    assert {each["href"][1:] for each in page.all("a")} <= set(names)
    assert "Looked at without changing it." in page.words and "Which experts are chosen" not in page.words
    assert all(each["aria-label"] for each in page.all("svg"))


def test_the_command(command, inputs, settings, tmp_path):
    model = settings(tiny.llama()).model
    out = tmp_path / "seen"
    arguments = ("analyze", model, "-o", out, "--harmful", inputs.harmful, "--harmless", inputs.harmless, *inputs.test)
    done = command(*arguments)
    assert done.code == 0 and done.err == "" and "told apart best at layer" in done.out and "Saved to" in done.out
    assert (out / "report.html").is_file() and (out / "scores.json").is_file()
    again = command(*arguments, "--no-answers")
    assert again.code == 2 and "exists already" in again.err
    again = command(*arguments, "--no-answers", "--force")
    assert again.code == 0 and not (out / "scores.json").exists()
    assert command(*arguments, "--force").code == 0


def test_nothing_is_left_of_one_that_fails(settings, tmp_path):
    chosen = settings(tiny.llama())
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError):
        analyze(chosen, tmp_path / "seen", force=True)
    assert [path.name for path in (tmp_path / "seen").iterdir()] == ["mine.txt"]
