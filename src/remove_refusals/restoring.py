"""Take an edit back: the base's bytes are put in their places, tensor by tensor, and verified by hash."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from remove_refusals.atomic import atomic_file
from remove_refusals.checkpoint import INDEX_FILE, checkpoint_files, file_hashes, read_header, tensor_hashes
from remove_refusals.comparing import same_bytes
from remove_refusals.errors import CertificateError, CheckpointError
from remove_refusals.records import read_json, write_json
from remove_refusals.slices import COPY_BYTES, opened, write_from
from remove_refusals.sources import local_directory

RECORD = "restored.json"
"""What says afterwards that a directory was edited once, with the content of its `ablation.json`."""

_OF_THE_EDIT = ("ablation.json", "certificate.json")


@dataclass(frozen=True)
class Restored:
    """What was put back.

    Attributes:
        directory: Where.
        tensors: The tensors whose bytes were written again.
        files: The files that were replaced whole, since their tensors lay otherwise.
        removed: Weight files that the base does not have.
    """

    directory: Path
    tensors: tuple[str, ...]
    files: tuple[str, ...]
    removed: tuple[str, ...]


def restore(directory: Path | str, base: str, *, revision: str | None = None) -> Restored:
    """Make an edited model the base again, in its own directory.

    Until the end `ablation.json` stays where it is, so that an interrupted call can be repeated. Then its content goes
    into `restored.json`. Prompts, scores, directions and the model card are left.

    Args:
        directory: The edited model, with its `ablation.json`.
        base: The model that it was made from: a directory, a hub id in the local cache, or `demo`.
        revision: The hub's branch, tag or commit.

    Returns:
        What was put back.

    Raises:
        CheckpointError: If a file is missing or corrupt, or the base is not the one that the record names.
        CertificateError: If the tensors are not the base's afterwards.
        OutputError: If a file cannot be written.
    """
    target = Path(directory)
    record = read_json(target / "ablation.json", error=CheckpointError)
    source = local_directory(base, revision)
    if source is None:
        raise CheckpointError(
            f"The base {base} is neither a directory nor in the hub's local cache, expected its files; download it."
        )
    if source.resolve() == target.resolve():
        raise CheckpointError(f"The base {base} is the edited model itself, expected the one that it was made from.")
    _check_base(source, record)
    wanted = {path.name for path in checkpoint_files(source)}
    removed = [path for path in checkpoint_files(target) if path.name not in wanted]
    tensors: list[str] = []
    files: list[str] = []
    for path in checkpoint_files(source):
        found = _put_back(path, target / path.name)
        files += [path.name] if found is None else []
        tensors += found or []
    for name in (INDEX_FILE, "config.json", "generation_config.json"):
        if (source / name).is_file():
            _replace(source / name, target / name)
        elif name == INDEX_FILE:
            (target / name).unlink(missing_ok=True)
    for path in removed:
        path.unlink()
    if tensor_hashes(target) != tensor_hashes(source):
        raise CertificateError(
            f"The tensors of {target} are not those of {source} after they were put back, expected the same hashes; "
            "check the disk and repeat the command."
        )
    write_json(target / RECORD, {"restored": True, "was": record}, force=True)
    for name in _OF_THE_EDIT:
        (target / name).unlink(missing_ok=True)
    return Restored(target, tuple(tensors), tuple(files), tuple(path.name for path in removed))


def _check_base(source: Path, record: object) -> None:
    """Hold the base to the hashes in the record, where it has some."""
    known = record.get("base", {}).get("sha256", {}) if isinstance(record, dict) else {}
    names = [path.name for path in checkpoint_files(source) if path.name in known]
    if not names:
        return
    found = file_hashes(source)
    for name in names:
        if found[name] != known[name]:
            raise CheckpointError(
                f"The base's file {source / name} has SHA-256 {found[name][:12]}…, expected {known[name][:12]}… as "
                "ablation.json records it; give the model that the directory was made from."
            )


def _put_back(source: Path, target: Path) -> list[str] | None:
    """Write the tensors of one file that differ; None if it was replaced whole."""
    header = read_header(source)
    if not target.is_file() or read_header(target).tensors != header.tensors:
        _replace(source, target)
        return None
    written = []
    with opened(source) as original:
        descriptor = os.open(target, os.O_WRONLY)
        try:
            for tensor in header.tensors:
                if same_bytes((source, tensor), (target, tensor)):
                    continue
                for start in range(tensor.start, tensor.stop, COPY_BYTES):
                    block = os.pread(original, min(COPY_BYTES, tensor.stop - start), start)
                    write_from(descriptor, memoryview(block), start)
                written.append(tensor.name)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return written


def _replace(source: Path, target: Path) -> None:
    with atomic_file(target, force=True) as staging:
        shutil.copyfile(source, staging)
