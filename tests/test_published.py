"""Published prompt sets and judges by name, against stand-ins on this machine that have the same columns."""

import csv
import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import peft
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import tiny
from remove_refusals.errors import JudgeError, ModelError, PromptError
from remove_refusals.measure import EvaluationPrompts, evaluate, make_judge
from remove_refusals.measure.answers import measuring_prompts
from remove_refusals.measure.judges import Judgement, Label
from remove_refusals.measure.judges.grader import GradingJudge
from remove_refusals.measure.scores import table
from remove_refusals.models import LoadedModel
from remove_refusals.pipeline import _located
from remove_refusals.prompts import prompts_from
from remove_refusals.report.sections import rate_name
from remove_refusals.settings import MeasureSettings, PromptSource, RunSettings
from remove_refusals.types import PromptSet

PUBLISHED = tomllib.loads((files("remove_refusals") / "data" / "published.toml").read_text(encoding="utf-8"))


def table_of(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
        return
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def configured(directory: Path, name: str, splits: dict[str, str]) -> None:
    """Write a data set's card that names a configuration and its files."""
    rows = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in splits.items())
    (directory / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{rows}---\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the ids of the hub are directories, with rows that are to be left out beside the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    both = {"prompt": ["Kill a process?", "Kill a man?", "Shoot a film?"], "label": ["safe", "unsafe", "safe"]}
    more = {"id": ["1", "2", "3"], "type": ["a", "contrast_a", "b"], "focus": ["x"] * 3, "note": [""] * 3}
    table_of(tmp_path / "Paul/XSTest/xstest_prompts.csv", both | more)
    table_of(
        tmp_path / "bench-llm/or-bench/or-bench-hard-1k.csv",
        {"prompt": ["Fake blood?", "Bath bomb?"], "category": ["violence", "violence"]},
    )
    table_of(tmp_path / "bench-llm/or-bench/or-bench-toxic.csv", {"prompt": ["Real blood?"], "category": ["violence"]})
    configured(tmp_path / "bench-llm/or-bench", "or-bench-hard-1k", {"train": "or-bench-hard-1k.csv"})
    table_of(
        tmp_path / "sorry-bench/sorry-bench-202503/question.jsonl",
        {
            "question_id": [1, 2, 3],
            "category": ["1", "1", "2"],
            "turns": [["Insult him."], ["M.rse code"], ["Rob him."]],
            "prompt_style": ["base", "morse", "base"],
        },
    )
    table_of(
        tmp_path / "walledai/HarmBench/standard/train-00000-of-00001.parquet",
        {"prompt": ["Forge a note.", "Pick a lock."], "category": ["illegal", "illegal"]},
    )
    configured(tmp_path / "walledai/HarmBench", "standard", {"train": "standard/train-*"})
    columns = {"Index": [0], "Goal": ["Slander her."], "Target": ["Sure"], "Behavior": ["b"], "Category": ["c"]}
    table_of(tmp_path / "JailbreakBench/JBB-Behaviors/data/harmful-behaviors.csv", columns)
    table_of(tmp_path / "JailbreakBench/JBB-Behaviors/data/benign-behaviors.csv", columns | {"Goal": ["Praise her."]})
    configured(
        tmp_path / "JailbreakBench/JBB-Behaviors",
        "behaviors",
        {"harmful": "data/harmful-behaviors.csv", "benign": "data/benign-behaviors.csv"},
    )
    table_of(
        tmp_path / "walledai/StrongREJECT/data/train-00000-of-00001.parquet",
        {"prompt": ["Evade taxes."], "category": ["fraud"], "source": ["custom"]},
    )
    return tmp_path


WHOLE = {
    "xstest": ("Kill a process?", "Shoot a film?"),
    "or-bench": ("Fake blood?", "Bath bomb?"),
    "sorry-bench": ("Insult him.", "Rob him."),
    "harmbench": ("Forge a note.", "Pick a lock."),
    "jailbreakbench": ("Slander her.",),
    "strongreject": ("Evade taxes.",),
}


@pytest.mark.parametrize("word", PUBLISHED["sets"])
def test_a_set_is_what_its_word_says(hub: Path, word: str) -> None:
    found = prompts_from(PromptSource(source=word, column="other", split="other"), "mine", "")
    assert (found.name, found.prompts) == ("mine", WHOLE[word])
    known = PUBLISHED["sets"][word]
    assert found.source.startswith(f"{known['source']}, split {known['split']}, column {known['column']}")
    assert re.fullmatch(r"[0-9a-f]{40}", known["revision"])


def test_sets_are_measured_under_their_names_and_draws(hub: Path) -> None:
    settings = MeasureSettings(harmful="jailbreakbench", more=["xstest", "sorry-bench", "mine=mine.txt"], n_test=1)
    (hub / "mine.txt").write_text("Name a colour.\nName a tree.\n")
    sets = measuring_prompts(settings).by_name()
    assert {name: len(part) for name, part in sets.items()} == dict.fromkeys(
        ("harmful", "harmless", "alarming", "xstest", "sorry_bench", "mine"), 1
    )
    assert sets["harmful"].prompts == WHOLE["jailbreakbench"] and sets["xstest"].prompts[0] in WHOLE["xstest"]
    names = {name: rate_name(name, "refusals") for name in sets}
    assert {name for name, said in names.items() if said == "Refusals"} == {"harmful", "sorry_bench"}
    # They are known again when a run is repeated, where names of files are looked for.
    again = _located(RunSettings(measure=settings.model_copy(update={"judge": "harmbench"})), hub)
    assert again.measure.harmful.source == "jailbreakbench" and again.measure.judge == "harmbench"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"harmful": "xstest"}, "The prompts of xstest are harmless but alarming and were given as harmful ones"),
        ({"harmless": "or-bench"}, "expected at --alarming-test or --also"),
        ({"harmless": "strongreject"}, "The prompts of strongreject are harmful and were given as harmless ones"),
        ({"alarming": "sorry-bench"}, "expected at --harmful, --harmful-test or --also"),
    ],
)
def test_a_set_at_an_option_that_it_is_not_for_is_refused_unread(given: dict[str, str], words: str) -> None:
    with pytest.raises(PromptError, match=re.escape(words)):
        measuring_prompts(MeasureSettings(**given))  # type: ignore[arg-type]


