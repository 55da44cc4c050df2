"""Two tensors on disk compared slice by slice: what is left of a direction in one, or whether their bytes are equal."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from remove_refusals.checkpoint import TensorEntry
from remove_refusals.linalg import Variant, project_out
from remove_refusals.slices import COPY_BYTES, float_dtype, opened, read_slice, tensor_slices
from remove_refusals.types import PlanEntry

_NUMBERS = 1 << 21
"""How many numbers of each tensor are compared at once, in float32 (8 MiB, about six times over)."""

Place = tuple[Path, TensorEntry]
"""A file and where in it a tensor lies."""


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
    """

    before: float = 0.0
    after: float = 0.0
    original: float = 0.0
    saved: float = 0.0
    planned: float = 0.0
    error: float = 0.0

    def add(self, **squares: torch.Tensor) -> None:
        """Add the squares of tensors."""
        for name, tensor in squares.items():
            setattr(self, name, getattr(self, name) + float(tensor.to(torch.float64).square().sum()))


def deviation(original: Place, saved: Place, entry: PlanEntry, axis: int, variant: Variant) -> Deviation:
    """Measure a saved tensor against what its plan makes of the original.

    Args:
        original: The base's tensor.
        saved: The edited one, of the same shape.
        entry: The plan.
        axis: The axis of width d_model.
        variant: What else the edit does.

    Returns:
        The sums, of what was computed in float32.

    Raises:
        CheckpointError: If a tensor cannot be read or is not of a data type to compute with.
    """
    dtypes = float_dtype(*original), float_dtype(*saved)
    shape = original[1].shape
    # That variant looks at all inputs at once.
    whole = variant == "row-norm"
    most = math.prod(shape) if whole else _NUMBERS
    cuts = [tensor_slices(shape, axis, dtype.itemsize, max(1, most)) for dtype in dtypes]
    constant = torch.tensor(entry.offset or (0.0,))
    found = Deviation()
    with opened(original[0]) as first, opened(saved[0]) as second:
        for before, after in zip(*cuts, strict=True):
            base = read_slice(first, original[1].start, before, dtypes[0]).to(torch.float32)
            values = read_slice(second, saved[1].start, after, dtypes[1]).to(torch.float32)
            seen, along = (base.view(shape), axis) if whole else (base, 1)
            planned = project_out(seen, entry.basis, entry.strength, along, variant, entry.offset).view(base.shape)
            found.add(
                before=base.movedim(1, -1) @ entry.basis,
                after=values.movedim(1, -1) @ entry.basis - constant,
                original=base,
                saved=values,
                planned=planned,
                error=values - planned,
            )
    return found


def same_bytes(first: Place, second: Place) -> bool:
    """Whether two tensors are of one data type and shape and their bytes are equal."""
    if (first[1].dtype, first[1].shape) != (second[1].dtype, second[1].shape):
        return False
    with opened(first[0]) as one, opened(second[0]) as other:
        for start, count in _blocks(first[1].stop - first[1].start):
            part, twin = (
                os.pread(file, count, place[1].start + start) for file, place in ((one, first), (other, second))
            )
            if part != twin or len(part) != count:
                return False
    return True


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, COPY_BYTES):
        yield start, min(COPY_BYTES, size - start)
