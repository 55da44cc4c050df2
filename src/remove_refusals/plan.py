"""From an intervention and a model's map to an edit plan: every tensor to be touched, and how.

The direction lives in the residual stream. Where a norm sits between a writer and the stream, the direction is pulled
back through it: a writer whose output is orthogonal to `gain ⊙ q` adds nothing along `q` after the norm, since the
norm's division by a number per token rotates nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.linalg import Variant, orthonormal_basis
from remove_refusals.map_types import ChannelStep, EditPlan, ModelMap, PlanEntry
from remove_refusals.types import SITE_KINDS, Direction, Intervention, SiteEdit, SiteKind

Tied = Literal["untie", "both"]
"""What happens to an embedding that is also the unembedding: `untie` leaves the unembedding as it was, which is what
the hooks do; `both` edits them as one, which keeps the file small and takes the direction out of the logits as well."""


def intervene(
    direction: Direction,
    n_layers: int,
    *,
    strength: float = 1.0,
    layers: tuple[int, int] | None = None,
    kinds: Iterable[SiteKind] = SITE_KINDS,
    affine: bool = False,
) -> Intervention:
    """Take one direction out at one strength, at every site of a range of layers.

    The affine variant puts the harmless mean's component back in its place (Marshall, Scherlis and Belrose 2024,
    "Refusal in LLMs is an affine function"): `v' = v - strength * (Q Qᵀ v - Q Qᵀ m)`. What the writers add is edited
    as ever, and the constant is added once, to the embedding, from where it reaches every layer. Where every writer is
    edited at strength 1, the stream's component is the same `Qᵀ m` at every layer boundary.

    Args:
        direction: What is taken out.
        n_layers: The model's number of layers.
        strength: The share that is taken out; 1 takes out all of it.
        layers: The first and the last layer, both included; None means all of them and the embedding. With a range,
            the embedding is edited only if it starts at layer 0.
        kinds: The kinds of site to edit.
        affine: Whether the harmless mean's component is put in the place of what is taken out.

    Returns:
        The intervention.

    Raises:
        DirectionError: If the range does not lie within the model, the strength is not a finite number, or the affine
            variant is asked for without the embedding or of a direction that does not know the harmless mean.
    """
    first, last = _checked_range(layers, n_layers, strength)
    wanted = frozenset(kinds)
    edits = [SiteEdit("embedding", None, strength)] if "embedding" in wanted and first == 0 else []
    if affine:
        edits = [replace(edit, offset=_affine_offset(direction, strength)) for edit in edits]
        if not edits:
            raise DirectionError(
                f"The affine variant is to edit {', '.join(sorted(wanted))} from layer {first} on, expected the "
                "embedding among them, which carries its constant; start at layer 0 with the embedding."
            )
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
        strength: What its strengths, and what it adds, are multiplied by.
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
        replace(edit, strength=strength * edit.strength, offset=tuple(strength * number for number in edit.offset))
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


def _affine_offset(direction: Direction, strength: float) -> tuple[float, ...]:
    component = direction.origin.harmless_component
    if component is None or len(component) != direction.basis.shape[1]:
        raise DirectionError(
            f"The direction (method {direction.origin.method}) has the harmless mean's component {component}, expected "
            f"{direction.basis.shape[1]} numbers for the affine variant; find the direction again with this version."
        )
    return tuple(strength * number for number in component)


def pull_back(
    basis: torch.Tensor, steps: Sequence[ChannelStep], tensor_of: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Find the directions that become `basis` behind per-channel steps.

    Args:
        basis: `[d_model, k]`, float32, orthonormal columns, in the residual stream.
        steps: The steps from the writer to the residual stream, first step first.
        tensor_of: Gives a parameter by its name in the model.

    Returns:
        `[d_model, k]`, float32, orthonormal columns: a writer without a component along them adds none along `basis`.
        A depthwise convolution with n taps needs up to n + 1 columns for each of `basis`.
    """
    if not steps:
        return basis
    columns = basis.to(torch.float64)
    for step in reversed(steps):
        if step.kind == "center":
            columns = columns - columns.mean(dim=0, keepdim=True)
            continue
        assert step.parameter is not None
        values = tensor_of(step.parameter).detach().to("cpu", torch.float64)
        if step.kind == "gain":
            columns = (values.reshape(-1) + step.offset).unsqueeze(1) * columns
        else:
            # Each tap brings the component of another token, so none of them may bring any.
            taps = [tap.unsqueeze(1) * columns for tap in values.reshape(columns.shape[0], -1).unbind(1)]
            spanned, sizes, _ = torch.linalg.svd(
                torch.cat([*taps, *([columns] if step.offset else [])], dim=1), full_matrices=False
            )
            columns = spanned[:, sizes > 1e-7 * sizes[0]]
    return orthonormal_basis(columns)


