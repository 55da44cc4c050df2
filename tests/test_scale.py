"""A plan of a run, from the configuration alone, held against what models of several types really hold."""

import json
import shutil

import pytest
import torch
from transformers import DynamicCache

import zoo
from remove_refusals.baking import scale
from remove_refusals.baking.scale import Devices, Sizes
from remove_refusals.errors import ConfigurationError, ModelError
from remove_refusals.modelmap import map_model
from remove_refusals.settings import LoadSettings, RunSettings
from streaming import saved

WHOLE = LoadSettings(dtype="float32")


def written(folder, model_type):
    """A tiny model on disk, and its sizes."""
    model = saved(folder, model_type).model
    return model, scale.sizes(str(folder / "base"), WHOLE, "cpu")


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_sizes_are_those_of_the_model(model_type, tmp_path):
    model, found = written(tmp_path, model_type)
    assert found.n_parameters == sum(one.numel() for one in model.parameters())
    assert found.weights == sum(one.nbytes for one in model.parameters())
    # Some types have buffers, too.
    assert found.weights == pytest.approx(2 * found.stored, rel=1e-3)
    writers = {writer.parameter for site in map_model(model).sites for writer in site.writers}
    assert found.edited == sum(model.get_parameter(name).nbytes for name in writers)
    inputs, cache = {**zoo.inputs(model), "use_cache": True}, DynamicCache()
    with torch.inference_mode():
        model(**inputs, past_key_values=cache)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.cached * inputs["input_ids"].numel() == kept


def test_what_gradients_keep_is_what_the_formula_says(tmp_path):
    model, found = written(tmp_path, "llama")
    ids = torch.randint(0, 50, (4, 30))
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    model.requires_grad_(False)
    inputs = model.get_input_embeddings()(ids).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(inputs_embeds=inputs, use_cache=False)
    # Hooks come to this in a search.
    assert 0.5 < sum(size for size, _ in kept.values()) / ids.numel() / found.gradient < 1.1


def test_a_configuration_alone_gives_the_same_plan(tmp_path):
    written(tmp_path, "qwen3_moe")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "bare")
    plans = [
        scale.plan_run(RunSettings(model=str(tmp_path / part), loading=WHOLE), Devices.read("2x1GiB"))
        for part in ("base", "bare")
    ]
    assert plans[0].stages == plans[1].stages and plans[0].weights == plans[1].weights


def test_quantised_weights_stay_so_on_a_gpu_and_are_counted_by_the_index(tmp_path):
    written(tmp_path, "llama")
    path = tmp_path / "base" / "config.json"
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": fp8, "dtype": "bfloat16"}))
    (tmp_path / "base" / "model.safetensors").unlink()
    found = {kind: scale.sizes(str(tmp_path / "base"), LoadSettings(), kind) for kind in ("cpu", "cuda")}
    assert 1 < found["cuda"].weights / found["cuda"].n_parameters < 1.1
    assert found["cpu"].weights == 2 * found["cpu"].n_parameters
    index = {"metadata": {"total_size": 123_456}, "weight_map": {}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert scale.sizes(str(tmp_path / "base"), LoadSettings(), "cuda").weights == 123_456


LARGE = Sizes(
    8192, 80, 128_256, 28_672, 70_000_000_000, 64, 8, 140 * 10**9, 140 * 10**9, 47 * 10**9, 327_680, 2, None, 5e8
)


@pytest.mark.parametrize(
    ("devices", "together", "replicas", "alone", "words"),
    [
        ("8x80GiB", 4, 2, False, "torchrun --nproc-per-node 8 -m remove_refusals run demo --tp auto --replicas 2"),
        ("2x96GiB", 2, 1, True, "torchrun --nproc-per-node 2 -m remove_refusals run demo --tp auto --one-at-a-time"),
        ("1x640GiB", 1, 1, False, "remove-refusals run demo"),
        ("16x24GiB", 8, 2, True, "--nnodes 2 "),
        ("8x24GiB", 8, 1, True, "--one-at-a-time"),
    ],
)
def test_the_fewest_devices_hold_a_copy(devices, together, replicas, alone, words, monkeypatch):
    monkeypatch.setattr(scale, "sizes", lambda *_: LARGE)
    found = scale.plan_run(RunSettings(), Devices.read(devices))
    assert (found.together, found.replicas, found.one_at_a_time) == (together, replicas, alone)
    assert found.fits and words in found.command and found.peak == max(stage.peak for stage in found.stages)


def test_the_line_to_type_says_what_was_planned(monkeypatch):
    monkeypatch.setattr(scale, "sizes", lambda *_: LARGE)
    settings = RunSettings(select=None, loading=LoadSettings(dtype="bfloat16"))
    command = scale.plan_run(settings, Devices.read("cpu:1TiB")).command
    assert command == "remove-refusals run demo --device cpu --select none --dtype bfloat16"


def test_a_data_type_that_is_none_is_refused():
    with pytest.raises(ModelError, match="float12"):
        scale.plan_run(RunSettings(loading=LoadSettings(dtype="float12")), Devices.read("24GiB"))


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(scale, "sizes", lambda *_: LARGE)
    found = scale.plan_run(RunSettings(), Devices.read("4x24GiB"))
    assert not found.fits and "does not fit" in found.slow[0]


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("8x80GiB", (8, 80 << 30, "cuda")),
        ("24GiB", (1, 24 << 30, "cuda")),
        ("cpu:1.5TiB", (1, 3 << 39, "cpu")),
        ("4x500MiB", (4, 500 << 20, "cuda")),
    ],
)
def test_devices_are_read(text, devices):
    found = Devices.read(text)
    assert (found.n, found.memory, found.kind) == devices
    assert Devices.read("cpu").memory > 1 << 30


@pytest.mark.parametrize("text", ["", "8", "x80GiB", "0x80GiB", "8xGiB", "gpu", "cpu80GiB", "cpu:", "8x80"])
def test_devices_that_say_nothing_are_refused(text):
    with pytest.raises(ConfigurationError, match="such as 8x80GiB"):
        Devices.read(text)
