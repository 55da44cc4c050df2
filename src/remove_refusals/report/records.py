"""The records in a run's directory, as far as they are there."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from remove_refusals.errors import RecordError
from remove_refusals.files import read_json


@dataclass(frozen=True)
class Material:
    """What a report is made from; what is not in the directory is None.

    Attributes:
        ablation: The content of `ablation.json`: what was done.
        scores: Of `scores.json`: what was measured.
        selection: Of `selection.json`: what a search tried.
        certificate: Of `certificate.json`: what the saved files hold.
        analysis: Of `analysis.json`: how far apart harmful and harmless prompts lie.
        rows: Of `rows.jsonl`: every answer.
    """

    ablation: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    selection: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    analysis: dict[str, Any] | None = None
    rows: tuple[dict[str, Any], ...] | None = None


NAMES = tuple(f"{field.name}.{'jsonl' if field.name == 'rows' else 'json'}" for field in fields(Material))
"""The files that a report is made from."""


def read_material(directory: Path) -> Material:
    """Read the records in a directory.

    Args:
        directory: What `run` left, or any directory with some of the same files.

    Returns:
        The records.

    Raises:
        RecordError: If it is no directory, holds none of them, or one that cannot be read or is no JSON object.
    """
    if not directory.is_dir():
        raise RecordError(f"There is no directory {directory}, expected one that `run` made; check the path.")
    found: dict[str, Any] = {}
    for name in NAMES:
        path = directory / name
        if not path.is_file():
            continue
        found[path.stem] = _rows(path) if path.suffix == ".jsonl" else _object(path)
    if not found:
        raise RecordError(
            f"The directory {directory} holds none of {', '.join(NAMES)}, expected at least one; name a directory that "
            "`run` made."
        )
    return Material(**found)


def _object(path: Path) -> dict[str, Any]:
    data = read_json(path, error=RecordError)
    if not isinstance(data, dict):
        raise RecordError(
            f"The record {path} holds a {type(data).__name__}, expected a JSON object; make the directory again."
        )
    return data


def _rows(path: Path) -> tuple[dict[str, Any], ...]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise ValueError(f"line {number} is a {type(row).__name__}")
                rows += [row] if row is not None else []
    except (OSError, ValueError, RecursionError) as cause:
        raise RecordError(
            f"The record {path} cannot be read ({cause}), expected one JSON object a line; make the directory again."
        ) from cause
    return tuple(rows)
