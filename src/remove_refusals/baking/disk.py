"""An edited checkpoint on disk: the base's files with the bytes of its writers anew, its records and its certificate.

No model is loaded, so the checkpoint may be larger than the memory.
"""

import filecmp
import fnmatch
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from remove_refusals.baking.base import (
    Base,
    base_of,
    check_base,
    has_safetensors,
    load_intervention,
    open_base,
    variant_of,
)
from remove_refusals.baking.certificate import certify
from remove_refusals.baking.shards import CONVERTED, LEDGER_FILE, plan_files, stream_edited
from remove_refusals.directions import DIRECTIONS, EditPlan, measure_boundaries, save_directions
from remove_refusals.errors import CertificateError, CheckpointError
from remove_refusals.files import read_json, resumable_directory, scratch_directory, write_json
from remove_refusals.modelmap import is_tied, map_model, skeleton_of, stored_names
from remove_refusals.models import (
    UNWANTED,
    LoadedModel,
    check_not_source,
    checkpoint_files,
    checkpoint_tensors,
    free_bytes,
    is_spread,
    load,
    local_directory,
    model_source,
    pick_device,
    read_header,
)
from remove_refusals.processes import is_first
from remove_refusals.progress import SILENT, Progress
from remove_refusals.report import AblationRecord, Certificate, LeakRecord
from remove_refusals.settings import DiskSettings, EditSettings, Tied
from remove_refusals.types import Intervention

_LEFT = (
    # What of the base nothing is made of; safetensors are looked at one by one.
    *UNWANTED, "*.index.json", "adapter_config.json",
    # Records of an earlier edit or training, and the card, which speaks of another model.
    "ablation.json", "certificate.json", "scores.json", "selection.json", "analysis.json", "rows.jsonl", "report.html",
    "candidates.safetensors", "trainer_state.json", "README.md",
    # Caches, and folders of other things.
    ".*", "__pycache__", DIRECTIONS, "checkpoint-*", "runs", "wandb",
)  # fmt: skip
"""What does not go along with the weights."""


@dataclass(frozen=True, eq=False)
class Baked:
    """What was written where by which plan, its record, and what was measured on the files, if that was wanted."""

    directory: Path
    plan: EditPlan
    record: AblationRecord
    certificate: Certificate | None

    def __repr__(self) -> str:
        passed = "none" if self.certificate is None else "passed" if self.certificate.passed else "failed"
        return f"Baked({str(self.directory)!r}, {len(self.plan.entries)} tensors edited, certificate: {passed})"


def bake(
    model: Base | LoadedModel | str | Path,
    intervention: Intervention,
    output: Path | str,
    settings: EditSettings | None = None,
    *,
    force: bool = False,
    disk: DiskSettings | None = None,
    progress: Progress = SILENT,
) -> Baked:
    """Edit a model's files; a call that was killed goes on when repeated, and ends with the same bytes.

    Where a loaded model was given, or the edit leaks, the result is loaded and what it holds between layers measured.
    """
    base, target = base_of(model), Path(output)
    check_not_source(target, base.source, revision=base.revision)
    plan = base.plan(intervention, settings)
    with resumable_directory(target, force=force) as directory:
        baked = write_baked(base, intervention, plan, directory, force=force, disk=disk, progress=progress)
        edited = _read_back(model if isinstance(model, LoadedModel) else None, base, plan, directory, progress)
        if edited is not None:
            baked = with_boundaries(baked, edited, intervention)
    return replace(baked, directory=target)