def check_fit(intervention: Intervention, model_map: ModelMap) -> None:
    """Check that an intervention's directions and layers are the model's.

    Raises:
        DirectionError: If a direction's width is not the model's, or an edit names a layer or direction that is not
            there, or a site twice, or has an offset that does not fit.
        ArchitectureError: If the model cannot carry the offset.
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
        if edit.offset and (
            edit.kind != "embedding" or len(edit.offset) != intervention.directions[edit.direction].basis.shape[1]
        ):
            raise DirectionError(
                f"The intervention adds {len(edit.offset)} numbers at site {edit.kind}, expected "
                f"{intervention.directions[edit.direction].basis.shape[1]} of them at the embedding; leave them out."
            )
    if offset_of(intervention) and (model_map.leaks or not _embedding_adds_rows(model_map)):
        reason = model_map.leaks[0].rstrip(".") if model_map.leaks else "its embedding's rows are not added to it alone"
        raise ArchitectureError(
            f"Model type '{model_map.model_type}' can carry no constant through its residual stream ({reason}), "
            "expected an embedding whose rows are added to it; leave the affine variant out."
        )


def offset_of(intervention: Intervention) -> tuple[float, ...]:
    """Give what an intervention adds to the residual stream, along the basis of the embedding's direction."""
    return next((edit.offset for edit in intervention.edits if edit.offset), ())


def _embedding_adds_rows(model_map: ModelMap) -> bool:
    """Whether each token has one row of the input embedding that reaches the stream through no norm or projection."""
    writers = [writer for site in model_map.sites if site.kind == "embedding" for writer in site.writers]
    found = [writer for writer in writers if writer.parameter == model_map.input_embedding]
    return [(writer.steps, writer.axis, len(writer.shape)) for writer in found] == [((), 1, 2)]


def check_exact(model_map: ModelMap, *, allow_leak: bool = False) -> None:
    """Check that an edit of a model's weights is exact.

    Raises:
        ArchitectureError: If it is not and `allow_leak` is not given.
    """
    if model_map.leaks and not allow_leak:
        raise ArchitectureError(
            f"No weight edit of model type '{model_map.model_type}' is exact ({model_map.leaks[0].rstrip('.')}), "
            "expected one that is; use hooks (chat, generate), or pass --allow-leak and read the measured leak."
        )


def resolve(
    intervention: Intervention,
    model_map: ModelMap,
    tensor_of: Callable[[str], torch.Tensor],
    *,
    tied: Tied = "untie",
    allow_leak: bool = False,
    variant: Variant = "plain",
    embedding_scale: float | None = None,
) -> EditPlan:
    """Resolve an intervention against one model.

    Args:
        intervention: What to take out where.
        model_map: The model's sites and writers.
        tensor_of: Gives a parameter by its name in the model; only norm gains are asked for.
        tied: What to do with an embedding that is also the unembedding.
        allow_leak: Whether to plan an edit that is known not to be exact.
        variant: What else the edit does to each tensor; only `plain` is what the hooks do.
        embedding_scale: What a row of the embedding is multiplied by until it is in the residual stream, as
            `scales.embedding_scale` measures it; needed where the intervention has an offset.

    Returns:
        The plan. An edit of strength 0 is listed under `left`, as is every writer of a site without an edit.

    Raises:
        DirectionError: If the intervention does not fit the model, or has an offset where the embedding's scale is
            not given or the variant is another than `plain`.
        ArchitectureError: If the model's map has leaks and `allow_leak` is not given, or one tensor would have to be
            edited in two ways.
    """
    check_fit(intervention, model_map)
    check_exact(model_map, allow_leak=allow_leak)
    edits = {(edit.kind, edit.layer): edit for edit in intervention.edits}
    entries: dict[str, PlanEntry] = {}
    left: list[tuple[str, str]] = []
    for site in model_map.sites:
        edit = edits.get((site.kind, site.layer))
        for writer in site.writers:
            if edit is None or edit.strength == 0:
                left.append((writer.parameter, "not selected" if edit is None else "strength 0"))
                continue
            basis = pull_back(intervention.directions[edit.direction].basis, writer.steps, tensor_of)
            entry = PlanEntry(
                parameter=writer.parameter,
                kind=site.kind,
                layer=site.layer,
                axis=writer.axis,
                shape=writer.shape,
                strength=edit.strength,
                basis=basis,
                on_disk=writer.on_disk,
                offset=_row_offset(edit, writer.parameter == model_map.input_embedding, embedding_scale, variant),
            )
            known = entries.setdefault(writer.parameter, entry)
            if known.strength != entry.strength or not torch.equal(known.basis, entry.basis):
                raise ArchitectureError(
                    f"Parameter '{writer.parameter}' writes to the residual stream at two sites that want two "
                    "different edits, expected one edit per tensor; use the same strength and direction for both."
                )
    edits_embedding = model_map.input_embedding in entries
    return EditPlan(
        tuple(entries.values()),
        model_map.tied and edits_embedding and tied == "untie",
        tuple(left),
        model_map.leaks,
        variant,
        embedding_scale if offset_of(intervention) else None,
    )


def _row_offset(edit: SiteEdit, carries: bool, scale: float | None, variant: Variant) -> tuple[float, ...]:
    """What each row of a writer gets so that the stream gets the edit's offset: that of the embedding carries it."""
    if not edit.offset or not carries:
        return ()
    if scale is None or variant != "plain":
        raise DirectionError(
            f"The intervention has an offset, the embedding's scale is {scale} and the variant is {variant}, expected "
            "a measured scale and the variant plain; leave the affine variant or the other one out."
        )
    return tuple(number / scale for number in edit.offset)
