"""A safetensors checkpoint on disk: which files, what is in them, and their hashes, without loading the weights."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch

from remove_refusals.errors import CheckpointError
from remove_refusals.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""The data types that an edit computes with, by their names in a safetensors header."""

COPY_BYTES = 1 << 23
"""How much is read and written at once: enough for the disk to work on several requests at a time."""

LEAST_MEMORY = 64 << 20
"""Below this a worker's slices would be so small that it crawls."""

# The files that decide what a model does: weights, configs, tokenizer, chat template, code of its own.
_HASHED_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")

# The format's own limit: https://huggingface.co/docs/safetensors, section "Format".
_MAX_HEADER_BYTES = 100_000_000

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
    """Where one tensor lies in a safetensors file: from the byte `start` to before `stop`, counted in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class ShardHeader:
    """The checked header of one safetensors file, its tensors in the order of their bytes."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


Place = tuple[Path, TensorEntry]
"""A file and where in it a tensor lies."""


def checkpoint_files(directory: Path) -> tuple[Path, ...]:
    """Find the weight files of a checkpoint, sorted by name: the single file, or else the shards of the index."""
    if not directory.is_dir():
        raise CheckpointError(
            f"The checkpoint {directory} is not a directory, expected one with {SINGLE_FILE} or {INDEX_FILE}; "
            "check the path."
        )
    if (directory / SINGLE_FILE).is_file():
        return (directory / SINGLE_FILE,)
    if (directory / INDEX_FILE).is_file():
        return tuple(directory / shard for shard in sorted(set(_weight_map(directory).values())))
    raise CheckpointError(
        f"The directory {directory} has neither {SINGLE_FILE} nor {INDEX_FILE}, expected one of them; save the model "
        "with `save_pretrained` to get safetensors."
    )


def checkpoint_tensors(directory: Path) -> dict[str, Place]:
    """Read every header of a checkpoint, in the order of files and bytes, and check them against the index."""
    files = checkpoint_files(directory)
    found: dict[str, Place] = {}
    for path in files:
        for tensor in read_header(path).tensors:
            if tensor.name in found:
                raise CheckpointError(
                    f"The tensor {tensor.name} lies in both {found[tensor.name][0].name} and {path.name} of "
                    f"{directory}, expected it once; download the checkpoint again."
                )
            found[tensor.name] = (path, tensor)
    if files == (directory / SINGLE_FILE,):
        return found
    weight_map = _weight_map(directory)
    for name in sorted(weight_map.keys() | found.keys()):
        listed, actual = weight_map.get(name), found[name][0].name if name in found else None
        if listed != actual:
            raise CheckpointError(
                f"The index of {directory} puts the tensor {name} in {listed or 'no shard'}, expected the one that "
                f"holds it, which is {actual or 'none'}; download the checkpoint again."
            )
    return found


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a safetensors file, without its data."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _corrupt(path, f"is {size} bytes long and announces a header of {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise _unreadable(f"weight file {path}", error) from error
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"has a header that is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "has a header that is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "has `__metadata__` that does not map strings to strings")
    end = 8 + length
    entries = (_tensor_entry(path, name, value, end) for name, value in header.items())
    tensors = tuple(sorted(entries, key=lambda tensor: (tensor.start, tensor.stop)))
    for tensor in tensors:
        if tensor.start != end:
            raise _corrupt(path, f"has the tensor {tensor.name} at byte {tensor.start}, not at {end}")
        end = tensor.stop
    if end != size:
        raise _corrupt(path, f"is {size} bytes long where its header needs {end}")
    return ShardHeader(path, tensors, metadata)


