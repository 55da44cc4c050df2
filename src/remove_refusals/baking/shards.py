"""Weight files, copied with the bytes of their edited tensors written anew; nothing of them is mapped into memory."""

import errno
import hashlib
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from remove_refusals.baking.base import Base, Copy, described, header_bytes
from remove_refusals.directions import EditPlan, PlanEntry
from remove_refusals.errors import CheckpointError, OutputError
from remove_refusals.files import Log, read_json, versions, write_json
from remove_refusals.formula import project_out_in_place
from remove_refusals.models import (
    BYTES_PER_NUMBER,
    COPY_BYTES,
    INDEX_FILE,
    SINGLE_FILE,
    BlockTensor,
    Place,
    ShardHeader,
    TensorEntry,
    checkpoint_files,
    find_block_tensor,
    float_dtype,
    fp8_block,
    opened,
    quantisation,
    read_header,
    read_into,
    read_slice,
    shares,
    tensor_slices,
    workers,
    write_from,
    write_slice,
)
from remove_refusals.progress import SILENT, Progress
from remove_refusals.settings import DiskSettings, Variant

if sys.platform != "win32":
    import fcntl

# Of linux/fs.h: _IOW(0x94, 9, int).
_FICLONE = 0x40049409

SCRATCH_BYTES = 24 << 20
"""What a worker holds beside the slice that it edits: the copy's buffer and the edit's blocks of float32."""

_LARGEST_SHARE = 288 << 20

LEDGER_FILE = ".whole-files.jsonl"
"""The log of what is whole in an unfinished output; the finished one has none."""

CONVERTED = ".converted"
"""Where an unfinished output has its base's weights as safetensors, if the base has not."""


class StoppedError(Exception):
    """Another worker has failed, or the user has interrupted: this one is to end."""


def clone(source: int, target: int) -> bool:
    """Let one open file share the other's blocks on the disk, and say whether the file system could."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class TensorEdit:
    """What happens to one tensor on disk; a quantised one has two, of its numbers and scales, with one `block`."""

    tensor: TensorEntry
    axis: int
    entry: PlanEntry
    block: BlockTensor | None = None


Fingerprint = tuple[int, int, str]
"""What tells one state of a file from another without reading all of it: size, time in ns, SHA-256 of the header."""


def fingerprint(path: Path) -> Fingerprint:
    """Look at a safetensors file."""
    with opened(path) as file:
        status = os.fstat(file)
        length = os.read(file, 8)
        header = os.read(file, min(int.from_bytes(length, "little"), status.st_size))
    return status.st_size, status.st_mtime_ns, hashlib.sha256(length + header).hexdigest()


@dataclass(frozen=True, eq=False)
class FilePlan:
    """What happens to one weight file of the base: edits by the tensors' names in the file, and new tensors.

    A tensor has several where its experts are edited each in its own way.

    `copies` names new tensors by the one behind which each lies, and says whether it gets that one's edited bytes.
    """

    header: ShardHeader
    fingerprint: Fingerprint
    edits: Mapping[str, Sequence[TensorEdit]]
    copies: Mapping[str, Mapping[str, bool]]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.header.path.name

    @property
    def data_start(self) -> int:
        """Where the data begins in the base's file."""
        return self.header.tensors[0].start if self.header.tensors else self.fingerprint[0]

    @property
    def size(self) -> int:
        """The length of the file to be written."""
        added = sum(len(self.copies.get(t.name, ())) * (t.stop - t.start) for t in self.header.tensors)
        return self.fingerprint[0] + added + (len(self.new_header()) - self.data_start if self.copies else 0)

    def new_header(self) -> bytes:
        """Give the bytes before the data of a file that tensors are added to."""
        described: dict[str, Any] = {"__metadata__": dict(self.header.metadata)} if self.header.metadata else {}
        place = 0
        for tensor in self.header.tensors:
            for name in (tensor.name, *self.copies.get(tensor.name, ())):
                stop = place + tensor.stop - tensor.start
                described[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, stop]}
                place = stop
        return header_bytes(described)


