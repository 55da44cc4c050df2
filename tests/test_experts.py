"""Experts as a model chooses them, on every mixture type; a strength for one expert, in hooks and in files alike."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import zoo
import zoo_wrappers
from architectures import difference, direction_of
from remove_refusals.baking.base import Base, load_intervention
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.baking.lora import bake_lora
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.directions.attribution import expert_choices, routing_interchange
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import as_intervention, check_fit, intervene
from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.examination import inspect
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.load import LoadedModel
from remove_refusals.settings import DiskSettings, EditSettings
from remove_refusals.types import Intervention, PromptSet, SiteEdit

# Text models, and those with towers whose mixture is another.
MIXTURES = """afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 dots1 dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite
    glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4
    inkling2_loop_text inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2_moe
    llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral
    nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text
    sarvam_mla sarvam_moe solar_open zaya""".split()
TOWERS = """aria deepseek_ocr2 dots3_note ernie4_5_vl_moe glm4v_moe glm5_next hy_v4_vl inkling2 inkling2_loop
    inkling_mm_model kimi_k25 llama4 minimax_m3_vl mistral4 mistral_large4 muse_spark nemotron_h_omni qwen3_5_moe
    qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp step3p7 unlimited_ocr nemo_speechlm""".split()
ALL = [
    *((name, zoo.build) for name in MIXTURES if name in zoo.MODEL_TYPES),
    *((name, zoo_wrappers.build) for name in TOWERS if name in zoo_wrappers.MODEL_TYPES),
]
NAMES = [f"{name}{'' if build is zoo.build else '+'}" for name, build in ALL]
HARMFUL, HARMLESS = (PromptSet(name, (name, "and so on"), "test") for name in ("steal it", "bake bread"))


def logits(model):
    with torch.inference_mode():
        return model(**zoo.inputs(model)).logits


def silencing(model_map, strength=1.0, expert=1, layer=None):
    layer = model_map.mixtures[-1].layer if layer is None else layer
    return SiteEdit(kind="expert", layer=layer, expert=expert, strength=strength, whole=True)


@pytest.mark.parametrize(("model_type", "build"), ALL, ids=NAMES)
def test_the_experts_that_are_named_chosen_are_those_that_count(model_type, build):
    """Without the others' weights what the last token gets stays; without those of any that is named it changes."""
    model = build(model_type)
    model_map = map_model(model)
    mixture = model_map.mixtures[-1]
    loaded = LoadedModel(model, tiny.tokenizer(), model_type)
    seen = expert_choices(
        loaded, *(PromptSet(name, ("as it is",), "test") for name in ("a", "b")), direction_of(model_map)
    )
    chosen = {choice.expert for choice in seen if choice.layer == mixture.layer and choice.harmful > 0}
    assert chosen and {choice.layer for choice in seen} == {each.layer for each in model_map.mixtures}
    names = [name for name, value in model.get_submodule(mixture.module).named_parameters() if value.dim() >= 2]
    down = [f"{mixture.module}.{name}" for name in names if "down" in name or name.endswith("w2") or name == "weight"]
    block = (mixture.router or "").rpartition(".")[0] or mixture.module
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "as it is"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]

    def last(without):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name in down:
                value = other.get_parameter(name)
                size = value.shape[0] // mixture.n_experts
                for expert in without:
                    value[expert * size : (expert + 1) * size] = 0
            decoder, given = getattr(other, other.base_model_prefix, other), []
            other.get_submodule(block).register_forward_hook(lambda module, args, output: given.append(output))
            decoder(input_ids=ids, use_cache=False)
            (out,) = given
            return (out[0] if isinstance(out, tuple) else out).reshape(-1, model_map.d_model)[-1]

    before = last(())
    torch.testing.assert_close(last(set(range(mixture.n_experts)) - chosen), before, atol=1e-6, rtol=1e-5)
    for expert in chosen:
        assert float((last({expert}) - before).abs().max()) > 1e-6, expert


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_an_adapter_carries_single_experts(model_type, tmp_path):
    model = zoo.build(model_type)
    model_map = map_model(model)
    directions = (direction_of(model_map), direction_of(model_map))
    edits = edits_of(model_map)
    if model_type == "gpt_oss":
        # Where PEFT carries biases it carries those of all experts.
        edits = edits[2:3]
    intervention = Intervention(directions, edits)
    with ablated(model, intervention):
        hooked = logits(model)
    model.save_pretrained(tmp_path / "base")
    base = Base(model, str(tmp_path / "base"), directory=tmp_path / "base")
    bake_lora(base, intervention, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    assert difference(logits(adapted), hooked) < 3e-5
    assert difference(logits(adapted.merge_and_unload()), hooked) < 3e-5


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "ernie4_5_moe"])
def test_behind_a_full_edit_an_edit_of_the_routers_along_the_direction_changes_nothing(model_type):
    """Where the norm's gain is respected; where it is not it only does damage."""
    model = zoo.build(model_type)
    model_map = map_model(model)
    direction = direction_of(model_map)
    bake_in_place(model, intervene(direction, model_map.n_layers))
    edited = logits(model)

    def with_routers(respecting_gain):
        other = copy.deepcopy(model)
        for mixture in model_map.mixtures:
            layer = other.get_submodule(model_map.layers[mixture.layer])
            wanted = (mixture.n_experts, model_map.d_model)
            (router,) = (value for name, value in layer.named_parameters() if value.shape == wanted)
            gain = layer.post_attention_layernorm.weight if respecting_gain else torch.ones(model_map.d_model)
            unit = torch.nn.functional.normalize(direction.basis[:, 0] / gain, dim=0)
            with torch.no_grad():
                router -= torch.outer(router @ unit, unit)
        return logits(other)

    torch.testing.assert_close(with_routers(True), edited, atol=1e-5, rtol=0)
    assert difference(with_routers(False), edited) > 1e-3


