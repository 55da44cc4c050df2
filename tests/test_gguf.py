"""The GGUF LoRA, held to the edit in memory; in llama.cpp too."""

import copy
import importlib.util
import json

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

import tiny_gguf
import zoo
from remove_refusals.baking.base import Base
from remove_refusals.baking.gguf import OTHER_NAMES, GgufNames, gguf_lora, write_gguf_lora
from remove_refusals.baking.lora import low_rank
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.plan import PlanEntry
from remove_refusals.directions.saved import save_direction
from remove_refusals.errors import ArchitectureError
from remove_refusals.formula import project_out
from remove_refusals.modelmap.derive import map_model
from remove_refusals.types import DirectionOrigin

needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not there")
PROJECTIONS = ("attn", "mlp")


def direction(d_model=zoo.D_MODEL, rank=1, **origin):
    vectors = torch.randn(d_model, rank, generator=torch.Generator().manual_seed(5))
    return direction_from_vectors(vectors, DirectionOrigin(method="given", **origin))


def planned(model, *, rank=1, strength=1.0, kinds=PROJECTIONS):
    """The base in memory, what is taken out of it, and the plan."""
    base = Base(model, "tiny")
    intervention = intervene(direction(rank=rank), zoo.N_LAYERS, strength=strength, kinds=kinds)
    return base, intervention, base.plan(intervention)


def edited(model, intervention):
    """A copy of the model with the edit in its weights."""
    other = copy.deepcopy(model)
    bake_in_place(other, intervention)
    return other


def logits(model):
    with torch.inference_mode():
        return model(zoo.token_ids(model), use_cache=False).logits[0]


def ids(model):
    return zoo.token_ids(model)[0].tolist()


# Types whose architecture has another name, and some whose name is the same but for punctuation.
CONVERTED = [
    *sorted({*OTHER_NAMES} & {*zoo.MODEL_TYPES}),
    "ernie4_5_moe", "gemma3_text", "gemma4_text", "glm4_moe", "gpt2", "gpt_oss", "jamba", "kimi_linear", "lfm2_moe",
    "llama", "llama4_text", "mamba2", "nemotron_h", "phimoe", "qwen2_moe", "qwen3_5_text", "qwen3_next", "starcoder2",
]  # fmt: skip


class TestNames:
    @pytest.mark.parametrize("model_type", CONVERTED)
    def test_every_writer_has_a_tensor_of_its_own(self, model_type):
        model = zoo.build(model_type)
        model_map = map_model(model)
        writers = [writer for site in model_map.sites for writer in site.writers]
        names = GgufNames(model).of_writers(writers)
        assert len(names) == len({writer.parameter for writer in writers}) > zoo.N_LAYERS
        for writer in writers:
            layer = next((site.layer for site in model_map.sites if writer in site.writers), None)
            assert layer is None or names[writer.parameter].startswith(f"blk.{layer}.")
            assert names[writer.parameter].endswith(".bias") == ("bias" in writer.parameter)

    @pytest.mark.parametrize(
        ("model_type", "architecture"),
        [("mistral3", "mistral3"), ("llava", "llama"), ("smolvlm", "llama"), ("qwen3_vl", "qwen3vl")],
    )
    def test_a_model_around_a_language_model_has_the_architecture_that_the_package_knows(
        self, model_type, architecture
    ):
        # Of Mistral 3 the whole, whose language model is a Mistral, of LLaVA the language model.
        config = zoo.tiny_config(model_type)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
        names, model_map = GgufNames(model), map_model(model)
        found = names.of_writers(writer for site in model_map.sites for writer in site.writers)
        assert names.architecture == architecture and found[model_map.input_embedding] == "token_embd.weight"

    def test_every_name_that_differs_is_an_architecture_of_the_package(self):
        known = {*gguf.MODEL_ARCH_NAMES.values()}
        assert known.issuperset(OTHER_NAMES.values()) and known.isdisjoint(OTHER_NAMES)

    @pytest.mark.parametrize(
        ("settings", "architecture", "shared"),
        [
            (dict(), "granitehybrid", "ffn_down_shexp"),
            (dict(num_local_experts=0), "granitehybrid", "ffn_down"),
            (dict(num_local_experts=0, layer_types=["full_attention"] * zoo.N_LAYERS), "granite", "ffn_down"),
            (dict(layer_types=["full_attention"] * zoo.N_LAYERS), "granitemoe", "ffn_down_shexp"),
        ],
    )
    def test_one_type_is_the_architecture_that_its_layers_make_it(self, settings, architecture, shared):
        names = GgufNames(zoo.build("granitemoehybrid", **settings))
        found = names.find("model.layers.1.shared_mlp.output_linear.weight")
        assert (names.architecture, found) == (architecture, f"blk.1.{shared}.weight")

    @pytest.mark.parametrize(
        ("model_type", "message"),
        [
            ("opt", r"'opt' has no architecture .*\(none\)"),
            ("falcon_h1", r"'falcon-h1', whose converter multiplies"),
            ("bitnet", r"'bitnet', whose converter rounds"),
            ("dbrx", r"'transformer\.blocks\.0\.ffn.*in another layout"),
        ],
    )
    def test_what_the_converter_knows_otherwise_or_not_at_all_is_refused(self, model_type, message):
        base, _, plan = planned(zoo.build(model_type))
        with pytest.raises(ArchitectureError, match=message):
            gguf_lora(base, plan)


