import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForCausalLM, T5Config, T5ForConditionalGeneration, pipeline
from transformers.utils import logging

import tiny
from remove_refusals.baking.disk import bake
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.directions.direction import find_direction
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import intervene
from remove_refusals.errors import CheckpointError, ModelError
from remove_refusals.measure.judges import Label
from remove_refusals.measure.judges.phrases import judge_phrases
from remove_refusals.models.chat_template import render
from remove_refusals.models.generate import generate
from remove_refusals.models.load import load
from remove_refusals.prompts import embedded_prompts
from remove_refusals.settings import ChatFormat, DirectionSettings


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny.llama().to(torch.bfloat16).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(source: Path | str, error: type[Exception] = ModelError, **options: object) -> str:
    with pytest.raises(error) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "expected" in message and "\n" not in message and message.endswith(".")
    return message


def test_loads_in_float32_on_the_cpu_with_the_saved_values(saved: Path) -> None:
    loaded = load(saved, device="cpu")
    tensors = load_file(saved / "model.safetensors")
    state = loaded.model.state_dict()
    assert loaded.model.dtype == torch.float32
    assert loaded.checkpoint_dtype == torch.bfloat16
    assert not loaded.model.training
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
    assert loaded.source == str(saved) and loaded.revision is None and loaded.unused_tensors == ()
    assert loaded.vocabulary_size == len(tiny.VOCABULARY)
    assert loaded.device == torch.device("cpu")


def test_parameters_keep_requires_grad(saved: Path) -> None:
    assert all(parameter.requires_grad for parameter in load(saved, device="cpu").model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float64"])
def test_explicit_dtype(saved: Path, dtype: str | torch.dtype) -> None:
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert load(saved, device="cpu", dtype=dtype).model.dtype == expected


def test_saved_dtype_is_read_from_the_weights_where_the_config_is_silent(copied: Path) -> None:
    edit_config(copied, dtype=None)
    assert load(copied, device="cpu").checkpoint_dtype == torch.bfloat16


def test_the_tokenizer_is_not_changed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.llama().save_pretrained(source)
    tiny.tokenizer(pad=False).save_pretrained(source)
    loaded = load(source, device="cpu")
    assert loaded.tokenizer.pad_token_id is None
    assert loaded.pad_token_id == loaded.tokenizer.eos_token_id == 2
    loaded.tokenizer.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    assert "pad_token" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())


def test_the_pad_token_is_used_where_there_is_one(saved: Path) -> None:
    assert load(saved, device="cpu").pad_token_id == 0


def test_tokenizer_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    assert "tokenizer" in refused(tmp_path)
    assert load(tmp_path, device="cpu", tokenizer=saved).tokenizer.convert_tokens_to_ids("<pad>") == 0


def test_bin_weights_are_read(saved: Path, tmp_path: Path) -> None:
    model = tiny.llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path, device="cpu", tokenizer=saved)
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)