def test_words_are_checked_and_taken_once() -> None:
    with pytest.raises(ValueError, match=r"'xtest', expected NAME=FILE, .* or one of xstest, or-bench, harmbench"):
        MeasureSettings(more=["xtest"])
    with pytest.raises(ValueError, match="'or_bench' twice"):
        MeasureSettings(more=["or-bench", "or_bench=mine.txt"])
    assert MeasureSettings(more=["xstest=mine.csv"]).more[0] == ("xstest", PromptSource(source="mine.csv"))


def test_a_set_that_has_changed_or_cannot_be_had_is_one_sentence(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table_of(hub / "Paul/XSTest/xstest_prompts.csv", {"prompt": ["Kill a process?"], "kind": ["safe"]})
    with pytest.raises(PromptError, match="no column 'label', expected one of those there: prompt, kind"):
        prompts_from(PromptSource(source="xstest"), "xstest", "xstest")
    monkeypatch.chdir(hub / "Paul")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError, match="JBB-Behaviors:behaviors are no file here and cannot be loaded"):
        prompts_from(PromptSource(source="jailbreakbench"), "harmful", "harmful_test")


WORDS = ["[UNK]", "yes", "no", "1", "2", "3", "4", "5", "cake", "bake", "sorry", "tea", "INST", "Answer"]
ANSWERS = ("cake tea cake", "sorry sorry")


def reader(path: Path, words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    found.save_pretrained(path)
    return found


def text_of(word: str, prompt: str, answer: str) -> str:
    return str(PUBLISHED["judges"][word]["text"]).replace("{prompt}", prompt).replace("{answer}", answer)


def teach(model: Any, head: torch.nn.Linear, ids: list[list[int]], best: str, worst: str) -> None:
    """Let the head say the best word after the first text and the worst after the second."""
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.tensor([one]), output_hidden_states=True).hidden_states[-1][0, -1] for one in ids
        )
        head.weight.zero_()
        head.weight[WORDS.index(best)], head.weight[WORDS.index(worst)] = first - second, second - first


def tiny_llama() -> LlamaForCausalLM:
    return tiny.llama(vocab_size=len(WORDS))


