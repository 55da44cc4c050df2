"""From an edit plan and a checkpoint's headers to what is done with each file, before a byte is written."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remove_refusals.blockformats import BlockTensor
from remove_refusals.blocktensors import find_block_tensor
from remove_refusals.checkpoint import INDEX_FILE, SINGLE_FILE, ShardHeader, TensorEntry, checkpoint_files, read_header
from remove_refusals.errors import CheckpointError
from remove_refusals.map_types import EditPlan, ModelMap, PlanEntry
from remove_refusals.records import read_json, versions
from remove_refusals.skeleton import by_stored_name
from remove_refusals.slices import float_dtype


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
            fields = (entry.parameter, entry.strength, entry.offset, [(t.name, t.axis) for t in entry.on_disk])
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
                _check_block(block, entry, plan)
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


def _check_block(block: BlockTensor, entry: PlanEntry, plan: EditPlan) -> None:
    """Check that an edit of a quantised tensor is one that its rounding can keep."""
    rank, width = entry.basis.shape[1], entry.basis.shape[0]
    if block.shape[1] != width or rank != 1 or plan.variant == "row-norm" or entry.offset:
        raise CheckpointError(
            f"The tensor {block.names[0]} is stored as {block.format} with width {block.shape[1]}, and the edit has "
            f"rank {rank}, width {width} and the variant {plan.variant}, expected the same width, rank 1 and the "
            "variant plain or norm-preserving; use an unquantised checkpoint."
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
