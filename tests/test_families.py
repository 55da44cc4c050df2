"""The whole way (look, find, edit, certify, run) on tiny stand-ins of families that people have, as they are published.

Names and layouts of the tensors are those of the publishers' files: experts one by one, fused, or fused and transposed,
in BF16, in FP8 or INT4, beside layers that predict several tokens, towers and a talker.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import remove_refusals
import zoo
import zoo_wrappers
from test_blockformats import INT4, in_fp8, in_int4

DEMO = Path(remove_refusals.__file__).parent / "data" / "demo"
TEXT = dict(vocab_size=2000, num_hidden_layers=2, pad_token_id=0, bos_token_id=None, eos_token_id=4)
TEXT |= dict(max_position_embeddings=256)
DENSE_FIRST = dict(mlp_layer_types=["dense", "sparse"])

Tensors = dict[str, torch.Tensor]


def written(model, directory, tensors: Callable[[Tensors], Tensors] = dict, **config):
    """Save a model in bfloat16 with the demo model's tokenizer, its tensors and its configuration changed."""
    model.to(torch.bfloat16).save_pretrained(directory)
    path = directory / "model.safetensors"
    made = {name: tensor.contiguous() for name, tensor in tensors(load_file(path)).items()}
    save_file(made, path, metadata={"format": "pt"})
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(described | config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, directory)


def fp8(scales: torch.dtype, *kept: str) -> tuple[Callable[[Tensors], Tensors], Mapping[str, object]]:
    """Give what puts projections into FP8 blocks, and what the configuration says of it."""

    def quantised(tensors: Tensors) -> Tensors:
        made: Tensors = {}
        for name, tensor in tensors.items():
            if re.search(r"layers\..*_proj(_with_mqa)?\.weight$", name):
                made[name], scale = in_fp8(tensor.float())
                made[f"{name}_scale_inv"] = scale.to(scales)
            else:
                made[name] = tensor
        return made

    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return quantised, how | {"modules_to_not_convert": ["lm_head", *kept]}


def qwen3(directory):
    written(zoo.build("qwen3", **TEXT, layer_types=["full_attention"] * 2), directory)


def qwen3_moe(directory):
    written(zoo.build("qwen3_moe", **TEXT), directory)


