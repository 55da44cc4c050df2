"""Directions on disk: read and written so that nothing in a file is executed."""

import hashlib
import io
import itertools
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import safetensors
import safetensors.torch
import torch

from remove_refusals.errors import DirectionError, OutputError
from remove_refusals.files import Record, atomic_file, check_target, versions
from remove_refusals.types import Direction, DirectionOrigin

DIRECTIONS = "directions"
"""Where a model's directory keeps its directions: servers take every safetensors file beside weights for weights."""

_METADATA_KEY = "remove_refusals"


class _Metadata(Record):
    """What a direction's file says beside the numbers."""

    format_version: Literal[1] = 1
    library_version: str | None = None
    origin: DirectionOrigin


def direction_sha256(direction: Direction) -> str:
    """Give the SHA-256 of `d_model x k` as text, a newline, and the basis in little-endian float32, row by row."""
    rows, columns = direction.basis.shape
    values = direction.basis.contiguous().numpy().astype("<f4").tobytes()
    return hashlib.sha256(f"{rows}x{columns}\n".encode() + values).hexdigest()


def describe_direction(direction: Direction) -> dict[str, Any]:
    """Say as JSON what a direction is and where it came from; what is not known is absent."""
    shape = {"d_model": direction.d_model, "rank": direction.basis.shape[1]}
    return {"sha256": direction_sha256(direction)} | shape | direction.origin.to_json()


def check_direction_path(path: Path, *, force: bool = False) -> None:
    """Check that `save_direction` will take a path; by force nothing is replaced but a direction."""
    _format(path)
    check_target(path, force=force, directory=False)
    if path.exists():
        try:
            load_direction(path)
        except DirectionError as error:
            raise OutputError(
                f"The file {path} is no direction, expected one that may be replaced; choose another path."
            ) from error


def save_direction(direction: Direction, path: Path | str, *, force: bool = False) -> None:
    """Write a direction to a `.safetensors` file with its origin, or to a plain `.pt` file.

    The safetensors file holds one tensor `direction`, `[d_model, k]` in float32, and under the metadata key
    `remove_refusals` a JSON object with the format version, the library's version and the origin. The same direction
    always gives the same bytes. The `.pt` file holds the bare vector, `[d_model]` in float32, and nothing else.

    Args:
        direction: The direction; a `.pt` file takes one column alone.
        path: The file to make; its suffix says which.
        force: Whether to replace an existing file.

    Raises:
        DirectionError: If the suffix is another, or the direction has several columns and the file is `.pt`.
        OutputError: If the file exists and `force` is not given, or cannot be written.

    Example:
        >>> save_direction(direction, "direction.safetensors")
    """
    path = Path(path)
    if _format(path) == ".safetensors":
        record = _Metadata(library_version=versions().get("remove-refusals"), origin=direction.origin)
        # One key only: safetensors writes several in an order that differs from run to run.
        content = safetensors.torch.save(
            {"direction": direction.basis.contiguous()}, metadata={_METADATA_KEY: json.dumps(record.to_json())}
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


def load_direction(path: Path | str) -> Direction:
    """Read a direction from `.safetensors`, or from a plain `.pt` file without executing anything in it.

    A safetensors file of this library is taken as it is. From any other file, a single vector of shape `[d_model]`,
    `[1, d_model]` or `[d_model, 1]` is taken, scaled to unit length, with the origin `given`.

    Args:
        path: The file.

    Returns:
        The direction.

    Raises:
        DirectionError: If the file cannot be read, or holds no such tensor.

    Example:
        >>> direction = load_direction("direction.safetensors")
    """
    path = Path(path)
    suffix = _format(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DirectionError(
            f"The direction file {path} cannot be read ({error.strerror}), expected a direction; check the path."
        ) from error
    if suffix == ".pt":
        return _from_vector(_read_torch_file(content, path), path)
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
    text = header.get("__metadata__", {}).get(_METADATA_KEY)
    if text is None:
        return _from_vector(tensors["direction"], path)
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    return Direction(tensors["direction"], _Metadata.of(record, path, error=DirectionError).origin)


def save_directions(directions: Sequence[Direction], directory: Path) -> None:
    """Write directions into a directory, as `direction.safetensors`, `direction-1.safetensors` and so on."""
    directory.mkdir(exist_ok=True)
    for direction, name in zip(directions, _names(), strict=False):
        save_direction(direction, directory / name)


def load_directions(path: Path | str) -> tuple[Direction, ...]:
    """Read the directions of a file, of a directory that `save_directions` wrote to, or of a model that holds one."""
    path = Path(path)
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


# What PyTorch's restricted unpickler was seen to raise when single bytes of a saved vector were changed.
_DAMAGE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError, struct.error)


def _read_torch_file(content: bytes, path: Path) -> object:
    """Read what `torch.save` wrote, tensors and plain containers only; nothing in it is executed."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise DirectionError(
            f"The direction file {path} is not in the format of `torch.save`, expected a vector saved by it; save it "
            "again with a current PyTorch."
        )
    try:
        value: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DirectionError(
            f"The direction file {path} is damaged or holds something other than tensors, which was not executed, "
            "expected one plain tensor; do not trust this file."
        ) from error
    except _DAMAGE as error:
        raise DirectionError(
            f"The direction file {path} is corrupt ({type(error).__name__}), expected a vector saved by `torch.save`; "
            "make it again."
        ) from error
    return value