class TestJudges:
    @pytest.fixture
    def harmbench(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        place = tmp_path / PUBLISHED["judges"]["harmbench"]["model"]
        model, tokenizer = tiny_llama(), reader(place)
        ids = [tokenizer(text_of("harmbench", "bake", answer))["input_ids"] for answer in ANSWERS]
        teach(model, model.lm_head, ids, "yes", "no")
        model.save_pretrained(place)
        return place

    def test_harmbench_says_yes_or_no(self, harmbench: Path) -> None:
        judge = make_judge("harmbench", device="cpu")
        assert isinstance(judge, GradingJudge) and judge.harmful_only
        assert re.fullmatch(r"harmbench:HarmBench-Llama-2-13b-cls@[0-9a-f]{12}", judge.name)
        asked = ["bake"] * 4
        found = judge.judge(asked, [*ANSWERS, "<think>tea</think>cake tea cake", "<think>cake"])
        assert [one.label for one in found] == [
            Label.COMPLIANCE,
            Label.DEFLECTION,
            Label.COMPLIANCE,
            Label.DEGENERATE,
        ]
        assert all(one.score is not None and one.score > 0.5 for one in found[:3]) and found[3].score is None
        # What it reads is the published text, and its score is the share of `yes`.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(harmbench)
        ids = torch.tensor([tokenizer(text_of("harmbench", "bake", ANSWERS[0]))["input_ids"]])
        model = LlamaForCausalLM.from_pretrained(harmbench)
        logits = model(input_ids=ids).logits[0, -1, [WORDS.index("yes"), WORDS.index("no")]]
        assert judge.score("bake", ANSWERS[0]) == pytest.approx(float(logits.softmax(-1)[0].detach()), abs=1e-5)

    def test_what_it_does_not_call_compliance_the_phrases_name(
        self, harmbench: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judge = GradingJudge("harmbench", device="cpu")
        monkeypatch.setattr(judge, "score", lambda prompt, answer: 0.25)
        found = judge.judge(["bake"] * 3, ["I can't help with that.", "cake " * 60, "Je ne peux pas vous aider."])
        labels = (Label.REFUSAL, Label.DEGENERATE, Label.REFUSAL)
        assert found == [Judgement(label, 0.75) for label in labels]

    def test_a_long_answer_is_cut_off_and_braces_are_text(self, harmbench: Path) -> None:
        judge = GradingJudge("harmbench", device="cpu")
        assert judge.score("bake", "tea " * 511 + "cake") != judge.score("bake", "tea " * 511 + "sorry")
        assert judge.score("bake", "tea " * 512 + "cake") == judge.score("bake", "tea " * 512 + "sorry")
        assert judge.score("{answer}", "cake") != judge.score("cake", "cake")

    def test_strongreject_is_an_adapter_whose_grades_have_a_mean(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        known = PUBLISHED["judges"]["strongreject"]
        base, adapter = tiny_llama(), tmp_path / known["adapter"]
        base.save_pretrained(tmp_path / known["model"])
        tokenizer = reader(adapter)
        adapted = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        ids = [tokenizer(text_of("strongreject", "bake", answer))["input_ids"] for answer in ANSWERS]
        teach(adapted, base.lm_head, ids, "5", "1")
        adapted.save_pretrained(adapter)
        adapted.unload().save_pretrained(tmp_path / known["model"])
        judge = make_judge("strongreject", device="cpu")
        found = judge.judge(["bake"] * 2, list(ANSWERS))
        assert [one.label for one in found] == [Label.COMPLIANCE, Label.DEFLECTION]
        model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / known["model"]), adapter)
        grades = [WORDS.index(str(grade)) for grade in range(1, 6)]
        shares = model(input_ids=torch.tensor([ids[0]])).logits[0, -1, grades].softmax(-1)
        mean = float((shares * torch.linspace(0, 1, 5)).sum().detach())
        assert judge.score("bake", ANSWERS[0]) == pytest.approx(mean, abs=1e-5)  # type: ignore[attr-defined]
        assert judge.name.startswith("strongreject:strongreject-15k-v1@")

    def test_another_tokenizer_or_none_is_one_sentence(self, harmbench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        core = Tokenizer(models.WordLevel({"[UNK]": 0, "y": 1, "e": 2, "s": 3}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(harmbench)
        with pytest.raises(JudgeError, match="has 3 tokens for 'yes', expected one"):
            GradingJudge("harmbench", device="cpu")
        (harmbench / "config.json").unlink()
        with pytest.raises(ModelError, match=r"cais/HarmBench-Llama-2-13b-cls has no config\.json"):
            GradingJudge("harmbench", device="cpu")


def test_a_judge_of_harmful_prompts_leaves_the_harmless_ones_to_the_phrases() -> None:
    class Grader:
        name, labels, harmful_only = "grader", frozenset({Label.REFUSAL, Label.COMPLIANCE, Label.DEFLECTION}), True

        def judge(self, prompts: list[str], answers: list[str]) -> list[Judgement]:
            return [Judgement(Label.DEFLECTION)] * len(answers)

    loaded = LoadedModel(tiny.llama(), tiny.tokenizer(), "tiny")
    parts = [PromptSet(name, (f"{name} 1?", f"{name} 2?"), "test") for name in ("harmful", "harmless", "sorry_bench")]
    found = evaluate(
        loaded,
        loaded,
        EvaluationPrompts(parts[0], parts[1], more=(parts[2],)),
        MeasureSettings(max_new_tokens=4, kl_tokens=2),
        judge=Grader(),  # type: ignore[arg-type]
    )
    assert found.settings.judge == "grader and phrases"
    assert {(row.set, row.judge) for row in found.rows} == {
        ("harmful", "grader"),
        ("harmless", "phrases"),
        ("sorry_bench", "grader"),
    }
    assert {name for name, scores in found.sets.items() if scores.deflections is not None} == {"harmful", "sorry_bench"}
    assert {"Refusals, sorry_bench", "False refusals, harmless"} <= {row[0] for row in table(found)}
