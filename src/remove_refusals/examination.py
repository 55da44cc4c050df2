"""Look at a model without changing it: where its refusal lives, and what is left of it without one direction."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from remove_refusals.baking import Base
from remove_refusals.directions import (
    MOST_PROMPTS,
    ablated,
    collect_both,
    direction_sha256,
    expert_choices,
    intervene,
    mean_difference,
    separation,
    site_contributions,
    writer_shares,
)
from remove_refusals.errors import ArchitectureError, CheckpointError, DirectionError, ModelError
from remove_refusals.files import atomic_directory, versions
from remove_refusals.formula import ChannelStep, pull_back
from remove_refusals.measure import Evaluation, EvaluationPrompts, evaluate, measuring_prompts
from remove_refusals.modelmap import ModelMap, by_stored_name, map_model, skeleton_of
from remove_refusals.models import (
    FLOAT_DTYPES,
    LoadedModel,
    Place,
    checkpoint_tensors,
    load_model,
    local_directory,
    opened,
    read_slice,
    render,
    same_bytes,
    template_tail_length,
    tensor_slices,
)
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import draw, prompts_from
from remove_refusals.report import AnalysisRecord, LookedAtDirection, PositionRecord, write_html_report
from remove_refusals.settings import RunSettings, published_name
from remove_refusals.types import (
    Activations,
    Contributions,
    Direction,
    ExpertChoice,
    PromptSet,
    Separation,
    WriterShare,
)

MOST_POSITIONS = 8
"""So many tokens of the chat template's tail are looked at, from the end."""


