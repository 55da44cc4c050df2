"""`run` keeps all of a model: every file, every tensor, and every byte that the edit does not touch."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import tiny
import zoo
from hashing import tensor_hashes
from remove_refusals import pipeline
from remove_refusals.baking.base import load_intervention, open_base
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.cli import printing
from remove_refusals.directions.hooks import ablated
from remove_refusals.errors import CheckpointError, SelectionError
from remove_refusals.models.checkpoint import checkpoint_files
from remove_refusals.models.load import load
from remove_refusals.pipeline import run
from remove_refusals.settings import (
    DirectionSettings,
    EditSettings,
    MeasureSettings,
    PromptSource,
    RunSettings,
    SelectSettings,
)
from streaming import saved, streamed, taken_out

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def written(path, tensors):
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def added(directory, extra):
    path = directory / "model.safetensors"
    written(path, load_file(path) | extra)


def changed_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def next_tokens(directory):
    """A Qwen3-Next with layers that predict the token after the next, and more of them in a file of their own."""
    zoo.build("qwen3_next").save_pretrained(directory)
    extra = {"mtp.fc.weight": torch.randn(64, 128), "mtp.norm.weight": torch.ones(64)}
    added(directory, extra)
    written(directory / "mtp.safetensors", {"mtp.layers.0.mlp.down_proj.weight": torch.randn(64, 96)})


def extra_layer(directory):
    """A DeepSeek-V3 with a layer beyond its last."""
    zoo.build("deepseek_v3").save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    copies = {name.replace("layers.3.", "layers.4."): tensor for name, tensor in stored.items() if "layers.3." in name}
    assert copies
    added(directory, copies | {"model.layers.4.eh_proj.weight": torch.randn(64, 128)})
    changed_config(directory, num_nextn_predict_layers=1)


def with_vision(directory):
    """A Gemma 3 with its vision tower, and what a processor is made of."""
    config = zoo.tiny_config("gemma3", vision_config={**TOWER, "image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval().float()
    model.save_pretrained(directory)
    for name in ("preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE", "USE_POLICY.md"):
        (directory / name).write_text("{}\n")
    (directory / "tokenizer.model").write_bytes(b"\x0a\x0e")
    (directory / "assets").mkdir()
    (directory / "assets" / "voices.txt").write_text("one\n")


def of_two_dtypes(directory):
    """A bfloat16 hybrid with float32 norms and a tied embedding."""
    zoo.build("granitemoehybrid", tie_word_embeddings=True).save_pretrained(directory)
    path = directory / "model.safetensors"
    wide = ("A_log", ".D", "dt_bias", "norm.weight")
    stored = load_file(path)
    written(path, {name: t.float() if name.endswith(wide) else t.bfloat16() for name, t in stored.items()})
    changed_config(directory, dtype="bfloat16")
    assert len({tensor.dtype for tensor in load_file(path).values()}) == 2


@pytest.fixture
def settings(tmp_path):
    def prompts(name, words):
        (tmp_path / name).write_text("".join(f"{word} it\n" for word in words.split()))
        return PromptSource(source=str(tmp_path / name))

    return RunSettings(
        model=str(tmp_path / "base"),
        direction=DirectionSettings(
            harmful=prompts("a", "Steal Break Burn"), harmless=prompts("b", "Bake Water Paint"), n_prompts=3
        ),
        measure=MeasureSettings(
            harmful=prompts("c", "Rob Hack"),
            harmless=prompts("d", "Cook Sing"),
            alarming=prompts("e", "Kill Shoot"),
            max_new_tokens=2,
            kl_tokens=2,
        ),
        select=None,
    )


def all_tensors(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    return found


@pytest.mark.parametrize("build", [next_tokens, extra_layer, with_vision, of_two_dtypes])
def test_no_file_and_no_tensor_is_missing(build, settings, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    build(base)
    tiny.tokenizer().save_pretrained(base)
    for unwanted in ("pytorch_model.bin", "README.md", "figure.png", ".gitattributes"):
        (base / unwanted).write_text("base")
    result = run(settings, out)
    files = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    left = {path for path in files if not (out / path).is_file()}
    assert {str(path) for path in left} == {"pytorch_model.bin", "figure.png", ".gitattributes"}
    before, after = all_tensors(base), all_tensors(out)
    planned = {tensor.name for entry in result.baked.plan.entries for tensor in entry.on_disk}
    new = {name for name in after.keys() - before.keys() if name.endswith("lm_head.weight")}
    assert len(new) == result.baked.plan.untie
    assert after.keys() == before.keys() | new and planned <= before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert bool(torch.equal(after[name], tensor)) is (name not in planned), name
    assert result.baked.certificate.passed and certify_directory(out, str(base)).passed
    assert not new or {after[name].dtype for name in new} <= {before[name].dtype for name in planned}
    changed = {path.name for path in files - left if (out / path).read_bytes() != (base / path).read_bytes()}
    assert changed == {"model.safetensors", "README.md"} | ({"config.json"} if new else set())
    one, other = (load(path).model for path in (base, out))
    with torch.inference_mode(), ablated(one, load_intervention(out)):
        difference = one(**zoo.inputs(one)).logits - other(**zoo.inputs(one)).logits
    assert float(difference.abs().max()) < (0.1 if build is of_two_dtypes else 1e-4)


def test_a_run_searches_with_the_choice_and_tells_it(settings, tmp_path, monkeypatch, capsys):
    zoo.build("gemma2").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for name in "ab":
        (tmp_path / name).write_text("".join(f"{name}{number}\n" for number in range(40)))
    asked = []

    def nothing(*_, tied, **__):
        asked.append(tied)
        raise SelectionError("There is nothing to choose by.")

    monkeypatch.setattr(pipeline, "select", nothing)
    many = settings.direction.model_copy(update={"n_prompts": 32})
    settings = settings.model_copy(update={"direction": many, "select": SelectSettings()})
    result = run(settings, tmp_path / "out")
    assert asked == [settings.edit.tied] == ["auto"]
    tied = result.baked.record.plan.tied
    assert tied.done == "both" and not (all_tensors(tmp_path / "out").keys() - all_tensors(tmp_path / "base").keys())
    printing.show_tied(result.baked.plan)
    said = " ".join(capsys.readouterr().out.split())
    assert tied.why in said and "--tied auto" in said
    assert tied.why in (tmp_path / "out" / "README.md").read_text()


def test_a_lost_or_changed_file_of_weights_fails_by_its_name(tmp_path):
    next_tokens(tmp_path / "base")
    streamed(tmp_path, taken_out())
    path = tmp_path / "streamed" / "mtp.safetensors"
    written(path, {"mtp.layers.0.mlp.down_proj.weight": torch.zeros(64, 96)})
    problems = certify_directory(tmp_path / "streamed", str(tmp_path / "base")).problems
    assert len(problems) == 1 and "mtp.safetensors" in problems[0]


def test_another_copy_of_the_model_does_not_go_along(tmp_path):
    saved(tmp_path, "llama")
    base = tmp_path / "base"
    stored = load_file(base / "model.safetensors")
    written(base / "model.fp32.safetensors", {name: tensor.float() for name, tensor in stored.items()})
    written(base / "consolidated.safetensors", {"layers.0.wo": torch.zeros(1)})
    streamed(tmp_path, taken_out())
    assert [path.name for path in (tmp_path / "streamed").glob("*.safetensors")] == ["model.safetensors"]


def test_a_link_out_of_the_base_is_not_followed(tmp_path):
    saved(tmp_path, "llama")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "base" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt .*is a link"):
        streamed(tmp_path, taken_out())


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path):
    saved(tmp_path, "llama")
    snapshot, blobs = tmp_path / "models--o--m" / "snapshots" / "abc", tmp_path / "models--o--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "base" / "LICENSE").write_text("a licence")
    for path in (tmp_path / "base").iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    bake(snapshot, taken_out(), tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "a licence" and not (tmp_path / "out" / "LICENSE").is_symlink()


def as_bin(directory, shards):
    """Turn a checkpoint into .bin files; tied tensors share memory there, as `torch.save` leaves them."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    state = model.state_dict()
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return state
    names = sorted(state)
    parts = [names[index::shards] for index in range(shards)]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        name = f"pytorch_model-{number:05}-of-{shards:05}.bin"
        torch.save({key: state[key] for key in part}, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", "untie"), ("gemma3_text", "untie"), ("gemma3_text", "both")]
)
def test_bin_files_become_certified_safetensors(model_type, tied, shards, tmp_path):
    loaded = saved(tmp_path, model_type)
    expected = tensor_hashes(streamed(tmp_path, taken_out(), "expected", tied=tied).directory)
    state = as_bin(tmp_path / "base", shards)
    found = streamed(tmp_path, taken_out(), tied=tied)
    assert found.certificate.passed and certify_directory(found.directory, str(tmp_path / "base")).passed
    assert len(checkpoint_files(found.directory)) == shards
    hashes = tensor_hashes(found.directory)
    # What shares memory in a .bin file has a place for each of its names.
    twin = {"lm_head.weight"} if tied == "both" else set()
    assert hashes.keys() == expected.keys() | twin == state.keys() | twin
    assert all(hashes[name] == value for name, value in expected.items())
    assert not list(tmp_path.glob(".*")) and not list(found.directory.glob("*.bin*"))
    again = AutoModelForCausalLM.from_pretrained(found.directory, dtype=torch.float32).eval()
    if tied == "both":
        assert again.lm_head.weight is again.model.embed_tokens.weight
        return
    with torch.inference_mode(), ablated(loaded.model, taken_out()):
        difference = loaded.model(**zoo.inputs(again)).logits - again(**zoo.inputs(again)).logits
    assert float(difference.abs().max()) < 0.1


