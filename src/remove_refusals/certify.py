"""Saved files → certificate: what is left of the direction in every writer, and that all other bytes are unchanged.

A writer passes if it is the tensor that the plan says, up to the rounding of the saved dtype: an error of at most half
a unit in the last place of each number.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from remove_refusals.blockformats import BlockTensor
from remove_refusals.blocktensors import find_block_tensor
from remove_refusals.checkpoint import checkpoint_tensors
from remove_refusals.comparing import PlainTensor, deviation, same_bytes
from remove_refusals.errors import CheckpointError
from remove_refusals.linalg import Variant
from remove_refusals.map_types import DiskTensor, EditPlan, ModelMap, PlanEntry
from remove_refusals.skeleton import by_stored_name
from remove_refusals.slices import Place, read_tensor
from remove_refusals.workers import shares, workers

DEFAULT_MEMORY = 1 << 28
"""How many bytes are held at once if nothing is said."""

FORMAT = 1
"""The version of the layout of `certificate.json`."""

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
"""Half a unit in the last place, relative to a number: the largest error of one rounding."""


LARGEST_SHARE_OFF = 0.05
"""How far the share that is left in a quantised tensor may be off: its rounding alone would hide a skipped writer."""

Readable = PlainTensor | BlockTensor


@dataclass(frozen=True, eq=False)
class _Pair:
    """A planned tensor before and after."""

    entry: PlanEntry
    tensor: DiskTensor
    original: Readable
    saved: Readable


@dataclass(frozen=True)
class WriterCertificate:
    """What was measured on one tensor of the saved files that holds a writer or a part of one.

    Attributes:
        name: Its name on disk.
        parameter: The parameter's name in the model.
        kind: The kind of its site.
        layer: The layer's index, or None for the embedding.
        dtype: The saved dtype.
        strength: The share that the plan takes out.
        share_left: `‖QᵀW'‖ / ‖QᵀW‖`, without the plan's offset; a plain edit wants `|1 - strength|`.
        error: How far `W'` is from the planned one, computed from the base in float32 (Frobenius norm).
        allowed: What rounding to the saved dtype can cost at most.
        requantising_alone: What quantising the unedited tensor anew would cost (Frobenius norm); None for plain floats.
    """

    name: str
    parameter: str
    kind: str
    layer: int | None
    dtype: str
    strength: float
    share_left: float
    error: float
    allowed: float
    requantising_alone: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the deviation is within rounding; of a quantised tensor also the share that is left."""
        off = 0.0 if self.requantising_alone is None else abs(self.share_left - abs(1 - self.strength))
        return self.error <= self.allowed and off <= LARGEST_SHARE_OFF


@dataclass(frozen=True)
class Certificate:
    """What was measured on saved files against their base.

    Attributes:
        edited: One entry for each tensor that the plan edits.
        left: Writers that the plan leaves alone, with the reason; their bytes are checked with the others.
        identical: How many other tensors are the base's byte for byte.
        problems: What does not hold, one sentence each; empty if the certificate passed.
        dropped: Tensors of the base that the model has no place for and that were not saved again.
        leaks: Why the edit cannot be exact, for a model that was edited all the same.
        boundaries: The largest component along the direction, without the plan's constant, relative to the residual
            stream's norm, before each layer and behind the last; None where the model was not run.
    """

    edited: tuple[WriterCertificate, ...]
    left: tuple[tuple[str, str], ...]
    identical: int
    problems: tuple[str, ...]
    leaks: tuple[str, ...] = ()
    boundaries: tuple[float, ...] | None = None
    dropped: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the files hold what the plan says."""
        return not self.problems

    @property
    def worst(self) -> WriterCertificate | None:
        """The edited tensor with the largest share left beyond what the plan wants."""
        return max(self.edited, key=lambda entry: abs(entry.share_left - abs(1 - entry.strength)), default=None)

    def to_json(self) -> dict[str, Any]:
        """Give the content of `certificate.json`; what was not measured is absent."""
        record: dict[str, Any] = {
            "format": FORMAT,
            "passed": self.passed,
            "problems": list(self.problems),
            "edited": [
                {key: value for key, value in asdict(entry).items() if value is not None or key == "layer"}
                | {"passed": entry.passed}
                for entry in self.edited
            ],
            "left": dict(self.left),
            "identical_tensors": self.identical,
        }
        if self.dropped:
            record["dropped"] = list(self.dropped)
        if self.leaks:
            record["leaks"] = list(self.leaks)
        if self.boundaries is not None:
            record["largest_component_at_layer_boundaries"] = list(self.boundaries)
        return record


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
    # The variant row-norm holds whole tensors in float32, several times over.
    jobs, share = shares(memory, 1 if plan.variant == "row-norm" else jobs, len(writers) + len(others))
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
    return Certificate(tuple(edited), plan.left, identical, tuple(problems), plan.leaks, boundaries, tuple(dropped))


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
            whole = plan.variant == "row-norm"
            first, second = (PlainTensor(place, tensor.axis, whole) for place in (original, saved))
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
