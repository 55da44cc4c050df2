"""FP8 with scales for blocks of any size, rows or whole tensors, and NVFP4: read, edited and written as they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from remove_refusals.baking.base import open_base
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.directions.saved import save_direction
from remove_refusals.errors import CheckpointError
from remove_refusals.examination import inspect
from remove_refusals.models.checkpoint import checkpoint_tensors, file_hashes
from remove_refusals.models.quantised import find_block_tensor, fp8_block
from streaming import saved, streamed, taken_out

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
INNER = 320
NAME = "model.layers.1.mlp.down_proj.weight"


def spread(scales, block, shape):
    """Each number's scale, of scales for blocks."""
    tall, wide = (min(one, size) for one, size in zip(block, shape, strict=True))
    return scales.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]


def in_fp8(weight, block, dtype):
    """Numbers `[rows, columns]` and a scale for each block, which may stand out over the edge."""
    rows, columns = weight.shape
    tall, wide = min(block[0], rows), min(block[1], columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % tall))
    blocks = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide)
    scales = (blocks.abs().amax((1, 3)) / 448).to(dtype)
    numbers = (weight / spread(scales.float(), block, weight.shape)).clamp(-448, 448)
    return numbers.to(torch.float8_e4m3fn), scales


def in_nvfp4(weight):
    """Bytes of two numbers, the first in the lower half, a scale for each 16 of a row, and the tensor's divisor."""
    whole = 448 * 6 / weight.abs().max()
    groups = weight.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    sizes = groups.abs() / (scales.float() / whole).unsqueeze(-1)
    codes = (sizes.unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8) | ((groups < 0).to(torch.uint8) << 3)
    codes = codes.flatten(1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales, whole.reshape(1)


def out_of_nvfp4(numbers, scales, whole):
    """The floats that the three stand for, as compressed-tensors has it: the third divides the scales."""
    codes = torch.stack((numbers & 15, numbers >> 4), -1).flatten(1).long()
    signed = torch.where(codes >= 8, -1.0, 1.0) * E2M1[codes & 7]
    return signed * (scales.float() / whole).repeat_interleave(16, 1)


def group(**weights):
    """A configuration of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


ROWS, ALL = (1, 1 << 20), (1 << 20, 1 << 20)
FP8 = {
    "blocks, BF16 scales": ("scale_inv", (128, 128), torch.bfloat16, None, {"weight_block_size": [128, 128]}),
    "small blocks": ("scale_inv", (24, 96), torch.float32, None, {"weight_block_size": [24, 96]}),
    "large blocks": ("scale_inv", (256, 256), torch.bfloat16, None, {"weight_block_size": [256, 256]}),
    "blocks of compressed-tensors": ("scale", (16, 64), torch.bfloat16, None, group(block_structure=[16, 64])),
    "rows": ("scale", ROWS, torch.bfloat16, None, group(strategy="channel")),
    "rows, one axis": ("scale", ROWS, torch.float32, (-1,), {"quant_method": "fbgemm_fp8"}),
    "tensor": ("scale", ALL, torch.float32, (1,), group(strategy="tensor")),
    "tensor, no axis": ("scale_inv", ALL, torch.bfloat16, (), {"weight_block_size": None}),
}
MIXTURE = {"moe_intermediate_size": INNER}
NVFP4 = ("NVFP4", "NVFP4 of ModelOpt")


def quantised(folder, kind, inner=INNER, model_type="llama"):
    """Save a tiny model whose projections are quantised; give what each stands for."""
    saved(folder, model_type, intermediate_size=inner, **({} if model_type == "llama" else MIXTURE))
    path = folder / "base" / "model.safetensors"
    tensors, meant = load_file(path), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        if kind in FP8:
            end, block, dtype, shape, _ = FP8[kind]
            numbers, scales = in_fp8(weight, block, dtype)
            meant[name] = numbers.float() * spread(scales.float(), block, weight.shape)
            tensors |= {name: numbers, f"{name}_{end}": scales if shape is None else scales.reshape(shape)}
        else:
            numbers, scales, whole = in_nvfp4(weight)
            meant[name] = out_of_nvfp4(numbers, scales, whole)
            names = ("_packed", "_scale", "_global_scale") if kind == "NVFP4" else ("", "_scale", "_scale_2")
            parts = (numbers, scales, whole if kind == "NVFP4" else (1 / whole).reshape(()))
            tensors |= {name + end: part for end, part in zip(names, parts, strict=True)}
    save_file(tensors, path, metadata={"format": "pt"})
    file = folder / "base" / "config.json"
    said = {"quant_method": "fp8", **FP8[kind][4]} if kind in FP8 else group(num_bits=4, type="float", group_size=16)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": said}))
    return meant, said


def read(folder, name=NAME):
    """A quantised tensor of a directory, by our own reading."""
    config = json.loads((folder / "config.json").read_text())
    tensor = find_block_tensor(name, checkpoint_tensors(folder), fp8_block(config))
    return tensor, torch.cat(list(tensor.floats(1 << 30))).squeeze(0)


@pytest.mark.parametrize("kind", ["blocks, BF16 scales", "rows", "NVFP4"])
def test_experts_that_lie_one_by_one_are_edited_each(kind, tmp_path):
    # Numbers that go into a layer have a scale of their own in some checkpoints, which stays.
    quantised(tmp_path, kind, model_type="qwen3_moe")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    layers = [name.partition(".down_proj")[0] for name in tensors if ".down_proj" in name]
    end = "input_global_scale" if kind == "NVFP4" else "input_scale"
    save_file(
        tensors | {f"{layer}.down_proj.{end}": torch.ones(1) for layer in layers}, path, metadata={"format": "pt"}
    )
    base = open_base(tmp_path / "base")
    assert base.names.unexplained == ()
    found = bake(base, taken_out(), tmp_path / "streamed")
    blocks = [row for row in found.certificate.edited if row.requantising_alone is not None]
    assert found.certificate.passed and len(blocks) == zoo.N_LAYERS * (4 + 1)
    assert len({row.name for row in blocks}) == len(blocks) and max(row.share_left for row in blocks) < 0.04


def bits(tensor):
    """The bytes of a tensor."""
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("kind", [*FP8, *NVFP4])
def test_a_quantised_checkpoint_keeps_its_format_and_loses_the_direction(kind, tmp_path):
    meant, _ = quantised(tmp_path, kind)
    for name in (NAME, NAME.replace("1.mlp.down", "2.self_attn.o")):
        torch.testing.assert_close(read(tmp_path / "base", name)[1], meant[name], rtol=1e-6, atol=0)
    found = streamed(tmp_path, taken_out())
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "streamed"))
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in before.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == described
    blocks = [row for row in found.certificate.edited if row.requantising_alone is not None]
    assert found.certificate.passed and len(blocks) == 2 * zoo.N_LAYERS
    # An input has only 64 numbers here to make up for its rounding.
    assert max(row.share_left for row in blocks) < (0.04 if kind in NVFP4 else 0.02)
    changed = {name for name in before if not torch.equal(*(bits(part[name]) for part in (before, after)))}
    assert not any(name.endswith(("_global_scale", "_scale_2")) for name in changed)
    assert all(("o_proj" in name or "down_proj" in name or "embed" in name) for name in changed)
    assert certify_directory(found.directory, str(tmp_path / "base")).passed


@pytest.mark.parametrize("kind", ["small blocks", "large blocks", "blocks of compressed-tensors", "rows", "NVFP4"])
def test_inspect_names_the_format_whatever_shares_a_scale(kind, tmp_path):
    quantised(tmp_path, kind)
    found = [row for row in inspect(str(tmp_path / "base")).writers if row.site != "embedding"]
    assert len(found) == 2 * zoo.N_LAYERS and not any(row.missing for row in found)
    assert all((row.dtype or "").startswith("NVFP4" if kind == "NVFP4" else "FP8 e4m3") for row in found)


@pytest.mark.parametrize("kind", ["small blocks", "rows", "tensor", "NVFP4"])
def test_slices_give_the_same_bits(kind, tmp_path):
    quantised(tmp_path, kind)
    whole = streamed(tmp_path, taken_out())
    cut = streamed(tmp_path, taken_out(), "cut", memory=1 << 17)
    assert file_hashes(cut.directory) == file_hashes(whole.directory)


@pytest.mark.parametrize(
    "kind", ["small blocks", "blocks, BF16 scales", "rows", "tensor", "NVFP4", "NVFP4 of ModelOpt"]
)
def test_what_is_not_edited_keeps_its_bits(kind, tmp_path):
    quantised(tmp_path, kind)
    tensor, values = read(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    numbers, scales = (stored[name] for name in tensor.names)
    shape = (1, *scales.shape[-2:]) if scales.dim() == 2 else (1, 1, 1)
    written = tensor.fitting(values.unsqueeze(0), scales.view(shape))
    codes = tensor.rounded(values.unsqueeze(0), written, torch.randn(zoo.D_MODEL))
    assert torch.equal(bits(written), bits(scales))
    changed = codes[0] != numbers.view(torch.uint8)
    # Only a negative zero becomes a positive one.
    zero = 128 if kind not in NVFP4 else 8 | 8 << 4
    assert bool(((numbers.view(torch.uint8)[changed] & zero) != 0).all())


@pytest.mark.parametrize("kind", ["blocks, BF16 scales", "small blocks", "rows", "rows, one axis", "tensor"])
def test_a_scale_that_no_longer_fits_is_doubled_and_moves_no_number(kind, tmp_path):
    quantised(tmp_path, kind)
    tensor, values = read(tmp_path / "base")
    scales = load_file(tmp_path / "base" / "model.safetensors")[tensor.names[1]]
    scales = scales.reshape((1, -1, 1) if scales.dim() < 2 else (1, *scales.shape))
    grown = values.clone().unsqueeze(0)
    row, column = divmod(int(values.abs().argmax()), INNER)
    for factor, times in ((1.03, 1), (1.5, 2), (2.01, 2), (5.0, 8)):
        grown[0, row, column] = factor * values[row, column]
        raised = tensor.fitting(grown, scales)
        assert set((raised.float() / scales.float()).flatten().tolist()) <= {1.0, float(times)}
        assert float((raised.float() / scales.float()).max()) == times
        codes = tensor.rounded(grown, raised, None)
        again = codes.view(torch.float8_e4m3fn).float() * tensor.expand(raised, grown.shape)
        off = (again - grown).abs()
        off[0, row, column] = 0
        # Numbers so small that they have no digits left to give lose their last.
        assert float(off.max()) <= 2**-9 * times / 2 * float(scales.float().max()) * (1 + 1e-6)


def test_scales_of_nvfp4_are_rounded_up_and_end_where_their_format_does(tmp_path):
    quantised(tmp_path, "NVFP4")
    tensor, values = read(tmp_path / "base")
    scales = load_file(tmp_path / "base" / "model.safetensors")[tensor.names[1]].unsqueeze(0)
    for factor in (1.3, 1.7, 2.9, 1e4):
        raised = tensor.fitting(factor * values.unsqueeze(0), scales).float()
        needed = factor * values.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * tensor.divisor
        fits = raised[0] >= needed.clamp(max=448) * (1 - 1e-6)
        assert bool(fits.all()) and bool((raised[0] <= (1.13 * needed).clamp(min=2**-9, max=448)).all())


@pytest.mark.parametrize("kind", ["blocks, BF16 scales", "rows", "NVFP4"])
def test_an_edit_that_makes_numbers_larger_leaves_nothing_either(kind, tmp_path):
    # Minus one time the direction's component is another one added, so that most rows' largest numbers grow.
    quantised(tmp_path, kind)
    found = streamed(tmp_path, taken_out(strength=-1.0))
    rows = [row for row in found.certificate.edited if row.requantising_alone is not None]
    assert found.certificate.passed and all(abs(row.share_left - 2) < 0.04 for row in rows)


@pytest.mark.parametrize(
    ("kind", "end", "value"),
    [
        ("blocks, BF16 scales", "_scale_inv", torch.ones(2, 2)),
        ("rows", "_scale", torch.ones(zoo.D_MODEL, 2)),
        ("tensor", "_scale", torch.ones(1, dtype=torch.float64)),
        ("small blocks", "_scale_inv", torch.ones(1, 3)),
        ("NVFP4", "_scale", torch.ones(zoo.D_MODEL, 20)),
        ("NVFP4", "_packed", torch.zeros(zoo.D_MODEL, 157, dtype=torch.uint8)),
        ("NVFP4", "_global_scale", torch.zeros(1)),
        ("NVFP4 of ModelOpt", "_scale_2", torch.ones(2)),
    ],
)
def test_scales_of_another_form_are_refused_by_name(kind, end, value, tmp_path):
    quantised(tmp_path, kind)
    path = tmp_path / "base" / "model.safetensors"
    save_file(load_file(path) | {f"{NAME}{end}": value}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{NAME}{end}"):
        streamed(tmp_path, taken_out())


def test_transformers_reads_the_same_numbers(tmp_path):
    # It reads whole blocks only.
    meant, _ = quantised(tmp_path, "blocks, BF16 scales", 256)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    name = "model.layers.2.self_attn.o_proj.weight"
    assert torch.equal(model.get_parameter(name), meant[name]) and torch.equal(
        read(tmp_path / "base", name)[1], meant[name]
    )


@pytest.mark.parametrize("kind", ["blocks of compressed-tensors", "rows", "tensor", "NVFP4"])
def test_compressed_tensors_reads_the_same_numbers(kind, tmp_path):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    _, said = quantised(tmp_path, kind)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, **said["config_groups"]["group_0"]["weights"]}
    weights |= {"block_structure": {"strategy": "block"}, "group_size": {"strategy": "tensor_group"}}.get(
        list(weights)[-1], {}
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    reader = compressors.NVFP4PackedCompressor if kind == "NVFP4" else compressors.FloatQuantizationCompressor
    streamed(tmp_path, taken_out())
    for part in ("base", "streamed"):
        tensors = load_file(tmp_path / part / "model.safetensors")
        state = {key.removeprefix("model.layers.1.mlp.down_proj."): tensors[key] for key in tensors if NAME in key}
        theirs = reader.decompress(state, scheme)["weight"]
        ours = read(tmp_path / part)[1]
        torch.testing.assert_close(
            ours.to(theirs.dtype), theirs, rtol=0 if theirs.dtype == torch.float32 else 0.008, atol=0
        )


METHODS = ("awq", "gptq", "bitsandbytes", "exl3", "hqq", "aqlm", "auto-round", None)


@pytest.mark.parametrize(("nested", "method"), enumerate(METHODS))
def test_what_cannot_be_edited_is_refused_by_config_alone(method, nested, command, tmp_path):
    # There is no other file that could be read.
    said = {"bits": 4, "group_size": 128} | ({"quant_method": method} if method else {})
    config = {"model_type": "llama", "quantization_config": said}
    config = {"model_type": "llava", "text_config": config} if nested % 2 else config
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    save_direction(taken_out().directions[0], tmp_path / "taken.safetensors")
    out = tmp_path / "out"
    bake = ("bake", tmp_path / "base", "--direction", tmp_path / "taken.safetensors", "-o", out)
    run = ("run", tmp_path / "base", "--select", "none", "-o", out)
    for arguments in (bake, (*bake, "--as", "lora"), (*bake, "--as", "gguf-lora"), run):
        found = command(*arguments)
        assert found.code == 2 and f"quant_method {method or 'unknown'})" in found.err and "bake --as lora" in found.err
        assert found.err.count("\n") == 1 and not out.exists()
