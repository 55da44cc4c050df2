"""A permanent edit of a checkpoint on disk: no model is loaded, so the checkpoint may be larger than the memory."""

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from remove_refusals.baking.base import (
    Baked,
    Checkpoint,
    _config,
    ablation_record,
    base_record,
    check_not_source,
    check_passed,
)
from remove_refusals.baking.certificate import certify, disk_reader
from remove_refusals.baking.shards import DEFAULT_MEMORY, plan_files, stream_edited
from remove_refusals.directions import DIRECTIONS, EditPlan, check_exact, check_fit, resolve, save_directions
from remove_refusals.errors import CertificateError, NotStreamedError
from remove_refusals.files import resumable_directory, write_json
from remove_refusals.modelmap import DiskTensor, by_stored_name, disk_names, skeleton
from remove_refusals.models import (
    checkpoint_tensors,
    same_bytes,
    saved_dtype,
)
from remove_refusals.report import Certificate
from remove_refusals.settings import Tied, Variant
from remove_refusals.types import Intervention

OnProgress = Callable[[str, int, int], None]


CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""What goes along beside the weights: configuration, tokenizer, chat template, code of its own, licence."""


_FOLDERS = ("additional_chat_templates",)


_LEFT = (
    "*.index.json",
    "ablation.json",
    "certificate.json",
    "scores.json",
    "selection.json",
    "adapter_config.json",
    "requirements*.txt",
)
"""What does not: indices of weights in any format, which are written anew, and records of an earlier edit."""


def bake_on_disk(
    checkpoint: Checkpoint,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    allow_leak: bool = False,
    variant: Variant = "plain",
    force: bool = False,
    memory: int = DEFAULT_MEMORY,
    jobs: int | None = None,
    certified: bool = True,
    on_progress: OnProgress | None = None,
) -> Baked:
    """Edit a checkpoint without loading it, and leave what `bake` leaves.

    The output grows in a directory beside its place, which is renamed at the end. If the process is killed, the same
    call goes on from the files that are whole, and ends with the same bytes as one that was left alone.

    Args:
        checkpoint: The base; it is only read.
        intervention: What to take out where.
        output: The directory to be made.
        tied: What to do with an embedding that is also the unembedding.
        allow_leak: Whether a model whose weights no edit makes exact is edited in memory instead of refused.
        variant: What else the edit does to each tensor.
        force: Whether to replace an existing output, or one that was begun from something else.
        memory: How many bytes may be held beside what Python and its packages take.
        jobs: How many files to write at once; by default as many as there are cores, at most 4.
        certified: Whether the saved files are measured against the base, which reads both once more.
        on_progress: Told of both stages.

    Returns:
        What was written; without a certificate if none was wanted.

    Raises:
        NotStreamedError: If what is asked for needs the model in memory.
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If no exact weight edit of the model exists.
        CheckpointError: If the base is corrupt, changes meanwhile, or has a format that cannot be edited.
        CertificateError: If the saved files do not hold what the plan says.
        OutputError: If the output is the base's own directory, exists and `force` is not given, or cannot be written.
    """
    target = Path(output)
    check_not_source(target, checkpoint.source, checkpoint.revision)
    model_map = checkpoint.model_map
    plan = _plan(checkpoint, intervention, tied=tied, allow_leak=allow_leak, variant=variant)
    plan, names = _shared(checkpoint, plan)
    stream = plan_files(checkpoint.directory, plan, model_map, names)
    with resumable_directory(target, force=force) as directory:
        hashes, ledger = stream_edited(
            stream,
            directory,
            memory=memory,
            jobs=jobs,
            force=force,
            on_progress=None if on_progress is None else lambda done, total: on_progress("files", done, total),
        )
        _carry_along(checkpoint, directory, untie=plan.untie)
        certificate = _certificate(checkpoint, directory, plan, memory, jobs) if certified else None
        save_directions(intervention.directions, directory / DIRECTIONS)
        dtype = saved_dtype(str(checkpoint.directory), _config(checkpoint.directory))
        base = base_record(checkpoint.source, checkpoint.revision, model_map.model_type, dtype, hashes)
        record = ablation_record(base, intervention, plan, model_map)
        record.write(directory / "ablation.json")
        ledger.close()
    return Baked(target, plan, record, certificate)


def _plan(
    checkpoint: Checkpoint, intervention: Intervention, *, tied: Tied, allow_leak: bool, variant: Variant
) -> EditPlan:
    model_map = checkpoint.model_map
    check_fit(intervention, model_map)
    check_exact(model_map, allow_leak=allow_leak)
    if model_map.leaks:
        raise NotStreamedError("What an inexact edit leaks is measured on a loaded model.")
    reader = disk_reader(checkpoint.directory, lambda name: disk_names(checkpoint.model, name)[0], model_map)
    return resolve(intervention, model_map, reader, tied=tied, allow_leak=allow_leak, variant=variant)


def _shared(checkpoint: Checkpoint, plan: EditPlan) -> tuple[EditPlan, tuple[str, ...]]:
    """Name on disk what else is the embedding in the model, which need not be among the checkpoint's tensors.

    Returns:
        The plan, in which such a tensor is edited with the embedding if the two stay tied, and the names of those that
        get a copy of the unedited embedding if not.

    Raises:
        NotStreamedError: If such a tensor is among the checkpoint's and has other bytes, or more than the embedding
            would have to be untied.
    """
    model_map, model = checkpoint.model_map, checkpoint.model
    entry = next((entry for entry in plan.entries if entry.parameter == model_map.input_embedding), None)
    if not model_map.tied or entry is None:
        return plan, ()
    embedding = model.get_parameter(model_map.input_embedding)
    shared = [name for name, value in model.named_parameters(remove_duplicate=False) if value is embedding]
    untied = skeleton(model, tied=False)
    if plan.untie:
        _check_nothing_else_is_tied(model, embedding)
    own = {tensor.name for tensor in entry.on_disk}
    names = [disk for name in shared for disk in disk_names(untied, name) if disk not in own]
    stored = by_stored_name(checkpoint_tensors(checkpoint.directory), model_map)
    twice = [name for name in names if name in stored]
    for name in twice:
        if not any(same_bytes(stored[name], stored[known]) for known in own & stored.keys()):
            raise NotStreamedError(f"The checkpoint holds '{name}', which the model ties to the embedding, otherwise.")
    if plan.untie:
        return plan, tuple(name for name in names if name not in stored)
    both = replace(entry, on_disk=(*entry.on_disk, *(DiskTensor(name, entry.on_disk[0].axis) for name in twice)))
    return replace(plan, entries=tuple(both if known is entry else known for known in plan.entries)), ()


def _check_nothing_else_is_tied(model: PreTrainedModel, embedding: torch.nn.Parameter) -> None:
    """Check that the setting that unties the embedding unties nothing else."""
    names: dict[int, str] = {id(embedding): ""}
    for name, value in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(value), name) not in {"", name}:
            raise NotStreamedError(f"The model ties '{name}' to '{names[id(value)]}', which would be untied too.")


def _carry_along(checkpoint: Checkpoint, directory: Path, *, untie: bool) -> None:
    """Copy what is beside the weights; the configuration says that nothing is tied any more where that is so."""
    for path in sorted(checkpoint.directory.iterdir()):
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in CARRIED)
        if wanted and path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _LEFT):
            shutil.copyfile(path, directory / path.name)
        elif path.name in _FOLDERS and path.is_dir():
            shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
    if untie:
        config = _config(directory)
        text = checkpoint.model.config.get_text_config(decoder=True)
        config["tie_word_embeddings"] = False
        for name, part in config.items():
            if isinstance(part, dict) and getattr(checkpoint.model.config, name, None) is text:
                part["tie_word_embeddings"] = False
        write_json(directory / "config.json", config, force=True)


def _certificate(checkpoint: Checkpoint, directory: Path, plan: EditPlan, memory: int, jobs: int | None) -> Certificate:
    """Measure the saved files; of files that do not hold what they should nothing is kept."""
    source, model_map = checkpoint.directory, checkpoint.model_map
    certificate = certify(directory, source, plan, model_map, memory=memory, jobs=jobs)
    try:
        check_passed(certificate)
    except CertificateError:
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    certificate.write(directory / "certificate.json")
    return certificate
