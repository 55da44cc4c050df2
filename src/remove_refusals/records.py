"""What is written down and read back: JSON and JSONL, and which versions wrote it."""

import json
import math
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from remove_refusals.atomic import atomic_file
from remove_refusals.errors import NumericalError, RemoveRefusalsError

_PACKAGES = ("remove-refusals", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Say which versions are running.

    Returns:
        The versions of Python, this package, torch, transformers and safetensors; one that is not installed is absent.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # Run from a source tree that was never installed: a version that is not known is not written down.
            continue
    return found


def write_json(path: Path, data: object, *, force: bool = False) -> None:
    """Write JSON in UTF-8 with the keys in the order given, indented by 2, ending in a newline; whole or not at all.

    Args:
        path: The file to write.
        data: Dictionaries with string keys, lists, tuples, strings, numbers, booleans and None.
        force: Whether an existing file is replaced.

    Raises:
        NumericalError: If a number is NaN or infinite; the message says where it is.
        OutputError: If the file exists and `force` is not given, or cannot be written.
    """
    _check_finite(data, path, "$")
    text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    _write_bytes(path, text.encode(), force=force)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]], *, force: bool = False) -> None:
    """Write one JSON object a line in UTF-8, in the order given; whole or not at all.

    Args:
        path: The file to write.
        rows: The objects; they are written as they come, so a generator need not fit in memory.
        force: Whether an existing file is replaced.

    Raises:
        NumericalError: If a number is NaN or infinite; the message says in which row.
        OutputError: If the file exists and `force` is not given, or cannot be written.
    """
    with atomic_file(path, force=force) as staging, staging.open("w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(rows, start=1):
            _check_finite(row, path, f"row {number}")
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, error: type[RemoveRefusalsError]) -> object:
    """Read a JSON file in UTF-8.

    Args:
        path: The file.
        error: The type to raise, which depends on what the file is for.

    Returns:
        What it holds.

    Raises:
        RemoveRefusalsError: Of the given type, if the file cannot be read or is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(
            f"The file {path} cannot be read ({cause.strerror}), expected JSON; check the path and its permissions."
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise error(
            f"The file {path} is not JSON in UTF-8 ({cause}), expected a whole JSON file; write or download it again."
        ) from cause


def _check_finite(data: object, path: Path, place: str) -> None:
    if isinstance(data, float) and not math.isfinite(data):
        raise NumericalError(
            f"The value at {place} for {path} is {data}, expected a finite number; what was not measured is left out."
        )
    if isinstance(data, Mapping):
        for key, value in data.items():
            _check_finite(value, path, f"{place}.{key}")
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            _check_finite(value, path, f"{place}[{index}]")


def _write_bytes(path: Path, content: bytes, *, force: bool) -> None:
    with atomic_file(path, force=force) as staging:
        staging.write_bytes(content)
