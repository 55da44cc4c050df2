"""Checkpoints that name their tensors otherwise than the model does, or hold some that it has no place for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
import zoo
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.examination import diff, inspect
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.names import name_for, saved_shapes, stored_names
from remove_refusals.modelmap.skeleton import skeleton
from remove_refusals.modelmap.types import DiskTensor
from remove_refusals.models.load import load
from remove_refusals.types import DirectionOrigin

MASK = "h.0.attn.bias"


@pytest.fixture(params=["without the prefix", "with masks"])
def base(request, tmp_path):
    """A GPT-2 as the hub has it: no `transformer.` before its names, and perhaps causal masks among its weights."""
    directory = tmp_path / "base"
    tiny.gpt2().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    if request.param == "with masks":
        tensors[MASK] = torch.ones(1, 1, 512, 512).tril()
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def test_inspect_gives_the_names_in_the_files(base):
    writers = inspect(str(base)).writers
    names = load_file(base / "model.safetensors").keys()
    assert {writer.on_disk for writer in writers} <= names and "h.0.attn.c_proj.weight" in names
    assert all(writer.dtype == "F32" and writer.missing is None for writer in writers)
    assert len(writers) == 2 + 2 * 4


def test_an_edit_is_exact_and_certified(base, tmp_path):
    loaded = load(base)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    intervention = intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), 2)
    baked = bake(loaded, intervention, tmp_path / "edited")
    assert baked.certificate.passed and max(baked.certificate.boundaries) < 1e-6
    tokens = torch.arange(4, 12).unsqueeze(0)
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
    with torch.inference_mode(), ablated(loaded.model, intervention):
        assert float((loaded.model(tokens).logits - edited(tokens).logits).abs().max()) < 1e-5
    again = certify_directory(tmp_path / "edited", str(base))
    assert again.problems == () and len(again.edited) == len(baked.certificate.edited)
    assert again.identical == baked.certificate.identical > 0
    # What the model has no place for is kept, and an unembedding is added under the model's name.
    names = load_file(tmp_path / "edited" / "model.safetensors").keys()
    assert names == load_file(base / "model.safetensors").keys() | {"lm_head.weight"}


def test_a_changed_bystander_is_still_found(base, tmp_path):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    bake(load(base), intervene(direction_from_vectors(vector, DirectionOrigin(method="given")), 2), tmp_path / "edited")
    path = tmp_path / "edited" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("h.1.ln_1.weight"))
    tensors[name][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    problems = certify_directory(tmp_path / "edited", str(base)).problems
    assert len(problems) == 1 and "h.1.ln_1.weight" in problems[0]


class TestStoredNames:
    """What the names and shapes in the headers say of the parameters."""

    def test_experts_one_by_one_come_in_the_order_of_their_numbers(self):
        model = zoo.build("mixtral", num_local_experts=12)
        names = stored_names(model, saved_shapes(model))
        stem = "model.layers.1.block_sparse_moe.experts"
        wanted = tuple(DiskTensor(f"{stem}.{number}.w2.weight", 0) for number in range(12))
        assert names.tensors("model.layers.1.mlp.experts.down_proj", 1) == wanted
        assert names.unexplained == ()

    @pytest.mark.parametrize("moe_intermediate_size", [32, zoo.D_MODEL])
    def test_fused_experts_are_transposed_unless_they_have_the_parameters_shape(self, moe_intermediate_size):
        model = zoo.build("qwen3_moe", moe_intermediate_size=moe_intermediate_size)
        name = "model.layers.0.mlp.experts.down_proj"
        own = tuple(model.get_parameter(name).shape)
        assert stored_names(model, {name: own}).tensors(name, 1) == (DiskTensor(name, 1),)

    def test_a_tensor_that_holds_two_parameters_is_edited_for_neither(self):
        model = zoo.build("hrm_text")
        names = stored_names(model, saved_shapes(model))
        layer = next(name for name in names.parameters if name.endswith("self_attn.q_proj.weight")).removesuffix(
            "q_proj.weight"
        )
        (held,) = names.of(f"{layer}q_proj.weight")
        assert held.endswith("attn.gqkv_proj.weight") and names.of(f"{layer}v_proj.weight") == (held,)
        assert names.tensors(f"{layer}q_proj.weight", 0) == ()
        assert len(names.tensors(f"{layer}o_proj.weight", 0)) == 1

    @pytest.mark.parametrize(
        ("model_type", "stray"),
        [
            ("qwen3_next", "mtp.fc.weight"),
            ("deepseek_v3", "model.layers.4.mlp.experts.0.down_proj.weight"),
            ("llama", "rotary_emb.inv_freq"),
            ("gpt2", "h.0.attn.bias"),
        ],
    )
    def test_what_nothing_explains_is_named(self, model_type, stray):
        model = zoo.build(model_type)
        names = stored_names(model, {**saved_shapes(model), stray: (3,)})
        assert names.unexplained == (stray,)

    @pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "olmo2", "granitemoe", "glm4_moe"])
    def test_what_saving_writes_explains_every_parameter(self, model_type):
        model = zoo.build(model_type)
        names = stored_names(model, saved_shapes(model))
        assert names.parameters == model.state_dict().keys() and names.unexplained == ()
        for site in map_model(model).sites:
            for writer in site.writers:
                for tensor in names.tensors(writer.parameter, writer.axis):
                    assert names.shapes[tensor.name][tensor.axis] == zoo.D_MODEL

    @pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "cohere"])
    def test_a_head_that_the_files_lack_has_a_name_that_is_loaded(self, model_type):
        apart = skeleton(zoo.build(model_type), tied=False)
        name = name_for(apart, "lm_head.weight")
        assert stored_names(apart, {name: (zoo.VOCABULARY, zoo.D_MODEL)}).of("lm_head.weight") == (name,)


def test_checkpoints_with_and_without_the_prefix_are_compared_by_what_they_become(base, tmp_path):
    tiny.gpt2().save_pretrained(tmp_path / "other")
    found = diff(str(base), str(tmp_path / "other"))
    assert {row.status for row in found.tensors} <= {"only in the first"}
    assert {row.name for row in found.tensors} <= {MASK} and found.identical > 0
