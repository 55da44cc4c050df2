"""Interventions on disk: what `run` and `bake` leave, to be made again in another way."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from remove_refusals.atomic import atomic_file
from remove_refusals.direction_files import DIRECTIONS, direction_sha256, load_directions
from remove_refusals.errors import DirectionError
from remove_refusals.records import read_json
from remove_refusals.types import SITE_KINDS, Direction, DirectionOrigin, Intervention, SiteEdit

RECORD = "ablation.json"
CANDIDATES = f"{DIRECTIONS}/candidates.safetensors"


def load_intervention(directory: Path) -> Intervention:
    """Read the intervention that a directory was made with.

    Args:
        directory: What `run` or `bake` made: it holds `ablation.json` and the directions.

    Returns:
        The intervention, strengths of every site included; it can be resolved against the same base again.

    Raises:
        DirectionError: If the record or a direction is missing or not as this library writes it.
    """
    record = read_json(directory / RECORD, error=DirectionError)
    edits = record.get("intervention") if isinstance(record, dict) else None
    if not isinstance(edits, list) or not edits:
        raise DirectionError(
            f"The record {directory / RECORD} has the intervention {edits}, expected a list of edits; give a directory "
            "that `run` or `bake` made."
        )
    return Intervention(load_directions(directory), tuple(_edit(edit, directory) for edit in edits))


def _edit(value: object, directory: Path) -> SiteEdit:
    edit: Mapping[str, Any] = value if isinstance(value, dict) else {}
    strength, layer, direction = edit.get("strength"), edit.get("layer"), edit.get("direction", 0)
    offset = edit.get("offset", [])
    kind = next((kind for kind in SITE_KINDS if kind == edit.get("kind")), None)
    numbers = [strength, *(offset if isinstance(offset, list) else [None])]
    fine = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
    places = all(isinstance(place, int) for place in (direction, 0 if layer is None else layer))
    if (
        kind is None
        or not fine
        or not places
        or not edit.keys() <= {"kind", "layer", "strength", "direction", "offset"}
    ):
        raise DirectionError(
            f"The record {directory / RECORD} has the edit {value}, expected a kind of site, a layer, a strength and a "
            "direction; give a directory that this version of `run` or `bake` made."
        )
    return SiteEdit(kind, layer, float(numbers[0]), direction, tuple(float(number) for number in numbers[1:]))


def save_candidates(interventions: Mapping[int, Intervention], path: Path) -> None:
    """Write the directions of candidates, by their number in `selection.json`, each direction once.

    Args:
        interventions: The interventions by the candidate's number.
        path: The safetensors file to make; nothing may lie there.

    Raises:
        OutputError: If it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, list[str]] = {}
    for number, intervention in interventions.items():
        names[str(number)] = [direction_sha256(direction)[:16] for direction in intervention.directions]
        tensors |= dict(
            zip(names[str(number)], (one.basis.contiguous() for one in intervention.directions), strict=True)
        )
    with atomic_file(path) as staging:
        safetensors.torch.save_file(tensors, staging, {"candidates": json.dumps(names)})


def load_candidates(directory: Path) -> dict[str, Intervention]:
    """Read the candidates of a run's search whose directions were kept: the front, and what was confirmed.

    Args:
        directory: What `run` left.

    Returns:
        The interventions by the candidate's name, in the order of `selection.json`; empty if nothing was searched.

    Raises:
        DirectionError: If the files are not as this library writes them.
    """
    path = directory / CANDIDATES
    if not path.exists():
        return {}
    record = read_json(directory / "selection.json", error=DirectionError)
    try:
        assert isinstance(record, dict)
        with safetensors.safe_open(path, framework="pt") as file:
            names = json.loads(file.metadata()["candidates"])
            bases = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        found = {}
        for number, kept in sorted(names.items(), key=lambda item: int(item[0])):
            candidate = record["candidates"][int(number)]
            directions = tuple(Direction(bases[name], DirectionOrigin("search")) for name in kept)
            edits = (
                {"kind": edit["site"], **{key: edit[key] for key in ("layer", "strength", "direction")}}
                for edit in candidate["strengths"]
            )
            found[candidate["name"]] = Intervention(directions, tuple(_edit(edit, directory) for edit in edits))
    except (AssertionError, KeyError, IndexError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise DirectionError(
            f"The candidates in {path} cannot be read ({type(error).__name__}: {error}), expected what `run` leaves; "
            "make the directory again."
        ) from error
    return found