def _read_back(
    model: LoadedModel | None, base: Base, plan: EditPlan, directory: Path, progress: Progress
) -> LoadedModel | None:
    """Load what was written as its base lies; None where no base is in memory, or two are too large, which is said."""
    if not plan.leaks and (model is None or model.is_offloaded or is_spread(model.model)):
        return None
    places = {} if model is None else getattr(model.model, "hf_device_map", {})
    options: dict[str, Any] = {"device": None if model is None else model.device, "dtype": torch.float32}
    if model is not None and len(set(places.values())) > 1:
        options = {"device_map": places, "dtype": model.model.dtype}
    elif (size := _n_numbers(directory) * 4) > (room := free_bytes(pick_device(options["device"]))):
        if not plan.leaks:
            progress.note(
                f"What is left between layers was not measured: the edited model takes {size / 1e9:.1f} GB in float32 "
                f"beside the base, and {room / 1e9:.1f} GB are free."
            )
            return None
        options = {"device_map": "auto"}
    return load(directory, trust_remote_code=base.trust_remote_code, **options)


def _n_numbers(directory: Path) -> int:
    return sum(math.prod(entry.shape) for _, entry in checkpoint_tensors(directory).values())


def write_baked(
    base: Base,
    intervention: Intervention,
    plan: EditPlan,
    directory: Path,
    *,
    force: bool = False,
    disk: DiskSettings | None = None,
    progress: Progress = SILENT,
) -> Baked:
    """Write an edited checkpoint into a directory that is empty, or as an interrupted call has left it."""
    disk, scratch = disk or DiskSettings(), directory / CONVERTED
    try:
        safe = base.as_safetensors(scratch)
        plan = safe.named(plan)
        stream = plan_files(safe, plan)
        hashes = stream_edited(stream, directory, disk, force=force, progress=progress)
        _carry_along(safe, plan, directory)
        certificate = None
        if disk.certify:
            progress.begin("certificate")
            certificate = _certified(directory, safe, plan, disk)
            if not certificate.passed:
                for path in directory.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                raise CertificateError(
                    f"The saved files do not hold the edit: {certificate.problems[0].rstrip('.')} "
                    f"({len(certificate.problems)} such in all), expected every writer edited and all other bytes "
                    "unchanged; nothing was kept, report this model type."
                )
            certificate.write(directory / "certificate.json")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    save_directions(intervention.directions, directory / DIRECTIONS)
    record = base.ablation(intervention, plan, hashes)
    record.write(directory / "ablation.json")
    (directory / LEDGER_FILE).unlink()
    return Baked(directory, plan, record, certificate)


def with_boundaries(baked: Baked, edited: LoadedModel, intervention: Intervention) -> Baked:
    """Measure on the saved model, loaded, what is left at every layer boundary, where nothing should be; record it."""
    everywhere = {(edit.kind, edit.layer) for edit in intervention.edits if edit.strength == 1}
    sites = {(site.kind, site.layer) for site in map_model(edited.model).sites}
    if len(intervention.directions) != 1 or sites - everywhere:
        return baked
    found = measure_boundaries(edited, intervention.directions[0])
    certificate, record = baked.certificate, baked.record
    if certificate is not None:
        certificate = certificate.model_copy(update={"boundaries": found})
    if baked.plan.leaks:
        record = record.model_copy(update={"leak": LeakRecord(why=baked.plan.leaks, largest_component=max(found))})
    if is_first():
        if certificate is not None:
            certificate.write(baked.directory / "certificate.json", force=True)
        record.write(baked.directory / "ablation.json", force=True)
    return replace(baked, record=record, certificate=certificate)


def certify_directory(directory: Path, base: str, *, trust_remote_code: bool = False) -> Certificate:
    """Measure a saved edit against its base (a directory, or a hub id in the local cache), as its own record says."""
    record = AblationRecord.read(directory / "ablation.json", error=CheckpointError)
    # Of the hub the commit that it was made from.
    revision = None if Path(model_source(base)).is_dir() else record.base.revision
    if local_directory(base, revision) is None:
        at = "" if revision is None else f" at commit {revision}"
        raise CheckpointError(
            f"The base {base} is neither a directory nor in the hub's local cache{at}, expected its files; download it."
        )
    check_base(record.base, base, directory, revision)
    intervention = load_intervention(directory)
    with ExitStack() as stack:
        made_from = open_base(base, revision=revision, trust_remote_code=trust_remote_code)
        if not has_safetensors(made_from.files):
            made_from = made_from.as_safetensors(stack.enter_context(scratch_directory(directory)))
        tied: Tied = "untie" if record.plan.embedding_untied else "both"
        plan = made_from.plan(intervention, EditSettings(tied=tied, allow_leak=True, variant=variant_of(record)))
        return _certified(directory, made_from, plan, DiskSettings(memory=1 << 28))