def test_what_edits_no_expert_of_the_model_is_refused_by_name():
    model_map = map_model(zoo.build("mixtral"))
    for edit, message in (
        (SiteEdit(kind="expert", layer=1, expert=9, strength=1.0, whole=True), "expert 9 of layer 1"),
        (SiteEdit(kind="expert", layer=1, strength=1.0, whole=True), "expert None of layer 1"),
    ):
        with pytest.raises(DirectionError, match=message):
            check_fit(Intervention((), (edit,)), model_map)
    twice = (silencing(model_map), silencing(model_map))
    with pytest.raises(DirectionError, match="twice"):
        check_fit(Intervention((), twice), model_map)
    with pytest.raises(ArchitectureError, match="has no routed experts"):
        check_fit(Intervention((), (silencing(model_map),)), map_model(zoo.build("llama")))


def test_a_range_of_layers_holds_for_experts_too():
    model_map = map_model(zoo.build("mixtral"))
    edits = tuple(silencing(model_map, layer=layer) for layer in range(4))
    weaker = intervene(Intervention((), edits), 4, strength=0.5, layers=(1, 2))
    assert [(edit.layer, edit.strength, edit.whole) for edit in weaker.edits] == [(1, 0.5, True), (2, 0.5, True)]


def test_an_edit_of_experts_is_read_back_and_checked_again(tmp_path):
    model = zoo.build("mixtral")
    model.save_pretrained(tmp_path / "base")
    model_map = map_model(model)
    intervention = Intervention(
        (direction_of(model_map),), (silencing(model_map), edits_of(model_map)[2].model_copy(update={"expert": 3}))
    )
    bake(tmp_path / "base", intervention, tmp_path / "edited", disk=DiskSettings(jobs=1))
    assert load_intervention(tmp_path / "edited").edits == intervention.edits
    assert certify_directory(tmp_path / "edited", str(tmp_path / "base")).passed
    file = tmp_path / "edited" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".3." in name and "experts.0" in name and "w2" in name)
    for other, value in ((name, tensors[name] + 1e-3), (name.replace("experts.0", "experts.1"), tensors[name].clone())):
        save_file(tensors | {other: value}, file, metadata={"format": "pt"})
        assert not certify_directory(tmp_path / "edited", str(tmp_path / "base")).passed


def test_the_bytes_of_an_expert_beside_an_edited_one_are_checked_where_files_hold_all_in_one_tensor(tmp_path):
    model = zoo.build("gpt_oss")
    model.save_pretrained(tmp_path / "base")
    intervention = Intervention((), (silencing(map_model(model), expert=1),))
    baked = bake(tmp_path / "base", intervention, tmp_path / "edited", disk=DiskSettings(jobs=1))
    assert [row.expert for row in baked.certificate.edited] == [1, 1]
    file = tmp_path / "edited" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("3.mlp.experts.down_proj"))
    assert not tensors[name][1].any() and tensors[name][0].any()
    tensors[name][2, 0, 0] += 1e-7
    save_file(tensors, file, metadata={"format": "pt"})
    found = certify_directory(tmp_path / "edited", str(tmp_path / "base"))
    assert any("expert" in problem for problem in found.problems)


def test_inspect_says_how_many_experts_can_be_edited_alone(tmp_path):
    for model_type, experts, alone in (("mixtral", dict.fromkeys(range(4), 4), True), ("llama", {}, None)):
        zoo.build(model_type).save_pretrained(tmp_path / model_type)
        found = inspect(str(tmp_path / model_type))
        assert found.experts == experts and found.experts_alone is alone


def edits_of(model_map):
    """Two experts of the last mixture: one silenced in part, one along a direction; and half of another at its site."""
    layer = model_map.mixtures[-1].layer
    kind = next(
        site.kind
        for site in model_map.sites
        if site.layer == layer and set(model_map.mixtures[-1].writers) & set(site.writers)
    )
    return (
        silencing(model_map, 0.7, expert=0),
        silencing(model_map, 1.0, expert=2),
        SiteEdit(kind="expert", layer=layer, expert=1, strength=0.8, direction=0),
        SiteEdit(kind=kind, layer=layer, strength=0.5, direction=1),
    )


