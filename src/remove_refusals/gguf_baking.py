"""A GGUF file with the edit in its own tensors: a copy that is there whole or not at all, and beside it a record."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from remove_refusals.apply.gguf_edit import (
    EMBEDDING,
    UNEMBEDDING,
    GgufWriter,
    check_file,
    edit_gguf,
    gains_of,
)
from remove_refusals.apply.gguf_file import GgufFile, open_gguf
from remove_refusals.apply.gguf_names import GgufNames
from remove_refusals.atomic import atomic_file, check_target
from remove_refusals.baking import ablation_record
from remove_refusals.errors import ArchitectureError, OutputError
from remove_refusals.linalg import Variant
from remove_refusals.map_types import EditPlan, ModelMap
from remove_refusals.plan import Tied, check_fit, offset_of, resolve
from remove_refusals.records import write_json
from remove_refusals.types import Intervention


@dataclass(frozen=True, eq=False)
class BakedGguf:
    """What was written.

    Attributes:
        path: The edited file.
        plan: What happened to which tensor of the model.
        writers: What was measured, a tensor each.
        tied: Whether the file's token embedding is its output projection too, so that both were edited.
        record: The content of the record beside the file.
    """

    path: Path
    plan: EditPlan
    writers: tuple[GgufWriter, ...]
    tied: bool
    record: dict[str, Any]


def record_path(output: Path) -> Path:
    """Give the place of the record of an edited GGUF file: `OUT.ablation.json` beside `OUT.gguf`."""
    return output.with_suffix(".ablation.json")


def bake_gguf(
    source: Path,
    model_map: ModelMap,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    allow_leak: bool = False,
    variant: Variant = "plain",
    force: bool = False,
) -> BakedGguf:
    """Edit the tensors of a GGUF file, in a copy.

    No weights of the model are needed but those in the file; types, layout, metadata and all other tensors stay.

    Args:
        source: The GGUF file; it is only read.
        model_map: The map of the model that the file was converted from.
        intervention: What to take out where; without an offset.
        output: The file to be made.
        tied: What to do with a token embedding that is the output projection too: the file has no room for a second
            one, so that only `both` can edit it.
        allow_leak: Whether to edit a model whose weights no edit makes exact.
        variant: What else the edit does to each tensor.
        force: Whether to replace an existing output.

    Returns:
        What was written. `OUT.ablation.json` holds the record with what was measured.

    Raises:
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If GGUF has no place for a writer, no exact edit exists, the intervention has an offset, or
            an embedding is tied and `tied` is not `both`.
        CheckpointError: If the file is none of this model, or has a writer of a type that cannot be written.
        OutputError: If the output exists and `force` is not given, is the source, or cannot be written.
    """
    target = Path(output)
    _check_place(source, target, force=force)
    names = GgufNames(model_map)
    file = open_gguf(source)
    check_file(file, model_map, names)
    check_fit(intervention, model_map)
    if offset_of(intervention):
        raise ArchitectureError(
            "The intervention adds a constant, which needs the embedding's scale of a loaded model, expected none for "
            "a GGUF file; leave the affine variant out, or save the edited weights and convert those."
        )
    # Whether anything is tied is the file's to say.
    as_stored = replace(model_map, tied=UNEMBEDDING not in file.tensors)
    gains = gains_of(file, model_map, names)
    plan = resolve(intervention, as_stored, gains.__getitem__, tied=tied, allow_leak=allow_leak, variant=variant)
    both = _edits_both(file, plan, model_map, tied)
    planned = {entry.parameter for entry in plan.entries}
    writers = [writer for site in model_map.sites for writer in site.writers if writer.parameter in planned]
    with atomic_file(target, force=force) as staging:
        measured = edit_gguf(file, plan, names.of_writers(writers), staging)
    record = _record(file, intervention, plan, as_stored, measured)
    write_json(record_path(target), record, force=force)
    return BakedGguf(target, plan, measured, both, record)


def _check_place(source: Path, target: Path, *, force: bool) -> None:
    if target.exists() and source.exists() and target.samefile(source):
        raise OutputError(
            f"The output {target} is the file that is to be edited, expected another place, since it is never written "
            "to; choose another path."
        )
    check_target(target, force=force, directory=False)
    check_target(record_path(target), force=force, directory=False)


def _edits_both(file: GgufFile, plan: EditPlan, model_map: ModelMap, tied: Tied) -> bool:
    """Whether the plan edits a token embedding that is the output projection too."""
    if all(entry.parameter != model_map.input_embedding for entry in plan.entries):
        return False
    if UNEMBEDDING in file.tensors:
        if model_map.tied and tied == "both":
            raise ArchitectureError(
                f"The file {file.path.name} has an '{UNEMBEDDING}' of its own though model type "
                f"'{model_map.model_type}' ties it, expected one tensor for --tied both; leave --tied out."
            )
        return False
    if tied != "both":
        raise ArchitectureError(
            f"The file {file.path.name} has '{EMBEDDING}' for its output too and no room for a copy, expected --tied "
            "both, which edits them as one, or an edit without the embedding; pass one of --tied both and --sites "
            "attn,mlp."
        )
    return True


def _record(
    file: GgufFile,
    intervention: Intervention,
    plan: EditPlan,
    model_map: ModelMap,
    measured: tuple[GgufWriter, ...],
) -> dict[str, Any]:
    with file.path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    base = {
        "source": file.path.name,
        "model_type": model_map.model_type,
        "sha256": {file.path.name: digest},
    }
    return ablation_record(base, intervention, plan, model_map) | {
        "certificate": {
            "edited": [asdict(writer) for writer in measured],
            "largest_share_beyond_plan": max(
                (abs(writer.share_left - abs(1 - writer.strength)) for writer in measured), default=0.0
            ),
            "other_bytes_identical": True,
        }
    }
