"""Directions on disk, with where they came from."""

import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import safetensors.torch
import torch

from remove_refusals.atomic import atomic_file, check_target
from remove_refusals.errors import DirectionError, OutputError
from remove_refusals.records import versions
from remove_refusals.torch_files import read_torch_file
from remove_refusals.types import Direction, DirectionOrigin

DIRECTION_FORMAT_VERSION = 1

DIRECTIONS = "directions"
"""Where a model's directory keeps its directions: servers take every safetensors file beside weights for weights."""

_METADATA_KEY = "remove_refusals"


def direction_sha256(direction: Direction) -> str:
    """Hash a direction, so that records can name it.

    Args:
        direction: The direction.

    Returns:
        SHA-256, as 64 hex digits, of `d_model x k` as text, a newline, and the basis in little-endian float32, row by
        row; the origin does not matter.
    """
    rows, columns = direction.basis.shape
    values = direction.basis.contiguous().numpy().astype("<f4").tobytes()
    return hashlib.sha256(f"{rows}x{columns}\n".encode() + values).hexdigest()


def describe_direction(direction: Direction) -> dict[str, Any]:
    """Say as JSON what a direction is and where it came from; what is not known is absent.

    Args:
        direction: The direction.

    Returns:
        `sha256`, `d_model`, `rank`, and what is known of its origin.
    """
    known = {key: value for key, value in vars(direction.origin).items() if value is not None}
    rank = direction.basis.shape[1]
    return {"sha256": direction_sha256(direction), "d_model": direction.d_model, "rank": rank} | known


def check_direction_path(path: Path, *, force: bool = False) -> None:
    """Check that `save_direction` will take a path, before the work that leads to a direction is done.

    Args:
        path: Where the direction is to go.
        force: Whether an existing file is replaced.

    Raises:
        DirectionError: If the suffix is neither `.safetensors` nor `.pt`.
        OutputError: If the file exists and `force` is not given, if it is a directory, or if it holds anything but a
            direction, such as a model's weights.
    """
    _format(path)
    check_target(path, force=force, directory=False)
    if path.exists():
        try:
            load_direction(path)
        except DirectionError as error:
            raise OutputError(
                f"The file {path} is no direction, expected one that may be replaced; choose another path."
            ) from error


def save_direction(direction: Direction, path: Path, *, force: bool = False) -> None:
    """Write a direction to a `.safetensors` file with its origin, or to a plain `.pt` file.

    The safetensors file holds one tensor `direction`, `[d_model, k]` in float32, and under the metadata key
    `remove_refusals` a JSON object with the format version, the library's version and the origin. The same direction
    always gives the same bytes. The `.pt` file holds the bare vector, `[d_model]` in float32, and nothing else.

    Args:
        direction: The direction.
        path: Where to; the suffix decides the format.
        force: Whether an existing file is replaced.

    Raises:
        DirectionError: If the suffix is neither, or if a direction of more than one column is to go to `.pt`.
        OutputError: If the file exists and `force` is not given, or cannot be written.
    """
    if _format(path) == ".safetensors":
        record = {
            "format_version": DIRECTION_FORMAT_VERSION,
            "library_version": versions().get("remove-refusals"),
            "origin": asdict(direction.origin),
        }
        # One key only: safetensors writes several in an order that differs from run to run.
        content = safetensors.torch.save(
            {"direction": direction.basis.contiguous()}, metadata={_METADATA_KEY: json.dumps(record)}
        )
    else:
        if direction.basis.shape[1] != 1:
            raise DirectionError(
                f"The direction has {direction.basis.shape[1]} columns, expected 1 for the plain format of {path}; "
                "save it as .safetensors."
            )
        buffer = io.BytesIO()
        torch.save(direction.basis[:, 0].clone(), buffer)
        content = buffer.getvalue()
    with atomic_file(path, force=force) as staging:
        staging.write_bytes(content)


