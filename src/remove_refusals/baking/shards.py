"""One weight file, copied with the bytes of its edited tensors written anew; nothing of it is mapped into memory."""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from remove_refusals.directions import EditPlan, PlanEntry
from remove_refusals.errors import CheckpointError, OutputError
from remove_refusals.files import read_json, versions, write_json
from remove_refusals.formula import project_out_in_place
from remove_refusals.modelmap import ModelMap, by_stored_name
from remove_refusals.models import (
    BYTES_PER_NUMBER,
    COPY_BYTES,
    INDEX_FILE,
    SINGLE_FILE,
    BlockTensor,
    ShardHeader,
    TensorEntry,
    TensorSlice,
    checkpoint_files,
    find_block_tensor,
    float_dtype,
    opened,
    read_header,
    read_into,
    read_slice,
    shares,
    tensor_slices,
    workers,
    write_from,
    write_slice,
)
from remove_refusals.settings import Variant

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


@dataclass(frozen=True, eq=False)
class TensorEdit:
    """What happens to one tensor on disk.

    Attributes:
        tensor: Where it lies in its file.
        axis: Its axis of width d_model.
        entry: The edit.
        block: The quantised tensor of which it holds the numbers or the scales; None for plain floats.
    """

    tensor: TensorEntry
    axis: int
    entry: PlanEntry
    block: BlockTensor | None = None


@dataclass(frozen=True)
class Fingerprint:
    """What tells one state of a file from another without reading all of it.

    Attributes:
        size: Its length in bytes.
        modified: When it was last written, in nanoseconds.
        header: SHA-256 of its safetensors header.
    """

    size: int
    modified: int
    header: str