def qwen3_moe_fp8(directory):
    tensors, config = fp8(torch.bfloat16, "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    written(zoo.build("qwen3_moe", **TEXT), directory, tensors, quantization_config=config)


def qwen3_next(directory):
    def with_mtp(tensors):
        layer = {
            name.replace("model.layers.1.", "mtp.layers.0."): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith("model.layers.1.")
        }
        norms = ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")
        layer |= {f"{name}.weight": torch.zeros(zoo.D_MODEL, dtype=torch.bfloat16) for name in norms}
        return tensors | layer | {"mtp.fc.weight": torch.randn(zoo.D_MODEL, 2 * zoo.D_MODEL).to(torch.bfloat16)}

    written(zoo.build("qwen3_next", **TEXT, layer_types=["linear_attention", "full_attention"]), directory, with_mtp)


def glm4_moe_lite(directory):
    def with_mtp(tensors):
        layer = {
            name.replace("layers.1.", "layers.2."): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith("model.layers.1.")
        }
        layer |= {
            "model.layers.2.eh_proj.weight": torch.randn(zoo.D_MODEL, 2 * zoo.D_MODEL).to(torch.bfloat16),
            "model.layers.2.enorm.weight": torch.ones(zoo.D_MODEL, dtype=torch.bfloat16),
            "model.layers.2.hnorm.weight": torch.ones(zoo.D_MODEL, dtype=torch.bfloat16),
            "model.layers.2.shared_head.norm.weight": torch.ones(zoo.D_MODEL, dtype=torch.bfloat16),
        }
        return tensors | layer

    model = zoo.build("glm4_moe_lite", **TEXT, **DENSE_FIRST)
    written(model, directory, with_mtp, num_nextn_predict_layers=1)


def qwen3_omni_moe(directory):
    written(zoo_wrappers.build("qwen3_omni_moe", **{"thinker_config.text_config": TEXT}), directory)


def qwen3_vl_moe(directory):
    def transposed(tensors):
        return {name: one.transpose(1, 2) if ".mlp.experts." in name else one for name, one in tensors.items()}

    written(zoo_wrappers.build("qwen3_vl_moe", text_config=TEXT), directory, transposed)


def kimi_k25(directory):
    def packed(tensors):
        made = {}
        for saved, tensor in tensors.items():
            name = re.sub(r"^(language_model\.model\.)blocks\.", r"\1layers.", saved).removeprefix("model.")
            name = name.replace("vision_tower.encoder.patch_embed", "vision_tower.patch_embed")
            if ".experts." not in name:
                made[name] = tensor
                continue
            parts = zip(("packed", "scale", "shape"), in_int4(tensor.float()), strict=True)
            made |= {f"{name}_{part}": value for part, value in parts}
        return made

    config = INT4 | {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.\w+_proj.*"]}
    apart = {"": dict(tie_word_embeddings=False)}
    written(zoo_wrappers.build("kimi_k25", text_config=TEXT | DENSE_FIRST, **apart), directory, packed)
    path = directory / "config.json"
    described = json.loads(path.read_text())
    described["text_config"]["quantization_config"] = config
    path.write_text(json.dumps(described))


def deepseek_v3(directory):
    tensors, config = fp8(torch.float32)
    model = zoo.build("deepseek_v3", **TEXT, first_k_dense_replace=1)
    written(model, directory, tensors, quantization_config=config)


FAMILIES = {
    qwen3: {"model.layers.1.mlp.down_proj.weight"},
    qwen3_moe: {"model.layers.1.mlp.experts.3.down_proj.weight"},
    qwen3_moe_fp8: {"model.layers.1.mlp.experts.3.down_proj.weight"},
    qwen3_next: {"model.layers.0.linear_attn.out_proj.weight", "model.layers.1.mlp.shared_expert.down_proj.weight"},
    glm4_moe_lite: {"model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.0.mlp.down_proj.weight"},
    qwen3_omni_moe: {"thinker.model.layers.1.mlp.experts.3.down_proj.weight"},
    qwen3_vl_moe: {"model.language_model.layers.1.mlp.experts.down_proj"},
    kimi_k25: {"language_model.model.layers.1.mlp.experts.3.down_proj.weight_packed"},
    deepseek_v3: {"model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.0.mlp.down_proj.weight"},
}
"""What builds each stand-in, with some of the tensors that an edit has to change."""

# Nothing but these changes: the embedding, an unembedding that is written beside it, and what layers add to the stream.
WRITERS = re.compile(
    r"^(thinker\.)?((language_)?model\.)+(embed_tokens|layers\.[01]\..*"
    r"(o_proj|out_proj|down_proj))(\.weight)?(_packed|_scale|_scale_inv)?$"
)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_whole_way(family, tmp_path, command, inputs):
    base = tmp_path / "base"
    family(base)
    looked = command("inspect", base)
    assert looked.code == 0 and "exact" in looked.out, looked.err
    direction, baked, ran = (tmp_path / name for name in ("direction.safetensors", "baked", "ran"))
    found = command("direction", base, *inputs.train, "-o", direction)
    assert found.code == 0, found.err
    edited = command("bake", base, "--direction", direction, "-o", baked)
    assert edited.code == 0, edited.err
    certified = command("certify", baked, "--base", base)
    assert certified.code == 0, certified.err
    before, after = (load_file(path / "model.safetensors") for path in (base, baked))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(bits(tensor), bits(after[name]))}
    assert changed >= FAMILIES[family]
    assert [name for name in changed if not WRITERS.match(name)] == []
    whole = command("run", base, *inputs.train, *inputs.test, "--select", "none", "-o", ran)
    assert whole.code == 0, whole.err
    assert load_file(ran / "model.safetensors").keys() == before.keys()


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