class TestLora:
    @pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "granitemoe", "mamba2"])
    @pytest.mark.parametrize("rank", [1, 3])
    def test_factors_times_scale_are_the_change(self, model_type, rank):
        model = zoo.build(model_type)
        kinds = ("embedding", *PROJECTIONS)
        base, intervention, plan = planned(model, rank=rank, strength=0.6, kinds=kinds)
        adapter = gguf_lora(base, plan)
        after = edited(model, intervention)
        names = GgufNames(model)
        assert adapter.rank == rank and len(adapter.tensors) == 2 * len(plan.entries)
        for entry in plan.entries:
            name = names.find(entry.parameter)
            first, second = adapter.tensors[f"{name}.lora_a"], adapter.tensors[f"{name}.lora_b"]
            change = after.get_parameter(entry.parameter) - model.get_parameter(entry.parameter)
            made = first @ second.mT if name == "token_embd.weight" else second @ first
            torch.testing.assert_close(made, change.detach(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("heads", [2, 4, 8])
    def test_inputs_stand_in_the_order_that_the_converter_gives_them(self, heads):
        # Of Qwen3.5 alone, whose heads of values are grouped by the key's in Transformers, and dealt out in turn there.
        model = zoo.build("qwen3_5_text", linear_num_value_heads=heads)
        base, intervention, plan = planned(model)
        name = "model.layers.0.linear_attn.out_proj.weight"
        change = (edited(model, intervention).get_parameter(name) - model.get_parameter(name)).detach()
        dealt = [head for turn in range(heads // 2) for head in range(turn, heads, heads // 2)]
        wanted = torch.cat([change[:, 16 * head : 16 * head + 16] for head in dealt], dim=1)
        tensors = gguf_lora(base, plan).tensors
        made = tensors["blk.0.ssm_out.weight.lora_b"] @ tensors["blk.0.ssm_out.weight.lora_a"]
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)

    @given(rows=st.integers(2, 9), columns=st.integers(1, 9), axis=st.sampled_from([0, 1]), strength=st.floats(-2, 2))
    @settings(deadline=None, max_examples=50)
    def test_low_rank_factors_are_the_one_formula(self, rows, columns, axis, strength):
        generator = torch.Generator().manual_seed(rows * 100 + columns)
        tensor = torch.randn(rows, columns, generator=generator)
        width = tensor.shape[axis]
        basis = direction_from_vectors(
            torch.randn(width, min(2, width), generator=generator), DirectionOrigin(method="given")
        ).basis
        entry = PlanEntry("w", "mlp", 0, axis, tuple(tensor.shape), strength, basis, ())
        factors = low_rank(entry, tensor)
        wanted = project_out(tensor, basis, strength, axis)
        torch.testing.assert_close(tensor + factors.left @ factors.right, wanted, rtol=0, atol=2e-5)

    @needs_llama
    @pytest.mark.parametrize(
        ("model_type", "tolerance"), [("llama", 1e-4), ("qwen2", 1e-4), ("mixtral", 1e-4), ("gemma3_text", 5e-3)]
    )
    def test_llama_cpp_gives_the_edited_logits(self, model_type, tolerance, tmp_path):
        # Gemma's activation is looked up in half precision there.
        model = tiny_gguf.build(model_type)
        kinds = PROJECTIONS if model_type == "gemma3_text" else ("embedding", *PROJECTIONS)
        base, intervention, plan = planned(model, rank=2, kinds=kinds)
        tiny_gguf.write(model, tmp_path / "base.gguf")
        adapter = gguf_lora(base, plan)
        write_gguf_lora(adapter, tmp_path / "lora.gguf", name="tiny", base="tiny")
        plain, wanted = logits(model), logits(edited(model, intervention))
        assert float((plain - wanted).abs().max()) > 0.5
        found = tiny_gguf.logits(tmp_path / "base.gguf", ids(model), lora=tmp_path / "lora.gguf")
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)

    @needs_llama
    def test_a_quantised_file_runs_with_the_adapter_of_the_full_model(self, tmp_path):
        model = tiny_gguf.build("llama")
        base, intervention, plan = planned(model)
        tiny_gguf.write(model, tmp_path / "base.gguf", tiny_gguf.Q8_0)
        adapter = gguf_lora(base, plan)
        write_gguf_lora(adapter, tmp_path / "lora.gguf", name="tiny", base="tiny")
        wanted = logits(edited(model, intervention))
        off = float((tiny_gguf.logits(tmp_path / "base.gguf", ids(model)) - logits(model)).abs().max())
        found = tiny_gguf.logits(tmp_path / "base.gguf", ids(model), lora=tmp_path / "lora.gguf")
        assert float((found - wanted).abs().max()) < 3 * off < 0.3 < float((logits(model) - wanted).abs().max())

    @pytest.mark.parametrize(
        ("model_type", "kinds", "message"),
        [
            ("gemma3_text", ("embedding", *PROJECTIONS), r"embed_tokens.*unembedding.*--sites attn,mlp"),
            ("gpt2", PROJECTIONS, r"c_proj\.bias.*no matrix"),
            ("gpt_oss", ("mlp",), r"down_proj_bias.*no matrix"),
        ],
    )
    def test_what_llama_cpp_cannot_carry_is_refused_by_name(self, model_type, kinds, message):
        model = zoo.build(model_type)
        base, _, plan = planned(model, kinds=kinds)
        with pytest.raises(ArchitectureError, match=message):
            gguf_lora(base, plan)

    def test_position_embeddings_are_refused_since_no_adapter_reaches_them(self):
        model = zoo.build("gpt2", tie_word_embeddings=False)
        base, _, plan = planned(model, kinds=("embedding",))
        with pytest.raises(ArchitectureError, match=r"wpe.*applies no adapter"):
            gguf_lora(base, plan)

    def test_the_command_writes_metadata_that_llama_cpp_asks_for(self, command, tmp_path):
        zoo.build("llama").save_pretrained(tmp_path / "base")
        save_direction(direction(), tmp_path / "taken.safetensors")
        arguments = ("bake", tmp_path / "base", "--direction", tmp_path / "taken.safetensors", "--as", "gguf-lora")
        outcome = command(*arguments, "-o", tmp_path / "lora.gguf")
        assert outcome.code == 0, outcome
        fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "lora.gguf").fields.items()}
        wanted = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}
        assert {key: fields[key] for key in wanted} == wanted and fields["general.architecture"] == "llama"
        record = json.loads(fields["remove_refusals.ablation"])
        assert record["base"]["source"] == "base" and len(record["plan"]["edited"]) == 9