def write_shard(file: FilePlan, target: Path, variant: Variant, memory: int, stopped: Callable[[], bool]) -> str:
    """Write one weight file, flush it to the disk, and give the SHA-256 of the base's file."""
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
            edits, copies = file.edits.get(tensor.name, ()), file.copies.get(tensor.name, {})
            if not edits and not copies:
                continue
            self.copy(done, tensor.start)
            for number, edited in enumerate((True, *copies.values())):
                done = tensor.start
                for edit in edits if edited else ():
                    self.copy(done, edit.tensor.start, hashed=number == 0)
                    self.edit(edit, file.header.path, hashed=number == 0)
                    done = edit.tensor.stop
                self.copy(done, tensor.stop, hashed=number == 0)
            done = tensor.stop
        self.copy(done, file.fingerprint[0])

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

    def edit(self, edit: TensorEdit, path: Path, *, hashed: bool) -> None:
        """Write an edited tensor to where the writing has come to, slice by slice."""
        tensor, entry = edit.tensor, edit.entry
        if edit.block is not None:
            self.edit_block(edit, edit.block, hashed=hashed)
            return
        dtype = float_dtype(path, tensor)
        room = self.memory - SCRATCH_BYTES if self.memory > 2 * SCRATCH_BYTES else self.memory // 16
        parts = list(tensor_slices(tensor.shape, edit.axis, dtype.itemsize, max(1, room // dtype.itemsize)))
        in_order = all(part.runs == 1 for part in parts)
        if hashed and not in_order:
            self.read(tensor.start, tensor.stop)
        for part in parts:
            self.heed()
            if self.room.numel() < part.run * part.runs:
                # The smaller room is given back first, so that there are never two.
                self.room = torch.empty(0, dtype=torch.uint8)
                self.room = torch.empty(part.run * part.runs, dtype=torch.uint8)
            seen = self.digest.update if hashed and in_order else None
            values = read_slice(self.source, tensor.start, part, dtype, room=self.room, seen=seen)
            project_out_in_place(values, entry.basis, entry.strength, 1, self.variant, entry.first)
            write_slice(self.target, self.place, part, values)
        self.place += tensor.stop - tensor.start

    def edit_block(self, edit: TensorEdit, block: BlockTensor, *, hashed: bool) -> None:
        """Write the numbers or the scales of an edited quantised tensor; both come of the same computation."""
        tensor, entry = edit.tensor, edit.entry
        self.read(tensor.start, tensor.stop, hashed=hashed)
        index = block.names.index(tensor.name)
        parts = block.parts(self.memory // BYTES_PER_NUMBER)
        with opened(block.weights[0]) as weights, opened(block.scales[0]) as scales:

            def strips(read: tuple[torch.Tensor, torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
                """Give views of bytes and scales that were read, each with the floats that are wanted there."""
                for raw, stored in block.strips(*read):
                    self.heed()
                    values = block.values(raw, stored)
                    project_out_in_place(values, entry.basis, entry.strength, 1, self.variant)
                    yield raw, stored, values

            raised: torch.Tensor | None = None
            for part in parts if block.wide else ():
                for _, stored, values in strips(block.read((weights, scales), part)):
                    raised = block.fitting(values, stored if raised is None else raised)
            if raised is not None and index:
                # Scales of whole rows are the same in every part.
                write_slice(self.target, self.place, parts[0][1], raised)
                parts = []
            for part in parts:
                read = block.read((weights, scales), part)
                for raw, stored, values in strips(read):
                    fitting = block.fitting(values, stored) if raised is None else raised
                    (stored if index else raw).copy_(
                        fitting if index else block.rounded(values, fitting, entry.basis[:, 0])
                    )
                write_slice(self.target, self.place, part[index], read[index])
        self.place += tensor.stop - tensor.start

    def heed(self) -> None:
        """End if told to."""
        if self.stopped():
            raise StoppedError


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """What happens to the weight files of a base, and which tensors are new."""

    base: Base
    plan: EditPlan
    files: tuple[FilePlan, ...]
    added: Mapping[str, Copy]

    def made_from(self) -> dict[str, Any]:
        """Give what decides every byte of the weight files, as JSON: `plan`, `base` and `version`."""
        digest = hashlib.sha256()
        for entry in self.plan.entries:
            fields = (entry.parameter, entry.strength, [(t.name, t.axis) for t in entry.on_disk])
            digest.update(repr(fields).encode() + entry.basis.numpy().tobytes())
            for part in entry.parts:
                own = b"" if part.basis is None else part.basis.numpy().tobytes()
                digest.update(repr((part.expert, part.strength)).encode() + own)
        digest.update(repr((self.plan.variant, sorted(self.added.items(), key=str))).encode())
        base = {file.name: list(file.fingerprint) for file in self.files}
        return {"plan": digest.hexdigest(), "base": base, "version": versions().get("remove-refusals", "unknown")}

    def index(self) -> dict[str, Any] | None:
        """Give the content of the new index; None for a checkpoint of a single file."""
        if self.files[0].name == SINGLE_FILE:
            return None
        index = read_json(self.base.weights / INDEX_FILE, error=CheckpointError)
        assert isinstance(index, dict)
        metadata = dict(index.get("metadata") or {})
        for file in self.files:
            for tensor in file.header.tensors:
                for name in file.copies.get(tensor.name, ()):
                    index["weight_map"][name] = file.name
                    added = {"total_size": tensor.stop - tensor.start, "total_parameters": math.prod(tensor.shape)}
                    metadata |= {key: metadata[key] + count for key, count in added.items() if key in metadata}
        return {**index, "metadata": metadata, "weight_map": dict(sorted(index["weight_map"].items()))}


def open_ledger(directory: Path, made_from: Mapping[str, Any], *, force: bool = False) -> Log:
    """Open the log of an unfinished output, and remove everything there that is not known to be whole.

    Its first line says from what the output is made; every other line is a file that was written and flushed.
    """
    path = directory / LEDGER_FILE
    ledger = Log(path)
    begun = ledger.entries[0] if ledger.entries else None
    if begun is not None and begun != made_from:
        if not force:
            differs = sorted(key for key in {*begun, *made_from} if begun.get(key) != made_from.get(key))
            raise OutputError(
                f"The unfinished output {directory} was begun with another {' and '.join(differs)}, expected the same "
                "to go on from; repeat the command that began it, pass --force to begin anew, or remove it."
            )
        path.unlink()
        ledger = Log(path)
    whole = {LEDGER_FILE, CONVERTED, *_whole(ledger, directory)}
    for found in directory.iterdir():
        if found.name not in whole:
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    return ledger


def _whole(ledger: Log, directory: Path) -> dict[str, str]:
    """Give the files of a ledger that are whole, each with the SHA-256 of the base's file."""
    records = ((directory / entry["file"], entry) for entry in ledger.entries[1:])
    return {
        path.name: entry["base_sha256"]
        for path, entry in records
        if path.is_file() and path.stat().st_size == entry["bytes"]
    }


def stream_edited(
    stream: StreamPlan, directory: Path, disk: DiskSettings, *, force: bool = False, progress: Progress = SILENT
) -> dict[str, str]:
    """Write the weight files that are not whole yet, and give the SHA-256 of each of the base's.

    A file shares the base's blocks on the disk where the file system can do that; of an edited tensor only its own
    bytes are written anew, in slices where it is larger than a worker's memory.
    """
    jobs, share = shares(disk.memory, disk.jobs, len(stream.files))
    ledger = open_ledger(directory, stream.made_from(), force=force)
    whole = _whole(ledger, directory)
    left = [file for file in stream.files if file.name not in whole]
    _check_room(left, directory)
    if not ledger.entries:
        ledger.append(stream.made_from())
    ended = threading.Event()
    progress = progress.stage("files", len(stream.files))
    if whole:
        progress.note(f"Goes on from {directory}, where {len(whole)} of {len(stream.files)} files are whole.")

    def write(file: FilePlan) -> None:
        try:
            target, variant = directory / file.name, stream.plan.variant
            digest = write_shard(file, target, variant, min(share, _LARGEST_SHARE), ended.is_set)
            ledger.append({"file": file.name, "bytes": file.size, "base_sha256": digest})
            whole[file.name] = digest
            progress.done(len(whole))
        except BaseException:
            ended.set()
            raise

    with workers(jobs) as pool:
        futures = [pool.submit(write, file) for file in left]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            ended.set()
    for future in futures:
        failure = None if future.cancelled() else future.exception()
        if failure is not None and not isinstance(failure, StoppedError):
            raise failure
    if (index := stream.index()) is not None:
        write_json(directory / INDEX_FILE, index, force=True)
    return dict(sorted(whole.items()))


def _check_room(left: list[FilePlan], directory: Path) -> None:
    """Check that the disk has room for what is still to be written; files may share blocks with the base's."""
    if not left:
        return
    free = shutil.disk_usage(directory).free
    needed = sum(file.size for file in left)
    if needed > free and _can_clone(left[0].header.path, directory):
        edited = (
            sum(edit.tensor.stop - edit.tensor.start for edits in file.edits.values() for edit in edits)
            for file in left
            if not file.copies
        )
        needed = sum(edited) + sum(file.size for file in left if file.copies)
    if needed > free:
        raise OutputError(
            f"The output {directory.parent} has {free / 1e9:.2f} GB free ({os.strerror(errno.ENOSPC)}), expected room "
            f"for {needed / 1e9:.2f} GB; free some space or choose another path."
        )


def _can_clone(source: Path, directory: Path) -> bool:
    """Try whether files of a directory can share blocks with a file."""
    probe = directory / ".probe"
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with opened(source) as original:
            return clone(original, descriptor)
    finally:
        os.close(descriptor)
        probe.unlink()


def plan_files(base: Base, plan: EditPlan) -> StreamPlan:
    """Resolve an edit plan against the files of a base."""
    headers = {path: read_header(path) for path in checkpoint_files(base.weights)}
    prints = {path: fingerprint(path) for path in headers}
    stored = {tensor.name: (path, tensor) for path, header in headers.items() for tensor in header.tensors}
    edits: dict[Path, dict[str, dict[int, TensorEdit]]] = {path: {} for path in headers}
    for _, path, edit in planned_edits(base.files, plan, stored):
        if edit.entry.is_empty:
            continue
        known = edits[path].setdefault(edit.tensor.name, {}).setdefault(edit.tensor.start, edit)
        if known is not edit and not _same(known, edit):
            raise CheckpointError(
                f"The tensor {edit.tensor.name} holds '{known.entry.parameter}' and '{edit.entry.parameter}', which "
                "want two different edits, expected one edit per tensor; use one strength and direction for both."
            )
    added = base.added(plan)
    copies: dict[str, dict[str, bool]] = {}
    for name, copy in added.items():
        copies.setdefault(stored[copy.source][1].name, {})[name] = copy.edited
    files = []
    for path, header in headers.items():
        behind = {tensor.name: copies[tensor.name] for tensor in header.tensors if tensor.name in copies}
        ordered = {name: [one for _, one in sorted(found.items())] for name, found in edits[path].items()}
        files.append(FilePlan(header, prints[path], ordered, behind))
    return StreamPlan(base, plan, tuple(files), added)


def planned_edits(
    directory: Path, plan: EditPlan, stored: Mapping[str, Place]
) -> Iterator[tuple[str, Path, TensorEdit]]:
    """Find the tensors that a plan edits in a checkpoint: the name that the plan knows, the file, and the edit.

    Where experts in one tensor are edited each in its own way, every expert is one, also where nothing is edited.
    """
    for entry in plan.entries:
        for name, path, edit in _edits_of(entry, directory, stored):
            if not entry.parts:
                yield name, path, edit
                continue
            place = [disk.name for disk in entry.on_disk].index(name)
            for expert in range(entry.n_experts) if len(entry.on_disk) == 1 else (place,):
                own = _of_expert(edit, expert, path)
                if not own.entry.is_empty or own.tensor is not edit.tensor:
                    yield name, path, own


def _of_expert(edit: TensorEdit, expert: int, path: Path) -> TensorEdit:
    """Give the part of an edit that is one expert's, in a tensor that holds it alone, or all of them."""
    tensor, entry = edit.tensor, edit.entry
    if edit.block is not None:
        raise CheckpointError(
            f"The tensor {tensor.name} of {path.name} is quantised ({edit.block.dtype}), expected floating-point "
            "numbers for a strength of one expert; use an unquantised checkpoint, or leave the experts alone."
        )
    if len(entry.on_disk) == entry.n_experts:
        return replace(edit, entry=entry.of_expert(expert))
    if edit.axis == 0 or tensor.shape[0] != entry.shape[0] or len(entry.on_disk) > 1:
        raise CheckpointError(
            f"The tensor {tensor.name} of {path.name} has shape {tensor.shape}, expected {entry.n_experts} experts of "
            f"'{entry.parameter}' one behind the other along its first axis; save it with `save_pretrained` first."
        )
    size = (tensor.stop - tensor.start) // entry.n_experts
    own = replace(
        tensor,
        shape=(tensor.shape[0] // entry.n_experts, *tensor.shape[1:]),
        start=tensor.start + expert * size,
        stop=tensor.start + (expert + 1) * size,
    )
    return replace(edit, tensor=own, entry=entry.of_expert(expert))


def _edits_of(entry: PlanEntry, directory: Path, stored: Mapping[str, Place]) -> Iterator[tuple[str, Path, TensorEdit]]:
    """Find the tensors that hold what an entry of a plan edits, each with the edit of all of it."""
    config = described(directory)
    shared = fp8_block(config)
    blocks = {tensor.name: find_block_tensor(tensor.name, stored, shared) for tensor in entry.on_disk}
    missing = [name for name, block in blocks.items() if block is None and name not in stored]
    if missing or not entry.on_disk:
        what = f"no tensor {missing[0]}" if missing else "no tensor that is known to hold it"
        quantised = quantisation(config)
        found = f" (the format is {quantised.get('quant_method')})" if quantised else ""
        raise CheckpointError(
            f"The checkpoint {directory} has {what}, expected the one that holds '{entry.parameter}', which is to "
            f"be edited{found}; use an unquantised checkpoint as `save_pretrained` writes it."
        )
    rank, width = entry.basis.shape[1], entry.basis.shape[0]
    for disk in entry.on_disk:
        block = blocks[disk.name]
        if block is not None and not entry.parts and (block.shape[1] != width or rank != 1):
            raise CheckpointError(
                f"The tensor {block.names[0]} is stored as {block.dtype} with width {block.shape[1]}, and the "
                f"edit has rank {rank} and width {width}, expected the same width and rank 1; use an unquantised "
                "checkpoint."
            )
        if block is not None:
            for path, tensor in (block.weights, block.scales):
                yield disk.name, path, TensorEdit(tensor, 1, entry, block)
            continue
        path, tensor = stored[disk.name]
        float_dtype(path, tensor)
        if disk.axis >= len(tensor.shape) or tensor.shape[disk.axis] != width:
            raise CheckpointError(
                f"The tensor {tensor.name} of {path.name} has shape {tensor.shape}, expected axis {disk.axis} of "
                f"width {width}; check that config.json and weights belong together."
            )
        yield disk.name, path, TensorEdit(tensor, disk.axis, entry)


def _same(first: TensorEdit, second: TensorEdit) -> bool:
    one, other = first.entry, second.entry
    if one.part is not None or other.part is not None:
        return False
    return first.axis == second.axis and one.strength == other.strength and torch.equal(one.basis, other.basis)
