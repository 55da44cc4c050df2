"""Carriers that need no new checkpoint: adapters that are exactly the edit, beside an untouched base model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel

from remove_refusals.apply.adapter import peft_adapter, save_peft_adapter
from remove_refusals.apply.adapter_check import check_installed, check_loads
from remove_refusals.apply.gguf_adapter import gguf_lora, write_gguf_lora
from remove_refusals.apply.gguf_control import control_vector, write_control_vector
from remove_refusals.apply.scales import embedding_scale
from remove_refusals.atomic import atomic_directory, atomic_file
from remove_refusals.baking import ablation_record, base_record, check_not_source
from remove_refusals.checkpoint import checkpoint_tensors
from remove_refusals.direction_files import DIRECTIONS, save_directions
from remove_refusals.disk_baking import Checkpoint
from remove_refusals.errors import NotStreamedError
from remove_refusals.linalg import Variant
from remove_refusals.map_types import EditPlan, ModelMap
from remove_refusals.models import LoadedModel, saved_dtype
from remove_refusals.plan import Tied, check_fit, offset_of, resolve
from remove_refusals.records import read_json, write_json
from remove_refusals.skeleton import by_stored_name, disk_tensors
from remove_refusals.slices import read_tensor
from remove_refusals.types import Direction, Intervention


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
        scale: Measures what the embedding's rows are multiplied by; None where that needs the model in memory.
    """

    model: PreTrainedModel
    model_map: ModelMap
    tensor_of: Callable[[str], torch.Tensor]
    record: dict[str, Any]
    source: str
    revision: str | None
    scale: Callable[[], float] | None = None

    @property
    def name(self) -> str:
        """What records call the model: a hub id, or the last part of a path."""
        return str(self.record["source"])


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
    record: dict[str, Any]


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
        lambda: embedding_scale(model, model_map),
    )


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
        NotStreamedError: If it has an offset and the model is not in memory.
        DirectionError: If it does not fit the model.
        ArchitectureError: If no exact weight edit of the model exists.
    """
    check_fit(intervention, base.model_map)
    scale = None
    if offset_of(intervention):
        if base.scale is None:
            raise NotStreamedError(
                "The affine variant needs the embedding's scale, which is measured on a loaded model."
            )
        scale = base.scale()
    return resolve(
        intervention,
        base.model_map,
        base.tensor_of,
        tied=tied,
        allow_leak=allow_leak,
        variant=variant,
        embedding_scale=scale,
    )


def bake_lora(
    base: BaseModel,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    allow_leak: bool = False,
    variant: Variant = "plain",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Carried:
    """Write a LoRA that is exactly the edit, as a directory that PEFT loads.

    Args:
        base: The model that it is made for.
        intervention: What to take out where.
        output: The directory to be made.
        tied: As for `bake`; `both` is refused where an embedding is tied.
        allow_leak: As for `bake`.
        variant: As for `bake`; only `plain` is of low rank.
        dtype: The dtype of the adapter's tensors; float32 keeps the edit exact.
        force: Whether to replace an existing output.

    Returns:
        What was written: adapter, `README.md`, `ablation.json` and the directions.

    Raises:
        ArchitectureError: If PEFT cannot carry the edit; the message names what.
        OutputError: If PEFT is not installed, or the output exists and `force` is not given, or cannot be written.
        DirectionError: If the intervention does not fit the model.
    """
    check_installed()
    target = Path(output)
    check_not_source(target, base.source, base.revision)
    plan = plan_for(base, intervention, tied=tied, allow_leak=allow_leak, variant=variant)
    adapter = peft_adapter(
        base.model, plan, base.model_map, base.tensor_of, base=base.name, revision=base.revision, dtype=dtype
    )
    record = ablation_record(base.record, intervention, plan, base.model_map) | {
        "modified": "With this adapter the refusal direction is taken out; the base model's files are unchanged.",
        "adapter": {
            "kind": "peft-lora",
            "rank": adapter.config["r"],
            "dtype": str(dtype).removeprefix("torch."),
            "tensors": len(adapter.tensors),
            "biases": sum(".lora_" not in name for name in adapter.tensors),
        },
    }
    environment = Environment(
        loader=PackageLoader("remove_refusals", "data"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    with atomic_directory(target, force=force) as directory:
        save_peft_adapter(adapter, directory)
        check_loads(base.model, directory)
        save_directions(intervention.directions, directory / DIRECTIONS)
        card = environment.get_template("adapter_card.md.jinja").render(record=record)
        (directory / "README.md").write_text(card, encoding="utf-8")
        write_json(directory / "ablation.json", record)
    return Carried(target, plan, record)


def bake_gguf_lora(
    base: BaseModel,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    allow_leak: bool = False,
    variant: Variant = "plain",
    force: bool = False,
) -> Carried:
    """Write a LoRA that is exactly the edit, as a GGUF file for llama.cpp's `--lora`.

    Args:
        base: The model that it is made for, in full precision.
        intervention: What to take out where.
        output: The file to be made.
        tied: As for `bake`; llama.cpp takes no adapter of a tied embedding.
        allow_leak: As for `bake`.
        variant: As for `bake`; only `plain` is of low rank.
        force: Whether to replace an existing output.

    Returns:
        What was written; the record lies in the metadata, under `remove_refusals.ablation`.

    Raises:
        ArchitectureError: If llama.cpp does not know the model or cannot carry the edit; the message names what.
        OutputError: If the `gguf` package is not installed, or the output exists and `force` is not given, or cannot be
            written.
        DirectionError: If the intervention does not fit the model.
    """
    plan = plan_for(base, intervention, tied=tied, allow_leak=allow_leak, variant=variant)
    adapter = gguf_lora(plan, base.model_map, base.tensor_of)
    record = ablation_record(base.record, intervention, plan, base.model_map) | {
        "modified": "With this adapter the refusal direction is taken out; the base model's files are unchanged.",
        "adapter": {"kind": "gguf-lora", "rank": adapter.rank, "dtype": "float32", "tensors": len(adapter.tensors)},
    }
    with atomic_file(Path(output), force=force) as staging:
        write_gguf_lora(
            adapter, staging, name=f"{base.name} without refusals", base=base.name, record=json.dumps(record)
        )
    return Carried(Path(output), plan, record)


def bake_control_vector(
    directions: Sequence[Direction],
    model_map: ModelMap,
    output: Path | str,
    *,
    strength: float = 1.0,
    layers: tuple[int, int] | None = None,
    force: bool = False,
) -> tuple[int, ...]:
    """Write directions as a control vector for llama.cpp; it is no ablation, see `control_vector`.

    Args:
        directions: One direction, or one for each layer.
        model_map: The model's map.
        output: The file to be made.
        strength: As for `control_vector`.
        layers: As for `control_vector`.
        force: Whether to replace an existing output.

    Returns:
        The layers behind which a vector is added.

    Raises:
        DirectionError: If the directions do not fit the model or a control vector.
        OutputError: If the `gguf` package is not installed, or the output exists and `force` is not given, or cannot be
            written.
    """
    check_fit(Intervention(tuple(directions), ()), model_map)
    vectors = control_vector(directions, model_map.n_layers, strength=strength, layers=layers)
    with atomic_file(Path(output), force=force) as staging:
        write_control_vector(vectors, staging, n_layers=model_map.n_layers, hint=model_map.model_type)
    return tuple(vectors)
