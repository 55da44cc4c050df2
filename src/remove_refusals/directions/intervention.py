"""Interventions on disk: what `run` and `bake` leave, to be made again in another way."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from remove_refusals.errors import DirectionError
from remove_refusals.modelmap import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.settings import (
    SITE_KINDS,
    EditSettings,
    SiteKind,
)
from remove_refusals.types import Direction, Intervention, SiteEdit


def intervene(
    direction: Direction,
    n_layers: int,
    *,
    strength: float = 1.0,
    layers: tuple[int, int] | None = None,
    kinds: Iterable[SiteKind] = SITE_KINDS,
) -> Intervention:
    """Take one direction out at one strength, at every site of a range of layers.

    Args:
        direction: What is taken out.
        n_layers: The model's number of layers.
        strength: The share that is taken out; 1 takes out all of it.
        layers: The first and the last layer, both included; None means all of them and the embedding. With a range,
            the embedding is edited only if it starts at layer 0.
        kinds: The kinds of site to edit.

    Returns:
        The intervention.

    Raises:
        DirectionError: If the range does not lie within the model, or the strength is not a finite number.
    """
    first, last = _checked_range(layers, n_layers, strength)
    wanted = frozenset(kinds)
    edits = [SiteEdit("embedding", None, strength)] if "embedding" in wanted and first == 0 else []
    for layer in range(first, last + 1):
        edits += [SiteEdit(kind, layer, strength) for kind in SITE_KINDS[1:] if kind in wanted]
    return Intervention((direction,), tuple(edits))


def intervene_per_layer(
    directions: Sequence[Direction],
    *,
    strength: float = 1.0,
    layers: tuple[int, int] | None = None,
    kinds: Iterable[SiteKind] = SITE_KINDS,
) -> Intervention:
    """Take from each layer's sites a direction of its own.

    Args:
        directions: One for each layer, as `mean_difference_per_layer` finds them; the embedding gets that of layer 0.
        strength: As for `intervene`.
        layers: As for `intervene`.
        kinds: As for `intervene`.

    Returns:
        The intervention, with the directions of the range of layers alone.

    Raises:
        DirectionError: If there is no direction, or as from `intervene`.
    """
    if not directions:
        raise DirectionError("There are 0 directions, expected one for each layer; find them first.")
    uniform = intervene(directions[0], len(directions), strength=strength, layers=layers, kinds=kinds)
    first, last = layers if layers is not None else (0, len(directions) - 1)
    edits = (replace(edit, direction=0 if edit.layer is None else edit.layer - first) for edit in uniform.edits)
    return Intervention(tuple(directions[first : last + 1]), tuple(edits))


def scaled(
    intervention: Intervention,
    n_layers: int,
    *,
    strength: float = 1.0,
    layers: tuple[int, int] | None = None,
    kinds: Iterable[SiteKind] = SITE_KINDS,
) -> Intervention:
    """Take out more or less of what an intervention takes out, at some of its sites.

    Args:
        intervention: The intervention.
        n_layers: The model's number of layers.
        strength: What its strengths are multiplied by.
        layers: As for `intervene`.
        kinds: As for `intervene`.

    Returns:
        The intervention, with all directions; the edits that are not kept are left out.

    Raises:
        DirectionError: As from `intervene`.
    """
    first, last = _checked_range(layers, n_layers, strength)
    wanted = frozenset(kinds)
    edits = tuple(
        replace(edit, strength=strength * edit.strength)
        for edit in intervention.edits
        if edit.kind in wanted and (first == 0 if edit.layer is None else first <= edit.layer <= last)
    )
    return Intervention(intervention.directions, edits)


def _checked_range(layers: tuple[int, int] | None, n_layers: int, strength: float) -> tuple[int, int]:
    """Give the first and last layer of a range, or of the model."""
    first, last = layers if layers is not None else (0, n_layers - 1)
    if not 0 <= first <= last < n_layers:
        raise DirectionError(
            f"The layer range {first}-{last} does not lie within the model's layers 0-{n_layers - 1}; "
            "give two of its layers, the lower one first."
        )
    if not -10 <= strength <= 10:
        raise DirectionError(f"The strength is {strength}, expected a number from -10 to 10; 1 takes out all of it.")
    return first, last


def check_fit(intervention: Intervention, model_map: ModelMap) -> None:
    """Check that an intervention's directions and layers are the model's.

    Raises:
        DirectionError: If a direction's width is not the model's, or an edit names a layer or direction that is not
            there, or a site twice.
    """
    for direction in intervention.directions:
        if direction.d_model != model_map.d_model:
            raise DirectionError(
                f"The direction has d_model {direction.d_model} and the model has d_model {model_map.d_model}, "
                "expected them to be equal; use a direction that was found on this model."
            )
    seen = set()
    for edit in intervention.edits:
        if edit.layer is not None and not 0 <= edit.layer < model_map.n_layers:
            raise DirectionError(
                f"The intervention edits layer {edit.layer}, expected one of the model's layers "
                f"0-{model_map.n_layers - 1}; use an intervention that was made for this model."
            )
        if not 0 <= edit.direction < len(intervention.directions) or (edit.kind, edit.layer) in seen:
            raise DirectionError(
                f"The intervention edits site {edit.kind} of layer {edit.layer} twice or with a direction that it "
                f"does not have ({edit.direction}), expected each site once; leave one of the edits out."
            )
        seen.add((edit.kind, edit.layer))


def made_intervention(
    loaded: "LoadedModel", directions: "tuple[Direction, ...]", settings: "EditSettings"
) -> tuple["Intervention", "ModelMap"]:
    """Map the model and make the intervention that the settings mean for it.

    Raises:
        ArchitectureError: If the model cannot be mapped.
        DirectionError: If the directions or the layers do not fit the model.
    """
    from remove_refusals.modelmap import derive as modelmap

    model_map = modelmap.map_model(loaded.model)
    return make_intervention(directions, settings, model_map), model_map


def make_intervention(
    found: Direction | tuple[Direction, ...], settings: EditSettings, model_map: ModelMap
) -> Intervention:
    """Apply one direction, or one for each layer, as the settings say.

    Raises:
        DirectionError: If there are several directions and not one for each layer, or their width is not the model's,
            the layers do not lie within the model.
    """
    directions = (found,) if isinstance(found, Direction) else found
    options: dict[str, Any] = {"strength": settings.strength, "layers": settings.layers, "kinds": settings.sites}
    if len(directions) == 1:
        intervention = intervene(directions[0], model_map.n_layers, **options)
    elif len(directions) != model_map.n_layers:
        raise DirectionError(
            f"There are {len(directions)} directions, expected one, or one for each of the model's "
            f"{model_map.n_layers} layers; use directions that were found on this model."
        )
    else:
        intervention = intervene_per_layer(directions, **options)
    check_fit(intervention, model_map)
    return intervention
