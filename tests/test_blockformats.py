"""Checkpoints in FP8 blocks, in MXFP4 and in INT4 groups, edited on disk in their own format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from remove_refusals.baking.base import open_base
from remove_refusals.baking.certificate import certify
from remove_refusals.baking.disk import certify_directory
from remove_refusals.directions.hooks import ablated
from remove_refusals.errors import CheckpointError
from remove_refusals.models.checkpoint import checkpoint_tensors, file_hashes
from remove_refusals.models.quantised import FP8_BLOCK, find_block_tensor
from streaming import saved, streamed, taken_out

FP8 = torch.float8_e4m3fn
FP8_NAMES = ("_proj.weight", "_proj_with_mqa.weight")
# Quantised writers: of a layer's attention, and of its dense network or its experts, one tensor or one for each.
WRITERS = {
    "llama": 2 * zoo.N_LAYERS,
    "deepseek_v3": zoo.N_LAYERS + 1 + (zoo.N_LAYERS - 1) * (4 + 1),
    "gpt_oss": zoo.N_LAYERS,
    "mistral": 2 * zoo.N_LAYERS,
}
INT4_PARTS = ("packed", "scale", "shape")
GROUP = 32
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def in_fp8(weight):
    """Quantise `[rows, columns]` in blocks of 128 by 128, as DeepSeek-V3 is stored."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return (weight / spread).to(FP8), scales


def in_mxfp4(weight):
    """Quantise `[experts, inputs, d_model]` for each row of 32 inputs, as gpt-oss is stored."""
    rows = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.ceil(torch.log2(rows.abs().amax(-1, keepdim=True) / 6))
    distance = (rows.abs() / 2**exponents).unsqueeze(-1) - E2M1
    codes = distance.abs().argmin(-1).to(torch.uint8) | ((rows < 0).to(torch.uint8) << 3)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, (exponents.squeeze(-1) + 127).to(torch.uint8)


def in_int4(weight):
    """Quantise `[rows, columns]` for each row of 32 inputs, as compressed-tensors packs it."""
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(1).to(torch.int64) + 8
    words = (codes.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), scales, torch.tensor(weight.shape)


def out_of_int4(words, scales):
    """The floats that packed integers and their scales stand for."""
    codes = (words.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return (codes.flatten(1) - 8.0).float() * scales.float().repeat_interleave(GROUP, 1)


def quantised(folder, model_type, inner=320):
    """Save a tiny model whose experts, or whose projections, are quantised; give it as it was before."""
    # With every expert chosen no rounding flips a choice.
    widths = {"moe_intermediate_size": inner, "num_experts_per_tok": 4} if model_type == "deepseek_v3" else {}
    model = saved(folder, model_type, intermediate_size=inner, **widths).model
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        if model_type == "mistral" and name.endswith(FP8_NAMES):
            parts = in_int4(tensors.pop(name).float())
            tensors |= {f"{name}_{part}": value for part, value in zip(INT4_PARTS, parts, strict=True)}
        elif model_type != "gpt_oss" and name.endswith(FP8_NAMES):
            tensors[name], tensors[f"{name}_scale_inv"] = in_fp8(tensors[name].float())
        elif name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = in_mxfp4(tensors.pop(name).float())
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "base" / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config["quantization_config"] = {"gpt_oss": mxfp4, "mistral": INT4}.get(model_type, fp8)
    (folder / "base" / "config.json").write_text(json.dumps(config))
    return model


def dequantised(directory):
    """The model as Transformers loads it where there is no accelerator for the format; INT4 without its package."""
    config = AutoConfig.from_pretrained(directory)
    if getattr(config, "quantization_config", {}).get("quant_method") == "compressed-tensors":
        del config.quantization_config
        tensors = load_file(directory / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_packed")]:
            words, scales, _ = (tensors.pop(f"{name.removesuffix('packed')}{part}") for part in INT4_PARTS)
            tensors[name.removesuffix("_packed")] = out_of_int4(words, scales)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        model.load_state_dict(tensors, strict=False)
        model.tie_weights()
        return model.eval()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt_oss", "mistral"])
def test_a_quantised_checkpoint_keeps_its_format_and_loses_the_direction(model_type, tmp_path):
    quantised(tmp_path, model_type)
    found = streamed(tmp_path, taken_out())
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "streamed"))
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in before.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == described
    blocks = [row for row in found.certificate.edited if row.requantising_alone is not None]
    assert found.certificate.passed and len(blocks) == WRITERS[model_type]
    # An input has only 64 numbers here to make up for its rounding; without that more than half would be left.
    assert max(row.share_left for row in blocks) < (0.04 if model_type in ("gpt_oss", "mistral") else 0.02)
    assert certify_directory(found.directory, str(tmp_path / "base")).passed
    written = json.loads((found.directory / "certificate.json").read_text())["edited"]
    assert sum("requantising_alone" in row for row in written) == len(blocks)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt_oss", "mistral"])
