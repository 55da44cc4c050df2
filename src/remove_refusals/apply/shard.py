"""One weight file, copied with the bytes of its edited tensors written anew; nothing of it is mapped into memory."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from remove_refusals.apply.streamplan import FilePlan, TensorEdit, fingerprint
from remove_refusals.blockformats import BYTES_PER_NUMBER, BlockTensor
from remove_refusals.errors import CheckpointError
from remove_refusals.linalg import Variant, project_out_in_place
from remove_refusals.slices import (
    COPY_BYTES,
    TensorSlice,
    float_dtype,
    opened,
    read_into,
    read_slice,
    tensor_slices,
    write_from,
    write_slice,
)

# Of linux/fs.h: _IOW(0x94, 9, int).
_FICLONE = 0x40049409

SCRATCH_BYTES = 24 << 20
"""What a worker holds beside the slice that it edits: the copy's buffer and the edit's blocks of float32."""


class StoppedError(Exception):
    """Another worker has failed, or the user has interrupted: this one is to end."""


def clone(source: int, target: int) -> bool:
    """Let one open file share the other's blocks on the disk, where the file system can.

    Returns:
        Whether it could; if not, the target is as it was.
    """
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except (ImportError, OSError):
        return False
    return True


def can_clone(source: Path, directory: Path) -> bool:
    """Try whether files of a directory can share blocks with a file."""
    probe = directory / ".probe"
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with opened(source) as original:
            return clone(original, descriptor)
    finally:
        os.close(descriptor)
        probe.unlink()


def check_memory(file: FilePlan, variant: Variant, memory: int) -> None:
    """Check that what an edit has to hold at once fits a worker's memory.

    Raises:
        CheckpointError: If the variant needs a tensor whole that is too large.
    """
    for edit in file.edits.values() if variant == "row-norm" else ():
        # The tensor in its own data type, and four of it in float32.
        if edit.block is not None:
            continue
        item = float_dtype(file.header.path, edit.tensor).itemsize
        needed = (edit.tensor.stop - edit.tensor.start) // item * (item + 16)
        if needed > memory:
            raise CheckpointError(
                f"The variant row-norm needs the tensor {edit.tensor.name} whole, which takes {needed >> 20} MiB, "
                f"expected at most the {memory >> 20} MiB of a worker; raise --memory or lower --jobs."
            )


def write_shard(file: FilePlan, target: Path, variant: Variant, memory: int, stopped: Callable[[], bool]) -> str:
    """Write one weight file and flush it to the disk.

    Args:
        file: What happens to it.
        target: Where it goes; whatever is there is replaced.
        variant: The plan's variant.
        memory: How many bytes may be held at once.
        stopped: Asked often whether to end.

    Returns:
        SHA-256 of the base's file.

    Raises:
        CheckpointError: If the base's file cannot be read, or has changed since it was planned.
        OSError: If the file cannot be written.
        StoppedError: If it was told to end.
    """
    with opened(file.header.path) as source:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            cloned = not file.copies and clone(source, descriptor)
            writer = _Writer(source, descriptor, cloned, variant, memory, stopped)
            writer.write(file)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if fingerprint(file.header.path) != file.fingerprint:
        raise CheckpointError(
            f"The weight file {file.header.path} was changed while it was read, expected it to stay as it is; repeat "
            "the command when nothing else writes to it."
        )
    return str(writer.digest.hexdigest())


@dataclass
class _Writer:
    """Two open files, the hash of what was read, and where the writing has come to."""

    source: int
    target: int
    cloned: bool
    variant: Variant
    memory: int
    stopped: Callable[[], bool]
    digest: Any = field(default_factory=hashlib.sha256)
    place: int = 0

    def __post_init__(self) -> None:
        size = min(COPY_BYTES, max(4096, self.memory // 8))
        self.buffer = torch.empty(size, dtype=torch.uint8).numpy().data
        self.room = torch.empty(0, dtype=torch.uint8)

    def write(self, file: FilePlan) -> None:
        """Go through the base's file from its first byte to its last."""
        done = 0
        if file.copies:
            header = file.new_header()
            write_from(self.target, memoryview(header), 0)
            self.read(0, file.data_start)
            done, self.place = file.data_start, len(header)
        for tensor in file.header.tensors:
            edit, copies = file.edits.get(tensor.name), file.copies.get(tensor.name, ())
            if edit is None and not copies:
                continue
            self.copy(done, tensor.start)
            if edit is None:
                self.copy(tensor.start, tensor.stop)
            else:
                self.edit(edit, file.header.path)
            for _ in copies:
                self.copy(tensor.start, tensor.stop, hashed=False)
            done = tensor.stop
        self.copy(done, file.fingerprint.size)

    def copy(self, start: int, stop: int, *, hashed: bool = True) -> None:
        """Copy bytes of the base to where the writing has come to."""
        self.read(start, stop, self.place, hashed=hashed)
        self.place += stop - start

    def read(self, start: int, stop: int, place: int | None = None, *, hashed: bool = True) -> None:
        """Read bytes of the base, and write them if it is said where and they are not shared already."""
        while start < stop:
            self.heed()
            part = self.buffer[: min(len(self.buffer), stop - start)]
            read_into(self.source, part, start)
            if hashed:
                self.digest.update(part)
            if place is not None and not self.cloned:
                write_from(self.target, part, place)
                place += len(part)
            start += len(part)

    def edit(self, edit: TensorEdit, path: Path) -> None:
        """Write an edited tensor to where the writing has come to, slice by slice."""
        tensor, entry = edit.tensor, edit.entry
        if edit.block is not None:
            self.edit_block(edit, edit.block)
            return
        dtype = float_dtype(path, tensor)
        parts = self.slices(edit, dtype.itemsize)
        together = all(part.runs == 1 for part in parts)
        if not together:
            # Its slices are not read in the order of the file.
            self.read(tensor.start, tensor.stop)
        axis = edit.axis if self.variant == "row-norm" else 1
        for part in parts:
            self.heed()
            if self.room.numel() < part.run * part.runs:
                # The smaller room is given back first, so that there are never two.
                self.room = torch.empty(0, dtype=torch.uint8)
                self.room = torch.empty(part.run * part.runs, dtype=torch.uint8)
            hashed = self.digest.update if together else None
            values = read_slice(self.source, tensor.start, part, dtype, room=self.room, seen=hashed)
            seen = values.view(tensor.shape) if self.variant == "row-norm" else values
            project_out_in_place(seen, entry.basis, entry.strength, axis, self.variant, entry.offset)
            write_slice(self.target, self.place, part, values)
        self.place += tensor.stop - tensor.start

    def edit_block(self, edit: TensorEdit, block: BlockTensor) -> None:
        """Write the numbers or the scales of an edited quantised tensor; both come of the same computation."""
        tensor, entry = edit.tensor, edit.entry
        self.read(tensor.start, tensor.stop)
        index = block.names.index(tensor.name)
        with opened(block.weights[0]) as weights, opened(block.scales[0]) as scales:
            for part in block.parts(self.memory // BYTES_PER_NUMBER):
                self.heed()
                values, stored = block.read((weights, scales), part)
                values = values.contiguous()
                project_out_in_place(values, entry.basis, entry.strength, 1, self.variant, entry.offset)
                written = block.rounded(values, stored, entry.basis[:, 0])[index]
                write_slice(self.target, self.place, part[index], written)
        self.place += tensor.stop - tensor.start

    def slices(self, edit: TensorEdit, item: int) -> list[TensorSlice]:
        """Cut a tensor so that what is held at once fits the memory."""
        shape, numbers = edit.tensor.shape, (edit.tensor.stop - edit.tensor.start) // item
        if self.variant == "row-norm":
            return list(tensor_slices(shape, edit.axis, item, max(1, numbers)))
        room = self.memory - SCRATCH_BYTES if self.memory > 2 * SCRATCH_BYTES else self.memory // 16
        return list(tensor_slices(shape, edit.axis, item, max(1, room // item)))

    def heed(self) -> None:
        """End if told to."""
        if self.stopped():
            raise StoppedError
