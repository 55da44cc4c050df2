"""Edit plan → a GGUF file with the edit in its own tensors: same types, same layout, every other byte the same.

Each writer is dequantised, edited in float32 and quantised again to the type that it had. What that rounding leaves of
the direction is measured, beside what quantising the unedited numbers again would cost.
"""

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from remove_refusals.apply.factors import is_bias
from remove_refusals.apply.gguf_file import GgufFile, GgufTensor, decoded, encoded, parts
from remove_refusals.apply.gguf_names import GgufNames
from remove_refusals.errors import ArchitectureError, CertificateError, CheckpointError
from remove_refusals.linalg import project_out
from remove_refusals.map_types import EditPlan, ModelMap, PlanEntry
from remove_refusals.slices import COPY_BYTES

EMBEDDING, UNEMBEDDING = "token_embd.weight", "output.weight"
_LOOKED_UP = (EMBEDDING, "position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class GgufWriter:
    """What was measured on one edited tensor, dequantised.

    Attributes:
        name: Its name in the file.
        parameter: Its name in the model.
        type: Its type, such as `Q8_0`.
        strength: The share that the plan takes out.
        share_left: `‖QᵀW'‖ / ‖QᵀW‖`, without the plan's offset; 1 - strength but for rounding.
        rounding: How far `W'` is from the edit in float32, as a share of `‖W‖` (Frobenius norms).
        rounding_alone: The same for `W`, quantised again without an edit.
    """

    name: str
    parameter: str
    type: str
    strength: float
    share_left: float
    rounding: float
    rounding_alone: float


def check_file(file: GgufFile, model_map: ModelMap, names: GgufNames) -> None:
    """Check that a GGUF file is one of the model's type and size.

    Raises:
        CheckpointError: If it is not; the message says in what.
    """
    architecture = file.fields.get("general.architecture")
    found = {
        "general.architecture": (architecture, names.architecture),
        "embedding_length": (file.fields.get(f"{architecture}.embedding_length"), model_map.d_model),
        "block_count": (file.fields.get(f"{architecture}.block_count"), model_map.n_layers),
    }
    for key, (value, expected) in found.items():
        # Layers that predict further tokens are counted with the others in some files.
        if value != expected and not (key == "block_count" and isinstance(value, int) and value > model_map.n_layers):
            raise CheckpointError(
                f"The file {file.path.name} has {key} {value!r}, expected {expected!r} for model type "
                f"'{model_map.model_type}'; give a GGUF file of this model."
            )


def gains_of(file: GgufFile, model_map: ModelMap, names: GgufNames) -> Mapping[str, torch.Tensor]:
    """Give the model's norm gains between writers and stream, as the file has them.

    GGUF files hold the gain that is multiplied by, so that what the model adds to its parameter is taken off again.

    Raises:
        ArchitectureError: If the file can have no such tensor.
        CheckpointError: If it has none.
    """
    gains = {}
    for step in {step for site in model_map.sites for writer in site.writers for step in writer.steps}:
        if step.parameter is None:
            continue
        name = names.find(step.parameter)
        if name is None or step.kind != "gain":
            raise ArchitectureError(
                f"Parameter '{step.parameter}' lies between a writer and the residual stream and has no tensor in GGUF "
                f"files of architecture '{names.architecture}', expected one; save the edited weights instead."
            )
        gains[step.parameter] = file.values(name) - step.offset
    return gains


def edit_gguf(file: GgufFile, plan: EditPlan, named: Mapping[str, str], target: Path) -> tuple[GgufWriter, ...]:
    """Copy a GGUF file and edit its writers in the copy.

    Args:
        file: The file; it is only read.
        plan: What happens to which tensor of the model.
        named: The names in the file by those in the model.
        target: The copy; whoever calls moves it into place.

    Returns:
        What was measured, a tensor each.

    Raises:
        CheckpointError: If a tensor is missing, of another shape than the model's, or of a type that the `gguf` package
            cannot write.
        CertificateError: If a byte changed that should not have.
    """
    found = {entry.parameter: _tensor_of(file, entry, named[entry.parameter]) for entry in plan.entries}
    _check_types(file, found.values())
    shutil.copyfile(file.path, target)
    measured = tuple(_edited(file, plan, entry, found[entry.parameter], target) for entry in plan.entries)
    _check_rest(file.path, target, sorted((tensor.offset, tensor.n_bytes) for tensor in found.values()))
    return measured


def _axis_of(entry: PlanEntry, name: str) -> int:
    """The axis of width d_model: GGUF files hold every projection with its outputs as rows."""
    return -1 if name in _LOOKED_UP or is_bias(entry) else -2


def _tensor_of(file: GgufFile, entry: PlanEntry, name: str) -> GgufTensor:
    tensor = file.tensors.get(name)
    # A vocabulary may be padded.
    same = tensor is not None and (name == EMBEDDING or sorted(tensor.shape) == sorted(entry.shape))
    if tensor is None or not same or tensor.shape[_axis_of(entry, name)] != entry.shape[entry.axis]:
        raise CheckpointError(
            f"The file {file.path.name} has {'no tensor' if tensor is None else tensor.shape} at '{name}', expected "
            f"parameter '{entry.parameter}' of shape {entry.shape}; give one whole GGUF file of this model."
        )
    return tensor


def _check_types(file: GgufFile, tensors: Iterable[GgufTensor]) -> None:
    refused = [tensor for tensor in tensors if not tensor.can_be_written()]
    if refused:
        kinds = ", ".join(sorted({tensor.type_name for tensor in refused}))
        raise CheckpointError(
            f"The file {file.path.name} has '{refused[0].name}' as {refused[0].type_name} ({len(refused)} writers as "
            f"{kinds}), expected a type that the package 'gguf' can write, such as Q8_0, BF16 or F16; use another "
            "quantisation of the model, or --as gguf-lora beside this one."
        )


def _edited(file: GgufFile, plan: EditPlan, entry: PlanEntry, tensor: GgufTensor, target: Path) -> GgufWriter:
    axis = _axis_of(entry, tensor.name)
    raw, written = file.raw(tensor), file.raw(tensor, path=target)
    constant = torch.tensor(entry.offset) if entry.offset else torch.zeros(entry.basis.shape[1])
    sums = dict.fromkeys(("before", "after", "whole", "error", "alone"), 0.0)
    # Only the rows' norms need more than one input at a time.
    whole = plan.variant == "row-norm"
    for index in [(...,)] if whole else parts(tensor, axis):
        original = decoded(raw[index], tensor.kind)
        edited = project_out(original, entry.basis, entry.strength, axis, plan.variant, entry.offset)
        packed = encoded(edited, tensor.kind)
        written[index] = packed
        saved, alone = decoded(packed, tensor.kind), decoded(encoded(original, tensor.kind), tensor.kind)
        for name, value in (
            ("before", original.movedim(axis, -1) @ entry.basis),
            ("after", saved.movedim(axis, -1) @ entry.basis - constant),
            ("whole", original),
            ("error", saved - edited),
            ("alone", alone - original),
        ):
            sums[name] += float(value.to(torch.float64).square().sum())
    written.flush()  # type: ignore[attr-defined]
    return GgufWriter(
        tensor.name,
        entry.parameter,
        tensor.type_name,
        entry.strength,
        math.sqrt(sums["after"] / sums["before"]) if sums["before"] else 0.0,
        math.sqrt(sums["error"] / sums["whole"]) if sums["whole"] else 0.0,
        math.sqrt(sums["alone"] / sums["whole"]) if sums["whole"] else 0.0,
    )


def _check_rest(source: Path, target: Path, edited: list[tuple[int, int]]) -> None:
    """Check that all bytes outside of the edited tensors are the same."""
    place = 0
    with source.open("rb") as first, target.open("rb") as second:
        for start, n_bytes in [*edited, (source.stat().st_size, 0)]:
            for file in (first, second):
                file.seek(place)
            left = start - place
            while left > 0:
                count = min(left, COPY_BYTES)
                if first.read(count) != second.read(count):
                    raise CertificateError(
                        f"The file {target.name} differs from {source.name} before byte {start} outside of the edited "
                        "tensors, expected the same bytes there; nothing was kept, run it again."
                    )
                left -= count
            place = start + n_bytes
