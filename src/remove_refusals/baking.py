"""A permanent edit of a model that fits in memory: a directory that is written whole or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from remove_refusals.activations import measure_boundaries
from remove_refusals.apply.memory import save_edited
from remove_refusals.apply.scales import embedding_scale
from remove_refusals.atomic import atomic_directory
from remove_refusals.certify import Certificate, certify
from remove_refusals.checkpoint import INDEX_FILE, SINGLE_FILE, checkpoint_tensors, file_hashes
from remove_refusals.direction_files import DIRECTIONS, describe_direction, save_directions
from remove_refusals.errors import CertificateError, OutputError
from remove_refusals.linalg import Variant
from remove_refusals.map_types import EditPlan, ModelMap
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, load
from remove_refusals.plan import Tied, check_fit, offset_of, resolve
from remove_refusals.records import versions, write_json
from remove_refusals.skeleton import by_stored_name, disk_names
from remove_refusals.slices import FLOAT_DTYPES
from remove_refusals.sources import licence_fields, local_directory
from remove_refusals.types import Intervention

FORMAT = 1
"""The version of the layout of `ablation.json`."""


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
    record: dict[str, Any]
    certificate: Certificate | None


def bake(
    loaded: LoadedModel,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    dtype: torch.dtype | None = None,
    allow_leak: bool = False,
    variant: Variant = "plain",
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
        allow_leak: Whether to edit a model whose weights no edit makes exact; the leak is measured and recorded.
        variant: What else the edit does to each tensor; only `plain` is what the hooks do.
        force: Whether to replace an existing output.
        model_map: The model's map, if it is at hand; otherwise it is derived.

    Returns:
        What was written.

    Raises:
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If no exact weight edit of the model exists.
        ModelError: If a tensor is quantised or not in memory.
        CertificateError: If the saved files do not hold what the plan says.
        OutputError: If the output is the model's own directory, exists and `force` is not given, or cannot be written.
    """
    target = Path(output)
    check_not_source(target, loaded.source, loaded.revision)
    with atomic_directory(target, force=force) as directory:
        baked = write_baked(
            loaded,
            intervention,
            directory,
            tied=tied,
            dtype=dtype,
            allow_leak=allow_leak,
            variant=variant,
            model_map=model_map,
        )
        write_json(directory / "ablation.json", baked.record)
    return replace(baked, directory=target)


def write_baked(
    loaded: LoadedModel,
    intervention: Intervention,
    directory: Path,
    *,
    tied: Tied = "untie",
    dtype: torch.dtype | None = None,
    allow_leak: bool = False,
    variant: Variant = "plain",
    model_map: ModelMap | None = None,
) -> Baked:
    """Write an edited model into a directory that exists; `ablation.json` is left to the caller, who may add to it.

    Args, Returns and Raises: as for `bake`.
    """
    model_map = model_map or map_model(loaded.model)
    check_fit(intervention, model_map)
    plan = resolve(
        intervention,
        model_map,
        loaded.model.get_parameter,
        tied=tied,
        allow_leak=allow_leak,
        variant=variant,
        embedding_scale=embedding_scale(loaded.model, model_map) if offset_of(intervention) else None,
    )
    base = base_directory(loaded)
    saved = (lambda name: dtype) if dtype is not None else _saved_dtypes(loaded, base, model_map)
    save_edited(loaded.model, plan, model_map, directory, dtype_of=saved)
    loaded.tokenizer.save_pretrained(directory)
    certificate = None
    if base is not None and dtype is None:
        certificate = certify(
            directory, base, plan, model_map, boundaries=_boundaries(loaded, directory, intervention, model_map)
        )
        write_json(directory / "certificate.json", certificate.to_json())
        check_passed(certificate)
    save_directions(intervention.directions, directory / DIRECTIONS)
    described = base_record(loaded.source, loaded.revision, model_map.model_type, loaded.checkpoint_dtype)
    record = ablation_record(described, intervention, plan, model_map)
    if certificate is not None and plan.leaks and certificate.boundaries is not None:
        record["leak"] = {"why": list(plan.leaks), "largest_component": max(certificate.boundaries)}
    return Baked(directory, plan, record, certificate)


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


