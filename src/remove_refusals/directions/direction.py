"""From activations to a direction."""

import hashlib
import io
import itertools
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import safetensors.torch
import torch

from remove_refusals.directions.activations import collect_activations
from remove_refusals.errors import DirectionError, NumericalError, OutputError
from remove_refusals.files import atomic_file, check_target, versions
from remove_refusals.formula import orthonormal_basis
from remove_refusals.modelmap import ModelMap, map_model
from remove_refusals.models import LoadedModel, check_positions
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import draw, prompts_from
from remove_refusals.settings import DirectionSettings, published_name
from remove_refusals.types import Activations, Direction, DirectionOrigin, PromptSet


def layer_index(layer: float | int, n_layers: int) -> int:
    """Turn a layer given as a fraction of depth or as an index into an index.

    Args:
        layer: A float is a fraction of depth from 0.0 to 1.0, rounded down; an int is an index.
        n_layers: The model's number of layers.

    Returns:
        The index on the layer axis of `Activations.hidden`: the residual stream before that layer, and `n_layers` for
        the stream after the last.

    Raises:
        DirectionError: If it does not lie within the model.
    """
    if not 0 <= layer <= (1 if isinstance(layer, float) else n_layers):
        raise DirectionError(
            f"Layer {layer} does not lie within a model of {n_layers} layers; "
            f"give a fraction from 0.0 to 1.0 or an index from 0 to {n_layers}."
        )
    return int(layer * n_layers) if isinstance(layer, float) else layer


def direction_from_vectors(vectors: torch.Tensor, origin: DirectionOrigin) -> Direction:
    """Build a checked direction.

    Args:
        vectors: `[d_model]` or `[d_model, k]`, any floating-point dtype, independent columns of any length.
        origin: Where they came from.

    Returns:
        The direction, with an orthonormal basis of the columns' span.

    Raises:
        DirectionError: If the vectors are not finite or not independent.
    """
    columns = vectors.detach().to("cpu")
    return Direction(orthonormal_basis(columns.unsqueeze(1) if columns.dim() == 1 else columns), origin)


def hidden_at(activations: Activations, index: int, position: int) -> torch.Tensor:
    """Give the hidden states at one layer and position.

    Args:
        activations: What was collected.
        index: The index on the layer axis.
        position: The token position.

    Returns:
        `[n_prompts, d_model]`, float64.

    Raises:
        DirectionError: If the position was not collected.
        NumericalError: If an activation is NaN or infinite.
    """
    if position not in activations.positions:
        raise DirectionError(
            f"Position {position} was not collected, expected one of {list(activations.positions)}; "
            "collect the activations at that position."
        )
    hidden = activations.hidden[:, activations.positions.index(position), index].to(torch.float64)
    bad = ~torch.isfinite(hidden).all(dim=1)
    if bool(bad.any()):
        number = int(bad.nonzero()[0])
        raise NumericalError(
            f"The activations of prompt {number} of set '{activations.prompts.name}' at layer index {index} are NaN or "
            "infinite, expected finite numbers; load the model in float32 or check its weights."
        )
    return hidden


