"""Carriers that need no new checkpoint: adapters that are exactly the edit, beside an untouched base model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from remove_refusals.directions import EditPlan, check_fit, describe_direction, load_directions, resolve
from remove_refusals.errors import CertificateError, CheckpointError, DirectionError, NotStreamedError, OutputError
from remove_refusals.files import read_json, versions
from remove_refusals.modelmap import ModelMap, by_stored_name, disk_tensors, map_model, skeleton_of
from remove_refusals.models import (
    INDEX_FILE,
    SINGLE_FILE,
    LoadedModel,
    checkpoint_tensors,
    file_hashes,
    licence_fields,
    local_directory,
    model_source,
    read_tensor,
    saved_dtype,
    weights_directory,
)
from remove_refusals.report import (
    AblationRecord,
    AdapterRecord,
    BaseRecord,
    Certificate,
    DirectionRecord,
    PlanRecord,
)
from remove_refusals.settings import Tied, Variant
from remove_refusals.types import Intervention


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A model that an adapter is made for, in memory or on disk.

    Attributes:
        model: The model; its weights may be missing.
        model_map: Its map.
        tensor_of: Gives a parameter by its name in the model.
        record: What `base_record` gives.
        source: The directory or hub id.
        revision: The hub's commit.
    """

    model: PreTrainedModel
    model_map: ModelMap
    tensor_of: Callable[[str], torch.Tensor]
    record: BaseRecord
    source: str
    revision: str | None

    @property
    def name(self) -> str:
        """What records call the model: a hub id, or the last part of a path."""
        return self.record.source


@dataclass(frozen=True, eq=False)
class Carried:
    """What was written.

    Attributes:
        path: The file or directory.
        plan: What happens to which tensor where the adapter is used.
        record: The content of `ablation.json`, which a GGUF file holds in its metadata.
    """

    path: Path
    plan: EditPlan
    record: AblationRecord


def base_in_memory(loaded: LoadedModel, model_map: ModelMap) -> BaseModel:
    """Take a loaded model as the base."""
    record = base_record(loaded.source, loaded.revision, model_map.model_type, loaded.checkpoint_dtype)
    model = loaded.model
    return BaseModel(
        model,
        model_map,
        model.get_parameter,
        record,
        loaded.source,
        loaded.revision,
    )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A causal language model on disk, without its weights.

    Attributes:
        source: The directory or hub id as it was given, `demo` resolved.
        revision: The hub's commit; None for a directory.
        directory: Where its files are.
        model: The model on the meta device.
        model_map: Its map.
    """

    source: str
    revision: str | None
    directory: Path
    model: PreTrainedModel
    model_map: ModelMap


def base_on_disk(checkpoint: Checkpoint) -> BaseModel:
    """Take a checkpoint as the base, whose tensors are read one by one."""
    config = read_json(checkpoint.directory / "config.json", error=NotStreamedError)
    dtype = saved_dtype(str(checkpoint.directory), config if isinstance(config, dict) else {})
    record = base_record(checkpoint.source, checkpoint.revision, checkpoint.model_map.model_type, dtype)
    return BaseModel(
        checkpoint.model,
        checkpoint.model_map,
        _reader(checkpoint),
        record,
        checkpoint.source,
        checkpoint.revision,
    )


def _reader(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """Read parameters from disk; what is fused in memory alone is put together."""
    stored = by_stored_name(checkpoint_tensors(checkpoint.directory), checkpoint.model_map)
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.model.state_dict().items()}
    axes = {writer.parameter: writer.axis for site in checkpoint.model_map.sites for writer in site.writers}

    def read(parameter: str) -> torch.Tensor:
        shape, axis = shapes[parameter], axes.get(parameter, 0)
        disk = disk_tensors(checkpoint.model, parameter, shape, axis)
        # The names of a list of experts come in the order of their numbers.
        parts = [read_tensor(*stored[tensor.name]) for tensor in disk if tensor.name in stored]
        layouts = {(tuple(part.shape), tensor.axis) for part, tensor in zip(parts, disk, strict=False)}
        if layouts == {(shape, axis)}:
            return parts[0]
        if len(parts) != shape[0] or layouts != {(shape[1:], axis - 1)}:
            raise NotStreamedError(f"The checkpoint holds parameter '{parameter}' in another layout than the model.")
        return torch.stack(parts)

    return read


def plan_for(
    base: BaseModel,
    intervention: Intervention,
    *,
    tied: Tied = "untie",
    allow_leak: bool = False,
    variant: Variant = "plain",
) -> EditPlan:
    """Resolve an intervention against a base.

    Raises:
        DirectionError: If it does not fit the model.
        ArchitectureError: If no exact weight edit of the model exists.
    """
    check_fit(intervention, base.model_map)
    return resolve(
        intervention,
        base.model_map,
        base.tensor_of,
        tied=tied,
        allow_leak=allow_leak,
        variant=variant,
    )


def open_checkpoint(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Map a checkpoint from its configuration and headers.

    Args:
        source: A directory, a hub id, or `demo`; what the hub has and this machine has not is downloaded.
        revision: The hub's branch, tag or commit.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        NotStreamedError: If there are no safetensors files.
        CheckpointError: If a file is missing or corrupt.
        ModelError: If there is no configuration of a causal language model.
        ArchitectureError: If the model cannot be mapped.
    """
    directory = weights_directory(source, revision)
    if directory is None or not any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise NotStreamedError(f"The model {source} has no {SINGLE_FILE} and no {INDEX_FILE}, expected one of them.")
    if not hasattr(os, "preadv"):
        raise NotStreamedError("This system has no positioned reads, expected Linux, macOS or another Unix.")
    checkpoint_tensors(directory)
    _check_not_rotated(directory)
    model = skeleton_of(directory, trust_remote_code=trust_remote_code)
    name = model_source(source)
    commit = None if Path(name).is_dir() else directory.name
    return Checkpoint(name, commit, directory, model, map_model(model))