_OUTLIER_SHARE = 0.5
"""From here on the plain difference leans on one coordinate: the harmless mean's component is removed first, and the
direction is taken out of the upper half of the layers only. Taken out everywhere it destroys such a model."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What was found of a model. What was not measured is None or empty.

    Attributes:
        separation: How far apart harmful and harmless prompts lie at the last token, layer by layer.
        elsewhere: The same at the other tokens of the chat template's tail.
        tokens: The token at each position, by its position.
        direction: The difference of the means where the last token separates best.
        layers: The first and the last layer that it is taken out of to see what is left without it.
        contributions: What each site adds along it.
        shares: How much of what each writer can write lies along it.
        choices: Which experts the routers choose.
        evaluation: What the model answers as it is, and with that direction taken out as it runs.
    """

    separation: Separation
    elsewhere: tuple[Separation, ...]
    tokens: dict[int, str]
    direction: Direction
    layers: tuple[int, int]
    contributions: Contributions
    shares: tuple[WriterShare, ...]
    choices: tuple[ExpertChoice, ...]
    evaluation: Evaluation | None = None

    def record(self) -> AnalysisRecord:
        """Give the content of `analysis.json`; the evaluation has records of its own."""
        origin = self.direction.origin
        positions = (
            PositionRecord(
                position=part.position,
                token=self.tokens[part.position],
                auroc=tuple(layer.auroc for layer in part.layers),
            )
            for part in (self.separation, *self.elsewhere)
        )
        return AnalysisRecord.made(
            self.separation,
            positions=tuple(positions),
            direction=LookedAtDirection(
                layer=origin.layer,
                position=origin.position,
                method=origin.method,
                sha256=direction_sha256(self.direction),
                taken_out_of=self.layers,
            ),
            contributions=self.contributions,
            writer_shares=self.shares,
            expert_choices=self.choices,
            versions=versions(),
        )


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
        What was found.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong; nothing is left half-made.
    """
    if output is None:
        return _examine(settings, answers=answers, progress=progress)
    with atomic_directory(Path(output), force=force) as directory:
        found = _examine(settings, answers=answers, progress=progress)
        found.record().write(directory / "analysis.json")
        if found.evaluation is not None:
            found.evaluation.save(directory)
        write_html_report(directory)
    return found


def _examine(settings: RunSettings, *, answers: bool, progress: Progress) -> Examination:
    finding = settings.direction
    harmful, harmless = (
        _at_most(part, finding.seed)
        for part in (
            prompts_from(finding.harmful, "harmful", "harmful_train"),
            prompts_from(finding.harmless, "harmless", "harmless_train"),
        )
    )
    prompts = measuring_prompts(settings.measure, (harmful, harmless))
    loaded = load_model(settings.model, settings.loading, chat=settings.chat, batch_size=settings.batch_size)
    model_map = map_model(loaded.model)
    if answers and model_map.unhooked:
        raise ArchitectureError(
            f"Hooks on model type '{model_map.model_type}' are not exact ({model_map.unhooked[0].rstrip('.')}), "
            "expected hooks that are to see what is left without a direction; pass `--no-answers`."
        )
    tokens = _tail(loaded, harmful)
    # All positions in one pass.
    told = progress.stage("activations", len(harmful) + len(harmless))
    activations = collect_both(loaded, harmful, harmless, positions=tuple(tokens), progress=told)
    seed, name = finding.seed, published_name(loaded.source)
    parts = [
        separation(activations[0], activations[1], position=position, seed=seed, model=name) for position in tokens
    ]
    direction = _direction(activations, parts[0])
    found = Examination(
        parts[0],
        tuple(parts[1:]),
        tokens,
        direction,
        _layers(direction, model_map),
        site_contributions(loaded, harmful, harmless, direction, position=parts[0].position),
        writer_shares(loaded, direction),
        expert_choices(loaded, harmful, harmless, position=parts[0].position),
    )
    if not answers:
        return found
    return replace(found, evaluation=_without(loaded, found, model_map, prompts, settings, progress))


def _at_most(prompts: PromptSet, seed: int) -> PromptSet:
    return draw(prompts, MOST_PROMPTS, seed) if len(prompts) > MOST_PROMPTS else prompts


def _tail(loaded: LoadedModel, prompts: PromptSet) -> dict[int, str]:
    """The tokens that stand behind every prompt, the last one first; at least the last of all."""
    length = template_tail_length(loaded)
    ids = render(loaded, prompts.prompts[:1])[0]
    positions = range(-1, -max(1, min(length, MOST_POSITIONS)) - 1, -1)
    return {position: str(loaded.tokenizer.decode([ids[position]])) for position in positions}


def _direction(activations: Sequence[Activations], separated: Separation) -> Direction:
    measured = [layer for layer in separated.layers if layer.auroc is not None]
    if not measured:
        raise DirectionError(
            f"The activations at position {separated.position} are the same on harmful and harmless prompts at every "
            "layer, expected them to differ; use other prompts or another chat template."
        )
    # Of layers that separate alike the one in the middle of them: the first may have the direction in part only.
    most = max(layer.auroc.value for layer in measured if layer.auroc is not None)
    best = [layer for layer in measured if layer.auroc is not None and layer.auroc.value >= most - 0.005]
    chosen = best[len(best) // 2]
    return mean_difference(
        activations[0],
        activations[1],
        layer=chosen.layer,
        position=separated.position,
        projected=chosen.largest_coordinate_share >= _OUTLIER_SHARE,
        model=separated.model,
        seed=separated.seed,
    )


def _layers(direction: Direction, model_map: ModelMap) -> tuple[int, int]:
    projected = direction.origin.method.startswith("projected")
    return (model_map.n_layers // 2 if projected else 0, model_map.n_layers - 1)


def _without(
    loaded: LoadedModel,
    found: Examination,
    model_map: ModelMap,
    prompts: EvaluationPrompts,
    settings: RunSettings,
    progress: Progress,
) -> Evaluation:
    intervention = intervene(found.direction, model_map.n_layers, layers=found.layers)
    evaluation = evaluate(
        loaded,
        loaded,
        prompts,
        settings.measure,
        edited_context=lambda: ablated(loaded, intervention),
        progress=progress,
    )
    name = published_name(loaded.source)
    return evaluation.model_copy(update={"base": name, "edited": f"{name} without one direction"})


def inspect(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Describe what an edit of a model would touch, from its configuration and the headers of its files alone.

    Args:
        source: A directory or a hub id.
        revision: The hub's branch, tag or commit.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Returns:
        A JSON object: `model_type`, `d_model`, `n_layers`, `verdict`, `leaks`, `unhooked`, `unused`, `tied`, and
        `writers`, one object for each tensor on disk with `site`, `layer`, `parameter`, `on_disk`, `axis`, `shape`,
        `norm`, `tied` and, where the files are at hand, `dtype`.

    Raises:
        ModelError: If there is no configuration of a causal language model.
        ArchitectureError: If the model cannot be mapped.
        CheckpointError: If its files are at hand and corrupt.
    """
    model = skeleton_of(source, revision=revision, trust_remote_code=trust_remote_code)
    model_map = map_model(model)
    directory = local_directory(source, revision)
    headers = by_stored_name(_headers(directory), model_map)
    writers = []
    for site in model_map.sites:
        for writer in site.writers:
            for tensor in writer.on_disk:
                entry = headers.get(tensor.name)
                row: dict[str, Any] = {
                    "site": site.kind,
                    "layer": site.layer,
                    "parameter": writer.parameter,
                    "on_disk": entry.name if entry is not None else tensor.name,
                    "axis": tensor.axis,
                    "shape": list(entry.shape if entry is not None else writer.shape),
                    "norm": _norm(writer.steps),
                    "tied": model_map.tied and writer.parameter == model_map.input_embedding,
                }
                if entry is not None:
                    row["dtype"] = entry.dtype
                elif headers:
                    row["missing"] = True
                writers.append(row)
    return {
        "model_type": model_map.model_type,
        "d_model": model_map.d_model,
        "n_layers": model_map.n_layers,
        "verdict": model_map.verdict,
        "leaks": list(model_map.leaks),
        "unhooked": list(model_map.unhooked),
        "unused": list(model_map.unused),
        "tied": model_map.tied,
        "sites": dict(Counter(site.kind for site in model_map.sites)),
        "writers": writers,
    }


