"""Look at checkpoints without their weights: a model's map and plan, and the certificate of a saved edit."""

from collections import Counter
from pathlib import Path
from typing import Any

from remove_refusals.certify import Certificate, certify, disk_reader
from remove_refusals.checkpoint import checkpoint_tensors
from remove_refusals.errors import CheckpointError
from remove_refusals.interventions import load_intervention
from remove_refusals.linalg import VARIANTS, Variant
from remove_refusals.map_types import ChannelStep, ModelMap
from remove_refusals.modelmap import map_model
from remove_refusals.plan import Tied, resolve
from remove_refusals.records import read_json
from remove_refusals.skeleton import by_stored_name, disk_names, skeleton_of
from remove_refusals.sources import local_directory


def inspect(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Describe what an edit of a model would touch, from its configuration and the headers of its files alone.

    Args:
        source: A directory or a hub id.
        revision: The hub's branch, tag or commit.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Returns:
        A JSON object: `model_type`, `d_model`, `n_layers`, `verdict`, `leaks`, `unhooked`, `unused`, `tied`, and
        `writers`, one object for each tensor on disk with `site`, `layer`, `parameter`, `on_disk`, `axis`, `shape`,
        `norm`, `tied` and, where the files are at hand, `dtype`.

    Raises:
        ModelError: If there is no configuration of a causal language model.
        ArchitectureError: If the model cannot be mapped.
        CheckpointError: If its files are at hand and corrupt.
    """
    model = skeleton_of(source, revision=revision, trust_remote_code=trust_remote_code)
    model_map = map_model(model)
    directory = local_directory(source, revision)
    headers = by_stored_name(_headers(directory), model_map)
    writers = []
    for site in model_map.sites:
        for writer in site.writers:
            for tensor in writer.on_disk:
                entry = headers.get(tensor.name)
                row: dict[str, Any] = {
                    "site": site.kind,
                    "layer": site.layer,
                    "parameter": writer.parameter,
                    "on_disk": entry.name if entry is not None else tensor.name,
                    "axis": tensor.axis,
                    "shape": list(entry.shape if entry is not None else writer.shape),
                    "norm": _norm(writer.steps),
                    "tied": model_map.tied and writer.parameter == model_map.input_embedding,
                }
                if entry is not None:
                    row["dtype"] = entry.dtype
                elif headers:
                    row["missing"] = True
                writers.append(row)
    return {
        "model_type": model_map.model_type,
        "d_model": model_map.d_model,
        "n_layers": model_map.n_layers,
        "verdict": model_map.verdict,
        "leaks": list(model_map.leaks),
        "unhooked": list(model_map.unhooked),
        "unused": list(model_map.unused),
        "tied": model_map.tied,
        "sites": dict(Counter(site.kind for site in model_map.sites)),
        "writers": writers,
    }


def _norm(steps: tuple[ChannelStep, ...]) -> str | None:
    parts = [step.kind if step.parameter is None else f"{step.offset:g}+{step.parameter}" for step in steps]
    return ", ".join(part.removeprefix("0+") for part in parts) or None


def _headers(directory: Path | None) -> dict[str, Any]:
    if directory is None or not any(directory.glob("*.safetensors")):
        return {}
    return {name: entry for name, (_, entry) in checkpoint_tensors(directory).items()}


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
    record = read_json(directory / "ablation.json", error=CheckpointError)
    base_directory = local_directory(base)
    if base_directory is None:
        raise CheckpointError(
            f"The base {base} is neither a directory nor in the hub's local cache, expected its files; download it."
        )
    if not isinstance(record, dict):
        raise CheckpointError(
            f"The record {directory / 'ablation.json'} is no JSON object, expected one as `bake` writes it; make the "
            "directory again."
        )
    model = skeleton_of(base_directory, trust_remote_code=trust_remote_code)
    model_map = map_model(model)
    intervention = load_intervention(directory)
    plan = resolve(
        intervention,
        model_map,
        disk_reader(base_directory, lambda parameter: disk_names(model, parameter)[0], model_map),
        tied=_tied(record, model_map),
        allow_leak=True,
        variant=_variant(record),
        embedding_scale=_embedding_scale(record),
    )
    return certify(directory, base_directory, plan, model_map)


def _tied(record: dict[str, Any], model_map: ModelMap) -> Tied:
    plan = record.get("plan")
    untied = isinstance(plan, dict) and plan.get("embedding_untied") is True
    return "untie" if untied or not model_map.tied else "both"


def _embedding_scale(record: dict[str, Any]) -> float | None:
    """What was measured when the edit was made: the files alone do not say it."""
    plan = record.get("plan")
    found = plan.get("embedding_scale") if isinstance(plan, dict) else None
    return float(found) if isinstance(found, int | float) and found != 0 else None


def _variant(record: dict[str, Any]) -> Variant:
    plan = record.get("plan")
    found = plan.get("variant", "plain") if isinstance(plan, dict) else "plain"
    for variant in VARIANTS:
        if found == variant:
            return variant
    raise CheckpointError(
        f"The record names the variant {found!r}, expected one of {', '.join(VARIANTS)}; use the version of this "
        "package that made it."
    )
