"""A permanent edit of a model that fits in memory: a directory that is written whole or not at all."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from remove_refusals.apply.memory import save_edited
from remove_refusals.atomic import atomic_directory
from remove_refusals.checkpoint import file_hashes
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel
from remove_refusals.plan import Tied, resolve
from remove_refusals.records import direction_sha256, save_direction, versions, write_json
from remove_refusals.types import EditPlan, Intervention, ModelMap

FORMAT = 1
"""The version of the layout of `ablation.json`."""


@dataclass(frozen=True, eq=False)
class Baked:
    """What was written.

    Attributes:
        directory: Where.
        plan: What happened to which tensor.
        record: The content of `ablation.json`.
    """

    directory: Path
    plan: EditPlan
    record: dict[str, Any]


def bake(
    loaded: LoadedModel,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    dtype: torch.dtype | None = None,
    force: bool = False,
    model_map: ModelMap | None = None,
) -> Baked:
    """Edit a model's weights and save it as a Transformers directory with its tokenizer and `ablation.json`.

    The model in memory is left as it is. The output is written beside its place and renamed at the end, so that an
    error, a full disk or Ctrl-C leaves nothing half-made.

    Args:
        loaded: The model, whole in memory and not quantised.
        intervention: What to take out where.
        output: The directory to be made.
        tied: What to do with an embedding that is also the unembedding.
        dtype: The dtype of the saved tensors; by default that of the model's checkpoint.
        force: Whether to replace an existing output.
        model_map: The model's map, if it is at hand; otherwise it is derived.

    Returns:
        What was written.

    Raises:
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If no exact weight edit of the model exists.
        ModelError: If a tensor is quantised or not in memory.
        OutputError: If the output exists and `force` is not given, or cannot be written.
    """
    target = Path(output)
    with atomic_directory(target, force=force) as directory:
        baked = write_baked(loaded, intervention, directory, tied=tied, dtype=dtype, model_map=model_map)
        write_json(directory / "ablation.json", baked.record)
    return replace(baked, directory=target)


def write_baked(
    loaded: LoadedModel,
    intervention: Intervention,
    directory: Path,
    *,
    tied: Tied = "untie",
    dtype: torch.dtype | None = None,
    model_map: ModelMap | None = None,
) -> Baked:
    """Write an edited model into a directory that exists; `ablation.json` is left to the caller, who may add to it.

    Args, Returns and Raises: as for `bake`.
    """
    model_map = model_map or map_model(loaded.model)
    plan = resolve(intervention, model_map, loaded.model.get_parameter, tied=tied)
    save_edited(loaded.model, plan, model_map, directory, dtype=dtype or loaded.checkpoint_dtype)
    loaded.tokenizer.save_pretrained(directory)
    for number, direction in enumerate(intervention.directions):
        name = "direction.safetensors" if number == 0 else f"direction-{number}.safetensors"
        save_direction(direction, directory / name)
    return Baked(directory, plan, ablation_record(loaded, intervention, plan, model_map))


def ablation_record(
    loaded: LoadedModel, intervention: Intervention, plan: EditPlan, model_map: ModelMap
) -> dict[str, Any]:
    """Say from what a model was made and how, as written to `ablation.json`.

    Returns:
        A JSON object: `format`, `base` (source, revision, model type, SHA-256 of its files), `directions`,
        `intervention`, `plan` and `versions`.
    """
    source = Path(loaded.source)
    base: dict[str, Any] = {"source": loaded.source if not source.is_dir() else source.resolve().name}
    if loaded.revision is not None:
        base["revision"] = loaded.revision
    base["model_type"] = model_map.model_type
    base |= {"dtype": str(loaded.checkpoint_dtype).removeprefix("torch.")} if loaded.checkpoint_dtype else {}
    if source.is_dir():
        base["sha256"] = file_hashes(source)
    return {
        "format": FORMAT,
        "modified": "The refusal direction was taken out of this model's weights; it is not the base model.",
        "base": base,
        "directions": [
            {"sha256": direction_sha256(direction), "d_model": direction.d_model, "rank": direction.basis.shape[1]}
            | {key: value for key, value in vars(direction.origin).items() if value is not None}
            for direction in intervention.directions
        ],
        "intervention": [
            {key: value for key, value in vars(edit).items() if value is not None} for edit in intervention.edits
        ],
        "plan": {
            "edited": [entry.parameter for entry in plan.entries],
            "left": dict(plan.left),
            "embedding_untied": plan.untie,
            "tied_in_base": model_map.tied,
        },
        "versions": versions(),
    }