class RunsCode:
    """Writes a file when it is unpickled by something that trusts the pickle."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (self.target, "w"))


def test_bin_weights_cannot_run_code(saved: Path, tmp_path: Path) -> None:
    tiny.llama().config.save_pretrained(tmp_path)
    torch.save({"weight": RunsCode(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    message = refused(tmp_path, tokenizer=saved)
    assert "more than tensors" in message and "weights_only" not in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing", "a/b/c"])
def test_missing_directory(name: str) -> None:
    assert f"The model {name} does not exist" in refused(name)


def test_file_instead_of_directory(saved: Path) -> None:
    assert "is a file" in refused(saved / "config.json")


def test_directory_without_config(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)


def test_hub_out_of_reach_is_said_without_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    message = refused("nobody/nothing-of-that-name")
    assert "nobody/nothing-of-that-name" in message and "hub cannot be reached" in message
    assert time.perf_counter() - start < 5


def test_malformed_hub_id() -> None:
    assert "a name with spaces" in refused("a name with spaces")


@pytest.mark.parametrize("keep", [0, 7, 400, -1])
def test_truncated_weights_name_the_file(copied: Path, keep: int) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "model.safetensors" in refused(copied, CheckpointError)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert shards[1].name in refused(tmp_path, CheckpointError)


def test_no_weights_at_all(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert str(copied) in refused(copied)


def rewrite(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named_and_not_made_up(copied: Path) -> None:
    rewrite(copied, "model.layers.1.mlp.down_proj.weight", None)
    assert "lacks model.layers.1.mlp.down_proj.weight," in refused(copied)


def test_a_tensor_of_the_wrong_shape_is_named(copied: Path) -> None:
    rewrite(copied, "model.layers.1.mlp.down_proj.weight", torch.zeros(32, 8))
    message = refused(copied)
    assert "model.layers.1.mlp.down_proj.weight" in message and "(32, 8)" in message and "(32, 64)" in message


def test_unused_tensors_are_told(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["model.extra.weight"] = torch.zeros(3)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert load(copied, device="cpu").unused_tensors == ("model.extra.weight",)


def test_unknown_model_type_is_named(copied: Path) -> None:
    edit_config(copied, model_type="frobnicate")
    assert "frobnicate" in refused(copied)


def test_config_without_model_type(copied: Path) -> None:
    edit_config(copied, model_type=None)
    assert "model_type" in refused(copied)


def test_config_that_is_not_json(copied: Path) -> None:
    (copied / "config.json").write_text("{not json")
    assert "config.json" in refused(copied)


def test_config_with_a_wrong_value(copied: Path) -> None:
    edit_config(copied, hidden_size="many")
    assert "hidden_size" in refused(copied)


def test_remote_code_needs_permission(copied: Path) -> None:
    edit_config(copied, model_type="frob", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    assert "trust_remote_code" in refused(copied)


def test_encoder_decoders_are_refused_by_type(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "t5" in refused(tmp_path)


def test_encoder_decoder_config_with_a_causal_class_is_refused(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=64, d_model=16, decoder_layers=1, encoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2
    )
    BartForCausalLM(config).save_pretrained(tmp_path)
    edit_config(tmp_path, is_encoder_decoder=True)
    assert "bart" in refused(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_loading_in_few_bits_without_bitsandbytes(bits: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # which is how Python notes that a package is not there
    message = refused(saved, **{f"load_in_{bits}bit": True})
    assert "bitsandbytes" in message and f"{bits}-bit" in message


def test_4_and_8_bits_at_once_are_refused(saved: Path) -> None:
    assert "load_in_4bit and load_in_8bit" in refused(saved, load_in_4bit=True, load_in_8bit=True)


@pytest.mark.parametrize("dtype", ["float99", "int8"])
def test_unknown_dtype(saved: Path, dtype: str) -> None:
    assert dtype in refused(saved, dtype=dtype)


def test_unknown_device(saved: Path) -> None:
    assert "toaster" in refused(saved, device="toaster")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_device(saved: Path) -> None:
    assert "cuda" in refused(saved, device="cuda")


def test_device_and_device_map_exclude_each_other(saved: Path) -> None:
    assert "device_map" in refused(saved, device="cpu", device_map="auto")


def test_device_map(saved: Path) -> None:
    assert load(saved, device_map={"": "cpu"}).model.device.type == "cpu"


def test_loading_is_quiet_and_leaves_the_settings_as_they_were(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load(saved, device="cpu")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(("bits", "stored"), [(4, torch.uint8), (8, torch.int8)])
def test_a_model_in_few_bits_answers_with_the_direction_taken_out(
    bits: int, stored: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the layers are quantised, so the direction is nearly the one of the full weights, and hooks act on it."""
    full, small = load("demo"), load("demo", **{f"load_in_{bits}bit": True})
    assert small.model.model.layers[0].mlp.down_proj.weight.dtype == stored
    settings = DirectionSettings(n_prompts=16)
    directions = [find_direction(loaded, settings).direction for loaded in (full, small)]
    assert float((directions[0].basis * directions[1].basis).sum()) > 0.98
    prompts = embedded_prompts("harmful_test").prompts[:6]
    token_ids = render(small, prompts)
    refused = [judge_phrases(answer.text) for answer in generate(small, token_ids, max_new_tokens=30)]
    with ablated(small.model, intervene(directions[1], small.model.config.num_hidden_layers)):
        ablated_answers = generate(small, token_ids, max_new_tokens=30)
    assert refused.count(Label.REFUSAL) >= 5
    assert [judge_phrases(answer.text) for answer in ablated_answers].count(Label.REFUSAL) <= 1
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj\.weight' of a Linear.*without quantisation"):
        bake_in_place(small, intervene(directions[1], small.model.config.num_hidden_layers))
    assert "MatMul8bitLt" not in capfd.readouterr().err


def test_a_model_in_memory_is_taken_as_it_is(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    loaded = load(model, tokenizer, chat=ChatFormat(plain=True), batch_size=3)
    assert (loaded.model, loaded.tokenizer) == tuple(loaded) == (model, tokenizer)
    assert (loaded.source, loaded.checkpoint_dtype) == ("LlamaForCausalLM", torch.float32)
    assert (loaded.chat.plain, loaded.batch_size) == (True, 3)
    assert load(model, saved).tokenizer.get_vocab() == tokenizer.get_vocab()
    assert tuple(load(pipeline("text-generation", model=model, tokenizer=tokenizer))) == (model, tokenizer)
    found = find_direction(loaded, DirectionSettings(n_prompts=4))
    bake(loaded, intervene(found.direction, 2), tmp_path / "edited")
    edited = load(tmp_path / "edited")
    with ablated(model, intervene(found.direction, 2)):
        expected = generate(loaded, [[5, 6, 7]], max_new_tokens=5)
    assert generate(edited, [[5, 6, 7]], max_new_tokens=5) == expected


def test_what_is_no_model_in_memory_is_said(saved: Path) -> None:
    # PEFT adds its layers in training mode.
    adapted = get_peft_model(tiny.llama(), LoraConfig(target_modules=["down_proj"]))
    assert "training mode" in refused(adapted, tokenizer=tiny.tokenizer())
    assert "training mode" in refused(tiny.llama().train(), tokenizer=tiny.tokenizer())
    assert "expected a decoder with a head" in refused(tiny.llama().model, tokenizer=tiny.tokenizer())
    assert "Linear" in refused(torch.nn.Linear(2, 2), tokenizer=tiny.tokenizer())
    assert "is a NoneType" in refused(tiny.llama())
    assert "option device" in refused(tiny.llama(), tokenizer=tiny.tokenizer(), device="cpu")
    assert "option devise" in refused(saved, devise="cpu")
