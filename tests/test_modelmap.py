"""The map against what is known of a few architectures."""

import copy

import pytest
import torch

import zoo
from remove_refusals.baking.memory import untie
from remove_refusals.errors import ArchitectureError
from remove_refusals.formula import ChannelStep
from remove_refusals.modelmap.derive import map_model


def written(model_map):
    return {writer.parameter: writer for site in model_map.sites for writer in site.writers}


def test_llama():
    found = map_model(zoo.build("llama"))
    assert (found.d_model, found.n_layers, found.tied, found.leaks) == (zoo.D_MODEL, zoo.N_LAYERS, False, ())
    assert found.layers == tuple(f"model.layers.{index}" for index in range(zoo.N_LAYERS))
    assert [(site.kind, site.layer) for site in found.sites] == [
        ("embedding", None),
        *[(kind, layer) for layer in range(zoo.N_LAYERS) for kind in ("attn", "mlp")],
    ]
    writers = written(found)
    assert writers["model.embed_tokens.weight"].axis == 1
    assert writers["model.layers.0.self_attn.o_proj.weight"].axis == 0
    assert writers["model.layers.3.mlp.down_proj.weight"].shape == (zoo.D_MODEL, 96)
    assert len(writers) == 1 + 2 * zoo.N_LAYERS
    assert found.unembedding == "lm_head.weight"


def test_gpt2_has_transposed_weights_biases_and_positions():
    writers = written(map_model(zoo.build("gpt2")))
    assert writers["transformer.h.0.attn.c_proj.weight"].axis == 1
    assert writers["transformer.h.0.mlp.c_proj.bias"].axis == 0
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(writers)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_gemma_has_a_gain_behind_each_writer(model_type):
    found = map_model(zoo.build(model_type))
    assert found.tied
    writer = written(found)["model.layers.2.self_attn.o_proj.weight"]
    assert writer.steps == (ChannelStep("gain", "model.layers.2.post_attention_layernorm.weight", 1.0),)
    site = next(site for site in found.sites if (site.kind, site.layer) == ("attn", 2))
    assert [point.module for point in site.hooks] == ["model.layers.2.self_attn"]
    assert site.residual_hook.module == "model.layers.2.post_attention_layernorm"


def test_fused_experts_and_their_biases():
    writers = written(map_model(zoo.build("gpt_oss")))
    experts = writers["model.layers.1.mlp.experts.down_proj"]
    assert (experts.shape, experts.axis) == ((4, zoo.SMALL["intermediate_size"], zoo.D_MODEL), 2)
    assert writers["model.layers.1.mlp.experts.down_proj_bias"].axis == 1
    assert written(map_model(zoo.build("mixtral")))["model.layers.1.mlp.experts.down_proj"].axis == 1


def test_the_embedding_norm_is_centred():
    writer = written(map_model(zoo.build("bloom")))["transformer.word_embeddings.weight"]
    assert [step.kind for step in writer.steps] == ["center", "gain"]


def test_a_residual_stream_behind_a_norm_is_a_leak():
    assert "passes through" in map_model(zoo.build("bert")).leaks[0]


def test_the_weights_are_not_read_and_the_model_is_left_alone():
    model = zoo.build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert len(map_model(model).sites) == 1 + 2 * zoo.N_LAYERS
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_parameter_that_nothing_is_known_of_is_refused_by_name():
    class Stray(type(zoo.build("llama"))):
        def __init__(self, config):
            super().__init__(config)
            layer = self.model.layers[1].mlp
            layer.mystery = torch.nn.Parameter(torch.zeros(config.hidden_size, 3))

    model = Stray(zoo.tiny_config("llama"))
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1\.mlp\.mystery"):
        map_model(model)


def test_an_unknown_forward_pass_is_refused_with_its_model_type():
    with pytest.raises(ArchitectureError, match="blt"):
        map_model(zoo.build("blt"))


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_inference_mode_changes_nothing(model_type):
    model = zoo.build(model_type)
    with torch.inference_mode():
        found = map_model(model)
    assert found == map_model(model)


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "opt"])
def test_a_model_that_is_built_alike_has_the_same_map(model_type, tmp_path):
    model = zoo.build(model_type)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert map_model(again) is map_model(copy.deepcopy(model)) is map_model(model)
    other = map_model(zoo.build(model_type, vocab_size=96))
    assert written(other)[other.input_embedding].shape == (96, zoo.D_MODEL)
    untie(again)
    assert map_model(again).tied is False
