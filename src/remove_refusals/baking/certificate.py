"""Saved files → certificate: what is left of the direction in every writer, and that all other bytes are unchanged.

A writer passes if it is the tensor that the plan says, up to the rounding of the saved dtype: an error of at most half
a unit in the last place of each number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from remove_refusals.baking.base import Base, described
from remove_refusals.baking.shards import planned_edits
from remove_refusals.directions import EditPlan, PlanEntry
from remove_refusals.formula import blocks, project_out_in_place, whole_blocks
from remove_refusals.models import (
    BlockTensor,
    Place,
    TensorEntry,
    checkpoint_tensors,
    find_block_tensor,
    float_dtype,
    fp8_block,
    opened,
    read_slice,
    same_bytes,
    shares,
    tensor_slices,
    workers,
)
from remove_refusals.report import Certificate, WriterCertificate
from remove_refusals.settings import DiskSettings, Variant

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
"""Half a unit in the last place, relative to a number: the largest error of one rounding."""

_SCRATCH_BYTES = 16 << 20

_ROW = 4096

# A quantised tensor is computed with in strips; what is read at once is as much as needs few reads.
_QUANTISED_NUMBERS = 1 << 24


@dataclass(frozen=True)
class PlainTensor:
    """A tensor of floats on disk, with its axis of width d_model."""

    place: Place
    along: int

    @property
    def dtype(self) -> str:
        """The name of its data type."""
        return str(float_dtype(*self.place)).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return self.place[1].shape

    @property
    def itemsize(self) -> int:
        """How many bytes a number has."""
        return float_dtype(*self.place).itemsize

    def parts(self, numbers: int) -> Iterator[torch.Tensor]:
        """Read it part by part, `[outer, d_model, inner]`; a part holds until the next is read."""
        path, entry = self.place
        dtype = float_dtype(path, entry)
        # Parts end where blocks do: then what is measured does not depend on the memory.
        most = whole_blocks(entry.shape, self.along, numbers)
        room: torch.Tensor | None = None
        with opened(path) as file:
            for part in tensor_slices(entry.shape, self.along, dtype.itemsize, max(1, most)):
                if room is None:
                    # The first part is the largest.
                    room = torch.empty(part.run * part.runs, dtype=torch.uint8)
                yield read_slice(file, entry.start, part, dtype, room=room)


Readable = PlainTensor | BlockTensor


@dataclass(frozen=True, eq=False)
class _Pair:
    """A planned tensor before and after."""

    entry: PlanEntry
    name: str
    original: Readable
    saved: Readable


def certify(directory: Path, base: Base, plan: EditPlan, disk: DiskSettings | None = None) -> Certificate:
    """Measure saved files against their base, which has safetensors, and a plan; the certificate may pass or not."""
    disk = disk or DiskSettings()
    before, after = checkpoint_tensors(base.weights), checkpoint_tensors(directory)
    problems: list[str] = []
    writers, planned = _pairs(before, after, plan, (base.files, directory), problems)
    # In the order of the files, so that the disk is read from front to back.
    others = [name for name in before if name in after and name not in planned]
    jobs, share = shares(disk.memory, disk.jobs, len(writers) + len(others))
    with workers(jobs) as pool:
        measured = pool.map(lambda pair: _writer(pair, plan.variant, share), writers)
        equal = pool.map(lambda name: same_bytes(after[name], before[name]), others)
        edited = tuple(measured)
        unchanged = {name for name, same in zip(others, equal, strict=True) if same}
    problems.extend(
        f"Writer '{entry.name}' deviates from the plan by {entry.error:.2g}, more than the {entry.allowed:.2g} that"
        f" rounding to {entry.dtype} can cost; {entry.share_left:.1%} of the direction is left."
        for entry in edited
        if not entry.passed
    )
    added = base.added(plan)
    for name, copy in added.items():
        source = (after if copy.edited else before).get(copy.source)
        if name not in after or source is None or not same_bytes(after[name], source):
            how = "as the edit makes it" if copy.edited else "as it was, for the unembedding"
            problems.append(f"Tensor '{name}' does not hold '{copy.source}' {how}.")
    known = planned | added.keys()
    problems.extend(f"Tensor '{name}' of the base is missing." for name in before if name not in {*after, *known})
    problems.extend(f"Tensor '{name}' is not in the base." for name in after if name not in {*before, *known})
    problems.extend(
        f"Tensor '{name}' is not to be edited and its bytes differ from the base's."
        for name in others
        if name not in unchanged
    )
    return Certificate(
        edited=edited,
        left=dict(plan.left),
        identical=len(unchanged) + len(added.keys() & after.keys()),
        problems=tuple(problems),
        leaks=plan.leaks or None,
        boundaries=None,
    )


def _pairs(
    before: Mapping[str, Place],
    after: Mapping[str, Place],
    plan: EditPlan,
    directories: tuple[Path, Path],
    problems: list[str],
) -> tuple[list[_Pair], set[str]]:
    """Find each planned tensor in both checkpoints, and name all that belong to the plan; the rest are problems."""
    planned: set[str] = set()
    pairs: list[_Pair] = []
    shared = fp8_block(described(directories[0]))
    for name, path, edit in planned_edits(directories[0], plan, before):
        planned |= {name} if edit.block is None else {name, *edit.block.names}
        if edit.block is not None and edit.tensor is edit.block.scales[1]:
            # Numbers and scales are one tensor here.
            continue
        held = after.get(name)
        if held is not None and edit.block is None:
            held = _like_part(before[name], held, edit.tensor)
        if edit.entry.is_empty:
            if held is not None and not same_bytes((path, edit.tensor), held):
                problems.append(f"An expert in '{name}' is not to be edited and its bytes differ from the base's.")
            continue
        original: Readable = edit.block or PlainTensor((path, edit.tensor), edit.axis)
        saved: Readable | None
        if edit.block is None:
            saved = None if held is None else PlainTensor(held, edit.axis)
        else:
            saved = find_block_tensor(name, after, shared)
        if saved is None:
            problems.append(f"Writer '{name}' is to be edited and is missing in {directories[1].name}.")
        elif saved.shape != original.shape:
            problems.append(f"Writer '{name}' has shape {saved.shape} and the base's has {original.shape}.")
        else:
            pairs.append(_Pair(edit.entry, name, original, saved))
    return pairs, planned


def _like_part(whole: Place, saved: Place, part: TensorEntry) -> Place:
    """Give the place in a saved tensor of what is a part of the original."""
    path, entry = saved
    if (entry.dtype, entry.shape) != (whole[1].dtype, whole[1].shape):
        return saved
    start = entry.start + part.start - whole[1].start
    return path, replace(part, start=start, stop=start + part.stop - part.start)


def _writer(pair: _Pair, variant: Variant, memory: int) -> WriterCertificate:
    entry, saved = pair.entry, pair.saved
    found = deviation(pair.original, saved, entry, variant, memory)
    # The edit itself is computed in float32, whose errors add up along the axis.
    arithmetic = 4 * ROUNDING[torch.float32] * max(found.original, found.planned) ** 0.5
    quantised = isinstance(saved, BlockTensor)
    # A number of a quantised format may go to either of its neighbours.
    rounding = found.step**0.5 if quantised else ROUNDING[getattr(torch, saved.dtype)] * found.saved**0.5
    return WriterCertificate(
        name=pair.name,
        parameter=entry.parameter,
        kind=entry.kind if entry.part is None else "expert",
        layer=entry.layer,
        expert=None if entry.part is None else entry.part.expert,
        dtype=saved.dtype,
        strength=entry.strength if entry.part is None else entry.part.strength,
        share_left=(found.after / found.before) ** 0.5 if found.before else 0.0,
        error=found.error**0.5,
        allowed=rounding + arithmetic,
        requantising_alone=found.requantised**0.5 if quantised else None,
    )


@dataclass
class Deviation:
    """Squared Frobenius norms, summed over a tensor: of `QᵀW` before and after, of `W` and `W'`, of the planned one.

    `error` is of `W'` minus the planned one; of a quantised format `requantised` is of what quantising `W` anew would
    change, and `step` of the distances between neighbouring numbers.
    """

    before: float = 0.0
    after: float = 0.0
    original: float = 0.0
    saved: float = 0.0
    planned: float = 0.0
    error: float = 0.0
    requantised: float = 0.0
    step: float = 0.0

    def add(self, **squares: torch.Tensor) -> None:
        """Add the squares of tensors."""
        for name, tensor in squares.items():
            setattr(self, name, getattr(self, name) + _sum_of_squares(tensor))


def _sum_of_squares(tensor: torch.Tensor) -> float:
    """Sum in float64 over rows that are short enough for float32, which loses its digits over millions of numbers."""
    numbers = tensor.reshape(-1)
    whole = len(numbers) // _ROW * _ROW
    rows = torch.linalg.vector_norm(numbers[:whole].view(-1, _ROW), dim=1)
    return float(rows.to(torch.float64).square().sum() + numbers[whole:].to(torch.float64).square().sum())


def deviation(original: Readable, saved: Readable, entry: PlanEntry, variant: Variant, memory: int) -> Deviation:
    """Measure a saved tensor in float32 against what its plan makes of the original, of the same shape."""
    found, room = Deviation(), _Room()
    basis = entry.basis if entry.part is None else entry.part.basis
    # Both are cut alike, whatever their data types.
    pair_bytes = sum(tensor.itemsize for tensor in (original, saved) if isinstance(tensor, PlainTensor))
    numbers = max(memory - _SCRATCH_BYTES, memory // 2) // max(1, pair_bytes)
    first_parts, second_parts = (
        tensor.floats(_QUANTISED_NUMBERS) if isinstance(tensor, BlockTensor) else tensor.parts(numbers)
        for tensor in (original, saved)
    )
    for base, values in zip(first_parts, second_parts, strict=True):
        for block, twin in zip(blocks(base.contiguous(), 1), blocks(values.contiguous(), 1), strict=True):
            first, second = room.floats(block, 0), room.floats(twin, 1)
            found.add(
                before=_components(first, basis),
                after=_components(second, basis),
                original=first,
                saved=second,
            )
            planned = room.floats(first, 2)
            project_out_in_place(planned, entry.basis, entry.strength, 1, variant, entry.first)
            found.add(planned=planned, error=second.sub_(planned))
        if isinstance(original, BlockTensor):
            found.add(requantised=original.fresh(base) - base)
    if isinstance(saved, BlockTensor):
        found.step = saved.squared_steps(_QUANTISED_NUMBERS)
    return found


class _Room:
    """Memory for blocks in float32 that is used again and again: new pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._rows: dict[int, torch.Tensor] = {}

    def floats(self, block: torch.Tensor, index: int) -> torch.Tensor:
        """Copy a block to the room of that index."""
        if index not in self._rows or self._rows[index].numel() < block.numel():
            self._rows[index] = torch.empty(block.numel(), dtype=torch.float32)
        return self._rows[index][: block.numel()].view(block.shape).copy_(block)


def _components(values: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """Give `QᵀW` of `[outer, d_model, inner]`, with k numbers for each input; of a silenced expert all of it."""
    if basis is None:
        return values
    if values.shape[2] == 1:
        return values.view(values.shape[:2]) @ basis
    return torch.matmul(basis.T, values)
