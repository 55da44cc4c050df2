"""What becomes of an embedding that is also the unembedding: by what servers know, and by what the files hold."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
import zoo
from remove_refusals.baking.base import base_of, open_base
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.plan import resolve
from remove_refusals.examination import inspect
from remove_refusals.measure.answers import Answered
from remove_refusals.measure.judges.phrases import Label
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.generate import Answer
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.search.confirming import Confirming, confirm
from remove_refusals.search.layers import Bench, Option
from remove_refusals.search.material import OwnAnswers
from remove_refusals.settings import EditSettings, MeasureSettings
from remove_refusals.types import PromptSet
from streaming import saved, streamed, taken_out

HEAD = "lm_head.weight"


def logits(model):
    with torch.inference_mode():
        return model(**zoo.inputs(model)).logits


@pytest.mark.parametrize(
    ("model_type", "done", "servers"),
    [
        ("gemma", "both", ["llama.cpp"]),
        ("cohere", "both", ["llama.cpp", "vLLM"]),
        ("cohere2_moe", "both", ["vLLM"]),
        ("gemma3", "untie", []),
        ("gpt2", "untie", []),
    ],
)
def test_what_is_done_goes_by_the_servers(model_type, done, servers):
    model = zoo.build(model_type)
    tied = resolve(taken_out(), map_model(model), model.get_parameter).tied
    assert (tied.asked, tied.done) == ("auto", done)
    assert [name for name in ("llama.cpp", "vLLM") if name in tied.why] == servers
    for asked in ("untie", "both"):
        chosen = resolve(taken_out(), map_model(model), model.get_parameter, EditSettings(tied=asked)).tied
        assert (chosen.asked, chosen.done) == (asked, asked)


def test_the_type_of_the_language_model_inside_decides():
    found = map_model(zoo.build("gemma3"))
    assert (found.model_type, found.text_type) == ("gemma3", "gemma3_text")


@pytest.mark.parametrize("model_type", ["gemma", "cohere2", "zamba2"])
def test_hooks_and_files_agree_where_both_are_edited_unasked(model_type, tmp_path):
    loaded = saved(tmp_path, model_type, torch.float32)
    found = streamed(tmp_path, taken_out(strength=0.8))
    plan = json.loads((found.directory / "ablation.json").read_text())["plan"]
    assert (plan["tied"]["asked"], plan["tied"]["done"], plan["embedding_untied"]) == ("auto", "both", False)
    assert (
        load_file(found.directory / "model.safetensors").keys() == load_file(tmp_path / "base/model.safetensors").keys()
    )
    assert found.certificate.passed and certify_directory(found.directory, str(tmp_path / "base")).passed
    edited = AutoModelForCausalLM.from_pretrained(found.directory, attn_implementation="eager").eval()
    assert edited.get_output_embeddings().weight is edited.get_input_embeddings().weight
    with ablated(loaded, taken_out(strength=0.8)):
        torch.testing.assert_close(logits(loaded.model), logits(edited), atol=1e-5, rtol=0)
    with ablated(loaded, taken_out(strength=0.8), tied="untie"):
        assert float((logits(loaded.model) - logits(edited)).abs().max()) > 1e-4


def test_a_search_measures_what_will_be_saved():
    loaded = LoadedModel(zoo.build("gemma3_text"), tiny.tokenizer(), "tiny")
    generator = torch.Generator().manual_seed(0)

    def made(label):
        tokens = torch.randint(3, 30, (3, 11), generator=generator).tolist()
        answers = tuple(Answer(text="", token_ids=tuple(row[5:]), finished=False) for row in tokens)
        prompts = PromptSet("drawn", ("a", "b", "c"), "drawn")
        return Answered(prompts, tuple(tuple(row[:5]) for row in tokens), answers, (label,) * 3)

    harmful, harmless = made(Label.REFUSAL), made(Label.COMPLIANCE)
    vector = torch.randn(zoo.D_MODEL, generator=generator)
    option = Option(1, direction_from_vectors(vector), vector, "drawn")
    settings = MeasureSettings(max_new_tokens=2, kl_tokens=2)
    found = {
        tied: (
            Bench(OwnAnswers(loaded, harmful, harmless, tied=tied), kl_tokens=4).score([option], 3)[0].damage,
            confirm(Confirming(loaded, harmful, harmless, settings, tied), taken_out()).damage.value,
        )
        for tied in ("auto", "untie", "both")
    }
    assert found["auto"] == found["untie"]
    assert all(abs(one - other) > 1e-5 for one, other in zip(found["untie"], found["both"], strict=True))


def with_another_head(folder, model_type, kind):
    """A checkpoint whose configuration says that its embedding is tied, beside an unembedding of other bytes."""
    model = zoo.build(model_type)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0) * 1.5)
    model.all_tied_weights_keys = {}
    model.save_pretrained(folder, max_shard_size="60KB" if kind == "shards" else "1GB")
    tiny.tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if kind == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(("model_type", "kind"), [("gemma2", "one file"), ("cohere", "shards"), ("gpt2", "bin")])
def test_a_head_of_its_own_is_one_whatever_the_configuration_says(model_type, kind, tmp_path):
    with_another_head(tmp_path / "base", model_type, kind)
    loaded = load(tmp_path / "base")
    before = loaded.model.get_output_embeddings().weight.detach().clone()
    assert not map_model(loaded.model).tied and not open_base(tmp_path / "base").model_map.tied
    assert kind == "bin" or not inspect(str(tmp_path / "base")).tied
    both = EditSettings(tied="both")
    found = bake(open_base(tmp_path / "base"), taken_out(), tmp_path / "edited", both)
    plan = found.record.plan
    assert plan.tied is None and not plan.tied_in_base and not plan.embedding_untied
    assert found.certificate.passed and certify_directory(found.directory, str(tmp_path / "base")).passed
    assert json.loads((found.directory / "config.json").read_text())["tie_word_embeddings"] is False
    again = base_of(loaded).plan(taken_out(), both)
    assert [one.on_disk for one in again.entries] == [one.on_disk for one in found.plan.entries] and again.tied is None
    edited = load(tmp_path / "edited")
    assert torch.equal(edited.model.get_output_embeddings().weight, before)
    for tied in ("auto", "both"):
        with ablated(loaded, taken_out(), tied=tied):
            torch.testing.assert_close(logits(loaded.model), logits(edited.model), atol=1e-5, rtol=0)