def load_direction(path: Path) -> Direction:
    """Read a direction from `.safetensors`, or from a plain `.pt` file without executing anything in it.

    A safetensors file of this library is taken as it is. From any other file, a single vector of shape `[d_model]`,
    `[1, d_model]` or `[d_model, 1]` is taken, scaled to unit length, with the origin `given`.

    Args:
        path: The file.

    Returns:
        The direction, in float32 on the CPU.

    Raises:
        DirectionError: If the file is missing, corrupt, of another format, holds code, or holds no usable direction.
    """
    suffix = _format(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DirectionError(
            f"The direction file {path} cannot be read ({error.strerror}), expected a direction; check the path."
        ) from error
    if suffix == ".pt":
        return _from_vector(read_torch_file(content, path), path)
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise DirectionError(
            f"The direction file {path} is corrupt ({error}), expected a whole safetensors file; make it again."
        ) from error
    if list(tensors) != ["direction"]:
        raise DirectionError(
            f"The direction file {path} holds the tensors {sorted(tensors)[:5]}, expected one named `direction`; "
            "give the file of a direction, not of a model."
        )
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    record = header.get("__metadata__", {}).get(_METADATA_KEY)
    if record is None:
        return _from_vector(tensors["direction"], path)
    return Direction(tensors["direction"], _origin(record, path))


def save_directions(directions: Sequence[Direction], directory: Path) -> None:
    """Write directions into a directory, as `direction.safetensors`, `direction-1.safetensors` and so on.

    Args:
        directions: The directions.
        directory: The directory; it is made if its parent is there.

    Raises:
        OutputError: If one of the files exists or cannot be written.
    """
    directory.mkdir(exist_ok=True)
    for direction, name in zip(directions, _names(), strict=False):
        save_direction(direction, directory / name)


def load_directions(path: Path) -> tuple[Direction, ...]:
    """Read the directions that a path names.

    Args:
        path: A file of one direction, a directory that `save_directions` wrote to, or a model's directory that holds
            one.

    Returns:
        The directions, at least one.

    Raises:
        DirectionError: As from `load_direction`, or if the directory holds none.
    """
    if not path.is_dir():
        return (load_direction(path),)
    path = path / DIRECTIONS if (path / DIRECTIONS).is_dir() else path
    files = tuple(itertools.takewhile(Path.is_file, (path / name for name in _names())))
    if not files:
        raise DirectionError(
            f"The directory {path} has no direction.safetensors, expected one as `direction --per-layer` or `bake` "
            "writes it; check the path."
        )
    return tuple(load_direction(file) for file in files)


def _names() -> Iterator[str]:
    yield "direction.safetensors"
    yield from (f"direction-{number}.safetensors" for number in itertools.count(1))


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt"):
        raise DirectionError(
            f"The direction file {path} has the suffix {suffix!r}, expected .safetensors or .pt; choose one of them."
        )
    return suffix


def _from_vector(value: object, path: Path) -> Direction:
    if not _is_vector(value):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise DirectionError(
            f"The direction file {path} holds {found}, expected one floating-point vector of shape [d_model]; save "
            "the vector alone."
        )
    vector = value.detach().reshape(-1, 1).double()
    norm = float(vector.norm())
    if not math.isfinite(norm) or norm == 0:
        raise DirectionError(
            f"The vector in {path} has the length {norm}, expected a finite one above 0; compute it again."
        )
    return Direction((vector / norm).float(), DirectionOrigin(method="given"))


def _is_vector(value: object) -> TypeGuard[torch.Tensor]:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.dim() in (1, 2)
        and value.numel() == max(value.shape) > 0
        # A view can claim more elements than the file holds, up to any size.
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _origin(record: str, path: Path) -> DirectionOrigin:
    try:
        content = json.loads(record)
    except ValueError:
        content = None
    version = content.get("format_version") if isinstance(content, dict) else None
    origin = content.get("origin") if isinstance(content, dict) else None
    if version != DIRECTION_FORMAT_VERSION:
        raise DirectionError(
            f"The direction file {path} has the format version {version}, expected {DIRECTION_FORMAT_VERSION}; read "
            "it with the version of this library that wrote it, or make it again."
        )
    names = {field.name for field in fields(DirectionOrigin)}
    if not isinstance(origin, dict) or "method" not in origin or not origin.keys() <= names:
        raise DirectionError(
            f"The direction file {path} has the origin {origin}, expected an object with the fields "
            f"{', '.join(sorted(names))}; make the file again."
        )
    component = origin.get("harmless_component") or []
    if not isinstance(component, list) or not all(isinstance(n, float) and math.isfinite(n) for n in component):
        raise DirectionError(
            f"The direction file {path} has the harmless component {component}, expected a list of numbers; make the "
            "file again."
        )
    length = origin.get("length")
    if length is not None and not (isinstance(length, float) and 0 < length < math.inf):
        raise DirectionError(
            f"The direction file {path} has the length {length}, expected a number above 0; make the file again."
        )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in origin.items()}
    return DirectionOrigin(**values)