def fingerprint(path: Path) -> Fingerprint:
    """Look at a safetensors file.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), status.st_size))
    except OSError as error:
        raise CheckpointError(
            f"The weight file {path} cannot be read ({error.strerror}), expected a safetensors file; check the path "
            "and its permissions."
        ) from error
    return Fingerprint(status.st_size, status.st_mtime_ns, hashlib.sha256(length + header).hexdigest())


@dataclass(frozen=True, eq=False)
class FilePlan:
    """What happens to one weight file.

    Attributes:
        header: The header of the base's file.
        fingerprint: The base's file as it was when this was planned.
        edits: The tensors that are edited, by their names in the file.
        copies: New tensors, each by the name of the one whose unedited bytes it gets and behind which it lies.
    """

    header: ShardHeader
    fingerprint: Fingerprint
    edits: Mapping[str, TensorEdit]
    copies: Mapping[str, tuple[str, ...]]

    @property
    def size(self) -> int:
        """The length of the file to be written."""
        added = sum(len(self.copies.get(t.name, ())) * (t.stop - t.start) for t in self.header.tensors)
        head = len(self.new_header()) - self.data_start if self.copies else 0
        return self.fingerprint.size + head + added

    @property
    def data_start(self) -> int:
        """Where the data begins in the base's file."""
        return self.header.tensors[0].start if self.header.tensors else self.fingerprint.size

    def new_header(self) -> bytes:
        """Give the bytes before the data of a file that tensors are added to."""
        described: dict[str, Any] = {"__metadata__": dict(self.header.metadata)} if self.header.metadata else {}
        place = 0
        for tensor in self.header.tensors:
            for name in (tensor.name, *self.copies.get(tensor.name, ())):
                stop = place + tensor.stop - tensor.start
                described[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, stop]}
                place = stop
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


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
        for part in parts:
            self.heed()
            if self.room.numel() < part.run * part.runs:
                # The smaller room is given back first, so that there are never two.
                self.room = torch.empty(0, dtype=torch.uint8)
                self.room = torch.empty(part.run * part.runs, dtype=torch.uint8)
            hashed = self.digest.update if together else None
            values = read_slice(self.source, tensor.start, part, dtype, room=self.room, seen=hashed)
            project_out_in_place(values, entry.basis, entry.strength, 1, self.variant)
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
                project_out_in_place(values, entry.basis, entry.strength, 1, self.variant)
                written = block.rounded(values, stored, entry.basis[:, 0])[index]
                write_slice(self.target, self.place, part[index], written)
        self.place += tensor.stop - tensor.start

    def slices(self, edit: TensorEdit, item: int) -> list[TensorSlice]:
        """Cut a tensor so that what is held at once fits the memory."""
        shape = edit.tensor.shape
        room = self.memory - SCRATCH_BYTES if self.memory > 2 * SCRATCH_BYTES else self.memory // 16
        return list(tensor_slices(shape, edit.axis, item, max(1, room // item)))

    def heed(self) -> None:
        """End if told to."""
        if self.stopped():
            raise StoppedError


DEFAULT_MEMORY = 1 << 30
"""How much a process takes beside what Python and its packages take."""


_LARGEST_SHARE = 288 << 20


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """What happens to the files of a checkpoint.

    Attributes:
        base: The checkpoint's directory; it is only read.
        plan: What happens to which parameter.
        files: Its weight files.
        added: New tensors by name, with the name of the one that each is an unedited copy of.
    """

    base: Path
    plan: EditPlan
    files: tuple[FilePlan, ...]
    added: Mapping[str, str]

    def made_from(self) -> dict[str, Any]:
        """Give what decides every byte of the weight files, as JSON: `plan`, `base` and `version`."""
        digest = hashlib.sha256()
        for entry in self.plan.entries:
            fields = (entry.parameter, entry.strength, [(t.name, t.axis) for t in entry.on_disk])
            digest.update(repr(fields).encode() + entry.basis.numpy().tobytes())
        digest.update(repr((self.plan.variant, sorted(self.added.items()))).encode())
        base = {file.header.path.name: list(vars(file.fingerprint).values()) for file in self.files}
        return {"plan": digest.hexdigest(), "base": base, "version": versions().get("remove-refusals", "unknown")}

    def index(self) -> dict[str, Any] | None:
        """Give the content of the new index; None for a checkpoint of a single file."""
        if self.files[0].header.path.name == SINGLE_FILE:
            return None
        index = read_json(self.base / INDEX_FILE, error=CheckpointError)
        assert isinstance(index, dict)
        metadata = dict(index.get("metadata") or {})
        for name, source in self.added.items():
            file, tensor = next((f, t) for f in self.files for t in f.header.tensors if t.name == source)
            index["weight_map"][name] = file.header.path.name
            added = {"total_size": tensor.stop - tensor.start, "total_parameters": _numbers(tensor)}
            metadata |= {key: metadata[key] + count for key, count in added.items() if key in metadata}
        return {**index, "metadata": metadata, "weight_map": dict(sorted(index["weight_map"].items()))}


class Ledger:
    """What is whole in a directory, as long as it is made from the same things.

    The first line says from what the directory is made; every other line is a file that was written and flushed.
    """

    def __init__(self, directory: Path, made_from: Mapping[str, Any], *, force: bool = False) -> None:
        """Open the ledger of a directory, and remove everything there that is not known to be whole.

        Args:
            directory: The unfinished output.
            made_from: What decides the bytes of every file, as JSON.
            force: Whether an output that was begun from something else is thrown away.

        Raises:
            OutputError: If the output was begun from something else and `force` is not given.
        """
        self._path = directory / LEDGER_FILE
        self._lock = threading.Lock()
        self._made_from = dict(made_from)
        begun, records = self._read()
        if begun is not None and begun != dict(made_from) and not force:
            differs = sorted(key for key in {*begun, *made_from} if begun.get(key) != made_from.get(key))
            raise OutputError(
                f"The unfinished output {directory} was begun with another {' and '.join(differs)}, expected the same "
                "to go on from; repeat the command that began it, pass --force to begin anew, or remove it."
            )
        self.whole: dict[str, dict[str, Any]] = {}
        if begun == dict(made_from):
            self.whole = {name: record for name, record in records.items() if _is_whole(directory / name, record)}
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.whole and path != self._path:
                path.unlink()
        self._begun = begun == dict(made_from)

    def begin(self) -> None:
        """Write the first line, if it is not there."""
        if not self._begun:
            self._append(self._made_from, fresh=True)
            self._begun = True

    def add(self, name: str, size: int, **facts: Any) -> None:
        """Note that a file is whole; it has been flushed to the disk."""
        record = {"file": name, "bytes": size, **facts}
        with self._lock:
            self._append(record)
            self.whole[name] = record

    def close(self) -> None:
        """Remove the ledger: the output is finished."""
        self._path.unlink()

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        lines: list[dict[str, Any]] = []
        if self._path.is_file():
            text = self._path.read_text(encoding="utf-8", errors="replace")
            # A killed process may have left half of a line, which is cut off so that the next one stands alone.
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                os.truncate(self._path, len(whole.encode()))
            lines = [json.loads(line) for line in whole.splitlines()]
        return (lines[0] if lines else None), {line["file"]: line for line in lines[1:]}

    def _append(self, record: Mapping[str, Any], *, fresh: bool = False) -> None:
        with self._path.open("w" if fresh else "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def stream_edited(
    stream: StreamPlan,
    directory: Path,
    *,
    memory: int = DEFAULT_MEMORY,
    jobs: int | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, str], Ledger]:
    """Write the weight files of an edited checkpoint, those that are not whole yet.

    A file shares the base's blocks on the disk where the file system can do that, and is copied where not; of an edited
    tensor only its own bytes are written anew. Tensors larger than a worker's memory are edited in slices.

    Args:
        stream: What happens to each file.
        directory: An existing directory, empty or as an interrupted call has left it.
        memory: How many bytes may be held beside what Python and its packages take.
        jobs: How many files to write at once; fewer where the memory is too small for so many.
        force: Whether an output that was begun from something else is thrown away.
        on_progress: Called with the number of whole files and of all.

    Returns:
        SHA-256 of each of the base's weight files by name, and the ledger, which is to be closed when the output is
        finished.

    Raises:
        CheckpointError: If the base cannot be read, or changes meanwhile, or the variant needs more memory.
        OutputError: If the output was begun from something else, or the disk has no room for it.
        OSError: If a file cannot be written.
    """
    jobs, share = shares(memory, jobs, len(stream.files))
    share = min(share, _LARGEST_SHARE)
    ledger = Ledger(directory, stream.made_from(), force=force)
    left = [file for file in stream.files if file.header.path.name not in ledger.whole]
    _check_room(left, directory)
    ledger.begin()
    ended = threading.Event()

    def write(file: FilePlan) -> None:
        name = file.header.path.name
        try:
            digest = write_shard(file, directory / name, stream.plan.variant, share, ended.is_set)
            ledger.add(name, file.size, base_sha256=digest)
            if on_progress is not None:
                on_progress(len(ledger.whole), len(stream.files))
        except BaseException:
            ended.set()
            raise

    with workers(jobs) as pool:
        futures = [pool.submit(write, file) for file in left]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            ended.set()
    failures = [future.exception() for future in futures if not future.cancelled()]
    for failure in failures:
        if failure is not None and not isinstance(failure, StoppedError):
            raise failure
    index = stream.index()
    if index is not None:
        write_json(directory / INDEX_FILE, index, force=True)
    return {name: str(record["base_sha256"]) for name, record in ledger.whole.items()}, ledger


def _check_room(left: list[FilePlan], directory: Path) -> None:
    """Check that the disk has room for what is still to be written.

    Raises:
        OutputError: If it has not.
    """
    if not left:
        return
    free = shutil.disk_usage(directory).free
    needed = sum(file.size for file in left)
    if needed > free and can_clone(left[0].header.path, directory):
        needed = sum(_written(file) for file in left)
    if needed > free:
        raise OutputError(
            f"The output {directory.parent} has {free / 1e9:.2f} GB free ({os.strerror(errno.ENOSPC)}), expected room "
            f"for {needed / 1e9:.2f} GB; free some space or choose another path."
        )


def _written(file: FilePlan) -> int:
    """How many bytes of a file that shares the base's blocks are its own."""
    return file.size if file.copies else sum(e.tensor.stop - e.tensor.start for e in file.edits.values())


def _numbers(tensor: TensorEntry) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def plan_files(base: Path, plan: EditPlan, model_map: ModelMap, names: tuple[str, ...] = ()) -> StreamPlan:
    """Resolve an edit plan against the files of a checkpoint.

    Args:
        base: The checkpoint's directory.
        plan: What happens to which parameter.
        model_map: The model's map.
        names: The names on disk of the unembedding, and of what else shares the embedding's memory in the model, that
            get a copy of the unedited embedding where the plan unties them.

    Returns:
        What happens to each file.

    Raises:
        CheckpointError: If the checkpoint is corrupt, a tensor to be edited is not there, or it is of a data type or
            shape that cannot be edited.
    """
    headers = {path: read_header(path) for path in checkpoint_files(base)}
    prints = {path: fingerprint(path) for path in headers}
    stored = by_stored_name({t.name: (path, t) for path, header in headers.items() for t in header.tensors}, model_map)
    edits: dict[Path, dict[str, TensorEdit]] = {path: {} for path in headers}
    for path, edit in _edits(base, plan, stored):
        known = edits[path].setdefault(edit.tensor.name, edit)
        if known is not edit and not _same(known, edit):
            raise CheckpointError(
                f"The tensor {edit.tensor.name} holds '{known.entry.parameter}' and '{edit.entry.parameter}', which "
                "want two different edits, expected one edit per tensor; use one strength and direction for both."
            )
    added: dict[str, str] = {}
    if plan.untie:
        embedding = next(entry for entry in plan.entries if entry.parameter == model_map.input_embedding)
        source = stored[embedding.on_disk[0].name][1].name
        added = {name: source for name in names if name not in stored}
    files = tuple(
        FilePlan(
            header,
            prints[path],
            edits[path],
            {t.name: copies for t in header.tensors if (copies := tuple(n for n, s in added.items() if s == t.name))},
        )
        for path, header in headers.items()
    )
    return StreamPlan(base, plan, files, added)


def _edits(
    base: Path, plan: EditPlan, stored: Mapping[str, tuple[Path, TensorEntry]]
) -> Iterator[tuple[Path, TensorEdit]]:
    for entry in plan.entries:
        blocks = {tensor.name: find_block_tensor(tensor.name, stored) for tensor in entry.on_disk}
        missing = [name for name, block in blocks.items() if block is None and name not in stored]
        if missing or not entry.on_disk:
            what = f"no tensor {missing[0]}" if missing else "no tensor that is known to hold it"
            raise CheckpointError(
                f"The checkpoint {base} has {what}, expected the one that holds '{entry.parameter}', which is to be "
                f"edited{_format(base)}; use an unquantised checkpoint as `save_pretrained` writes it."
            )
        for disk in entry.on_disk:
            block = blocks[disk.name]
            if block is not None:
                _check_block(block, entry)
                yield from ((path, TensorEdit(t, 1, entry, block)) for path, t in (block.weights, block.scales))
                continue
            path, tensor = stored[disk.name]
            float_dtype(path, tensor)
            if disk.axis >= len(tensor.shape) or tensor.shape[disk.axis] != entry.basis.shape[0]:
                raise CheckpointError(
                    f"The tensor {tensor.name} of {path.name} has shape {tensor.shape}, expected axis {disk.axis} of "
                    f"width {entry.basis.shape[0]}; check that config.json and weights belong together."
                )
            yield path, TensorEdit(tensor, disk.axis, entry)


def _check_block(block: BlockTensor, entry: PlanEntry) -> None:
    """Check that an edit of a quantised tensor is one that its rounding can keep."""
    rank, width = entry.basis.shape[1], entry.basis.shape[0]
    if block.shape[1] != width or rank != 1:
        raise CheckpointError(
            f"The tensor {block.names[0]} is stored as {block.format} with width {block.shape[1]}, and the edit has "
            f"rank {rank} and width {width}, expected the same width and rank 1; use an unquantised checkpoint."
        )


def _format(base: Path) -> str:
    """Name the checkpoint's format where its config names one."""
    config = read_json(base / "config.json", error=CheckpointError)
    quantised = config.get("quantization_config") if isinstance(config, dict) else None
    return f" (the format is {quantised.get('quant_method')})" if isinstance(quantised, dict) else ""


def _same(first: TensorEdit, second: TensorEdit) -> bool:
    plain = (replace(edit.entry, parameter="", layer=None, shape=(), on_disk=()) for edit in (first, second))
    one, other = (vars(entry) for entry in plain)
    same_basis = one["basis"].equal(other["basis"])
    return first.axis == second.axis and same_basis and (one | {"basis": 0}) == (other | {"basis": 0})


LEDGER_FILE = ".whole-files.jsonl"
"""The ledger's name in the unfinished output; the finished one has none."""


def _is_whole(path: Path, record: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == record["bytes"]
