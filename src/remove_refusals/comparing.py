"""Two tensors on disk compared slice by slice: what is left of a direction in one, or whether their bytes are equal."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from remove_refusals.blockformats import BlockTensor
from remove_refusals.linalg import Variant, blocks, project_out_in_place, whole_blocks
from remove_refusals.map_types import PlanEntry
from remove_refusals.slices import COPY_BYTES, Place, float_dtype, opened, read_into, read_slice, tensor_slices

_SCRATCH_BYTES = 16 << 20
_ROW = 4096
# More would not be quicker: tables of indices and floats come to many times a quantised number's own size.
_QUANTISED_NUMBERS = 1 << 21


@dataclass(frozen=True)
class PlainTensor:
    """A tensor of floats on disk.

    Attributes:
        place: Where.
        along: Its axis of width d_model.
        whole: Whether it is read at once, in its own shape.
    """

    place: Place
    along: int
    whole: bool = False

    @property
    def dtype(self) -> str:
        """The name of its data type."""
        return str(float_dtype(*self.place)).removeprefix("torch.")

    @property
    def axis(self) -> int:
        """The axis of width d_model in what `parts` gives."""
        return self.along if self.whole else 1

    @property
    def itemsize(self) -> int:
        """How many bytes a number has."""
        return float_dtype(*self.place).itemsize

    def parts(self, numbers: int) -> Iterator[torch.Tensor]:
        """Read it part by part: `[outer, d_model, inner]` in its own data type; a part holds until the next is read."""
        path, entry = self.place
        dtype = float_dtype(path, entry)
        # Parts end where blocks do: then what is measured does not depend on the memory.
        most = math.prod(entry.shape) if self.whole else whole_blocks(entry.shape, self.along, numbers)
        room: torch.Tensor | None = None
        with opened(path) as file:
            for part in tensor_slices(entry.shape, self.along, dtype.itemsize, max(1, most)):
                if room is None:
                    # The first part is the largest.
                    room = torch.empty(part.run * part.runs, dtype=torch.uint8)
                values = read_slice(file, entry.start, part, dtype, room=room)
                yield values.view(entry.shape) if self.whole else values


@dataclass
class Deviation:
    """Squared Frobenius norms, summed over a tensor.

    Attributes:
        before: Of `QᵀW`.
        after: Of `QᵀW' - constant`.
        original: Of `W`.
        saved: Of `W'`.
        planned: Of what `W'` was to be.
        error: Of `W'` minus that.
        requantised: Of what quantising `W` anew would change, for a quantised format.
        step: Of the distances between neighbouring numbers of the format, for a quantised format.
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


def deviation(
    original: PlainTensor | BlockTensor,
    saved: PlainTensor | BlockTensor,
    entry: PlanEntry,
    variant: Variant,
    memory: int,
) -> Deviation:
    """Measure a saved tensor against what its plan makes of the original.

    Args:
        original: The base's tensor.
        saved: The edited one, of the same shape.
        entry: The plan.
        variant: What else the edit does.
        memory: How many bytes may be held at once.

    Returns:
        The sums, of what was computed in float32.

    Raises:
        CheckpointError: If a tensor cannot be read or is not of a data type to compute with.
    """
    found, room = Deviation(), _Room()
    # Both are cut alike, whatever their data types.
    pair_bytes = sum(tensor.itemsize for tensor in (original, saved) if isinstance(tensor, PlainTensor))
    numbers = max(memory - _SCRATCH_BYTES, memory // 2) // max(1, pair_bytes)
    first_parts, second_parts = (
        tensor.floats(_QUANTISED_NUMBERS) if isinstance(tensor, BlockTensor) else tensor.parts(numbers)
        for tensor in (original, saved)
    )
    for base, values in zip(first_parts, second_parts, strict=True):
        if variant == "row-norm":
            _add_block(found, base.to(torch.float32), values.to(torch.float32), entry, variant, original.axis, room)
        else:
            for block, twin in zip(blocks(base.contiguous(), 1), blocks(values.contiguous(), 1), strict=True):
                first, second = room.floats(block, 0), room.floats(twin, 1)
                _add_block(found, first, second, entry, variant, 1, room)
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


def _add_block(
    found: Deviation,
    base: torch.Tensor,
    values: torch.Tensor,
    entry: PlanEntry,
    variant: Variant,
    axis: int,
    room: _Room,
) -> None:
    """Add a part of both tensors in float32; of `values` nothing is left."""
    constant = torch.tensor(entry.offset or (0.0,))
    found.add(
        before=_components(base, entry.basis, axis),
        after=_components(values, entry.basis, axis) - constant,
        original=base,
        saved=values,
    )
    planned = room.floats(base, 2)
    project_out_in_place(planned, entry.basis, entry.strength, axis, variant, entry.offset)
    found.add(planned=planned, error=values.sub_(planned))


def _components(values: torch.Tensor, basis: torch.Tensor, axis: int) -> torch.Tensor:
    """Give `QᵀW`: `[..., k]`, the axis of width d_model summed over."""
    if axis != 1 or values.dim() != 3:
        return values.movedim(axis, -1) @ basis
    if values.shape[2] == 1:
        return values.view(values.shape[:2]) @ basis
    return torch.matmul(basis.T, values).movedim(1, -1)


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
