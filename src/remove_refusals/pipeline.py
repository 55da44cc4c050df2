"""The whole job: model → activations → direction → edit → saved model → measured from the saved files."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from remove_refusals.activations import collect_activations
from remove_refusals.atomic import atomic_directory
from remove_refusals.baking import Baked, check_not_source, write_baked
from remove_refusals.chat_template import check_position, template_tail_length
from remove_refusals.direction_files import load_directions
from remove_refusals.directions import largest_coordinate_share, layer_index, mean_difference, mean_difference_per_layer
from remove_refusals.errors import DirectionError, ModelError
from remove_refusals.evaluation import Evaluation, EvaluationPrompts, EvaluationSettings, evaluate, warnings
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, load
from remove_refusals.plan import check_fit, intervene, intervene_per_layer
from remove_refusals.prompts import check_disjoint, draw
from remove_refusals.records import write_json, write_jsonl
from remove_refusals.report import model_card
from remove_refusals.scores import table_key
from remove_refusals.settings import (
    DirectionSettings,
    EditSettings,
    LoadSettings,
    MeasureSettings,
    RunSettings,
    published_name,
)
from remove_refusals.types import ChatFormat, Direction, Intervention, ModelMap, PromptSet

OUTLIER_SHARE = 0.5
"""From here on a single coordinate is called an outlier: it holds more than all others together."""

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run made and measured."""

    baked: Baked
    evaluation: Evaluation
    warnings: tuple[str, ...]


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


def load_model(model: str, settings: LoadSettings) -> LoadedModel:
    """Load a model by directory, hub id or the name `demo`.

    Raises:
        ModelError: If it cannot be found or loaded.
        CheckpointError: If a weight file is corrupt.
    """
    return load(model, **asdict(settings))


def training_prompts(settings: DirectionSettings) -> tuple[PromptSet, PromptSet]:
    """Load the harmful and the harmless prompts and draw from both.

    Raises:
        PromptError: If a set cannot be loaded or has fewer prompts than are to be drawn.
    """
    harmful = settings.harmful.load("harmful", "harmful_train")
    harmless = settings.harmless.load("harmless", "harmless_train")
    return draw(harmful, settings.n_prompts, settings.seed), draw(harmless, settings.n_prompts, settings.seed)


def find_direction(
    loaded: LoadedModel,
    settings: DirectionSettings,
    *,
    chat: ChatFormat,
    prompts: tuple[PromptSet, PromptSet] | None = None,
    batch_size: int | None = None,
    model_map: ModelMap | None = None,
    on_progress: OnProgress | None = None,
) -> FoundDirection:
    """Collect the activations of harmful and harmless prompts and take the difference of the means.

    The prompts are those of `training_prompts`, if they are not given.

    Raises:
        PromptError: If prompts cannot be loaded, or the position does not lie within the chat template's tail.
        DirectionError: If the layer does not lie within the model.
        NumericalError: If activations are NaN or infinite.
    """
    harmful, harmless = prompts or training_prompts(settings)
    if not chat.plain:
        tail = template_tail_length(
            loaded.tokenizer, system_prompt=chat.system_prompt, chat_template=chat.chat_template
        )
        for position in settings.positions:
            check_position(position, tail)
    model_map = model_map or map_model(loaded.model)
    indices = _indices(settings, model_map.n_layers)
    total = len(harmful) + len(harmless)
    parts = []
    for before, part in ((0, harmful), (len(harmful), harmless)):
        parts.append(
            collect_activations(
                loaded,
                part,
                chat=chat,
                positions=settings.positions,
                n_layers=max(indices),
                batch_size=batch_size,
                model_map=model_map,
                on_progress=stage_progress(on_progress, "activations", before, total),
            )
        )
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


def make_intervention(
    found: Direction | tuple[Direction, ...], settings: EditSettings, model_map: ModelMap
) -> Intervention:
    """Apply one direction, or one for each layer, as the settings say.

    Raises:
        DirectionError: If there are several directions and not one for each layer, or their width is not the model's,
            the layers do not lie within the model, or the affine variant does not fit them.
        ArchitectureError: If the affine variant is asked for and the model cannot carry its constant.
    """
    directions = (found,) if isinstance(found, Direction) else found
    options: dict[str, Any] = {"strength": settings.strength, "layers": settings.layers, "kinds": settings.sites}
    if len(directions) == 1:
        intervention = intervene(directions[0], model_map.n_layers, affine=settings.affine, **options)
    elif len(directions) != model_map.n_layers or settings.affine:
        affine = " and the affine variant is asked for" if settings.affine else ""
        raise DirectionError(
            f"There are {len(directions)} directions{affine}, expected one, or one for each of the model's "
            f"{model_map.n_layers} layers without --affine; use directions that were found on this model."
        )
    else:
        intervention = intervene_per_layer(directions, **options)
    check_fit(intervention, model_map)
    return intervention


def test_prompts(settings: MeasureSettings, used: tuple[PromptSet, ...] = ()) -> EvaluationPrompts:
    """Load the prompts to measure on and check that none of them was used to find the direction.

    Raises:
        PromptError: If a set cannot be loaded, or shares a prompt with another.
    """

    def limited(prompts: PromptSet) -> PromptSet:
        if settings.n_test is None or settings.n_test >= len(prompts):
            return prompts
        return draw(prompts, settings.n_test, 0)

    harmful = settings.harmful.load("harmful", "harmful_test")
    harmless = settings.harmless.load("harmless", "harmless_test")
    alarming = settings.alarming.load("alarming", "harmless_alarming")
    check_disjoint(*used, harmful, harmless, alarming)
    return EvaluationPrompts(limited(harmful), limited(harmless), limited(alarming))


