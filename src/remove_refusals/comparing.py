"""Two tensors on disk compared slice by slice: what is left of a direction in one, or whether their bytes are equal."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from remove_refusals.blockformats import BlockTensor
from remove_refusals.linalg import Variant, project_out
from remove_refusals.slices import COPY_BYTES, Place, float_dtype, opened, read_slice, tensor_slices
from remove_refusals.types import PlanEntry

_NUMBERS = 1 << 21
"""How many numbers of each tensor are compared at once, in float32 (8 MiB, about six times over)."""


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
        """The axis of width d_model in what `floats` gives."""
        return self.along if self.whole else 1

    def floats(self, numbers: int) -> Iterator[torch.Tensor]:
        """Read it part by part: `[outer, d_model, inner]`, float32."""
        path, entry = self.place
        dtype = float_dtype(path, entry)
        most = math.prod(entry.shape) if self.whole else numbers
        with opened(path) as file:
            for part in tensor_slices(entry.shape, self.along, dtype.itemsize, max(1, most)):
                values = read_slice(file, entry.start, part, dtype).to(torch.float32)
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
            setattr(self, name, getattr(self, name) + float(torch.linalg.vector_norm(tensor)) ** 2)


def deviation(
    original: PlainTensor | BlockTensor, saved: PlainTensor | BlockTensor, entry: PlanEntry, variant: Variant
) -> Deviation:
    """Measure a saved tensor against what its plan makes of the original.

    Args:
        original: The base's tensor.
        saved: The edited one, of the same shape.
        entry: The plan.
        variant: What else the edit does.

    Returns:
        The sums, of what was computed in float32.

    Raises:
        CheckpointError: If a tensor cannot be read or is not of a data type to compute with.
    """
    constant = torch.tensor(entry.offset or (0.0,))
    axis = original.axis
    found = Deviation()
    for base, values in zip(original.floats(_NUMBERS), saved.floats(_NUMBERS), strict=True):
        planned = project_out(base, entry.basis, entry.strength, axis, variant, entry.offset)
        found.add(
            before=base.movedim(axis, -1) @ entry.basis,
            after=values.movedim(axis, -1) @ entry.basis - constant,
            original=base,
            saved=values,
            planned=planned,
            error=values - planned,
        )
        if isinstance(original, BlockTensor):
            found.add(requantised=original.fresh(base) - base)
    if isinstance(saved, BlockTensor):
        found.step = saved.squared_steps(_NUMBERS)
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
