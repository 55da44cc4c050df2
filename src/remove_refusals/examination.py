"""Look at a model without changing it: where its refusal lives, and what is left of it without one direction."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from remove_refusals.baking import Base, described
from remove_refusals.directions import (
    MOST_PROMPTS,
    ablated,
    collect_both,
    direction_sha256,
    expert_choices,
    intervene,
    mean_difference,
    routing_interchange,
    separation,
    site_contributions,
    writer_shares,
)
from remove_refusals.errors import ArchitectureError, CheckpointError, DirectionError, ModelError
from remove_refusals.files import Record, atomic_directory, versions
from remove_refusals.formula import ChannelStep, pull_back
from remove_refusals.measure import Evaluation, evaluate, measuring_prompts
from remove_refusals.modelmap import DiskTensor, map_model, skeleton_of, stored_names
from remove_refusals.models import (
    FLOAT_DTYPES,
    LoadedModel,
    Place,
    check_not_source,
    checkpoint_tensors,
    find_block_tensor,
    fp8_block,
    load_model,
    local_directory,
    opened,
    plain_shapes,
    read_slice,
    refuse_adapter,
    render,
    same_bytes,
    tail_positions,
    tensor_slices,
)
from remove_refusals.processes import from_first
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import draw, prompts_from
from remove_refusals.report import AnalysisRecord, LookedAtDirection, PositionRecord, write_html_report
from remove_refusals.settings import RunSettings, SiteKind, published_name
from remove_refusals.types import Activations, Direction, Separation, auroc_plot

_OUTLIER_SHARE = 0.5
"""From here on the plain difference leans on one coordinate: the harmless mean's component is removed first, and the
direction is taken out of the upper half of the layers only. Taken out everywhere it destroys such a model."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What was found of a model; the direction is the difference of the means where the last token separates best."""

    analysis: AnalysisRecord
    direction: Direction
    evaluation: Evaluation | None = None

    def __repr__(self) -> str:
        return f"Examination({self.direction!r}{'' if self.evaluation is None else f', {self.evaluation!r}'})"

    def _repr_html_(self) -> str:
        return auroc_plot(self.analysis.layers) + ("" if self.evaluation is None else self.evaluation._repr_html_())


def analyze(
    settings: RunSettings,
    output: Path | str | None = None,
    *,
    answers: bool = True,
    force: bool = False,
    progress: Progress = SILENT,
) -> Examination:
    """Look at a model without changing it, and leave a directory with the records and a page of them.

    The direction is found on the prompts of `settings.direction`; what is left of the refusal without it is measured on
    those of `settings.measure`, which have none in common with them.

    Args:
        settings: The model, the prompts, and how to measure; what is to be edited plays no part.
        output: The directory to be made; None makes none.
        answers: Whether the model answers, as it is and with the direction taken out as it runs.
        force: Whether an existing output is replaced.
        progress: Told of every stage.

    Returns:
        What was found: the `analysis`, as it is written to `analysis.json`, the direction, and the scores.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong; nothing is left half-made.

    Example:
        >>> analyze(RunSettings(model="demo"), "seen").analysis.layers
    """
    if output is None:
        return _examine(settings, answers=answers, progress=progress)
    check_not_source(Path(output), settings.model, revision=settings.loading.revision)
    with atomic_directory(Path(output), force=force) as directory:
        found = _examine(settings, answers=answers, progress=progress)
        found.analysis.write(directory / "analysis.json")
        if found.evaluation is not None:
            found.evaluation.save(directory)
        write_html_report(directory)
    return found


