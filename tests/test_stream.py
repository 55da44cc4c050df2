"""The edit on disk: the bits of the edit in memory, within any memory, and whole or resumable whatever ends it."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from hashing import tensor_hashes
from remove_refusals.baking.disk import bake, certify_directory
from remove_refusals.baking.memory import bake_in_place
from remove_refusals.baking.shards import LEDGER_FILE
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.saved import save_direction
from remove_refusals.errors import CheckpointError
from remove_refusals.models.checkpoint import (
    INDEX_FILE,
    TensorEntry,
    bytes_of,
    file_hashes,
    opened,
    read_slice,
    read_tensor,
    tensor_slices,
    write_slice,
)
from remove_refusals.settings import EditSettings
from streaming import saved, streamed, taken_out

SHARDED = "60KB"


@pytest.mark.parametrize(
    ("model_type", "dtype", "shards"),
    [
        ("llama", torch.bfloat16, SHARDED),
        ("llama", torch.float16, "1GB"),
        ("gpt2", torch.float32, "1GB"),
        ("gpt2", torch.bfloat16, SHARDED),
        ("gemma2", torch.bfloat16, "1GB"),
        ("gemma3_text", torch.bfloat16, SHARDED),
        ("mixtral", torch.bfloat16, SHARDED),
        ("gpt_oss", torch.bfloat16, SHARDED),
        ("granitemoe", torch.float16, "1GB"),
        ("lfm2", torch.bfloat16, "1GB"),
    ],
)
def test_the_bits_are_those_of_the_edit_in_memory(model_type, dtype, shards, tmp_path):
    saved(tmp_path, model_type, dtype, shards)
    assert (tmp_path / "base" / INDEX_FILE).exists() is (shards == SHARDED)
    intervention = taken_out(strength=0.9)
    expected = in_memory(tmp_path, intervention)
    found = streamed(tmp_path, intervention)
    base, edited = tensor_hashes(tmp_path / "base"), tensor_hashes(found.directory)
    assert edited == tensor_hashes(expected)
    planned = {tensor.name for entry in found.plan.entries for tensor in entry.on_disk}
    assert {name for name, value in base.items() if edited[name] != value} == planned
    assert found.certificate.passed and found.certificate.identical == len(edited) - len(planned)
    assert certify_directory(found.directory, str(tmp_path / "base")).problems == ()
    names = {path.name for path in found.directory.iterdir()}
    assert {path.name for path in (tmp_path / "base").iterdir()} - names == set()
    assert LEDGER_FILE not in names and not (tmp_path / ".streamed.partial").exists()


def test_of_a_loaded_model_the_files_are_edited(tmp_path):
    loaded = saved(tmp_path, "mixtral", shards=SHARDED)
    found = bake(loaded, taken_out(), tmp_path / "of-a-loaded-one")
    other = streamed(tmp_path, taken_out())
    assert tensor_hashes(found.directory) == tensor_hashes(other.directory) and found.record == other.record
    assert found.certificate.boundaries is not None and other.certificate.boundaries is None


def in_memory(folder, intervention, **options):
    """The edit of the loaded model, in the data type of its files, saved as Transformers does."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    bake_in_place(model, intervention, EditSettings(**options))
    model.save_pretrained(folder / "in-memory")
    return folder / "in-memory"


@pytest.mark.parametrize("variant", ["plain", "norm-preserving"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "gpt2"])
def test_variants_and_planes(variant, model_type, tmp_path):
    saved(tmp_path, model_type)
    intervention = taken_out(2, layers=(1, 2))
    expected = in_memory(tmp_path, intervention, variant=variant)
    assert tensor_hashes(streamed(tmp_path, intervention, variant=variant).directory) == tensor_hashes(expected)