def test_the_logits_are_those_of_the_edit_in_full_precision_within_rounding(model_type, tmp_path):
    # Where there is no accelerator Transformers dequantises as it loads, and reads whole blocks only.
    model = quantised(tmp_path, model_type, 256)
    streamed(tmp_path, taken_out())
    base, edited = (dequantised(tmp_path / part) for part in ("base", "streamed"))
    inputs = zoo.inputs(base)
    with torch.inference_mode():
        plain, found = base(**inputs).logits, edited(**inputs).logits
        with ablated(base, taken_out()):
            exact = base(**inputs).logits
        rounding = (plain - model(**inputs).logits).norm()
    error, effect = float((found - exact).norm()), float((plain - exact).norm())
    assert error < 1.2 * float(rounding) and error < 0.75 * effect


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "mistral"])
def test_slices_give_the_same_bits(model_type, tmp_path):
    quantised(tmp_path, model_type)
    whole = streamed(tmp_path, taken_out())
    cut = streamed(tmp_path, taken_out(), "cut", memory=1 << 14)
    assert file_hashes(cut.directory) == file_hashes(whole.directory)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "mistral"])
def test_what_is_not_edited_keeps_its_bits(model_type, tmp_path):
    quantised(tmp_path, model_type)
    stored = checkpoint_tensors(tmp_path / "base")
    inner = "experts.down_proj" if model_type == "gpt_oss" else "down_proj.weight"
    tensor = find_block_tensor(f"model.layers.1.mlp.{inner}", stored, FP8_BLOCK)
    original = [load_file(tmp_path / "base" / "model.safetensors")[name] for name in tensor.names]
    values = torch.cat(list(tensor.floats(1 << 30)))
    scales = tensor.fitting(values, original[1].view(-1, *original[1].shape[-2:]))
    codes = tensor.rounded(values, scales, torch.randn(zoo.D_MODEL))
    again = codes.view(torch.int32 if model_type == "mistral" else torch.uint8).view(original[0].shape)
    assert torch.equal(scales.view(original[1].shape), original[1])
    # Only a negative zero becomes a positive one.
    zero = {"gpt_oss": 8 | 8 << 4, "llama": 128, "mistral": 0}[model_type]
    changed = again != original[0].view(again.dtype)
    assert bool(((original[0].view(again.dtype)[changed] & zero) != 0).all())
    parts = torch.cat([part.reshape(-1) for part in tensor.floats(64)])
    assert torch.equal(parts.sort()[0], values.reshape(-1).sort()[0])


def test_a_skipped_expert_fails_by_its_name(tmp_path):
    quantised(tmp_path, "gpt_oss")
    found = streamed(tmp_path, taken_out())
    paths = [tmp_path / part / "model.safetensors" for part in ("base", "streamed")]
    tensors = [load_file(path) for path in paths]
    name = "model.layers.2.mlp.experts.down_proj"
    for part in (f"{name}_blocks", f"{name}_scales"):
        tensors[1][part] = tensors[0][part].clone()
    save_file(tensors[1], paths[1], metadata={"format": "pt"})
    problems = certify(found.directory, open_base(tmp_path / "base"), found.plan).problems
    assert len(problems) == 1 and name in problems[0]


def test_what_the_formats_cannot_carry_is_refused_by_name(tmp_path):
    quantised(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="stored as FP8"):
        streamed(tmp_path, taken_out(2))
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {f"{name}_scale_inv": torch.ones(2, 2)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}_scale_inv"):
        streamed(tmp_path, taken_out())


def test_compressed_tensors_reads_the_same_numbers(tmp_path):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    quantised(tmp_path, "mistral")
    streamed(tmp_path, taken_out())
    scheme = QuantizationScheme(**INT4["config_groups"]["group_0"])
    name = "model.layers.1.mlp.down_proj.weight"
    for part in ("base", "streamed"):
        tensors = load_file(tmp_path / part / "model.safetensors")
        state = {f"weight_{kind}": tensors[f"{name}_{kind}"] for kind in INT4_PARTS}
        theirs = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        tensor = find_block_tensor(name, checkpoint_tensors(tmp_path / part), FP8_BLOCK)
        ours = torch.cat(list(tensor.floats(1 << 30))).squeeze(0)
        assert torch.equal(ours.to(theirs.dtype), theirs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype=torch.float32).eval()
    plain = dequantised(tmp_path / "streamed")
    inputs = zoo.inputs(plain)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_rotations_around_the_tensors_are_refused_by_name(key, tmp_path):
    quantised(tmp_path, "mistral")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config[key] = {**config["quantization_config"], "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{key}.transform_config \\(R1\\)"):
        streamed(tmp_path, taken_out())
    config[key]["transform_config"] = {"config_groups": {}}
    path.write_text(json.dumps(config))
    assert streamed(tmp_path, taken_out()).certificate.passed


@pytest.mark.parametrize("part", ["zero_point", "g_idx", "scale", "shape", "packed"])
def test_integers_packed_otherwise_are_refused_by_name(part, tmp_path):
    quantised(tmp_path, "mistral")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    other = {"scale": torch.ones(zoo.D_MODEL, 1), "packed": torch.zeros(zoo.D_MODEL, 80, dtype=torch.int32)}
    tensors[f"{name}_{part}"] = other.get(part, torch.tensor([zoo.D_MODEL, 319]))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}_{'scale|shape' if part == 'packed' else part}"):
        streamed(tmp_path, taken_out())
