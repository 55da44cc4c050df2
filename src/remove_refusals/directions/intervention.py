"""From directions to an intervention: which direction is taken out where, and how much of it."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.modelmap import ModelMap, map_model
from remove_refusals.models import LoadedModel
from remove_refusals.settings import SITE_KINDS, EditSettings, SiteKind
from remove_refusals.types import Direction, Intervention, SiteEdit

Taken = Intervention | Direction | Sequence[Direction] | torch.Tensor
"""What can be taken out: an intervention; one direction, or one for each layer; or a plain tensor of directions of any
length: `[d_model]`, `[1, d_model]` or `[d_model, k]`."""


def as_intervention(
    what: Taken, model: PreTrainedModel | LoadedModel | ModelMap, settings: EditSettings | None = None
) -> Intervention:
    """Make the intervention that is meant for a model, and check that it fits; strengths it has are multiplied.

    Experts that the settings silence come to it as they are, and need no direction beside them.
    """
    model_map = model if isinstance(model, ModelMap) else map_model(model)
    if isinstance(what, torch.Tensor):
        what = _direction(what, model_map.d_model)
    if isinstance(what, Intervention):
        check_fit(what, model_map)
    edit = settings or EditSettings()
    if edit.silence_experts and isinstance(what, tuple) and not what:
        what = Intervention((), ())
    made = intervene(what, model_map.n_layers, strength=edit.strength, layers=edit.layers, kinds=edit.sites)
    silenced = (
        SiteEdit(kind="expert", layer=layer, expert=expert, strength=share, whole=True)
        for layer, expert, share in edit.silence_experts
    )
    made = Intervention(made.directions, (*made.edits, *silenced))
    check_fit(made, model_map)
    return made


def _direction(vectors: torch.Tensor, d_model: int) -> Direction:
    # A row is a vector too, as long as the width says which of the two axes is meant.
    columns = vectors.T if vectors.dim() == 2 and vectors.shape[0] == 1 else vectors
    if columns.dim() not in (1, 2) or columns.shape[0] != d_model or not columns.is_floating_point():
        raise DirectionError(
            f"The tensor to be taken out has shape {tuple(vectors.shape)} and dtype {vectors.dtype}, expected "
            f"floating-point numbers of shape [d_model], [1, d_model] or [d_model, k] with the model's d_model "
            f"{d_model}; give one direction, or one in each column."
        )
    return direction_from_vectors(columns)


def intervene(
    what: Intervention | Direction | Sequence[Direction],
    n_layers: int,
    *,
    strength: float = 1.0,
    layers: tuple[int, int] | None = None,
    kinds: Iterable[SiteKind] = SITE_KINDS,
) -> Intervention:
    """Take directions out at one strength, at every site of a range of layers.

    Args:
        what: One direction; one for each layer, of which the embedding gets that of layer 0; or an intervention, whose
            strengths are multiplied.
        n_layers: The model's number of layers.
        strength: The share that is taken out; 1 takes out all of it.
        layers: The first and the last layer, both included; None means all of them and the embedding. With a range,
            the embedding is edited only if it starts at layer 0.
        kinds: The kinds of site to edit.

    Returns:
        The intervention, which `ablated`, `bake` and `evaluate` take.

    Raises:
        DirectionError: If the range does not lie within the model, or the strength is not between -10 and 10.

    Example:
        >>> weaker = intervene(direction, map_model(model).n_layers, strength=0.5, layers=(8, 20))
    """
    first, last = layers if layers is not None else (0, n_layers - 1)
    if not 0 <= first <= last < n_layers:
        raise DirectionError(
            f"The layer range {first}-{last} does not lie within the model's layers 0-{n_layers - 1}; "
            "give two of its layers, the lower one first."
        )
    if not -10 <= strength <= 10:
        raise DirectionError(f"The strength is {strength}, expected a number from -10 to 10; 1 takes out all of it.")
    whole, wanted = _everywhere(what, n_layers), frozenset(kinds)
    edits = [
        edit.model_copy(update={"strength": strength * edit.strength})
        for edit in whole.edits
        if (edit.kind in wanted or edit.expert is not None)
        and (first == 0 if edit.layer is None else first <= edit.layer <= last)
    ]
    # What a silenced expert was found along stays, so that records can say it.
    used = sorted({edit.direction for edit in edits if whole.directions}) or list(range(min(1, len(whole.directions))))
    return Intervention(
        tuple(whole.directions[number] for number in used),
        tuple(edit.model_copy(update={"direction": used.index(edit.direction)}) if used else edit for edit in edits),
    )


def _everywhere(what: Intervention | Direction | Sequence[Direction], n_layers: int) -> Intervention:
    if isinstance(what, Intervention):
        return what
    directions = (what,) if isinstance(what, Direction) else tuple(what)
    if len(directions) not in (1, n_layers):
        raise DirectionError(
            f"There are {len(directions)} directions, expected one, or one for each of the model's {n_layers} layers; "
            "use directions that were found on this model."
        )
    places = [("embedding", None), *((kind, layer) for layer in range(n_layers) for kind in SITE_KINDS[1:])]
    each = len(directions) > 1
    edits = [
        SiteEdit(kind=kind, layer=layer, strength=1.0, direction=(layer or 0) if each else 0) for kind, layer in places
    ]
    return Intervention(directions, tuple(edits))


def check_fit(intervention: Intervention, model_map: ModelMap) -> None:
    """Check that an intervention's directions and layers are the model's, and that it edits no site twice."""
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
        if edit.kind == "expert":
            _check_expert(edit, model_map)
        known = edit.whole or 0 <= edit.direction < len(intervention.directions)
        if not known or edit.place in seen:
            raise DirectionError(
                f"The intervention edits site {edit.kind} of layer {edit.layer} twice or with a direction that it "
                f"does not have ({edit.direction}), expected each site once; leave one of the edits out."
            )
        seen.add(edit.place)


def _check_expert(edit: SiteEdit, model_map: ModelMap) -> None:
    mixture = next((one for one in model_map.mixtures if one.layer == edit.layer), None)
    if mixture is None or not mixture.writers:
        raise ArchitectureError(
            f"Layer {edit.layer} of model type '{model_map.model_type}' has no routed experts whose output can be told "
            "apart and scaled, expected a module that is given each token's experts and their weights; leave the "
            "experts alone."
        )
    if edit.expert is None or not 0 <= edit.expert < mixture.n_experts:
        raise DirectionError(
            f"The intervention edits expert {edit.expert} of layer {edit.layer}, expected one of its experts "
            f"0-{mixture.n_experts - 1}; use an intervention that was made for this model."
        )


def middle_direction(intervention: Intervention, n_layers: int) -> tuple[Direction, int]:
    """Choose what to look at: the direction found nearest to 60% of the depth, and its index of the layer axis.

    That is where refusal is decided (Arditi et al. 2024 find it between 50% and 70%), and the index for directions that
    do not know where they were found.
    """
    middle = round(0.6 * n_layers)

    def place(direction: Direction) -> int:
        layer = direction.origin.layer
        return middle if layer is None else min(max(layer, 0), n_layers)

    chosen = min(intervention.directions, key=lambda direction: abs(place(direction) - middle))
    return chosen, place(chosen)
