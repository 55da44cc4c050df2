"""A LoRA that is exactly the edit: loaded with plain PEFT, unmerged and merged, over many kinds of model."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
import zoo
from architectures import entry
from remove_refusals.baking.base import Base, load_intervention, open_base
from remove_refusals.baking.disk import bake
from remove_refusals.baking.lora import bake_lora, check_loads, peft_adapter, save_peft_adapter
from remove_refusals.baking.memory import bake_in_place, is_adapter, with_adapter
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.saved import save_direction
from remove_refusals.errors import ArchitectureError, DirectionError, ModelError
from remove_refusals.models.load import load
from remove_refusals.settings import EditSettings
from remove_refusals.types import DirectionOrigin, Intervention, SiteEdit

# Plain, with gains behind the writers and a scaled tied embedding, Conv1D with biases, biases on the input side only,
# fused experts beside shared ones, experts stored the other way round with biases, state space mixers, and hybrids.
MODEL_TYPES = (
    "llama",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "jetmoe",
    "granitemoe",
    "lfm2",
    "inkling_text",
    "qwen3_next",
    "granite",
)


def direction(d_model, rank=1):
    vectors = torch.randn(d_model, rank, generator=torch.Generator().manual_seed(5))
    return direction_from_vectors(vectors, DirectionOrigin(method="given"))


def logits(model):
    with torch.inference_mode():
        return model(zoo.token_ids(model), use_cache=False).logits


def adapter(model, intervention, **options):
    """The adapter of a model in memory."""
    base = Base(model, "somewhere")
    return peft_adapter(base, base.plan(intervention, EditSettings(**{"tied": "untie"} | options)))


def adapted(model, intervention, directory):
    save_peft_adapter(adapter(model, intervention), directory)
    with warnings.catch_warnings():
        # PEFT warns of every tied embedding that an adapter touches.
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, directory).eval()


def edited(model, intervention, **options):
    """A copy of the model with the edit in its weights."""
    other = copy.deepcopy(model)
    bake_in_place(other, intervention, EditSettings(**{"tied": "untie"} | options))
    return other


def untied(model):
    """Give the unembedding a tensor of its own."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_adapter_is_the_edit_unmerged_and_merged(model_type, rank, tmp_path):
    model = zoo.build(model_type)
    intervention = intervene(direction(zoo.D_MODEL, rank), zoo.N_LAYERS, strength=0.8)
    plain, wanted = logits(model), logits(edited(model, intervention))
    # Merged, an adapter of a tied embedding changes both of its uses.
    wanted_merged = logits(edited(model, intervention, tied="both"))
    loaded = adapted(model, intervention, tmp_path)
    assert float((plain - wanted).abs().max()) > 0.05
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted_merged, rtol=0, atol=2e-5)


def test_merged_into_an_untied_base_the_unembedding_stays(tmp_path):
    model = zoo.build("gemma3_text")
    intervention = intervene(direction(zoo.D_MODEL), zoo.N_LAYERS)
    wanted = logits(edited(model, intervention))
    merged = adapted(untied(model), intervention, tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=2e-5)


def test_only_planned_layers_are_adapted():
    model = zoo.build("qwen2")
    base = Base(model, "somewhere")
    plan = base.plan(intervene(direction(zoo.D_MODEL), zoo.N_LAYERS, layers=(2, 3)))
    built = peft_adapter(base, plan)
    modules = {entry.parameter.removesuffix(".weight") for entry in plan.entries}
    assert set(built.config["target_modules"]) == modules and len(modules) == 4
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in built.tensors} == modules


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", "backbone.layers.0.mixer.out_proj.weight.*PEFT refuses"),
        ("dbrx", "experts.mlp.w2.*outside of its own module"),
        ("hrm_text", "z_L_init.*no matrix"),
    ],
)
def test_what_peft_cannot_carry_is_refused_by_name(model_type, message):
    model = zoo.build(model_type)
    with pytest.raises(ArchitectureError, match=message):
        adapter(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS))


def test_a_tied_pair_edited_as_one_is_refused():
    model = zoo.build("gemma3_text")
    with pytest.raises(ArchitectureError, match=r"embed_tokens.*--tied untie"):
        adapter(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS), tied="both")


@pytest.mark.parametrize("variant", ["norm-preserving"])
def test_a_variant_of_full_rank_is_refused(variant):
    model = zoo.build("llama")
    with pytest.raises(ArchitectureError, match=variant):
        adapter(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS), variant=variant)


def test_what_peft_would_pass_by_is_refused(tmp_path):
    model = zoo.build("laguna")
    save_peft_adapter(adapter(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS)), tmp_path)
    with pytest.raises(ArchitectureError, match=r"no place.*shared_experts"):
        check_loads(model, tmp_path)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen2_moe"])