def measure_settings(settings: RunSettings) -> EvaluationSettings:
    """The settings of the evaluation as a run's settings give them."""
    return EvaluationSettings(
        max_new_tokens=settings.measure.max_new_tokens,
        kl_tokens=settings.measure.kl_tokens,
        batch_size=settings.batch_size,
        chat=settings.chat,
    )


def run(
    settings: RunSettings,
    output: Path | str,
    *,
    force: bool = False,
    direction_file: Path | None = None,
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Do the whole job and leave a directory with the edited model, its tokenizer, its records and its model card.

    The final numbers are measured on the saved files, loaded afresh.

    Args:
        settings: What to do.
        output: The directory to be made.
        force: Whether to replace an existing output.
        direction_file: A direction that was found before, or a directory of one for each layer; otherwise they are
            found now.
        on_progress: Told of every stage.

    Returns:
        What was made and measured.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong; nothing is left half-made.
    """
    if settings.loading.load_in_4bit:
        raise ModelError(
            "The model is to be loaded in 4 bits and saved, expected full weights for a permanent edit; leave "
            "--load-in-4bit out, or measure with `evaluate` and talk with `chat`."
        )
    target = Path(output)
    check_not_source(target, settings.model, settings.loading.revision)
    with atomic_directory(target, force=force) as directory:
        result = _run_into(directory, target.name, settings, direction_file, on_progress)
    return replace(result, baked=replace(result.baked, directory=target))


def _run_into(
    directory: Path,
    output_name: str,
    settings: RunSettings,
    direction_file: Path | None,
    on_progress: OnProgress | None,
) -> RunResult:
    # What can be wrong with files is said before a model is loaded.
    given = None if direction_file is None else load_directions(direction_file)
    drawn = training_prompts(settings.direction) if given is None else None
    prompts = test_prompts(settings.measure, drawn or ())
    loaded = load_model(settings.model, settings.loading)
    model_map = map_model(loaded.model)
    if given is None:
        found = find_direction(
            loaded,
            settings.direction,
            chat=settings.chat,
            prompts=drawn,
            batch_size=settings.batch_size,
            model_map=model_map,
            on_progress=on_progress,
        )
    else:
        found = FoundDirection(given, (), None)
    intervention = make_intervention(found.directions, settings.edit, model_map)
    baked = write_baked(
        loaded,
        intervention,
        directory,
        tied=settings.edit.tied,
        allow_leak=settings.edit.allow_leak,
        variant=settings.edit.variant,
        model_map=model_map,
    )
    edited = load_model(str(directory), replace(settings.loading, revision=None))
    evaluation = evaluate(
        loaded, edited, prompts, measure_settings(settings), on_progress=stage_progress(on_progress, "evaluation")
    )
    evaluation = replace(evaluation, base=published_name(loaded.source), edited=output_name)
    notes = (*warnings(evaluation), *_outlier_warning(found, settings))
    record = {
        **baked.record,
        "settings": settings.record(),
        "prompts": _prompt_records(found.prompts, prompts),
        "scores": evaluation.to_json(),
        "warnings": list(notes),
    }
    write_json(directory / "ablation.json", record)
    write_json(directory / "scores.json", evaluation.to_json())
    write_jsonl(directory / "rows.jsonl", (row.to_json() for row in evaluation.rows))
    (directory / "README.md").write_text(
        model_card(record, evaluation.table(), table_key(evaluation), baked.certificate), encoding="utf-8"
    )
    return RunResult(replace(baked, record=record), evaluation, notes)


def _prompt_records(used: tuple[PromptSet, ...], prompts: EvaluationPrompts) -> dict[str, dict[str, Any]]:
    sets = {f"{part.name}_train": part for part in used}
    sets |= {f"{part.name}_test": part for part in (prompts.harmful, prompts.harmless, prompts.alarming) if part}
    return {
        name: {"source": published_name(part.source), "n": len(part), "sha256": part.sha256}
        for name, part in sets.items()
    }


def _outlier_warning(found: FoundDirection, settings: RunSettings) -> tuple[str, ...]:
    share = found.largest_coordinate
    if share is None or share < OUTLIER_SHARE or settings.direction.projected:
        return ()
    return (
        f"One coordinate holds {share:.0%} of the residual stream's mean squared norm where the direction was found; "
        "the plain mean difference leans on it. Try --projected and a range of layers in the upper half.",
    )


def stage_progress(
    on_progress: OnProgress | None, stage: str, before: int = 0, total: int | None = None
) -> Callable[..., None] | None:
    """Turn the report of one stage's part, `(done)` or `(done, total)`, into that of the stage."""
    if on_progress is None:
        return None

    def report(done: int, whole: int | None = None) -> None:
        on_progress(stage, before + done, whole if total is None and whole is not None else total or 0)

    return report


def compare(
    settings: RunSettings, edited: str, *, on_progress: OnProgress | None = None
) -> tuple[Evaluation, tuple[str, ...]]:
    """Measure an edited model against its base, `settings.model`.

    Returns:
        The scores, and what should be said of them.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong.
    """
    prompts = test_prompts(settings.measure)
    base = load_model(settings.model, settings.loading)
    other = load_model(edited, replace(settings.loading, revision=None))
    evaluation = evaluate(
        base, other, prompts, measure_settings(settings), on_progress=stage_progress(on_progress, "evaluation")
    )
    return evaluation, warnings(evaluation)
