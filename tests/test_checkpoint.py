import hashlib
import json
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hashing import tensor_hashes
from remove_refusals.errors import CheckpointError
from remove_refusals.models.checkpoint import (
    INDEX_FILE,
    checkpoint_files,
    checkpoint_tensors,
    file_hashes,
    read_header,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.zeros(0, 5),
    "d": torch.tensor(7, dtype=torch.int64),
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / INDEX_FILE).exists()
    return tmp_path


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_files_of_a_single_and_a_sharded_checkpoint(saved: Path, sharded: Path) -> None:
    assert checkpoint_files(saved) == (saved / "model.safetensors",)
    files = checkpoint_files(sharded)
    assert len(files) > 1
    assert files == tuple(sorted(sharded.glob("*.safetensors")))


def test_header_agrees_with_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {tensor.name: tensor.shape for tensor in header.tensors} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    assert {tensor.name: tensor.dtype for tensor in header.tensors} == {"a": "F32", "b": "BF16", "c": "F32", "d": "I64"}
    content = path.read_bytes()
    for tensor in header.tensors:
        expected = TENSORS[tensor.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[tensor.start : tensor.stop] == expected


def test_file_hashes_are_sha256_of_the_files_that_matter(saved: Path) -> None:
    (saved / "README.md").write_text("not hashed")
    (saved / ".hidden.json").write_text("{}")
    hashes = file_hashes(saved)
    assert list(hashes) == ["config.json", "generation_config.json", "model.safetensors"]
    for name, value in hashes.items():
        assert value == hashlib.sha256((saved / name).read_bytes()).hexdigest()


def test_tensor_hashes_do_not_depend_on_the_shards(saved: Path, sharded: Path) -> None:
    hashes = tensor_hashes(saved)
    assert hashes == tensor_hashes(sharded)
    loaded = load_file(saved / "model.safetensors")
    assert hashes == {name: hashlib.sha256(loaded[name].numpy().tobytes()).hexdigest() for name in sorted(loaded)}


def test_tensor_hash_sees_one_changed_bit(saved: Path, tmp_path: Path) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    last = read_header(saved / "model.safetensors").tensors[-1].name
    before, after = tensor_hashes(saved), tensor_hashes(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {last}


@given(cut=st.integers(min_value=0, max_value=len(save(TENSORS)) - 1))
@settings(max_examples=60, deadline=None)
def test_every_truncation_is_found(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "shard.safetensors"
    path.write_bytes(save(TENSORS)[:cut])
    with pytest.raises(CheckpointError, match=r"shard\.safetensors .* truncated or corrupt"):
        read_header(path)


@given(position=st.integers(min_value=0, max_value=300), value=st.integers(min_value=0, max_value=255))
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_the_reference_accepts_too(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    content = bytearray(save(TENSORS, metadata={"format": "pt"}))
    content[position] = value
    path = tmp_path_factory.mktemp("changed") / "shard.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    reference = {name: (info["dtype"], info["shape"]) for name, info in safetensors.deserialize(bytes(content))}
    assert {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in header.tensors} == reference


@pytest.mark.parametrize(
    ("dtype", "n_bytes"),
    [("F4", 4), ("F6_E2M3", 6), ("BOOL", 8), ("F8_E8M0", 8), ("BF16", 16), ("F32", 32), ("C64", 64), ("F64", 64)],
)
def test_sizes_of_unusual_dtypes(tmp_path: Path, dtype: str, n_bytes: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": entry(dtype, [2, 4], 0, n_bytes)}, bytes(n_bytes)))
    assert len(safetensors.deserialize(path.read_bytes())) == 1
    assert read_header(path).tensors[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes long"),
        (b"not safetensors at all", "announces a header"),
        (raw(b'{"a": '), "not valid JSON"),
        (raw(b"\xff\xfe{}"), "not valid JSON"),
        (raw(b"[" * 5000), "not valid JSON"),
        (raw([1, 2]), "not a JSON object"),
        (raw({"__metadata__": {"a": 1}}), "__metadata__"),
        (raw({"a": 3}), "tensor a without"),
        (raw({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "tensor a without"),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)), "tensor a without"),
        (raw({"a": entry("F31", [1], 0, 4)}, bytes(4)), "unknown dtype F31"),
        (raw({"a": entry("F32", [2], 0, 4)}, bytes(4)), "tensor a 4 bytes where"),
        (raw({"a": entry("F32", [1], 4, 8)}, bytes(8)), "tensor a at byte"),
        (raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)), "tensor b at byte"),
        (raw({"a": entry("F32", [1], 0, 4)}, bytes(5)), "where its header needs"),
        (raw(b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": 1}', b"x"), "appears twice"),
    ],
)
def test_corrupt_headers_say_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard\.safetensors") as raised:
        read_header(path)
    assert message in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "shard.safetensors")


def test_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        file_hashes(tmp_path / "absent")


def test_missing_shard(sharded: Path) -> None:
    missing = checkpoint_files(sharded)[1]
    missing.unlink()
    for function in (checkpoint_files, file_hashes, tensor_hashes):
        with pytest.raises(CheckpointError, match=f"{missing.name}.*missing"):
            function(sharded)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b"])
def test_index_that_points_outside(sharded: Path, shard: str) -> None:
    (sharded.parent / "outside.safetensors").write_bytes(save(TENSORS))
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected the name of a file in the same directory"):
        checkpoint_files(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_malformed_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        checkpoint_files(tmp_path)


def test_index_and_shards_that_disagree(sharded: Path) -> None:
    original = json.loads((sharded / INDEX_FILE).read_text())
    shards = [path.name for path in checkpoint_files(sharded)]
    wrong = next(shard for shard in shards if shard != original["weight_map"]["lm_head.weight"])
    changes = {
        "elsewhere": original["weight_map"] | {"lm_head.weight": wrong},
        "invented": original["weight_map"] | {"invented.weight": shards[0]},
        "unlisted": {k: v for k, v in original["weight_map"].items() if k != "model.norm.weight"},
    }
    for name, weight_map in changes.items():
        (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        expected = {"elsewhere": "lm_head", "invented": "invented", "unlisted": "norm"}[name] + ".weight"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint_tensors(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = checkpoint_files(sharded)[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"both {first.name} and {second.name}"):
        checkpoint_tensors(sharded)