def test_a_whole_adapter_passes_the_check(model_type, tmp_path):
    model = zoo.build(model_type)
    save_peft_adapter(adapter(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS)), tmp_path)
    check_loads(model, tmp_path)


def test_bake_as_lora_reads_the_checkpoint_and_loads_with_plain_peft(command, tmp_path):
    model = zoo.build("mixtral", num_local_experts=12)
    model.save_pretrained(tmp_path / "base")
    taken = direction(zoo.D_MODEL)
    save_direction(taken, tmp_path / "taken.safetensors")
    arguments = ("bake", tmp_path / "base", "--direction", tmp_path / "taken.safetensors", "--as", "lora")
    outcome = command(*arguments, "-o", tmp_path / "adapter")
    assert outcome.code == 0, outcome
    assert "9 tensors of model type mixtral" in outcome.out
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir() if path.is_file()}) == 1
    record = json.loads((tmp_path / "adapter" / "ablation.json").read_text())
    assert record["adapter"]["kind"] == "peft-lora" and record["adapter"]["rank"] == 1
    assert len(record["plan"]["edited"]) == 9 and record["base"]["source"] == "base"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "ablation, not a fine-tune" in card and "`base`" in card and str(tmp_path) not in card
    wanted = logits(edited(model, intervene(taken, zoo.N_LAYERS)))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.eval()), wanted, rtol=0, atol=2e-5)


def test_an_unknown_kind_of_carrier_is_refused(command, llama_directory, tmp_path):
    save_direction(direction(32), tmp_path / "taken.safetensors")
    arguments = ("bake", llama_directory, "--direction", tmp_path / "taken.safetensors", "--as", "cheese")
    outcome = command(*arguments, "-o", tmp_path / "out")
    assert outcome.code == 2 and "'cheese'" in outcome.err and not (tmp_path / "out").exists()


class TestRepeat:
    @pytest.fixture
    def made(self, tmp_path):
        """A tiny model, and a bake of it with strengths and directions of its own at every site."""
        model = zoo.build("llama")
        model.save_pretrained(tmp_path / "base")
        tiny.tokenizer().save_pretrained(tmp_path / "base")
        taken = (
            direction(zoo.D_MODEL),
            direction_from_vectors(torch.eye(zoo.D_MODEL)[0], DirectionOrigin(method="given")),
        )
        edits = (
            SiteEdit(kind="attn", layer=1, strength=0.5),
            SiteEdit(kind="mlp", layer=1, strength=1.25, direction=1),
            SiteEdit(kind="mlp", layer=3, strength=-0.75),
        )
        intervention = Intervention(taken, edits)
        bake(open_base(tmp_path / "base"), intervention, tmp_path / "made")
        return model, intervention

    def test_what_was_made_is_read_back(self, made, tmp_path):
        found = load_intervention(tmp_path / "made")
        assert found.edits == made[1].edits
        assert all(torch.equal(a.basis, b.basis) for a, b in zip(found.directions, made[1].directions, strict=True))

    def test_the_adapter_is_the_edit_that_was_made(self, made, command, tmp_path):
        arguments = ("bake", tmp_path / "base", "--run", tmp_path / "made", "--as", "lora")
        outcome = command(*arguments, "-o", tmp_path / "adapter")
        assert outcome.code == 0 and "3 tensors" in outcome.out, outcome
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
        assert float((logits(saved) - logits(made[0])).abs().max()) > 0.05
        loaded = PeftModel.from_pretrained(made[0], tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(loaded), logits(saved), rtol=0, atol=2e-5)

    def test_a_checkpoint_can_be_made_again_to_the_byte(self, made, command, tmp_path):
        outcome = command("bake", tmp_path / "base", "--run", tmp_path / "made", "-o", tmp_path / "again")
        assert outcome.code == 0, outcome
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "again"))
        assert first == second

    def test_its_variant_is_made_again_too(self, made, command, tmp_path):
        given = ("--run", tmp_path / "made", "-o", tmp_path / "kept", "--variant", "norm-preserving")
        assert command("bake", tmp_path / "base", *given).code == 0
        assert command("bake", tmp_path / "base", "--run", tmp_path / "kept", "-o", tmp_path / "again").code == 0
        made, kept, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "kept", "again"))
        assert made != kept == again

    def test_a_strength_is_multiplied(self, made, command, tmp_path):
        given = ("--run", tmp_path / "made", "--strength", "0.5", "-o", tmp_path / "half")
        assert command("bake", tmp_path / "base", *given).code == 0
        before, after = (load_intervention(tmp_path / name).edits for name in ("made", "half"))
        assert [0.5 * edit.strength for edit in before] == [edit.strength for edit in after]

    @pytest.mark.parametrize("more", [(), ("--run", ".", "--direction", "."), ("--candidate", "a")])
    def test_one_thing_is_taken_out(self, more, command, tmp_path):
        outcome = command("bake", "demo", *more, "-o", tmp_path / "out")
        assert outcome.code == 2 and "expected" in outcome.err and "--run" in outcome.err

    @pytest.mark.parametrize(
        "change",
        [{"strength": None}, {"strength": "1"}, {"kind": "head"}, {"layer": 1.5}, {"more": 1}, {"offset": 3}],
    )
    def test_a_record_that_was_changed_is_refused(self, change, made, tmp_path):
        path = tmp_path / "made" / "ablation.json"
        record = json.loads(path.read_text())
        record["intervention"][0] |= change
        path.write_text(json.dumps(record))
        with pytest.raises(DirectionError, match=r"ablation\.json has at intervention\.0"):
            load_intervention(tmp_path / "made")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_an_adapter_is_measured_as_the_model_that_it_makes(model_type, tmp_path):
    model = zoo.build(model_type)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    intervention = intervene(direction(zoo.D_MODEL), zoo.N_LAYERS)
    wanted = logits(edited(model, intervention))
    save_peft_adapter(adapter(model, intervention), tmp_path)
    assert is_adapter(tmp_path) and not is_adapter(tmp_path / "base")
    loaded = with_adapter(load(tmp_path / "base"), tmp_path)
    torch.testing.assert_close(logits(loaded.model), wanted, rtol=0, atol=2e-5)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_adapter_of_another_model_is_one_sentence(tmp_path):
    model = zoo.build("llama")
    save_peft_adapter(adapter(model, intervene(direction(zoo.D_MODEL), zoo.N_LAYERS)), tmp_path)
    zoo.build("llama", hidden_size=32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"cannot be loaded into .*base"):
        with_adapter(load(tmp_path / "base"), tmp_path)