def _examine(settings: RunSettings, *, answers: bool, progress: Progress) -> Examination:
    finding = settings.direction
    sets = [prompts_from(finding.harmful, "harmful", "harmful_train")]
    sets.append(prompts_from(finding.harmless, "harmless", "harmless_train"))
    harmful, harmless = (draw(part, MOST_PROMPTS, finding.seed) if len(part) > MOST_PROMPTS else part for part in sets)
    prompts = measuring_prompts(settings.measure, (harmful, harmless))
    loaded = load_model(
        settings.model, settings.loading, chat=settings.chat, batch_size=settings.batch_size, progress=progress
    )
    model_map, name = map_model(loaded.model), published_name(loaded.source)
    if answers and model_map.unhooked:
        raise ArchitectureError(
            f"Hooks on model type '{model_map.model_type}' are not exact ({model_map.unhooked[0].rstrip('.')}), "
            "expected hooks that are to see what is left without a direction; pass `--no-answers`."
        )
    # The tokens that stand behind every prompt.
    ids = render(loaded, harmful.prompts[:1])[0]
    tokens = {position: str(loaded.tokenizer.decode([ids[position]])) for position in tail_positions(loaded)}
    # All positions in one pass.
    told = progress.stage("activations", len(harmful) + len(harmless))
    activations = collect_both(loaded, harmful, harmless, positions=tuple(tokens), progress=told)
    parts = [separation(*activations, position=position, seed=finding.seed) for position in tokens]
    direction = from_first(lambda: _direction(activations, parts[0]))
    origin = direction.origin
    layers = (model_map.n_layers // 2 if origin.method.startswith("projected") else 0, model_map.n_layers - 1)
    by_position = (
        PositionRecord(position=position, token=token, auroc=tuple(layer.auroc for layer in part.layers))
        for part, (position, token) in zip(parts, tokens.items(), strict=True)
    )
    analysis = AnalysisRecord.made(
        parts[0],
        positions=tuple(by_position),
        direction=LookedAtDirection(
            layer=origin.layer,
            position=origin.position,
            method=origin.method,
            sha256=direction_sha256(direction),
            taken_out_of=layers,
        ),
        contributions=site_contributions(loaded, harmful, harmless, direction, position=parts[0].position),
        writer_shares=writer_shares(loaded, direction),
        **_of_experts(loaded, activations, parts[0].position),
        versions=versions(),
    )
    if not answers:
        return Examination(analysis, direction)
    without = partial(ablated, loaded, intervene(direction, model_map.n_layers, layers=layers))
    evaluation = evaluate(loaded, loaded, prompts, settings.measure, edited_context=without, progress=progress)
    names = {"base": name, "edited": f"{name} without one direction"}
    return Examination(analysis, direction, evaluation.model_copy(update=names))


def _of_experts(loaded: LoadedModel, activations: tuple[Activations, Activations], position: int) -> dict[str, Any]:
    """Look at single experts along the difference behind the last layer, where all that they write has come to."""
    model_map = map_model(loaded.model)
    if not model_map.mixtures:
        return {"expert_choices": (), "interchange": ()}
    behind_all = mean_difference(*activations, layer=model_map.n_layers, position=position)
    looked_at = loaded, activations[0].prompts, activations[1].prompts, behind_all
    return {
        "expert_choices": expert_choices(*looked_at, position=position),
        "interchange": routing_interchange(*looked_at, position=position),
    }


def _direction(activations: Sequence[Activations], separated: Separation) -> Direction:
    measured = [(layer, layer.auroc.value) for layer in separated.layers if layer.auroc is not None]
    if not measured:
        raise DirectionError(
            f"The activations at position {separated.position} are the same on harmful and harmless prompts at every "
            "layer, expected them to differ; use other prompts or another chat template."
        )
    # Of layers that separate alike the one in the middle of them: the first may have the direction in part only.
    most = max(value for _, value in measured)
    best = [layer for layer, value in measured if value >= most - 0.005]
    chosen = best[len(best) // 2]
    return mean_difference(
        *activations,
        layer=chosen.layer,
        position=separated.position,
        projected=chosen.largest_coordinate_share >= _OUTLIER_SHARE,
        model=separated.model,
        seed=separated.seed,
    )


class InspectedWriter(Record):
    """A tensor that writes to the residual stream, through `norm`; `missing` if the files at hand do not hold it."""

    site: SiteKind
    layer: int | None = None
    parameter: str
    on_disk: str
    axis: int
    shape: tuple[int, ...]
    norm: str | None = None
    tied: bool
    dtype: str | None = None
    missing: bool | None = None


class Inspection(Record):
    """What an edit of a model would touch, and why it may not be exact; `sites` counts them by kind.

    `experts` says how many routed experts each layer has whose choice can be read; each can have a strength of its own
    where `experts_alone` holds, which is None without any.
    Tensors of the files that are `unexplained` are none of the model's, and no edit changes them.
    """

    model_type: str
    d_model: int
    n_layers: int
    verdict: str
    leaks: tuple[str, ...]
    unhooked: tuple[str, ...]
    unused: tuple[str, ...]
    tied: bool
    sites: dict[SiteKind, int]
    experts: dict[int, int]
    experts_alone: bool | None = None
    writers: tuple[InspectedWriter, ...]
    unexplained: tuple[str, ...]


def inspect(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Describe what an edit of a model would touch, from its configuration and the headers of its files alone."""
    model = skeleton_of(source, revision=revision, trust_remote_code=trust_remote_code)
    directory = local_directory(source, revision)
    at_hand = directory is not None and any(directory.glob("*.safetensors"))
    base = Base(model, source, revision, directory if at_hand else None).as_stored()
    model_map, stored = base.model_map, checkpoint_tensors(base.files) if at_hand else {}
    shared = fp8_block(described(directory))
    writers = []
    for site, writer in ((found, writer) for found in model_map.sites for writer in found.writers):
        tensors = base.names.tensors(writer.parameter, writer.axis)
        for tensor in tensors or (DiskTensor(writer.parameter, writer.axis),):
            block = find_block_tensor(tensor.name, stored, shared)
            entry = stored[tensor.name][1] if tensor.name in stored else None
            row = InspectedWriter(
                site=site.kind,
                layer=site.layer,
                parameter=writer.parameter,
                on_disk=tensor.name if block is None else block.names[0],
                axis=tensor.axis if block is None else block.axis,
                shape=writer.shape if entry is None else entry.shape,
                norm=_norm(writer.steps),
                tied=model_map.tied and writer.parameter == model_map.input_embedding,
                dtype=block.dtype if block is not None else None if entry is None else entry.dtype,
                missing=True if at_hand and block is None and entry is None else None,
            )
            writers.append(row)
    return Inspection(
        model_type=model_map.model_type,
        d_model=model_map.d_model,
        n_layers=model_map.n_layers,
        verdict=model_map.verdict,
        leaks=model_map.leaks,
        unhooked=model_map.unhooked,
        unused=model_map.unused,
        tied=model_map.tied,
        sites=dict(Counter(site.kind for site in model_map.sites)),
        experts={mixture.layer: mixture.n_experts for mixture in model_map.mixtures},
        experts_alone=all(mixture.writers for mixture in model_map.mixtures) if model_map.mixtures else None,
        writers=tuple(writers),
        unexplained=base.names.unexplained if at_hand else (),
    )


def _norm(steps: tuple[ChannelStep, ...]) -> str | None:
    parts = [step.kind if step.parameter is None else f"{step.offset:g}+{step.parameter}" for step in steps]
    return ", ".join(part.removeprefix("0+") for part in parts) or None


_NUMBERS = 1 << 21

Status = Literal["changed", "only in the first", "only in the second", "another shape", "another data type"]


class TensorDifference(Record):
    """One tensor that two checkpoints do not have in common.

    `relative` is `‖B - A‖ / ‖A‖` (Frobenius norms); `along` is the share of `‖B - A‖²` that lies along the direction,
    as it reaches the residual stream, for a tensor that writes to it.
    """

    name: str
    status: Status
    relative: float | None = None
    along: float | None = None
    axis: int | None = None


class Differences(Record):
    """What two checkpoints do not have in common, one by one and together; `identical` tensors are so byte for byte."""

    tensors: tuple[TensorDifference, ...]
    identical: int
    relative: float | None = None
    along: float | None = None


class _Squares(NamedTuple):
    """Squared norms: of the first tensor, of the difference, and of that along a direction, where there is one."""

    first: float = 0.0
    delta: float = 0.0
    measured: float = 0.0
    along: float = 0.0

    def plus(self, other: "_Squares") -> "_Squares":
        return _Squares(*map(sum, zip(self, other, strict=True)))

    @property
    def shares(self) -> dict[str, float | None]:
        """How large the difference is, and how much of it lies along the direction."""
        return {
            "relative": math.sqrt(self.delta / self.first) if self.first else None,
            "along": self.along / self.measured if self.measured else None,
        }


def diff(
    first: str, second: str, direction: Direction | None = None, *, trust_remote_code: bool = False
) -> Differences:
    """Compare two checkpoints on disk, slice by slice, and measure what of the differences lies along a direction."""
    folders = [_directory(name) for name in (first, second)]
    tensors = [checkpoint_tensors(folder) for folder in folders]
    bases: Mapping[str, tuple[int, torch.Tensor]] = {}
    try:
        base = Base(skeleton_of(folders[0], trust_remote_code=trust_remote_code), str(folders[0]), directory=folders[0])
        # The names on disk need not be the same in both.
        here, there = (stored_names(base.model, plain_shapes(found)) for found in tensors)
        twins = {
            theirs: ours
            for parameter in here.parameters
            if len(here.of(parameter)) == len(there.of(parameter))
            for ours, theirs in zip(here.of(parameter), there.of(parameter), strict=True)
        }
        tensors[1] = {twins.get(name, name): place for name, place in tensors[1].items()}
        bases = {} if direction is None else _bases(direction, base)
    except (ModelError, ArchitectureError):
        if direction is not None:
            raise
    rows: list[TensorDifference] = []
    total, identical = _Squares(), 0
    for name in dict.fromkeys((*tensors[0], *tensors[1])):
        one, other = (found.get(name) for found in tensors)
        if one is not None and other is not None and one[1].shape == other[1].shape and same_bytes(one, other):
            identical += 1
            continue
        row, squares = _difference(name, one, other, bases.get(name))
        rows.append(row)
        total = total.plus(squares)
    return Differences(tensors=tuple(rows), identical=identical, **total.shares)


def _directory(source: str) -> Path:
    found = local_directory(source)
    if found is None:
        raise CheckpointError(
            f"The checkpoint {source} is neither a directory nor in the hub's local cache, expected one of them; check "
            "the path."
        )
    refuse_adapter(str(found))
    return found


def _bases(direction: Direction, base: Base) -> dict[str, tuple[int, torch.Tensor]]:
    """For each tensor that writes to the residual stream its axis, and the direction seen from it."""
    if direction.d_model != base.model_map.d_model:
        raise DirectionError(
            f"The direction has d_model {direction.d_model} and the model has d_model {base.model_map.d_model}, "
            "expected them to be equal; use a direction that was found on this model."
        )
    return {
        tensor.name: (tensor.axis, pull_back(direction.basis, writer.steps, base.tensor))
        for site in base.model_map.sites
        for writer in site.writers
        for tensor in base.names.tensors(writer.parameter, writer.axis)
    }


def _difference(
    name: str, first: Place | None, second: Place | None, basis: tuple[int, torch.Tensor] | None
) -> tuple[TensorDifference, _Squares]:
    status: Status = "changed"
    if first is None or second is None:
        status = "only in the second" if first is None else "only in the first"
    elif first[1].shape != second[1].shape:
        status = "another shape"
    else:
        status = "changed" if first[1].dtype == second[1].dtype else "another data type"
        if {first[1].dtype, second[1].dtype} <= FLOAT_DTYPES.keys() and first[1].shape:
            found, axis = _squares(first, second, basis), basis[0] if basis is not None else None
            return TensorDifference(name=name, status=status, axis=axis, **found.shares), found
    return TensorDifference(name=name, status=status), _Squares()


def _squares(first: Place, second: Place, basis: tuple[int, torch.Tensor] | None) -> _Squares:
    dtypes = [FLOAT_DTYPES[place[1].dtype] for place in (first, second)]
    axis = basis[0] if basis is not None else len(first[1].shape) - 1
    cuts = [tensor_slices(first[1].shape, axis, dtype.itemsize, _NUMBERS) for dtype in dtypes]
    total = _Squares()
    with opened(first[0]) as one, opened(second[0]) as other:
        for part, twin in zip(*cuts, strict=True):
            values = read_slice(one, first[1].start, part, dtypes[0]).to(torch.float64)
            delta = read_slice(other, second[1].start, twin, dtypes[1]).to(torch.float64) - values
            found = _Squares(float(values.square().sum()), float(delta.square().sum()))
            if basis is not None:
                along = float((delta.movedim(1, -1) @ basis[1].to(torch.float64)).square().sum())
                found = found._replace(measured=found.delta, along=along)
            total = total.plus(found)
    return total
