"""A safetensors checkpoint on disk: which files, what is in them, and their hashes, without loading the weights."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from remove_refusals.errors import CheckpointError
from remove_refusals.records import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

HASHED_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""The files that decide what a model does: weights, configs, tokenizer, chat template, code of its own."""

# The format's own limit: https://huggingface.co/docs/safetensors, section "Format".
_MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 1 << 22

_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file.

    Attributes:
        name: The tensor's name on disk.
        dtype: The format's name of the data type, for example `BF16`.
        shape: Its shape.
        start: The offset of its first byte from the beginning of the file.
        stop: The offset just after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardHeader:
    """The checked header of one safetensors file.

    Attributes:
        path: The file.
        tensors: Its tensors in the order of their bytes.
        metadata: The header's `__metadata__`.
    """

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


def checkpoint_files(directory: Path) -> tuple[Path, ...]:
    """Find the weight files of a checkpoint: the single file, or else the shards that the index names.

    Args:
        directory: The checkpoint's directory.

    Returns:
        The paths, sorted by name; each of them exists.

    Raises:
        CheckpointError: If there are none, or if the index is malformed, names a missing shard, or names a path
            outside the directory.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"The checkpoint {directory} is not a directory, expected one with {SINGLE_FILE} or {INDEX_FILE}; "
            "check the path."
        )
    single = directory / SINGLE_FILE
    if single.is_file():
        return (single,)
    if (directory / INDEX_FILE).is_file():
        return tuple(directory / shard for shard in sorted(set(_weight_map(directory).values())))
    raise CheckpointError(
        f"The directory {directory} has neither {SINGLE_FILE} nor {INDEX_FILE}, expected one of them; save the model "
        "with `save_pretrained` to get safetensors."
    )


def checkpoint_tensors(directory: Path) -> dict[str, tuple[Path, TensorEntry]]:
    """Read every header of a checkpoint and check them against the index.

    Args:
        directory: The checkpoint's directory.

    Returns:
        For each tensor name the file that holds it and its place there, in the order of files and bytes.

    Raises:
        CheckpointError: As for `checkpoint_files` and `read_header`; or if a tensor lies in two files, or if index
            and shards do not agree on which tensors there are and where.
    """
    files = checkpoint_files(directory)
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for path in files:
        for tensor in read_header(path).tensors:
            if tensor.name in found:
                raise CheckpointError(
                    f"The tensor {tensor.name} lies in both {found[tensor.name][0].name} and {path.name} of "
                    f"{directory}, expected it once; download the checkpoint again."
                )
            found[tensor.name] = (path, tensor)
    if files != (directory / SINGLE_FILE,):
        _check_index(directory, found)
    return found


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a safetensors file, without its data.

    Args:
        path: The file.

    Returns:
        The header, with the offsets counted from the beginning of the file.

    Raises:
        CheckpointError: If the file is missing, truncated or corrupt, with what is wrong.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _corrupt(path, f"is {size} bytes long and announces a header of {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"The weight file {path} cannot be read ({error.strerror}), expected a safetensors file; check the path "
            "and its permissions."
        ) from error
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"has a header that is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "has a header that is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "has `__metadata__` that does not map strings to strings")
    tensors = sorted(
        (_tensor_entry(path, name, value, 8 + length) for name, value in header.items()),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise _corrupt(path, f"has the tensor {tensor.name} at byte {tensor.start}, not at {end}")
        end = tensor.stop
    if end != size:
        raise _corrupt(path, f"is {size} bytes long where its header needs {end}")
    return ShardHeader(path, tuple(tensors), metadata)


def file_hashes(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Hash the files that decide what a model does: weights, configs, tokenizer, chat template, code of its own.

    Args:
        directory: The checkpoint's directory.
        known: Hashes that were computed before; these files are not read again.

    Returns:
        SHA-256 as 64 hex digits for each file name, sorted by name; hidden files and subdirectories are left out.

    Raises:
        CheckpointError: If a weight file is missing (see `checkpoint_files`) or a file cannot be read.
    """
    if not any(directory.glob("pytorch_model*.bin")):
        checkpoint_files(directory)
    paths = [path for path in sorted(directory.iterdir()) if path.suffix in HASHED_SUFFIXES and path.name[0] != "."]
    known = known or {}
    return {path.name: known.get(path.name) or _hash(path, 0, None) for path in paths if path.is_file()}


def tensor_hashes(directory: Path) -> dict[str, str]:
    """Hash the bytes of each tensor of a checkpoint, one block at a time.

    Args:
        directory: The checkpoint's directory.

    Returns:
        SHA-256 as 64 hex digits of each tensor's raw bytes (little endian, row-major), sorted by tensor name.

    Raises:
        CheckpointError: As for `checkpoint_tensors`, or if a file cannot be read.
    """
    tensors = checkpoint_tensors(directory)
    return {name: _hash(path, entry.start, entry.stop) for name, (path, entry) in sorted(tensors.items())}


def _weight_map(directory: Path) -> dict[str, str]:
    """Read the index: for each tensor name the name of its shard, which exists and lies in the directory."""
    path = directory / INDEX_FILE
    index = read_json(path, error=CheckpointError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CheckpointError(
            f"The index {path} has no `weight_map` from tensor names to file names, expected one; download the "
            "checkpoint again."
        )
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"The index {path} names the shard {shard!r}, expected the name of a file in the same directory; do "
                "not use this checkpoint before you know who wrote it."
            )
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"The index {path} names the shard {shard}, expected it in {directory} but it is missing; download "
                "the checkpoint again."
            )
    return weight_map


def _check_index(directory: Path, found: Mapping[str, tuple[Path, TensorEntry]]) -> None:
    weight_map = _weight_map(directory)
    for name in sorted(weight_map.keys() | found.keys()):
        listed, actual = weight_map.get(name), found[name][0].name if name in found else None
        if listed != actual:
            raise CheckpointError(
                f"The index of {directory} puts the tensor {name} in {listed or 'no shard'}, expected the one that "
                f"holds it, which is {actual or 'none'}; download the checkpoint again."
            )


def _tensor_entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    dtype = value.get("dtype") if isinstance(value, dict) else None
    shape = value.get("shape") if isinstance(value, dict) else None
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _corrupt(path, f"describes the tensor {name} without a dtype, shape and two data offsets")
    if dtype not in _DTYPE_BITS:
        raise _corrupt(path, f"gives the tensor {name} the unknown dtype {dtype}")
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    start, stop = offsets
    if bits != 8 * (stop - start):
        raise _corrupt(path, f"gives the tensor {name} {stop - start} bytes where {dtype} {shape} has {bits / 8:g}")
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key appears twice")
    return mapping


def _corrupt(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"The weight file {path} {what}, expected a whole safetensors file; it is truncated or corrupt, so download "
        "it again."
    )


def _hash(path: Path, start: int, stop: int | None) -> str:
    """Hash the bytes of `path` from `start` to before `stop`, or to the end of the file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(_BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop - file.tell())):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f"The file {path} cannot be read ({error.strerror}), expected a readable file; check its permissions and "
            "the disk."
        ) from error
    return digest.hexdigest()
