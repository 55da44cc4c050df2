"""Tensors of a safetensors file, read and written in slices by position, so that memory is what the caller allots.

Nothing is mapped into memory. A slice holds the axis of width d_model whole, since an edit works on each input alone.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from remove_refusals.checkpoint import TensorEntry
from remove_refusals.errors import CheckpointError

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""The data types that an edit computes with, by their names in a safetensors header."""

Place = tuple[Path, TensorEntry]
"""A file and where in it a tensor lies."""

COPY_BYTES = 1 << 23
"""How much is read and written at once: enough for the disk to work on several requests at a time."""


@dataclass(frozen=True)
class TensorSlice:
    """A part of a tensor that is seen as `[outer, d_model, inner]`.

    Attributes:
        shape: The shape of the part, with the middle axis whole.
        offset: Its first byte, counted from the tensor's.
        run: How many bytes lie together.
        stride: How far it is from one such run to the next.
        runs: How many there are; 1 if the part lies together.
    """

    shape: tuple[int, int, int]
    offset: int
    run: int
    stride: int = 0
    runs: int = 1


def tensor_slices(shape: Sequence[int], axis: int, item_bytes: int, most: int) -> Iterator[TensorSlice]:
    """Cut a tensor into parts that fit a limit.

    Args:
        shape: The tensor's shape.
        axis: The axis of width d_model, which is kept whole.
        item_bytes: The size of one number.
        most: The most numbers of a part; a part holds one input in any case.

    Yields:
        Parts that together are the tensor.
    """
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
    """Open a file for reading only and give its descriptor.

    Raises:
        CheckpointError: If it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(str(path), error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a file.

    Raises:
        CheckpointError: If the file cannot be read or ends too early.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise _unreadable("that is being read", error) from error
        if count == 0:
            raise CheckpointError(
                f"A weight file ends at byte {offset + done}, expected {len(buffer) - done} more there; it was cut off "
                "while it was read, so download it again."
            )
        done += count


def write_from(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write a buffer to a file at a place.

    Raises:
        OSError: If it cannot be written.
    """
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
    """Read a part of a tensor.

    Args:
        descriptor: The open file.
        start: The tensor's first byte in the file.
        part: The part.
        dtype: The tensor's data type.
        room: `[at least the part's bytes]`, uint8: memory to use, so that it need not be asked for each time.
        seen: Called with the bytes in the order in which they are read, as soon as they are.

    Returns:
        `[outer, d_model, inner]`, contiguous.

    Raises:
        CheckpointError: If the file cannot be read or ends too early.
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
    """Write a part of a tensor; the arguments are those of `read_slice`, `tensor` is what that gives.

    Raises:
        OSError: If it cannot be written.
    """
    view = bytes_of(tensor)
    for index in range(part.runs):
        place = index * part.run
        write_from(descriptor, view[place : place + part.run], start + part.offset + index * part.stride)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Give the memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """Read one floating-point tensor of a safetensors file whole.

    Args:
        path: The file.
        entry: Where the tensor lies in it.

    Returns:
        The tensor, of its shape and data type.

    Raises:
        CheckpointError: If it is of another kind of data type, or cannot be read.
    """
    dtype = float_dtype(path, entry)
    raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    with opened(path) as descriptor:
        read_into(descriptor, raw.numpy().data, entry.start)
    return raw.view(dtype).view(entry.shape)


def float_dtype(path: Path, entry: TensorEntry) -> torch.dtype:
    """Give the data type of a tensor that is to be computed with.

    Raises:
        CheckpointError: If it is not one of `FLOAT_DTYPES`.
    """
    if entry.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"The tensor {entry.name} of {path.name} is saved as {entry.dtype}, expected one of "
            f"{', '.join(FLOAT_DTYPES)}; use an unquantised checkpoint of this model."
        )
    return FLOAT_DTYPES[entry.dtype]


def _unreadable(what: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"The weight file {what} cannot be read ({error.strerror}), expected a readable file; check its permissions "
        "and the disk."
    )