def test_evaluate_takes_an_adapter(command, llama_directory, inputs, tmp_path):
    save_direction(direction(32), tmp_path / "taken.safetensors")
    for name, more in (("baked", ()), ("adapter", ("--as", "lora"))):
        made = ("bake", llama_directory, "--direction", tmp_path / "taken.safetensors", *more, "-o", tmp_path / name)
        assert command(*made).code == 0
        rows = ("--rows", tmp_path / f"{name}.jsonl", "--dtype", "float32")
        outcome = command("evaluate", llama_directory, tmp_path / name, *inputs.test, *rows)
        assert outcome.code == 0, outcome
    kept = [[json.loads(row) for row in (tmp_path / f"{name}.jsonl").open()] for name in ("baked", "adapter")]
    prompts = {(row["set"], row["prompt"], row["model"]) for row in kept[0]}
    assert prompts == {(row["set"], row["prompt"], row["model"]) for row in kept[1]} and len(prompts) == len(kept[0])
    assert [row for row in kept[0] if row["model"] == "base"] == [row for row in kept[1] if row["model"] == "base"]


def test_an_adapter_leaves_the_unembedding_alone_where_files_would_not(tmp_path):
    _, record = bake_lora(Base(zoo.build("gemma2"), "tiny"), intervene(direction(zoo.D_MODEL), 4), tmp_path / "lora")
    assert (record.plan.tied.asked, record.plan.tied.done, record.plan.embedding_untied) == ("auto", "untie", True)
    assert "Loaded, the adapter changes the embedding alone" in (tmp_path / "lora" / "README.md").read_text()


# What PEFT cannot carry, with the word that says why.
REFUSED = {
    "dbrx": "outside of its own module",
    "falcon_h1": "PEFT refuses",
    "falcon_mamba": "PEFT refuses",
    "hrm_text": "no matrix",
    "laguna": "no place",
    "mamba": "PEFT refuses",
    "mamba2": "PEFT refuses",
    "nemotron_h": "PEFT refuses",
    "whisper": "outside of its own module",
}


@pytest.mark.parametrize("model_type", [found for found in zoo.MODEL_TYPES if found not in MODEL_TYPES])
def test_every_other_model_type_is_carried_exactly_or_refused(model_type, tmp_path):
    found = entry(model_type)
    if found.verdict != "exact":
        pytest.skip(f"no exact edit: {found.reason}")
    model, model_map = found.model, found.model_map
    intervention = intervene(direction(model_map.d_model), model_map.n_layers)

    def run(which):
        with torch.inference_mode():
            return which(**zoo.inputs(model)).logits

    wanted = run(edited(model, intervention))
    try:
        save_peft_adapter(adapter(model, intervention), tmp_path)
        check_loads(model, tmp_path)
    except ArchitectureError as error:
        assert REFUSED[model_type] in str(error)
        return
    assert model_type not in REFUSED
    made = run(adapted(model, intervention, tmp_path))
    torch.testing.assert_close(made / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=5e-5)