def file_hashes(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Hash (SHA-256) the files that decide what a model does, sorted by name; what is known is not read again."""
    if not any(directory.glob("pytorch_model*.bin")):
        checkpoint_files(directory)
    hashes = dict(known or {})
    paths = [path for path in sorted(directory.iterdir()) if path.suffix in _HASHED_SUFFIXES and path.name[0] != "."]
    for path in paths:
        if path.is_file() and path.name not in hashes:
            try:
                with path.open("rb") as file:
                    hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _unreadable(f"file {path}", error) from error
    return {path.name: hashes[path.name] for path in paths if path.is_file()}


def _weight_map(directory: Path) -> dict[str, str]:
    """Read the index: for each tensor name the name of its shard, which exists and lies in the directory."""
    path = directory / INDEX_FILE
    index = read_json(path, error=CheckpointError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    if not isinstance(weight_map, dict) or not shards or not all(isinstance(shard, str) for shard in shards):
        raise CheckpointError(
            f"The index {path} has no `weight_map` from tensor names to file names, expected one; download the "
            "checkpoint again."
        )
    for shard in sorted(set(shards)):
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


def _tensor_entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    described = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
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


def _unreadable(what: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"The {what} cannot be read ({error.strerror}), expected a readable file; check the path, its permissions and "
        "the disk."
    )


def same_bytes(first: Place, second: Place) -> bool:
    """Whether two tensors are of one data type and shape and their bytes are equal."""
    if (first[1].dtype, first[1].shape) != (second[1].dtype, second[1].shape):
        return False
    size = first[1].stop - first[1].start
    room = np.empty((2, min(size, COPY_BYTES)), dtype=np.uint8)
    with opened(first[0]) as one, opened(second[0]) as other:
        for start in range(0, size, COPY_BYTES):
            part = room[:, : min(COPY_BYTES, size - start)]
            read_into(one, part[0].data, first[1].start + start)
            read_into(other, part[1].data, second[1].start + start)
            # Seven times as quick as torch.equal on bytes.
            if not np.array_equal(part[0], part[1]):
                return False
    return True


@dataclass(frozen=True)
class TensorSlice:
    """A part of a tensor that is seen as `[outer, d_model, inner]`, with the middle axis whole.

    Its bytes lie in `runs` of length `run`, `stride` apart; the first is at `offset`, counted from the tensor's.
    """

    shape: tuple[int, int, int]
    offset: int
    run: int
    stride: int = 0
    runs: int = 1


def tensor_slices(shape: Sequence[int], axis: int, item_bytes: int, most: int) -> Iterator[TensorSlice]:
    """Cut a tensor into parts of at most so many numbers, or one input, with the axis of width d_model kept whole."""
    d_model = shape[axis]
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    matrix = d_model * inner * item_bytes
    if d_model * inner <= most or inner == 1:
        group = max(1, most // max(1, d_model * inner))
        for start in range(0, outer, group):
            count = min(group, outer - start)
            yield TensorSlice((count, d_model, inner), start * matrix, count * matrix)
        return
    width = max(1, most // d_model)
    for index in range(outer):
        for left in range(0, inner, width):
            count = min(width, inner - left)
            offset = index * matrix + left * item_bytes
            yield TensorSlice((1, d_model, count), offset, count * item_bytes, inner * item_bytes, d_model)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading only and give its descriptor."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(f"weight file {path}", error) from error
    with file:
        yield file.fileno()


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a file."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise _unreadable("weight file that is being read", error) from error
        if count == 0:
            raise CheckpointError(
                f"A weight file ends at byte {offset + done}, expected {len(buffer) - done} more there; it was cut off "
                "while it was read, so download it again."
            )
        done += count


def write_from(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write a buffer to a file at a place."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)


def read_slice(
    descriptor: int,
    start: int,
    part: TensorSlice,
    dtype: torch.dtype,
    *,
    room: torch.Tensor | None = None,
    seen: Callable[[memoryview], object] | None = None,
) -> torch.Tensor:
    """Read a part of the tensor that begins at the byte `start`: `[outer, d_model, inner]`, contiguous.

    `room`, uint8, is memory to use, at least the part's bytes; `seen` is called with bytes as soon as they are read.
    """
    size = part.run * part.runs
    raw = torch.empty(size, dtype=torch.uint8) if room is None else room[:size]
    view = raw.numpy().data
    for index in range(part.runs):
        offset = start + part.offset + index * part.stride
        for done in range(0, part.run, COPY_BYTES):
            count = min(COPY_BYTES, part.run - done)
            place = index * part.run + done
            read_into(descriptor, view[place : place + count], offset + done)
            if seen is not None:
                seen(view[place : place + count])
    return raw.view(dtype).view(part.shape)


def write_slice(descriptor: int, start: int, part: TensorSlice, tensor: torch.Tensor) -> None:
    """Write a part of a tensor; the arguments are those of `read_slice`, `tensor` is what that gives."""
    view = bytes_of(tensor)
    for index in range(part.runs):
        place = index * part.run
        write_from(descriptor, view[place : place + part.run], start + part.offset + index * part.stride)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Give the memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_tensor(path: Path, entry: TensorEntry, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Read one tensor of a safetensors file whole; floating-point numbers unless a data type is given."""
    dtype = dtype or float_dtype(path, entry)
    raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    with opened(path) as descriptor:
        read_into(descriptor, raw.numpy().data, entry.start)
    return raw.view(dtype).view(entry.shape)


def float_dtype(path: Path, entry: TensorEntry) -> torch.dtype:
    """Give the data type of a tensor that is to be computed with."""
    if entry.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"The tensor {entry.name} of {path.name} is saved as {entry.dtype}, expected one of "
            f"{', '.join(FLOAT_DTYPES)}; use an unquantised checkpoint of this model."
        )
    return FLOAT_DTYPES[entry.dtype]


def shares(memory: int, jobs: int | None, n_tasks: int) -> tuple[int, int]:
    """Divide memory, in bytes, among workers: give their number, fewer where it is too small, and the bytes of each."""
    # More than four add nothing but load on the disk.
    jobs = jobs or min(4, os.cpu_count() or 1)
    count = max(1, min(jobs, memory // LEAST_MEMORY, n_tasks))
    # What the plan, the headers and the records take comes out of the budget too.
    return count, int(memory * 0.75) // count


@contextmanager
def workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads that compute on one core each, since there are several of them."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            finally:
                # What has not begun is not waited for when something fails.
                pool.shutdown(cancel_futures=True)
    finally:
        # The last setting holds for threads that are made later, too.
        torch.set_num_threads(threads)
