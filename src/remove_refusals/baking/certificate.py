"""Saved files → certificate: what is left of the direction in every writer, and that all other bytes are unchanged.

A writer passes if it is the tensor that the plan says, up to the rounding of the saved dtype: an error of at most half
a unit in the last place of each number.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from remove_refusals.baking.base import load_intervention
from remove_refusals.directions import EditPlan, PlanEntry, resolve
from remove_refusals.errors import CheckpointError
from remove_refusals.formula import blocks, project_out_in_place, whole_blocks
from remove_refusals.modelmap import DiskTensor, ModelMap, by_stored_name, disk_names, map_model, skeleton_of
from remove_refusals.models import (
    BlockTensor,
    Place,
    checkpoint_tensors,
    find_block_tensor,
    float_dtype,
    local_directory,
    opened,
    read_slice,
    read_tensor,
    same_bytes,
    shares,
    tensor_slices,
    workers,
)
from remove_refusals.report import AblationRecord, Certificate, WriterCertificate
from remove_refusals.settings import VARIANTS, Variant

DEFAULT_MEMORY = 1 << 28
"""How many bytes are held at once if nothing is said."""


ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
"""Half a unit in the last place, relative to a number: the largest error of one rounding."""


@dataclass(frozen=True)
class PlainTensor:
    """A tensor of floats on disk.

    Attributes:
        place: Where.
        along: Its axis of width d_model.
    """

    place: Place
    along: int

    @property
    def dtype(self) -> str:
        """The name of its data type."""
        return str(float_dtype(*self.place)).removeprefix("torch.")

    @property
    def axis(self) -> int:
        """The axis of width d_model in what `parts` gives."""
        return 1

    @property
    def itemsize(self) -> int:
        """How many bytes a number has."""
        return float_dtype(*self.place).itemsize

    def parts(self, numbers: int) -> Iterator[torch.Tensor]:
        """Read it part by part: `[outer, d_model, inner]` in its own data type; a part holds until the next is read."""
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
                values = read_slice(file, entry.start, part, dtype, room=room)
                yield values


Readable = PlainTensor | BlockTensor


@dataclass(frozen=True, eq=False)
class _Pair:
    """A planned tensor before and after."""

    entry: PlanEntry
    tensor: DiskTensor
    original: Readable
    saved: Readable


def certify(
    directory: Path,
    base: Path,
    plan: EditPlan,
    model_map: ModelMap,
    *,
    boundaries: tuple[float, ...] | None = None,
    memory: int = DEFAULT_MEMORY,
    jobs: int | None = None,
) -> Certificate:
    """Measure saved files against their base and a plan.

    Args:
        directory: The edited checkpoint.
        base: The checkpoint that it was made from.
        plan: What was to happen to which tensor.
        model_map: The model's map.
        boundaries: What `measure_boundaries` found, if the model was run.
        memory: How many bytes may be held at once.
        jobs: How many tensors to read at once; by default as many as there are cores, at most 4.

    Returns:
        The certificate, passed or not.

    Raises:
        CheckpointError: If a checkpoint cannot be read.
    """
    before, after = (by_stored_name(checkpoint_tensors(path), model_map) for path in (base, directory))
    problems: list[str] = []
    writers, planned = _pairs(before, after, plan, (base.name, directory.name), problems)
    dropped = sorted(before.keys() - after.keys() - model_map.stored) if model_map.stored else []
    apart = planned | set(dropped)
    # In the order of the files, so that the disk is read from front to back.
    others = [name for name in before if name in after and name not in apart]
    jobs, share = shares(memory, jobs, len(writers) + len(others))
    with workers(jobs) as pool:
        measured = pool.map(lambda pair: _writer(pair, plan.variant, share), writers)
        equal = pool.map(lambda name: same_bytes(after[name], before[name]), others)
        edited = list(measured)
        unchanged = {name for name, same in zip(others, equal, strict=True) if same}
    problems.extend(
        f"Writer '{entry.name}' deviates from the plan by {entry.error:.2g}, more than the {entry.allowed:.2g} that"
        f" rounding to {entry.dtype} can cost; {entry.share_left:.1%} of the direction is left."
        for entry in edited
        if not entry.passed
    )
    identical = _compare_others(before, after, plan, model_map, apart, unchanged, problems)
    return Certificate(
        problems=tuple(problems),
        edited=tuple(edited),
        left=dict(plan.left),
        identical=identical,
        dropped=tuple(dropped) or None,
        leaks=plan.leaks or None,
        boundaries=boundaries,
    )


def _pairs(
    before: Mapping[str, Place],
    after: Mapping[str, Place],
    plan: EditPlan,
    names: tuple[str, str],
    problems: list[str],
) -> tuple[list[_Pair], set[str]]:
    """Find each planned tensor in both checkpoints; what cannot be measured goes to `problems`.

    Returns:
        The pairs, and the names of all tensors that belong to the plan.
    """
    planned: set[str] = set()
    pairs: list[_Pair] = []
    for entry in plan.entries:
        if not entry.on_disk:
            problems.append(f"Writer '{entry.parameter}' is to be edited and its name on disk is unknown.")
        for tensor in entry.on_disk:
            planned.add(tensor.name)
            blocks = find_block_tensor(tensor.name, before), find_block_tensor(tensor.name, after)
            if blocks[0] is not None and blocks[1] is not None and blocks[0].shape == blocks[1].shape:
                planned.update(blocks[0].names)
                pairs.append(_Pair(entry, tensor, blocks[0], blocks[1]))
                continue
            if tensor.name not in before or tensor.name not in after:
                where = names[0] if tensor.name not in before else names[1]
                problems.append(f"Writer '{tensor.name}' is to be edited and is missing in {where}.")
                continue
            original, saved = before[tensor.name], after[tensor.name]
            if saved[1].shape != original[1].shape:
                shapes = f"{saved[1].shape} and the base's has {original[1].shape}"
                problems.append(f"Writer '{tensor.name}' has shape {shapes}.")
                continue
            first, second = (PlainTensor(place, tensor.axis) for place in (original, saved))
            pairs.append(_Pair(entry, tensor, first, second))
    return pairs, planned


def _writer(pair: _Pair, variant: Variant, memory: int) -> WriterCertificate:
    entry, tensor, saved = pair.entry, pair.tensor, pair.saved
    found = deviation(pair.original, saved, entry, variant, memory)
    # The edit itself is computed in float32, whose errors add up along the axis.
    arithmetic = 4 * ROUNDING[torch.float32] * max(found.original, found.planned) ** 0.5
    quantised = isinstance(saved, BlockTensor)
    # A number of a quantised format may go to either of its neighbours.
    rounding = found.step**0.5 if quantised else ROUNDING[getattr(torch, saved.dtype)] * found.saved**0.5
    return WriterCertificate(
        name=tensor.name,
        parameter=entry.parameter,
        kind=entry.kind,
        layer=entry.layer,
        dtype=saved.dtype,
        strength=entry.strength,
        share_left=(found.after / found.before) ** 0.5 if found.before else 0.0,
        error=found.error**0.5,
        allowed=rounding + arithmetic,
        requantising_alone=found.requantised**0.5 if quantised else None,
    )


def _compare_others(
    before: Mapping[str, Place],
    after: Mapping[str, Place],
    plan: EditPlan,
    model_map: ModelMap,
    apart: set[str],
    unchanged: set[str],
    problems: list[str],
) -> int:
    """Count the tensors whose bytes are as they should be, those set apart left out; others go to `problems`."""
    kept: list[Place] = []
    if plan.untie:
        embedding = next(entry for entry in plan.entries if entry.parameter == model_map.input_embedding)
        names = {tensor.name for tensor in embedding.on_disk}
        kept = [before[name] for name in names & before.keys()]
        if not any(same_bytes(after[name], place) for name in after.keys() - names for place in kept):
            problems.append(f"No tensor holds '{model_map.input_embedding}' as it was, for the unembedding.")
        # Where nothing is tied any more, what was one tensor under several names is several with the same bytes.
        kept += [after[name] for name in (before.keys() & after.keys()) - names]
    identical = 0
    for name in dict.fromkeys((*before, *after)):
        if name in apart:
            continue
        if name not in after:
            problems.append(f"Tensor '{name}' of the base is missing.")
        elif name not in before and not any(same_bytes(after[name], place) for place in kept):
            problems.append(f"Tensor '{name}' is not in the base.")
        elif name in before and name not in unchanged:
            problems.append(f"Tensor '{name}' is not to be edited and its bytes differ from the base's.")
        else:
            identical += 1
    return identical


def disk_reader(directory: Path, names: Callable[[str], str], model_map: ModelMap) -> Callable[[str], torch.Tensor]:
    """Give a function that reads a parameter of a checkpoint by its name in the model.

    Args:
        directory: The checkpoint.
        names: Turns a name in the model into the one on disk.
        model_map: The model's map.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or (from the function) does not hold the parameter.
    """
    tensors = by_stored_name(checkpoint_tensors(directory), model_map)

    def read(parameter: str) -> torch.Tensor:
        name = names(parameter)
        if name not in tensors:
            raise CheckpointError(
                f"The checkpoint {directory} has no tensor '{name}', expected parameter '{parameter}' under that name; "
                "check that it is the base that the directory was made from."
            )
        return read_tensor(*tensors[name])

    return read


def certify_directory(directory: Path, base: str, *, trust_remote_code: bool = False) -> Certificate:
    """Measure a saved edit against its base, as its own `ablation.json` says it was made.

    Args:
        directory: The edited model, with `ablation.json` and its directions.
        base: The base model: a directory, or a hub id in the local cache.
        trust_remote_code: Run Python code that comes with the base.

    Returns:
        The certificate, passed or not.

    Raises:
        CheckpointError: If a file is missing or corrupt.
        ModelError: If the base has no configuration of a causal language model.
        DirectionError: If the record holds no intervention, or the directions do not fit the base.
        ArchitectureError: If the base cannot be mapped.
    """
    record = AblationRecord.read(directory / "ablation.json", error=CheckpointError)
    base_directory = local_directory(base)
    if base_directory is None:
        raise CheckpointError(
            f"The base {base} is neither a directory nor in the hub's local cache, expected its files; download it."
        )
    model = skeleton_of(base_directory, trust_remote_code=trust_remote_code)
    model_map = map_model(model)
    intervention = load_intervention(directory)
    plan = resolve(
        intervention,
        model_map,
        disk_reader(base_directory, lambda parameter: disk_names(model, parameter)[0], model_map),
        tied="untie" if record.plan.embedding_untied or not model_map.tied else "both",
        allow_leak=True,
        variant=_variant(record.plan.variant),
    )
    return certify(directory, base_directory, plan, model_map)


def _variant(found: str) -> Variant:
    for variant in VARIANTS:
        if found == variant:
            return variant
    raise CheckpointError(
        f"The record names the variant {found!r}, expected one of {', '.join(VARIANTS)}; use the version of this "
        "package that made it."
    )


_SCRATCH_BYTES = 16 << 20


_ROW = 4096


# More would not be quicker: tables of indices and floats come to many times a quantised number's own size.
_QUANTISED_NUMBERS = 1 << 21


@dataclass
class Deviation:
    """Squared Frobenius norms, summed over a tensor.

    Attributes:
        before: Of `QᵀW`.
        after: Of `QᵀW'`.
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
    found.add(
        before=_components(base, entry.basis, axis),
        after=_components(values, entry.basis, axis),
        original=base,
        saved=values,
    )
    planned = room.floats(base, 2)
    project_out_in_place(planned, entry.basis, entry.strength, axis, variant)
    found.add(planned=planned, error=values.sub_(planned))


def _components(values: torch.Tensor, basis: torch.Tensor, axis: int) -> torch.Tensor:
    """Give `QᵀW`: `[..., k]`, the axis of width d_model summed over."""
    if axis != 1 or values.dim() != 3:
        return values.movedim(axis, -1) @ basis
    if values.shape[2] == 1:
        return values.view(values.shape[:2]) @ basis
    return torch.matmul(basis.T, values).movedim(1, -1)