def _certified(directory: Path, base: Base, plan: EditPlan, disk: DiskSettings) -> Certificate:
    """Measure the tensors, and compare the weight files that no index names."""
    certificate = certify(directory, base, plan, disk)
    problems = [
        f"The weight file {path} is missing or its bytes differ from the base's."
        for path in _carried(base, plan)
        if path.suffix == ".safetensors"
        and not ((directory / path).is_file() and filecmp.cmp(base.files / path, directory / path, shallow=False))
    ]
    return certificate.model_copy(update={"problems": (*certificate.problems, *problems)})


def _carried(base: Base, plan: EditPlan) -> Iterator[Path]:
    """Name the files beside the weights: processors, tokenizer, code, licence, and weights that no index names."""
    own = {path.name for path in checkpoint_files(base.weights)}
    for path in base.files.glob("*.index.json"):
        index = read_json(path, error=CheckpointError)
        own.update(index.get("weight_map", {}).values() if isinstance(index, dict) else ())
    edited = {entry.parameter for entry in plan.entries}
    # The hub's cache keeps a snapshot's files apart from it.
    inside = (base.files.resolve(), (base.files / ".." / ".." / "blobs").resolve())
    for folder, folders, names in os.walk(base.files):
        folders[:] = sorted(name for name in folders if not _is_left(Path(folder, name)))
        for name in sorted((*names, *(name for name in folders if Path(folder, name).is_symlink()))):
            path = Path(folder, name)
            if _is_left(path) or path.relative_to(base.files).as_posix() in own:
                continue
            if not any(path.resolve().is_relative_to(place) for place in inside):
                raise CheckpointError(
                    f"The file {path} of the base is a link to {path.resolve()}, expected a file within the base, "
                    "since it would go along with the edited model; copy it there, or remove the link."
                )
            if path.suffix == ".safetensors":
                shapes = {tensor.name: tensor.shape for tensor in read_header(path).tensors}
                if edited & stored_names(base.model, shapes).parameters:
                    # Another copy of the model, which the edit has not reached.
                    continue
            if path.is_file():
                yield path.relative_to(base.files)


def _is_left(path: Path) -> bool:
    """Whether a file is none of those that go along, or a folder is what `bake` or `run` made."""
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in _LEFT) or (path / "ablation.json").exists()


def _is_said_tied(base: Base) -> bool:
    """Whether the configuration makes one of an embedding and an unembedding that the files hold as two."""
    if base.model_map.tied:
        return False
    said = AutoConfig.from_pretrained(base.files, trust_remote_code=base.trust_remote_code)
    parts = (said, said.get_text_config(decoder=True))
    # Built only where it may be so: it takes seconds where there are many layers.
    return any(getattr(part, "tie_word_embeddings", False) for part in parts) and is_tied(
        skeleton_of(base.files, trust_remote_code=base.trust_remote_code)
    )


def _carry_along(base: Base, plan: EditPlan, directory: Path) -> None:
    """Copy what is beside the weights; the configuration says that nothing is tied any more where that is so."""
    for path in _carried(base, plan):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.files / path, directory / path)
    if plan.untie or _is_said_tied(base):
        config = read_json(directory / "config.json", error=CheckpointError)
        assert isinstance(config, dict)
        text = base.model.config.get_text_config(decoder=True)
        # Of a model that speaks, the part that was edited has a configuration within the whole's.
        for whole in filter(None, (config, config.get("thinker_config"))):
            whole["tie_word_embeddings"] = False
            for name, part in whole.items():
                if isinstance(part, dict) and getattr(base.model.config, name, None) is text:
                    part["tie_word_embeddings"] = False
        write_json(directory / "config.json", config, force=True)