def test_bin_files_with_code_in_them_are_refused(tmp_path):
    saved(tmp_path, "llama")
    as_bin(tmp_path / "base", 1)
    torch.save({"a": transformers.AutoConfig}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        streamed(tmp_path, taken_out())
    assert not list(tmp_path.glob(".*"))


def test_an_unfinished_output_of_bin_files_is_gone_on_with(tmp_path):
    saved(tmp_path, "llama")
    as_bin(tmp_path / "base", 3)
    whole = tensor_hashes(streamed(tmp_path, taken_out(), "whole").directory)

    class KilledError(BaseException):
        pass

    def kill(stage, done, total):
        if done == 1:
            raise KilledError

    with pytest.raises(KilledError):
        streamed(tmp_path, taken_out(), on_progress=kill, jobs=1)
    seen = []
    found = streamed(tmp_path, taken_out(), on_progress=lambda stage, done, total: seen.append(done))
    assert seen[0] == 2 and tensor_hashes(found.directory) == whole


@pytest.mark.parametrize("model_type", ["zamba", "zamba2", "megatron-bert"])
def test_what_is_tied_beside_the_embedding_is_saved_under_each_of_its_names(model_type, tmp_path):
    loaded = saved(tmp_path, model_type, torch.float32)
    base = open_base(tmp_path / "base")
    found = streamed(tmp_path, taken_out(), tied="untie")
    more = {name for name, copy in base.added(found.plan).items() if copy.edited}
    assert more and found.certificate.passed and certify_directory(found.directory, str(tmp_path / "base")).passed
    model = type(loaded.model).from_pretrained(found.directory, attn_implementation="eager").eval()
    bake_in_place(loaded, taken_out(), EditSettings(tied="untie"))
    with torch.inference_mode():
        first, second = (one(**zoo.inputs(model)).logits for one in (loaded.model, model))
    torch.testing.assert_close(first, second)
