"""The whole job on a tiny random model: what it leaves, and that its numbers are those of the saved files."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from remove_refusals.baking.disk import certify_directory
from remove_refusals.directions.direction import direction_from_vectors, find_direction
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.saved import load_direction, save_direction
from remove_refusals.errors import DirectionError, ModelError, OutputError, PromptError
from remove_refusals.examination import inspect
from remove_refusals.files import STAGES
from remove_refusals.models.load import load
from remove_refusals.pipeline import compare, run
from remove_refusals.progress import Progress
from remove_refusals.search.candidates import CANDIDATES, Candidate, Selection, load_candidates, save_candidates
from remove_refusals.settings import (
    DirectionSettings,
    EditSettings,
    LoadSettings,
    MeasureSettings,
    PromptSource,
    Rule,
    RunSettings,
)
from remove_refusals.types import DirectionOrigin, Intervention, SiteEdit


def prompt_file(path, words):
    path.write_text("".join(f"Please {word} it\n" for word in words), encoding="utf-8")
    return PromptSource(source=str(path))


@pytest.fixture
def settings(tmp_path):
    source = tmp_path / "base"
    tiny.llama().to(torch.bfloat16).save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    return RunSettings(
        model=str(source),
        direction=DirectionSettings(
            harmful=prompt_file(tmp_path / "harmful.txt", ("steal", "break", "burn", "forge")),
            harmless=prompt_file(tmp_path / "harmless.txt", ("bake", "water", "paint", "read")),
            n_prompts=3,
        ),
        measure=MeasureSettings(
            harmful=prompt_file(tmp_path / "a.txt", ("rob", "hack")),
            harmless=prompt_file(tmp_path / "b.txt", ("cook", "sing", "draw")),
            alarming=prompt_file(tmp_path / "c.txt", ("kill", "shoot")),
            max_new_tokens=6,
            kl_tokens=4,
        ),
    )


def test_a_run_leaves_a_whole_and_documented_model(settings, tmp_path):
    stages = []
    result = run(settings, tmp_path / "out", progress=Progress(lambda *stage: stages.append(stage)))
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "README.md", "ablation.json", "analysis.json", "certificate.json", "config.json", "directions",
        "generation_config.json", "model.safetensors", "report.html", "rows.jsonl",
        "scores.json", "tokenizer.json",
    }  # fmt: skip
    AutoModelForCausalLM.from_pretrained(out)
    record = json.loads((out / "ablation.json").read_text())
    assert record["settings"]["direction"]["seed"] == 0
    assert record["prompts"]["harmful_test"]["n"] == 2 and len(record["prompts"]["harmful_test"]["sha256"]) == 64
    assert (
        record["scores"]
        == json.loads((out / "scores.json").read_text())
        == json.loads(json.dumps(result.evaluation.to_json()))
    )
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (2 + 3 + 2)
    assert {stage for stage, _, _ in stages} == {"activations", "files", "evaluation", "separation"}
    costs = result.costs
    assert list(costs)[:4] == ["prompts", "loading", "mapping", "activations"] and list(costs)[-1] == "report"
    assert {"certificate", "answers of the base model", "answers of the edited model", "damage"} <= set(costs)
    assert all(cost.seconds > 0 and cost.cpu_seconds > 0 for cost in costs.values())
    held = [cost.memory for name, cost in costs.items() if name != "activations"]
    assert held == sorted(held) and held[0] > 100e6
    assert "seconds" not in (out / "ablation.json").read_text()
    card = (out / "README.md").read_text()
    assert "This is not the base model" in card and "base_model: " in card
    assert str(tmp_path) not in json.dumps(record["base"]) and record["directions"][0]["sha256"][:16] in card
    assert not list(tmp_path.glob(".*"))


def test_the_numbers_are_those_of_the_saved_files(settings, tmp_path):
    result = run(settings, tmp_path / "out")
    again, _ = compare(settings, str(tmp_path / "out"))
    assert again.sets == result.evaluation.sets and again.kl == result.evaluation.kl


def test_the_same_seed_gives_the_same_files(settings, tmp_path):
    first, second = (run(settings, tmp_path / name).baked.directory for name in ("one", "two"))
    for name in ("model.safetensors", "directions/direction.safetensors", "certificate.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_second_model_gives_the_same_numbers(settings, tmp_path):
    one, other = (
        run(settings.model_copy(update={"from_files": afresh}), tmp_path / str(afresh)) for afresh in (False, True)
    )
    assert one.evaluation.model_copy(update={"edited": other.evaluation.edited}) == other.evaluation
    assert one.baked.certificate == other.baked.certificate and one.baked.certificate.boundaries is not None


@pytest.mark.parametrize(("n_answers", "n_kept"), [(7, 2), (14, 5)])
def test_a_killed_run_goes_on_and_one_that_ends_leaves_no_journal(settings, tmp_path, n_answers, n_kept):
    def kill(stage, done, total):
        if stage == "evaluation" and done == n_answers:
            raise KeyboardInterrupt

    out, journal = tmp_path / "out", tmp_path / ".out.journal"
    with pytest.raises(KeyboardInterrupt):
        run(settings, out, progress=Progress(kill))
    assert not out.exists()
    assert len((journal / STAGES).read_text().splitlines()) == n_kept
    seen = []
    run(settings, out, progress=Progress(lambda stage, done, total: seen.append((stage, done))))
    assert min(done for stage, done in seen if stage == "evaluation") == n_answers
    assert not list(tmp_path.glob(".*"))
    run(settings, tmp_path / "undisturbed")
    for name in ("model.safetensors", "rows.jsonl", "selection.json"):
        if (out / name).exists():
            assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_run_that_fails_leaves_no_journal(settings, tmp_path):
    def fail(stage, done, total):
        if stage == "evaluation" and done == 7:
            raise OutputError("The disk is full.")

    with pytest.raises(OutputError):
        run(settings, tmp_path / "new" / "out", progress=Progress(fail))
    assert not (tmp_path / "new").exists()


def test_a_direction_from_a_file_is_used_as_it_is(settings, tmp_path):
    loaded = load(settings.model)
    found = find_direction(loaded, settings.direction)
    save_direction(found.directions[0], tmp_path / "d.safetensors")
    run(settings, tmp_path / "out", direction_file=tmp_path / "d.safetensors")
    assert torch.equal(
        load_direction(tmp_path / "out" / "directions" / "direction.safetensors").basis, found.directions[0].basis
    )


def test_prompts_that_found_the_direction_may_not_measure_it(settings, tmp_path):
    measure = settings.measure.model_copy(update={"harmful": settings.direction.harmful})
    direction = settings.direction.model_copy(update={"n_prompts": 4})
    with pytest.raises(PromptError, match="Please"):
        run(settings.model_copy(update={"measure": measure, "direction": direction}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_saved_is_refused_before_any_work(settings, tmp_path):
    for bits in (4, 8):
        with pytest.raises(ModelError, match=f"{bits} bits.*--load-in-{bits}bit"):
            loading = LoadSettings(**{f"load_in_{bits}bit": True})
            run(settings.model_copy(update={"loading": loading}), tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="--force"):
        run(settings, tmp_path / "out")
    run(settings, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "ablation.json").is_file()


@pytest.mark.parametrize("variant", ["plain", "norm-preserving"])
def test_a_directory_is_certified_from_its_own_record(settings, tmp_path, variant):
    edit = EditSettings(strength=0.8, layers=(1, 1), variant=variant)
    run(settings.model_copy(update={"edit": edit}), tmp_path / "out")
    certificate = certify_directory(tmp_path / "out", settings.model)
    assert certificate.passed and len(certificate.edited) == 2 and len(certificate.left) == 3
    if variant == "plain":
        assert all(entry.share_left == pytest.approx(0.2, abs=0.02) for entry in certificate.edited)


def test_a_certificate_fails_for_files_that_were_changed(settings, tmp_path):
    run(settings, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    certificate = certify_directory(tmp_path / "out", settings.model)
    assert not certificate.passed and len(certificate.problems) == 5
    assert "model.layers.0.self_attn.o_proj.weight" in " ".join(certificate.problems)


def test_inspect_needs_no_weights(settings, tmp_path):
    (tmp_path / "base" / "model.safetensors").unlink()
    found = inspect(settings.model)
    assert found.verdict == "exact" and found.sites == {"embedding": 1, "attn": 2, "mlp": 2}
    assert [row.on_disk for row in found.writers][:2] == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ]
    assert "dtype" not in found.to_json()["writers"][0]


def test_what_a_search_tried_can_be_tried_again(settings, tmp_path):
    directory = tmp_path / "directions"
    directory.mkdir()
    vectors = torch.eye(8)
    directions = [direction_from_vectors(vectors[i], DirectionOrigin(method="test")) for i in range(3)]
    first = Intervention(
        (directions[0], directions[1]),
        (
            SiteEdit(kind="attn", layer=1, strength=0.5, direction=0),
            SiteEdit(kind="mlp", layer=2, strength=1.5, direction=1),
        ),
    )
    second = Intervention((directions[1], directions[2]), (SiteEdit(kind="mlp", layer=0, strength=1.0, direction=1),))
    candidates = [Candidate(name, one, 0.1, 0.2) for name, one in (("a", first), ("b", first), ("c", second))]
    Selection("auto", tuple(candidates), 2, Rule()).record().write(tmp_path / "selection.json")
    save_candidates({0: first, 2: second}, tmp_path / CANDIDATES)
    found = load_candidates(tmp_path)
    assert list(found) == ["a", "c"]
    for name, wanted in (("a", first), ("c", second)):
        assert found[name].edits == wanted.edits
        for one, other in zip(found[name].directions, wanted.directions, strict=True):
            assert torch.equal(one.basis, other.basis)
    assert load_candidates(tmp_path / "elsewhere") == {}


def test_an_intervention_is_scaled_and_restricted():
    direction = direction_from_vectors(torch.eye(8)[0], DirectionOrigin(method="test"))
    whole = intervene(direction, 4)
    for layers in (None, (0, 2), (1, 3)):
        found = intervene(whole, 4, strength=0.3, layers=layers).edits
        assert found == intervene(direction, 4, strength=0.3, layers=layers).edits
    kept = intervene(whole, 4, strength=2.0, kinds=("mlp",)).edits
    assert kept == intervene(direction, 4, strength=2.0, kinds=("mlp",)).edits
    for wrong in ({"layers": (2, 9)}, {"layers": (3, 1)}, {"strength": 99.0}):
        with pytest.raises(DirectionError):
            intervene(whole, 4, **wrong)