def mean_difference(
    harmful: Activations,
    harmless: Activations,
    *,
    layer: float | int = 0.6,
    position: int | Sequence[int] = -1,
    projected: bool = False,
    model: str | None = None,
    seed: int | None = None,
) -> Direction:
    """The difference of the mean activations on harmful and harmless prompts (Arditi et al. 2024, section 2.3).

    Args:
        harmful: Activations on prompts that the model refuses.
        harmless: Activations on prompts that it answers.
        layer: A fraction of depth (float) or an index (int) on the layer axis.
        position: The token position, one of those that were collected; for several of them the direction gets a column
            for each.
        projected: Whether the component along the harmless mean is removed first. Where one coordinate holds most of
            the residual stream's norm, the plain difference leans on it and taking it out destroys the model.
        model: The model's name, for the record.
        seed: The seed that drew the prompts, for the record.

    Returns:
        The direction: an orthonormal basis of the differences, computed in float64 and kept in float32.

    Raises:
        DirectionError: If the two sets do not fit together, were not collected there, or have equal means, or if the
            differences at several positions are linearly dependent.
        NumericalError: If an activation is NaN or infinite.
    """
    if harmful.hidden.shape[2:] != harmless.hidden.shape[2:]:
        raise DirectionError(
            f"The harmful activations have (layers + 1, d_model) {tuple(harmful.hidden.shape[2:])} and the harmless "
            f"ones {tuple(harmless.hidden.shape[2:])}, expected them to be equal; collect both on one model."
        )
    index = layer_index(layer, harmful.n_layers)
    positions = (position,) if isinstance(position, int) else tuple(position)
    harmless_means, harmful_means = (
        torch.stack([hidden_at(part, index, place).mean(dim=0) for place in positions], dim=1)
        for part in (harmless, harmful)
    )
    differences = harmful_means - harmless_means
    if projected:
        units = harmless_means / harmless_means.norm(dim=0)
        differences = differences - units * (units * differences).sum(dim=0)
    basis = orthonormal_basis(differences)
    return Direction(
        basis,
        DirectionOrigin(
            method="projected-mean-difference" if projected else "mean-difference",
            model=model,
            layer=index,
            position=positions if len(positions) > 1 else positions[0],
            seed=seed,
            n_harmful=len(harmful.prompts),
            n_harmless=len(harmless.prompts),
            harmful_sha256=harmful.prompts.sha256,
            harmless_sha256=harmless.prompts.sha256,
            length=float(differences.norm()) if len(positions) == 1 else None,
        ),
    )


def mean_difference_per_layer(
    harmful: Activations,
    harmless: Activations,
    *,
    position: int | Sequence[int] = -1,
    projected: bool = False,
    model: str | None = None,
    seed: int | None = None,
) -> tuple[Direction, ...]:
    """One direction for each layer: the difference of the mean activations in the stream behind it.

    Args:
        harmful: Activations on prompts that the model refuses, of every layer.
        harmless: Activations on prompts that it answers, of every layer.
        position: As for `mean_difference`.
        projected: As for `mean_difference`.
        model: The model's name, for the record.
        seed: The seed that drew the prompts, for the record.

    Returns:
        As many directions as layers were looked at; that of layer `i` is found at index `i + 1` on the layer axis.

    Raises:
        DirectionError: As from `mean_difference`, or if no layer was looked at.
        NumericalError: If an activation is NaN or infinite.
    """
    if harmful.n_layers == 0:
        raise DirectionError("The activations are of 0 layers, expected at least 1; collect them behind every layer.")
    return tuple(
        mean_difference(harmful, harmless, layer=index, position=position, projected=projected, model=model, seed=seed)
        for index in range(1, harmful.n_layers + 1)
    )


def largest_coordinate_share(activations: Sequence[Activations], index: int, position: int) -> float:
    """How much of the residual stream's mean squared norm lies in one coordinate.

    Args:
        activations: One or more sets from one model.
        index: The layer axis's index.
        position: The token position.

    Returns:
        The largest coordinate's share of the summed squares, from `1 / d_model` to 1. Near 1, the plain mean difference
        leans on that coordinate.

    Raises:
        DirectionError: If the position was not collected.
        NumericalError: If an activation is NaN or infinite.
    """
    squares = torch.cat([hidden_at(part, index, position) for part in activations]).square().sum(dim=0)
    return float(squares.max() / squares.sum())


@dataclass(frozen=True, eq=False)
class FoundDirection:
    """A direction, or one for each layer, with what its record needs.

    Attributes:
        directions: The directions.
        prompts: The harmful and the harmless prompts that they were found on; empty for those from a file.
        largest_coordinate: The largest share of the residual stream's mean squared norm that lies in one coordinate
            there; None for directions from a file.
    """

    directions: tuple[Direction, ...]
    prompts: tuple[PromptSet, ...]
    largest_coordinate: float | None

    @property
    def direction(self) -> Direction:
        """The only direction, or the first layer's."""
        return self.directions[0]