@pytest.mark.parametrize(("model_type", "build"), ALL, ids=NAMES)
def test_hooks_and_files_agree_on_single_experts(model_type, build, tmp_path):
    model = build(model_type)
    model_map = map_model(model)
    directions = [direction_of(model_map)]
    directions.append(dataclasses.replace(directions[0], basis=directions[0].basis.flip(0)))
    if not model_map.mixtures[-1].writers:
        with (
            pytest.raises(ArchitectureError, match="no routed experts"),
            ablated(model, Intervention(tuple(directions), (silencing(model_map),))),
        ):
            pass
        return
    intervention = Intervention(tuple(directions), edits_of(model_map))
    base = logits(model)
    with ablated(model, intervention):
        hooked = logits(model)
    assert difference(base, hooked) > 1e-4
    torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
    if model_map.leaks:
        intervention = Intervention(tuple(directions), intervention.edits[:3])
        with pytest.raises(ArchitectureError):
            bake_in_place(model, intervention)
        return
    other = copy.deepcopy(model)
    bake_in_place(other, intervention)
    assert difference(logits(other), hooked) < 3e-5
    model.save_pretrained(tmp_path / "base")
    files = Base(model, str(tmp_path / "base"), directory=tmp_path / "base")
    baked = bake(files, intervention, tmp_path / "edited", disk=DiskSettings(jobs=1))
    assert baked.certificate.passed
    again = type(model).from_pretrained(tmp_path / "edited", attn_implementation="eager").eval()
    for (name, saved), value in zip(again.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(saved, value), name
    measured = {(row.expert, row.strength) for row in baked.certificate.edited if row.kind == "expert"}
    assert measured == {(0, 0.7), (1, 0.8), (2, 1.0)}


@pytest.mark.parametrize("model_type", ["jetmoe", "llama4_text", "mixtral"])
def test_with_the_choice_of_every_expert_interchanged_the_first_mixture_writes_what_the_donor_s_does(model_type):
    """A harmful prompt that gets its own experts stays as it is; with a donor's, only the choice is the donor's."""
    model = zoo.build(model_type)
    model_map = map_model(model)
    loaded = LoadedModel(model, tiny.tokenizer(), model_type)
    sets = [
        PromptSet(name, texts, "test") for name, texts in (("a", ("steal it", "take it")), ("b", ("bake it", "ice it")))
    ]
    found = routing_interchange(loaded, *sets, direction_of(model_map))
    assert len(found) == len(model_map.mixtures) + 1
    # Other experts write something else.
    assert all(abs(each.share.value) > 1e-4 for each in found)
    same = routing_interchange(loaded, sets[0], sets[0], direction_of(model_map))
    assert all(each.share.value == pytest.approx(0, abs=1e-4) for each in same)


def test_experts_are_silenced_by_hand(command, tmp_path):
    """At the command line: alone, as files and as hooks, and beside a direction."""
    directory, prompts = tmp_path / "base", tmp_path / "prompts.txt"
    zoo.build("mixtral").save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    prompts.write_text("steal it\nbake bread\n")

    def said(model, *options):
        path = tmp_path / "said.jsonl"
        given = ("generate", model, "--prompts", prompts, "-o", path, "--max-new-tokens", 12, "--force", *options)
        assert command(*given).code == 0
        return [json.loads(line)["answer"] for line in path.read_text().splitlines()]

    silenced = ("--silence-experts", "3:1,2:0=0.5,3:2,1:3")
    assert command("bake", directory, *silenced, "-o", tmp_path / "edited").code == 0
    edits = load_intervention(tmp_path / "edited").edits
    assert [(one.layer, one.expert, one.strength, one.whole) for one in edits] == [
        (3, 1, 1.0, True),
        (2, 0, 0.5, True),
        (3, 2, 1.0, True),
        (1, 3, 1.0, True),
    ]
    assert said(directory, *silenced) == said(tmp_path / "edited") != said(directory)
    talk = ("chat", directory, "--max-new-tokens", 12, *silenced)
    answer = said(directory, *silenced)[0]
    typed = command(*talk, typed="steal it\n").out
    assert typed.endswith(f"{answer}\n") and "Taken out: the experts that are named." in typed
    model = map_model(zoo.build("mixtral"))
    both = as_intervention(direction_of(model), model, EditSettings(strength=0.5, silence_experts="3:1"))
    assert (
        both.edits[-1].expert == 1
        and both.edits[-1].strength == 1
        and {one.strength for one in both.edits[:-1]} == {0.5}
    )
    for wrong, words in (
        ("3", "expected LAYER:EXPERT"),
        ("9:1", "layer 9"),
        ("3:9", "expert 9 of layer 3"),
        ("3:1,3:1", "twice"),
    ):
        refused = command("bake", directory, "--silence-experts", wrong, "-o", tmp_path / "other")
        assert refused.code == 2 and words in refused.err and not (tmp_path / "other").exists()
    refused = command("bake", directory, "-o", tmp_path / "other")
    assert refused.code == 2 and "--silence-experts" in refused.err