def _norm(steps: tuple[ChannelStep, ...]) -> str | None:
    parts = [step.kind if step.parameter is None else f"{step.offset:g}+{step.parameter}" for step in steps]
    return ", ".join(part.removeprefix("0+") for part in parts) or None


def _headers(directory: Path | None) -> dict[str, Any]:
    if directory is None or not any(directory.glob("*.safetensors")):
        return {}
    return {name: entry for name, (_, entry) in checkpoint_tensors(directory).items()}


_NUMBERS = 1 << 21


Status = Literal["changed", "only in the first", "only in the second", "another shape", "another data type"]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that two checkpoints do not have in common.

    Attributes:
        name: Its name on disk.
        status: How it differs.
        relative: `‖B - A‖ / ‖A‖` (Frobenius norms); None where the two cannot be subtracted, or A is zero.
        along: The share of `‖B - A‖²` that lies along the direction, as it reaches the residual stream; None without
            a direction, or for a tensor that does not write to the residual stream.
        axis: The axis that this was measured along.
    """

    name: str
    status: Status
    relative: float | None = None
    along: float | None = None
    axis: int | None = None


@dataclass(frozen=True)
class Differences:
    """What two checkpoints do not have in common.

    Attributes:
        tensors: Those that differ, in the order of the first's files.
        identical: How many are the same byte for byte.
        relative: `‖B - A‖ / ‖A‖` over all tensors that could be subtracted, the identical ones left out.
        along: The share of `‖B - A‖²` along the direction, over the tensors that it was measured for.
    """

    tensors: tuple[TensorDifference, ...]
    identical: int
    relative: float | None = None
    along: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Give a JSON object; what was not measured is absent."""
        rows = [{key: value for key, value in asdict(row).items() if value is not None} for row in self.tensors]
        record: dict[str, Any] = {"tensors": rows, "identical": self.identical}
        whole = {"relative": self.relative, "along": self.along}
        return record | {key: value for key, value in whole.items() if value is not None}


@dataclass
class _Squares:
    first: float = 0.0
    delta: float = 0.0
    measured: float = 0.0
    along: float = 0.0


