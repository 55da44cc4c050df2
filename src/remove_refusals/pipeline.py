"""The whole job: model → activations → direction → edit → saved model → measured from the saved files."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from remove_refusals.activations import collect_activations
from remove_refusals.atomic import atomic_directory
from remove_refusals.baking import Baked, check_not_source, write_baked
from remove_refusals.chat_template import check_position, template_tail_length
from remove_refusals.direction_files import load_direction
from remove_refusals.directions import largest_coordinate_share, layer_index, mean_difference
from remove_refusals.errors import ModelError
from remove_refusals.evaluation import Evaluation, EvaluationPrompts, EvaluationSettings, evaluate, warnings
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, load
from remove_refusals.plan import check_fit, intervene
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
    """A direction with what its record needs.

    Attributes:
        direction: The direction.
        prompts: The harmful and the harmless prompts that it was found on; empty for one from a file.
        largest_coordinate: The share of the residual stream's mean squared norm that lies in one coordinate there;
            None for a direction from a file.
    """

    direction: Direction
    prompts: tuple[PromptSet, ...]
    largest_coordinate: float | None


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
        check_position(settings.position, tail)
    model_map = model_map or map_model(loaded.model)
    index = layer_index(settings.layer, model_map.n_layers)
    total = len(harmful) + len(harmless)
    parts = []
    for before, part in ((0, harmful), (len(harmful), harmless)):
        parts.append(
            collect_activations(
                loaded,
                part,
                chat=chat,
                positions=(settings.position,),
                n_layers=index,
                batch_size=batch_size,
                model_map=model_map,
                on_progress=stage_progress(on_progress, "activations", before, total),
            )
        )
    direction = mean_difference(
        parts[0],
        parts[1],
        layer=index,
        position=settings.position,
        projected=settings.projected,
        model=published_name(loaded.source),
        seed=settings.seed,
    )
    share = largest_coordinate_share(parts, index, settings.position)
    return FoundDirection(direction, (harmful, harmless), share)


def make_intervention(direction: Direction, settings: EditSettings, model_map: ModelMap) -> Intervention:
    """Apply one direction as the settings say.

    Raises:
        DirectionError: If the direction's width is not the model's, or the layers do not lie within the model.
    """
    intervention = intervene(
        direction, model_map.n_layers, strength=settings.strength, layers=settings.layers, kinds=settings.sites
    )
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
        direction_file: A direction that was found before; otherwise it is found now.
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
    given = None if direction_file is None else load_direction(direction_file)
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
    intervention = make_intervention(found.direction, settings.edit, model_map)
    baked = write_baked(
        loaded,
        intervention,
        directory,
        tied=settings.edit.tied,
        allow_leak=settings.edit.allow_leak,
        variant=settings.edit.variant,
        model_map=model_map,
    )
    edited = load(str(directory), device=settings.loading.device, dtype=settings.loading.dtype)
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