def training_prompts(settings: DirectionSettings) -> tuple[PromptSet, PromptSet]:
    """Load the harmful and the harmless prompts and draw from both.

    Raises:
        PromptError: If a set cannot be loaded or has fewer prompts than are to be drawn.
    """
    harmful = prompts_from(settings.harmful, "harmful", "harmful_train")
    harmless = prompts_from(settings.harmless, "harmless", "harmless_train")
    return draw(harmful, settings.n_prompts, settings.seed), draw(harmless, settings.n_prompts, settings.seed)


def find_direction(
    loaded: LoadedModel,
    settings: DirectionSettings,
    *,
    prompts: tuple[PromptSet, PromptSet] | None = None,
    model_map: ModelMap | None = None,
    progress: Progress = SILENT,
) -> FoundDirection:
    """Collect the activations of harmful and harmless prompts and take the difference of the means.

    The prompts are those of `training_prompts`, if they are not given.

    Raises:
        PromptError: If prompts cannot be loaded, or the position does not lie within the chat template's tail.
        DirectionError: If the layer does not lie within the model.
        NumericalError: If activations are NaN or infinite.
    """
    harmful, harmless = prompts or training_prompts(settings)
    check_positions(loaded, settings.positions)
    model_map = model_map or map_model(loaded.model)
    indices = _indices(settings, model_map.n_layers)
    collect = partial(
        collect_activations,
        loaded,
        positions=settings.positions,
        n_layers=max(indices),
        model_map=model_map,
    )
    progress = progress.stage("activations", len(harmful) + len(harmless))
    if loaded.is_offloaded:
        # In one go, which reads the weights once.
        both = PromptSet("both", harmful.prompts + harmless.prompts, harmful.source)
        found = collect(both, progress=progress)
        cut = len(harmful)
        parts = [
            Activations(found.hidden[:cut], found.positions, harmful),
            Activations(found.hidden[cut:], found.positions, harmless),
        ]
    else:
        parts = [
            collect(part, progress=progress.after(before)) for before, part in ((0, harmful), (len(harmful), harmless))
        ]
    options: dict[str, Any] = {"position": settings.position, "projected": settings.projected}
    options |= {"model": published_name(loaded.source), "seed": settings.seed}
    if settings.per_layer:
        directions = mean_difference_per_layer(parts[0], parts[1], **options)
    else:
        directions = (mean_difference(parts[0], parts[1], layer=indices[0], **options),)
    shares = (largest_coordinate_share(parts, index, place) for index in indices for place in settings.positions)
    return FoundDirection(directions, (harmful, harmless), max(shares))


def _indices(settings: DirectionSettings, n_layers: int) -> tuple[int, ...]:
    """Where directions are found, on the layer axis of the activations."""
    return tuple(range(1, n_layers + 1)) if settings.per_layer else (layer_index(settings.layer, n_layers),)


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
    length = origin.get("length")
    if length is not None and not (isinstance(length, float) and 0 < length < math.inf):
        raise DirectionError(
            f"The direction file {path} has the length {length}, expected a number above 0; make the file again."
        )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in origin.items()}
    return DirectionOrigin(**values)


# What PyTorch's restricted unpickler was seen to raise when single bytes of a saved vector were changed.
_DAMAGE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError, struct.error)


def read_torch_file(content: bytes, path: Path) -> object:
    """Read what `torch.save` wrote, tensors and plain containers only; nothing in it is executed.

    Args:
        content: The file's bytes.
        path: The file, for the message.

    Returns:
        What it holds, on the CPU.

    Raises:
        DirectionError: If it is not such a file, is damaged, or holds anything else, such as code.
    """
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
