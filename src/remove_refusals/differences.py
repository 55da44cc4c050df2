"""Two checkpoints tensor by tensor: which differ, by how much, and what share of that lies along a direction."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from remove_refusals.certify import disk_reader
from remove_refusals.checkpoint import checkpoint_tensors
from remove_refusals.comparing import same_bytes
from remove_refusals.errors import ArchitectureError, CheckpointError, DirectionError, ModelError
from remove_refusals.map_types import ModelMap
from remove_refusals.modelmap import map_model
from remove_refusals.plan import pull_back
from remove_refusals.skeleton import by_stored_name, disk_names, skeleton_of
from remove_refusals.slices import FLOAT_DTYPES, Place, opened, read_slice, tensor_slices
from remove_refusals.sources import local_directory
from remove_refusals.types import Direction

_NUMBERS = 1 << 21

Status = Literal["changed", "only in the first", "only in the second", "another shape", "another data type"]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that two checkpoints do not have in common.

    Attributes:
        name: Its name on disk.
        status: How it differs.
        relative: `‖B - A‖ / ‖A‖` (Frobenius norms); None where the two cannot be subtracted, or A is zero.
        along: The share of `‖B - A‖²` that lies along the direction, as it reaches the residual stream; None without
            a direction, or for a tensor that does not write to the residual stream.
        axis: The axis that this was measured along.
    """

    name: str
    status: Status
    relative: float | None = None
    along: float | None = None
    axis: int | None = None


@dataclass(frozen=True)
class Differences:
    """What two checkpoints do not have in common.

    Attributes:
        tensors: Those that differ, in the order of the first's files.
        identical: How many are the same byte for byte.
        relative: `‖B - A‖ / ‖A‖` over all tensors that could be subtracted, the identical ones left out.
        along: The share of `‖B - A‖²` along the direction, over the tensors that it was measured for.
    """

    tensors: tuple[TensorDifference, ...]
    identical: int
    relative: float | None = None
    along: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Give a JSON object; what was not measured is absent."""
        rows = [{key: value for key, value in asdict(row).items() if value is not None} for row in self.tensors]
        record: dict[str, Any] = {"tensors": rows, "identical": self.identical}
        whole = {"relative": self.relative, "along": self.along}
        return record | {key: value for key, value in whole.items() if value is not None}


@dataclass
class _Squares:
    first: float = 0.0
    delta: float = 0.0
    measured: float = 0.0
    along: float = 0.0


def diff(
    first: str, second: str, direction: Direction | None = None, *, trust_remote_code: bool = False
) -> Differences:
    """Compare two checkpoints on disk, slice by slice; no model is loaded.

    Args:
        first: A directory, a hub id in the local cache, or `demo`.
        second: Another one.
        direction: What share of the differences lies along it is measured, where norms lie between a tensor and the
            residual stream behind them.
        trust_remote_code: Run Python code that comes with the first.

    Returns:
        What differs.

    Raises:
        CheckpointError: If a checkpoint is missing or corrupt.
        DirectionError: If the direction's width is not the first model's.
        ModelError: If a direction is given and the first has no configuration of a causal language model.
        ArchitectureError: If a direction is given and the first cannot be mapped.
    """
    folders = [_directory(name) for name in (first, second)]
    tensors = [checkpoint_tensors(folder) for folder in folders]
    bases: Mapping[str, tuple[int, torch.Tensor]] = {}
    model_map = _map_of(folders[0], trust_remote_code, needed=direction is not None)
    if model_map is not None:
        tensors = [by_stored_name(found, model_map[1]) for found in tensors]
    if direction is not None and model_map is not None:
        bases = _bases(direction, folders[0], *model_map)
    rows: list[TensorDifference] = []
    total, identical = _Squares(), 0
    for name in dict.fromkeys((*tensors[0], *tensors[1])):
        places = [found.get(name) for found in tensors]
        row = _difference(name, places, bases.get(name), total)
        if row is None:
            identical += 1
        else:
            rows.append(row)
    relative = math.sqrt(total.delta / total.first) if total.first else None
    along = total.along / total.measured if total.measured else None
    return Differences(tuple(rows), identical, relative, along)


def _directory(source: str) -> Path:
    found = local_directory(source)
    if found is None:
        raise CheckpointError(
            f"The checkpoint {source} is neither a directory nor in the hub's local cache, expected one of them; check "
            "the path."
        )
    return found


def _map_of(directory: Path, trust_remote_code: bool, *, needed: bool) -> tuple[Callable[[str], str], ModelMap] | None:
    """Map the model, where that is possible; the names on disk need not be the same in both checkpoints."""
    try:
        model = skeleton_of(directory, trust_remote_code=trust_remote_code)
        return lambda parameter: disk_names(model, parameter)[0], map_model(model)
    except (ModelError, ArchitectureError):
        if needed:
            raise
        return None


def _bases(
    direction: Direction, directory: Path, names: Callable[[str], str], model_map: ModelMap
) -> dict[str, tuple[int, torch.Tensor]]:
    """For each tensor that writes to the residual stream its axis, and the direction seen from it."""
    if direction.d_model != model_map.d_model:
        raise DirectionError(
            f"The direction has d_model {direction.d_model} and the model has d_model {model_map.d_model}, expected "
            "them to be equal; use a direction that was found on this model."
        )
    reader = disk_reader(directory, names, model_map)
    return {
        tensor.name: (tensor.axis, pull_back(direction.basis, writer.steps, reader))
        for site in model_map.sites
        for writer in site.writers
        for tensor in writer.on_disk
    }


def _difference(
    name: str, places: Sequence[Place | None], basis: tuple[int, torch.Tensor] | None, total: _Squares
) -> TensorDifference | None:
    first, second = places
    if first is None or second is None:
        return TensorDifference(name, "only in the second" if first is None else "only in the first")
    if first[1].shape != second[1].shape:
        return TensorDifference(name, "another shape")
    if same_bytes(first, second):
        return None
    status: Status = "changed" if first[1].dtype == second[1].dtype else "another data type"
    if not {first[1].dtype, second[1].dtype} <= FLOAT_DTYPES.keys() or not first[1].shape:
        return TensorDifference(name, status)
    found = _squares(first, second, basis)
    for field in ("first", "delta", "measured", "along"):
        setattr(total, field, getattr(total, field) + getattr(found, field))
    return TensorDifference(
        name,
        status,
        math.sqrt(found.delta / found.first) if found.first else None,
        found.along / found.measured if found.measured else None,
        basis[0] if basis is not None else None,
    )


def _squares(first: Place, second: Place, basis: tuple[int, torch.Tensor] | None) -> _Squares:
    dtypes = [FLOAT_DTYPES[place[1].dtype] for place in (first, second)]
    axis = basis[0] if basis is not None else len(first[1].shape) - 1
    cuts = [tensor_slices(first[1].shape, axis, dtype.itemsize, _NUMBERS) for dtype in dtypes]
    found = _Squares()
    with opened(first[0]) as one, opened(second[0]) as other:
        for part, twin in zip(*cuts, strict=True):
            values = read_slice(one, first[1].start, part, dtypes[0]).to(torch.float64)
            delta = read_slice(other, second[1].start, twin, dtypes[1]).to(torch.float64) - values
            found.first += float(values.square().sum())
            found.delta += float(delta.square().sum())
            if basis is not None:
                found.along += float((delta.movedim(1, -1) @ basis[1].to(torch.float64)).square().sum())
    if basis is not None:
        found.measured = found.delta
    return found