def _check_not_rotated(directory: Path) -> None:
    """Check that no rotation is applied around what layers compute, as compressed-tensors can: it is in no tensor.

    Raises:
        CheckpointError: If the configuration names one.
    """
    config = _config(directory)
    for key in ("quantization_config", "compression_config"):
        part = config.get(key)
        transforms = part.get("transform_config") if isinstance(part, dict) else None
        groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
        if groups:
            raise CheckpointError(
                f"The checkpoint {directory} has rotations in {key}.transform_config ({', '.join(map(str, groups))}), "
                "expected none: a tensor's own output is not what reaches the residual stream; use an unquantised "
                "checkpoint of this model."
            )


def _config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "config.json", error=CheckpointError)
    return config if isinstance(config, dict) else {}


@dataclass(frozen=True, eq=False)
class Baked:
    """What was written.

    Attributes:
        directory: Where.
        plan: What happened to which tensor.
        record: The content of `ablation.json`.
        certificate: What was measured on the saved files; None where the base has no safetensors to compare with, or
            the dtype was changed.
    """

    directory: Path
    plan: EditPlan
    record: AblationRecord
    certificate: Certificate | None


def check_passed(certificate: Certificate) -> None:
    """Check that saved files hold what their plan says.

    Raises:
        CertificateError: If they do not.
    """
    if not certificate.passed:
        raise CertificateError(
            f"The saved files do not hold the edit: {certificate.problems[0].rstrip('.')} "
            f"({len(certificate.problems)} such in all), expected every writer edited and all other bytes "
            "unchanged; nothing was kept, report this model type."
        )


def check_not_source(output: Path, model: str, revision: str | None = None) -> None:
    """Check that an output does not take the place of the model that it is made from.

    Args:
        output: The directory to be made.
        model: The model's directory, hub id, or `demo`.
        revision: The hub's branch, tag or commit.

    Raises:
        OutputError: If the output is the model's directory or one above it, links followed.
    """
    source = local_directory(model, revision)
    if source is not None and source.resolve().is_relative_to(output.expanduser().resolve()):
        raise OutputError(
            f"The output {output} is the model itself or a directory that holds it, expected another place, since the "
            "model is never written to; choose another path."
        )


def base_directory(loaded: LoadedModel) -> Path | None:
    """Find the directory of the safetensors files that a model was loaded from.

    Returns:
        The directory, in the hub's cache for a hub id; None if there are no safetensors files.
    """
    source = local_directory(loaded.source, loaded.revision)
    if source is None:
        return None
    return source if (source / SINGLE_FILE).is_file() or (source / INDEX_FILE).is_file() else None


MODIFIED = "The refusal direction was taken out of this model's weights; it is not the base model."
ADAPTED = "With this adapter the refusal direction is taken out; the base model's files are unchanged."


def ablation_record(
    base: BaseRecord,
    intervention: Intervention,
    plan: EditPlan,
    model_map: ModelMap,
    adapter: AdapterRecord | None = None,
) -> AblationRecord:
    """Say from what a model or an adapter was made and how, as written to `ablation.json`."""
    return AblationRecord(
        modified=MODIFIED if adapter is None else ADAPTED,
        base=base,
        directions=tuple(DirectionRecord(**describe_direction(direction)) for direction in intervention.directions),
        intervention=intervention.edits,
        plan=PlanRecord(
            edited=tuple(entry.parameter for entry in plan.entries),
            left=dict(plan.left),
            variant=plan.variant,
            embedding_untied=plan.untie,
            tied_in_base=model_map.tied,
        ),
        versions=versions(),
        adapter=adapter,
    )


def load_intervention(directory: Path) -> Intervention:
    """Read the intervention that a directory was made with, which can be resolved against the same base again."""
    record = AblationRecord.read(directory / "ablation.json", error=DirectionError)
    return Intervention(load_directions(directory), record.intervention)


def base_record(
    source: str,
    revision: str | None,
    model_type: str,
    dtype: torch.dtype | None,
    known: Mapping[str, str] | None = None,
) -> BaseRecord:
    """Say from what a model was made; of `known` files the SHA-256 was computed before."""
    path = Path(source)
    local = path.is_dir()
    return BaseRecord(
        source=path.resolve().name if local else source,
        revision=revision,
        model_type=model_type,
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        sha256=file_hashes(path, known) if local else None,
        card=licence_fields(path) or None if local else None,
    )
