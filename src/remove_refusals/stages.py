"""The stages of a run that commands also use one by one: load, find the direction, make the intervention."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from remove_refusals.activations import collect_activations
from remove_refusals.apply.adapter_loading import is_adapter, with_adapter
from remove_refusals.calibration import load_calibration
from remove_refusals.chat_template import check_positions
from remove_refusals.directions import largest_coordinate_share, layer_index, mean_difference, mean_difference_per_layer
from remove_refusals.errors import DirectionError
from remove_refusals.evaluation import Evaluation, EvaluationPrompts, EvaluationSettings, evaluate
from remove_refusals.harness import run_tasks
from remove_refusals.journal import Journal
from remove_refusals.judges import Judge
from remove_refusals.judges.choosing import make_judge
from remove_refusals.map_types import ModelMap
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, load
from remove_refusals.plan import check_fit, intervene, intervene_per_layer
from remove_refusals.prompts import check_disjoint, draw
from remove_refusals.set_scores import Accuracies
from remove_refusals.settings import (
    DirectionSettings,
    EditSettings,
    LoadSettings,
    MeasureSettings,
    RunSettings,
    published_name,
)
from remove_refusals.text_scores import read_text, score_text
from remove_refusals.types import Activations, ChatFormat, Direction, Intervention, PromptSet

OnProgress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


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


def load_edited(edited: str, base: str, settings: LoadSettings) -> LoadedModel:
    """Load an edited model; a directory with an adapter of PEFT is merged into the base first.

    Raises:
        ModelError: If it cannot be found or loaded, or the adapter does not fit the base.
        CheckpointError: If a weight file is corrupt.
        OutputError: If it is an adapter and PEFT is not installed.
    """
    if is_adapter(edited):
        return with_adapter(load_model(base, settings), Path(edited))
    return load_model(edited, replace(settings, revision=None))


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
    check_positions(loaded.tokenizer, settings.positions, chat)
    model_map = model_map or map_model(loaded.model)
    indices = _indices(settings, model_map.n_layers)
    collect = partial(
        collect_activations,
        loaded,
        chat=chat,
        positions=settings.positions,
        n_layers=max(indices),
        batch_size=batch_size,
        model_map=model_map,
    )
    total = len(harmful) + len(harmless)
    if loaded.is_offloaded:
        # In one go, which reads the weights once.
        both = PromptSet("both", harmful.prompts + harmless.prompts, harmful.source)
        found = collect(both, on_progress=stage_progress(on_progress, "activations", 0, total))
        cut = len(harmful)
        parts = [
            Activations(found.hidden[:cut], found.positions, harmful),
            Activations(found.hidden[cut:], found.positions, harmless),
        ]
    else:
        parts = [
            collect(part, on_progress=stage_progress(on_progress, "activations", before, total))
            for before, part in ((0, harmful), (len(harmful), harmless))
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
    more = tuple(source.load(name, name) for name, source in settings.more)
    check_disjoint(*used, harmful, harmless, alarming, *more)
    return EvaluationPrompts(limited(harmful), limited(harmless), limited(alarming), tuple(map(limited, more)))


def test_text(settings: MeasureSettings) -> str | None:
    """Read the text whose perplexity is measured, if there is one.

    Raises:
        PromptError: If it cannot be read or is empty.
    """
    return None if settings.text is None else read_text(Path(settings.text))


def test_judge(settings: MeasureSettings, device: str | None = None) -> tuple[Judge, Accuracies]:
    """Make the judge, and read how often it is right.

    Raises:
        JudgeError: If the judge or its calibration cannot be used.
        ModelError: If a classifier cannot be found or loaded.
    """
    judge = make_judge(settings.judge, device=device)
    if settings.calibration is None:
        return judge, {}
    return judge, load_calibration(Path(settings.calibration), judge).accuracies


def measure_settings(settings: RunSettings) -> EvaluationSettings:
    """The settings of the evaluation as a run's settings give them."""
    return EvaluationSettings(
        max_new_tokens=settings.measure.max_new_tokens,
        kl_tokens=settings.measure.kl_tokens,
        batch_size=settings.batch_size,
        chat=settings.chat,
        longest=settings.measure.longest,
    )


def measure(
    base: LoadedModel,
    edited: LoadedModel,
    prompts: EvaluationPrompts,
    settings: RunSettings,
    *,
    judged: tuple[Judge, Accuracies] | None = None,
    text: str | None = None,
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Measure an edited model against its base in every way that the settings ask for.

    Args:
        base: The base model.
        edited: The edited model.
        prompts: What `test_prompts` gave.
        settings: A run's settings.
        judged: What `test_judge` gave; by default the phrase judge.
        text: The content of the text file, if there is one.
        journal: Keeps the answers, so that a killed measurement goes on.
        on_progress: Told of every stage.

    Returns:
        The scores.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong.
    """
    asked, size = settings.measure, settings.batch_size
    progress = stage_progress(on_progress, "evaluation")
    judge, accuracies = judged or (None, {})
    found = evaluate(
        base,
        edited,
        prompts,
        measure_settings(settings),
        judge=judge,
        accuracies=accuracies,
        journal=journal,
        on_progress=progress,
    )
    if text is not None:
        found = replace(found, text=score_text(base, edited, text, batch_size=size))
    if asked.tasks:
        directory = None if asked.task_directory is None else Path(asked.task_directory)
        tasks = run_tasks(base, edited, asked.tasks, directory=directory, limit=asked.task_limit, batch_size=size)
        found = replace(found, tasks=tasks)
    return found


def stage_progress(
    on_progress: OnProgress | None, stage: str, before: int = 0, total: int | None = None
) -> Callable[..., None] | None:
    """Turn the report of one stage's part, `(done)` or `(done, total)`, into that of the stage."""
    if on_progress is None:
        return None

    def report(done: int, whole: int | None = None) -> None:
        on_progress(stage, before + done, whole if total is None and whole is not None else total or 0)

    return report