@pytest.mark.parametrize("tied", ["untie", "both"])
@pytest.mark.parametrize("shards", ["1GB", SHARDED])
def test_a_tied_embedding(tied, shards, tmp_path):
    loaded = saved(tmp_path, "gemma3_text", torch.float32, shards)
    expected = in_memory(tmp_path, taken_out(), tied=tied)
    found = streamed(tmp_path, taken_out(), tied=tied, memory=1 << 16)
    hashes = tensor_hashes(found.directory)
    assert hashes == tensor_hashes(expected) and found.certificate.passed
    assert ("lm_head.weight" in hashes) is (tied == "untie")
    config = json.loads((found.directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is (tied == "both")
    model = AutoModelForCausalLM.from_pretrained(found.directory, dtype=torch.float32).eval()
    with torch.inference_mode(), ablated(loaded.model, taken_out(), tied=tied):
        torch.testing.assert_close(loaded.model(**zoo.inputs(model)).logits, model(**zoo.inputs(model)).logits)


@pytest.mark.parametrize(
    ("model_type", "variant"), [("llama", "plain"), ("gpt2", "norm-preserving"), ("gpt_oss", "plain")]
)
def test_slices_give_the_same_bits(model_type, variant, tmp_path):
    saved(tmp_path, model_type, shards=SHARDED)
    whole = streamed(tmp_path, taken_out(), "whole", variant=variant, jobs=1)
    for memory in (1 << 12, 1 << 16):
        cut = streamed(tmp_path, taken_out(), f"cut-{memory}", variant=variant, memory=memory, jobs=3)
        assert file_hashes(cut.directory) == file_hashes(whole.directory)


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    place=st.integers(0, 2),
    most=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=80, deadline=None)
def test_slices_together_are_the_tensor(tmp_path_factory, shape, place, most, dtype):
    axis = place % len(shape)
    tensor = torch.randn(shape).to(dtype)
    folder = tmp_path_factory.mktemp("slices")
    (folder / "a").write_bytes(b"before" + bytes(bytes_of(tensor)))
    (folder / "b").write_bytes(b"before")
    with opened(folder / "a") as source:
        target = os.open(folder / "b", os.O_RDWR)
        for part in tensor_slices(shape, axis, dtype.itemsize, most):
            assert part.shape[1] == shape[axis]
            assert part.shape[0] * part.shape[1] * part.shape[2] <= max(most, shape[axis])
            write_slice(target, 6, part, read_slice(source, 6, part, dtype))
        os.close(target)
    assert (folder / "b").read_bytes() == (folder / "a").read_bytes()


def test_a_slice_beyond_the_end_of_a_file_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match="ends at byte 10"):
        read_tensor(tmp_path / "short", TensorEntry("a", "F32", (4,), 0, 16))


def test_a_missing_writer_and_a_quantised_one_are_refused_by_name(tmp_path):
    saved(tmp_path, "llama")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e5m2)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}.*F8_E5M2"):
        streamed(tmp_path, taken_out())
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        streamed(tmp_path, taken_out())
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_a_tied_embedding_that_is_stored_twice(tied, tmp_path):
    saved(tmp_path, "gemma3_text")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, path, metadata={"format": "pt"})
    found = streamed(tmp_path, taken_out(), tied=tied)
    edited = load_file(found.directory / "model.safetensors")
    assert found.certificate.passed and edited.keys() == {*tensors, "lm_head.weight"}
    assert not torch.equal(edited["model.embed_tokens.weight"], embedding)
    assert torch.equal(edited["lm_head.weight"], embedding if tied == "untie" else edited["model.embed_tokens.weight"])
    assert certify_directory(found.directory, str(tmp_path / "base")).passed


def test_the_command(tmp_path, command):
    saved(tmp_path, "llama", torch.float32)
    save_direction(taken_out().directions[0], tmp_path / "direction.safetensors")

    def edited(name, *options):
        given = ("--direction", tmp_path / "direction.safetensors", "-o", tmp_path / name)
        return command("bake", tmp_path / "base", *given, *options)

    assert edited("streamed", "--memory", "200MiB", "--jobs", 2).code == 0
    assert not (edited("quick", "--no-certify").code or (tmp_path / "quick" / "certificate.json").exists())
    assert "--memory" in edited("small", "--memory", "2KB").err
    weights = tmp_path / "base" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "base" / "pytorch_model.bin")
    weights.unlink()
    assert edited("from-bin").code == 0 and (tmp_path / "from-bin" / "certificate.json").exists()
    hashes = [tensor_hashes(tmp_path / name) for name in ("streamed", "quick", "from-bin")]
    assert hashes[0] == hashes[1] == hashes[2]
    (tmp_path / "base" / "pytorch_model.bin").unlink()
    assert "has no model.safetensors" in edited("nothing").err