def diff(
    first: str, second: str, direction: Direction | None = None, *, trust_remote_code: bool = False
) -> Differences:
    """Compare two checkpoints on disk, slice by slice; no model is loaded.

    Args:
        first: A directory, a hub id in the local cache, or `demo`.
        second: Another one.
        direction: What share of the differences lies along it is measured, where norms lie between a tensor and the
            residual stream behind them.
        trust_remote_code: Run Python code that comes with the first.

    Returns:
        What differs.

    Raises:
        CheckpointError: If a checkpoint is missing or corrupt.
        DirectionError: If the direction's width is not the first model's.
        ModelError: If a direction is given and the first has no configuration of a causal language model.
        ArchitectureError: If a direction is given and the first cannot be mapped.
    """
    folders = [_directory(name) for name in (first, second)]
    tensors = [checkpoint_tensors(folder) for folder in folders]
    bases: Mapping[str, tuple[int, torch.Tensor]] = {}
    base = _base(folders[0], trust_remote_code, needed=direction is not None)
    if base is not None:
        tensors = [by_stored_name(found, base.model_map) for found in tensors]
    if direction is not None and base is not None:
        bases = _bases(direction, base)
    rows: list[TensorDifference] = []
    total, identical = _Squares(), 0
    for name in dict.fromkeys((*tensors[0], *tensors[1])):
        places = [found.get(name) for found in tensors]
        row = _difference(name, places, bases.get(name), total)
        if row is None:
            identical += 1
        else:
            rows.append(row)
    relative = math.sqrt(total.delta / total.first) if total.first else None
    along = total.along / total.measured if total.measured else None
    return Differences(tuple(rows), identical, relative, along)


def _directory(source: str) -> Path:
    found = local_directory(source)
    if found is None:
        raise CheckpointError(
            f"The checkpoint {source} is neither a directory nor in the hub's local cache, expected one of them; check "
            "the path."
        )
    return found


def _base(directory: Path, trust_remote_code: bool, *, needed: bool) -> Base | None:
    """Map the model, where that is possible; the names on disk need not be the same in both checkpoints."""
    try:
        model = skeleton_of(directory, trust_remote_code=trust_remote_code)
        map_model(model)
        return Base(model, str(directory), directory=directory)
    except (ModelError, ArchitectureError):
        if needed:
            raise
        return None


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
        for tensor in writer.on_disk
    }


def _difference(
    name: str, places: Sequence[Place | None], basis: tuple[int, torch.Tensor] | None, total: _Squares
) -> TensorDifference | None:
    first, second = places
    if first is None or second is None:
        return TensorDifference(name, "only in the second" if first is None else "only in the first")
    if first[1].shape != second[1].shape:
        return TensorDifference(name, "another shape")
    if same_bytes(first, second):
        return None
    status: Status = "changed" if first[1].dtype == second[1].dtype else "another data type"
    if not {first[1].dtype, second[1].dtype} <= FLOAT_DTYPES.keys() or not first[1].shape:
        return TensorDifference(name, status)
    found = _squares(first, second, basis)
    for field in ("first", "delta", "measured", "along"):
        setattr(total, field, getattr(total, field) + getattr(found, field))
    return TensorDifference(
        name,
        status,
        math.sqrt(found.delta / found.first) if found.first else None,
        found.along / found.measured if found.measured else None,
        basis[0] if basis is not None else None,
    )


def _squares(first: Place, second: Place, basis: tuple[int, torch.Tensor] | None) -> _Squares:
    dtypes = [FLOAT_DTYPES[place[1].dtype] for place in (first, second)]
    axis = basis[0] if basis is not None else len(first[1].shape) - 1
    cuts = [tensor_slices(first[1].shape, axis, dtype.itemsize, _NUMBERS) for dtype in dtypes]
    found = _Squares()
    with opened(first[0]) as one, opened(second[0]) as other:
        for part, twin in zip(*cuts, strict=True):
            values = read_slice(one, first[1].start, part, dtypes[0]).to(torch.float64)
            delta = read_slice(other, second[1].start, twin, dtypes[1]).to(torch.float64) - values
            found.first += float(values.square().sum())
            found.delta += float(delta.square().sum())
            if basis is not None:
                found.along += float((delta.movedim(1, -1) @ basis[1].to(torch.float64)).square().sum())
    if basis is not None:
        found.measured = found.delta
    return found
