"""Interventions on disk: what `run` and `bake` leave, to be made again in another way."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remove_refusals.direction_files import load_directions
from remove_refusals.errors import DirectionError
from remove_refusals.records import read_json
from remove_refusals.types import SITE_KINDS, Intervention, SiteEdit

RECORD = "ablation.json"


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
