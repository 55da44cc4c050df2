"""Repeat a run from its record, and say file by file what came out the same."""

import hashlib
import tempfile
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from remove_refusals.checkpoint import file_hashes
from remove_refusals.errors import RecordError
from remove_refusals.judges import PhraseJudge
from remove_refusals.pipeline import run
from remove_refusals.records import read_json
from remove_refusals.settings import PromptSource, RunSettings
from remove_refusals.sources import local_directory
from remove_refusals.stages import OnProgress

_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Reproduction:
    """What a repeated run gave, by file name.

    Attributes:
        same: Files with the same SHA-256.
        different: Files that differ: name, hash in the directory, hash of the repeated run.
        missing: Files that the repeated run did not make.
        new: Files that only the repeated run made.
        versions: What runs in another version now: name, version of the record, version now.
    """

    same: tuple[tuple[str, str], ...]
    different: tuple[tuple[str, str, str], ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    versions: tuple[tuple[str, str, str], ...]

    @property
    def weights_alike(self) -> bool:
        """Whether every weight and direction file came out the same."""
        apart = [name for name, _, _ in self.different] + [*self.missing, *self.new]
        return not any(name.endswith(_WEIGHTS) for name in apart)

    def to_json(self) -> dict[str, Any]:
        """Give the attributes."""
        return {"weights_alike": self.weights_alike} | {field.name: getattr(self, field.name) for field in fields(self)}


def reproduce(
    directory: Path,
    *,
    model: str | None = None,
    files: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Reproduction:
    """Repeat a run.

    Args:
        directory: What `run` left.
        model: Where the base model is; by default as the record calls it.
        files: Where prompt files, and whatever else the settings name, lie; the record holds their names alone. By
            default the working directory.
        on_progress: Told of every stage.

    Returns:
        What came out the same.

    Raises:
        RecordError: If there is no record, or a file that it names cannot be found, or the base model is another one.
        RemoveRefusalsError: Of the type that fits what went wrong in the run.
    """
    record = read_json(directory / "ablation.json", error=RecordError)
    try:
        assert isinstance(record, dict)
        settings = TypeAdapter(RunSettings).validate_python(record["settings"])
        base, prompts, before = record["base"], record["prompts"], record["versions"]
    except (AssertionError, KeyError, ValidationError) as error:
        raise RecordError(
            f"The record {directory / 'ablation.json'} does not hold the settings of a run ({type(error).__name__}), "
            "expected what this version writes; use the version that made it."
        ) from error
    settings = replace(_located(settings, files or Path()), model=model or settings.model)
    _check_base(settings, base)
    given = None if any("_test" not in name for name in prompts) else directory
    # Beside the directory, where there is room for a model.
    with tempfile.TemporaryDirectory(dir=directory.resolve().parent, prefix=".reproduce-") as scratch:
        # Under its own name, which stands in the records.
        again = Path(scratch) / directory.resolve().name
        result = run(settings, again, direction_file=given, on_progress=on_progress)
        after = result.baked.record["versions"]
        return _compare(directory, again, before, after)


def _located(settings: Any, files: Path) -> Any:
    """Give the settings with every prompt file, text and task directory where it lies."""
    if isinstance(settings, PromptSource):
        return settings if settings.source is None else replace(settings, source=_found(settings.source, files))
    if isinstance(settings, tuple):
        return tuple(_located(part, files) for part in settings)
    if not is_dataclass(settings) or isinstance(settings, type):
        return settings
    changed = {field.name: _located(getattr(settings, field.name), files) for field in fields(settings)}
    for name in ("text", "task_directory", "calibration", "judge"):
        if isinstance(changed.get(name), str) and changed[name] != PhraseJudge.name:
            changed[name] = _found(changed[name], files)
    return replace(settings, **changed)


def _found(name: str, files: Path) -> str:
    place = files / name
    if place.exists():
        return str(place)
    # A hub id or an address is its own place; the name of a local file has no directory.
    if "/" in name:
        return name
    raise RecordError(
        f"The run was made with a file '{name}', expected it in {files.resolve()}; pass --files with the directory "
        "that holds it."
    )


def _check_base(settings: RunSettings, base: dict[str, Any]) -> None:
    place = local_directory(settings.model, settings.loading.revision)
    if place is None or "sha256" not in base:
        return
    now = file_hashes(place)
    differing = sorted(name for name, sha in base["sha256"].items() if now.get(name) != sha)
    if differing:
        raise RecordError(
            f"The base model {settings.model} is not the one of the record: {differing[0]} "
            f"({len(differing)} files in all) differs, expected the same hashes; pass --model with the right one."
        )


def _compare(directory: Path, again: Path, before: dict[str, str], after: dict[str, str]) -> Reproduction:
    first, second = _hashes(directory), _hashes(again)
    shared = sorted(first.keys() & second.keys())
    return Reproduction(
        same=tuple((name, first[name]) for name in shared if first[name] == second[name]),
        different=tuple((name, first[name], second[name]) for name in shared if first[name] != second[name]),
        missing=tuple(sorted(first.keys() - second.keys())),
        new=tuple(sorted(second.keys() - first.keys())),
        versions=tuple(
            (name, version, after.get(name, "none"))
            for name, version in before.items()
            if after.get(name, "none") != version
        ),
    )


def _hashes(directory: Path) -> dict[str, str]:
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