def _saved_dtypes(loaded: LoadedModel, base: Path | None, model_map: ModelMap) -> Callable[[str], torch.dtype | None]:
    """Give each tensor the dtype that it has in the base's files, which need not be the same for all."""
    if base is None:
        return lambda name: loaded.checkpoint_dtype
    entries = by_stored_name(checkpoint_tensors(base), model_map)
    on_disk = {name: FLOAT_DTYPES.get(entry.dtype) for name, (_, entry) in entries.items()}
    if len({dtype for dtype in on_disk.values() if dtype is not None}) == 1:
        return lambda name: loaded.checkpoint_dtype

    def dtype_of(name: str) -> torch.dtype | None:
        return next((on_disk[disk] for disk in disk_names(loaded.model, name) if disk in on_disk), None)

    return dtype_of


def _boundaries(
    loaded: LoadedModel, directory: Path, intervention: Intervention, model_map: ModelMap
) -> tuple[float, ...] | None:
    """Run the saved model and measure what is left at every layer boundary, where nothing should be."""
    everywhere = {(edit.kind, edit.layer) for edit in intervention.edits if edit.strength == 1}
    if len(intervention.directions) != 1 or {(site.kind, site.layer) for site in model_map.sites} - everywhere:
        return None
    edited = load(directory, device=loaded.device, dtype=torch.float32, trust_remote_code=loaded.trust_remote_code)
    return measure_boundaries(edited, intervention.directions[0], model_map, constant=offset_of(intervention))


def ablation_record(
    base: Mapping[str, Any], intervention: Intervention, plan: EditPlan, model_map: ModelMap
) -> dict[str, Any]:
    """Say from what a model was made and how, as written to `ablation.json`.

    Args:
        base: What `base_record` gives.
        intervention: What was taken out where.
        plan: What happened to which tensor.
        model_map: The model's map.

    Returns:
        A JSON object: `format`, `base`, `directions`, `intervention`, `plan` and `versions`.
    """
    return {
        "format": FORMAT,
        "modified": "The refusal direction was taken out of this model's weights; it is not the base model.",
        "base": dict(base),
        "directions": [describe_direction(direction) for direction in intervention.directions],
        "intervention": [
            {key: value for key, value in vars(edit).items() if value not in {None, ()}} for edit in intervention.edits
        ],
        "plan": {
            "edited": [entry.parameter for entry in plan.entries],
            "left": dict(plan.left),
            "variant": plan.variant,
            **({"embedding_scale": plan.embedding_scale} if plan.embedding_scale is not None else {}),
            "embedding_untied": plan.untie,
            "tied_in_base": model_map.tied,
        },
        "versions": versions(),
    }


def base_record(
    source: str,
    revision: str | None,
    model_type: str,
    dtype: torch.dtype | None,
    known: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Say from what a model was made.

    Args:
        source: A directory or a hub id.
        revision: The hub's commit.
        model_type: The `model_type` of the config.
        dtype: The data type of the saved weights.
        known: SHA-256 of files of a directory that were computed before.

    Returns:
        A JSON object: `source`, `model_type`, and where they are known `revision` and `dtype`; of a directory `sha256`
        of its files, and `card` with what its card says of licence and descent.
    """
    path = Path(source)
    base: dict[str, Any] = {"source": source if not path.is_dir() else path.resolve().name}
    if revision is not None:
        base["revision"] = revision
    base["model_type"] = model_type
    base |= {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
    if path.is_dir():
        base["sha256"] = file_hashes(path, known)
        base |= {"card": card} if (card := licence_fields(path)) else {}
    return base
