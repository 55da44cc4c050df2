"""The whole job: model → activations → direction → edit → saved model → measured from the saved files."""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from remove_refusals.baking import Baked, base_of, check_not_source, load_edited, with_boundaries, write_baked
from remove_refusals.directions import (
    FoundDirection,
    as_intervention,
    check_exact,
    find_direction,
    load_directions,
    measure_separation,
    training_prompts,
)
from remove_refusals.errors import ModelError, RecordError, RemoveRefusalsError, SelectionError
from remove_refusals.files import Journal, atomic_directory, check_target
from remove_refusals.measure import (
    Evaluation,
    EvaluationPrompts,
    PhraseJudge,
    evaluate,
    measuring_judge,
    measuring_prompts,
    warnings,
)
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, file_hashes, load_model, local_directory
from remove_refusals.progress import SILENT, Progress
from remove_refusals.prompts import prompts_from
from remove_refusals.report import (
    AblationRecord,
    AnalysisRecord,
    BaseRecord,
    PromptsRecord,
    model_card,
    write_html_report,
)
from remove_refusals.search import CANDIDATES, SearchPrompts, Selection, save_candidates, select, split_for_search
from remove_refusals.settings import (
    RunSettings,
    SelectSettings,
    published_name,
)
from remove_refusals.types import Direction, Intervention, PromptSet, Separation

OUTLIER_SHARE = 0.5
"""From here on a single coordinate is called an outlier: it holds more than all others together."""


_FEWEST_APART = 2
"""Separation is measured on halves: each set needs two prompts."""


_FEW_CANDIDATES = 16
"""So many candidates are all kept with their directions."""


_NOTHING_CHOSEN = "Nothing was chosen, and the settings were used as given: {}"


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run made and measured."""

    baked: Baked
    evaluation: Evaluation
    warnings: tuple[str, ...]
    selection: Selection | None = None


def run(
    settings: RunSettings,
    output: Path | str,
    *,
    force: bool = False,
    direction_file: Path | None = None,
    progress: Progress = SILENT,
) -> RunResult:
    """Do the whole job and leave a directory with the edited model, its tokenizer, its records and its model card.

    The final numbers are measured on the saved files, loaded afresh. What is done is kept beside the output, in a
    directory whose name is a dot, the output's name and `.journal`; a run that was killed goes on from there when it is
    called again, and one that ends, well or with an error, removes it.

    Args:
        settings: What to do.
        output: The directory to be made.
        force: Whether to replace an existing output.
        direction_file: A direction that was found before, or a directory of one for each layer; otherwise they are
            found now.
        progress: Told of every stage.

    Returns:
        What was made and measured.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong; nothing is left half-made.
        KeyboardInterrupt: If it is interrupted; a note names the journal, if there is one.

    Example:
        >>> run(RunSettings(model="google/gemma-3-1b-it"), "gemma-ablated").evaluation.sets["harmful"].refusals
    """
    if settings.loading.load_in_4bit:
        raise ModelError(
            "The model is to be loaded in 4 bits and saved, expected full weights for a permanent edit; leave "
            "--load-in-4bit out, or measure with `evaluate` and talk with `chat`."
        )
    target = Path(output)
    check_not_source(target, settings.model, settings.loading.revision)
    check_target(target, force=force, directory=True)
    journal = target.parent / f".{target.name}.journal"
    with atomic_directory(target, force=force) as directory:
        try:
            result = _run_into(directory, target.name, settings, direction_file, Journal(journal), progress)
        except RemoveRefusalsError:
            # It would end in the same way again.
            shutil.rmtree(journal, ignore_errors=True)
            raise
        except KeyboardInterrupt as stopped:
            if journal.is_dir():
                stopped.add_note(f"what was done is kept in {journal}, where the same command goes on.")
            raise
    shutil.rmtree(journal, ignore_errors=True)
    return replace(result, baked=replace(result.baked, directory=target))


def _run_into(
    directory: Path,
    output_name: str,
    settings: RunSettings,
    direction_file: Path | None,
    journal: Journal,
    progress: Progress,
) -> RunResult:
    # What can be wrong with files is said before a model is loaded.
    given = None if direction_file is None else load_directions(direction_file)
    searching = settings.select is not None and given is None
    search, said = _search_prompts(settings) if searching else (None, ())
    drawn = training_prompts(settings.direction) if given is None else None
    prompts = measuring_prompts(settings.measure, search.sets() if search is not None else drawn or ())
    judge, accuracies = measuring_judge(settings.measure, settings.loading.device)
    told: dict[str, Any] = {"chat": settings.chat, "batch_size": settings.batch_size}
    loaded = load_model(settings.model, settings.loading, **told)
    model_map = map_model(loaded.model)
    check_exact(model_map, allow_leak=settings.edit.allow_leak)
    selection: Selection | None = None
    if search is not None:
        selection, said = _selection(loaded, settings, search, journal, progress)
    if selection is not None and search is not None:
        intervention, used, notes = selection.intervention, search.sets(), selection.notes
    else:
        found = _found(loaded, settings, given, drawn, progress)
        intervention = as_intervention(found.directions, loaded, settings.edit)
        used, notes = found.prompts, (*said, *_outlier_warning(found, settings))
    base, edit = base_of(loaded), settings.edit
    plan = base.plan(intervention, tied=edit.tied, allow_leak=edit.allow_leak, variant=edit.variant)
    baked = write_baked(base, intervention, plan, directory)
    edited = load_model(str(directory), settings.loading.model_copy(update={"revision": None}), **told)
    baked = with_boundaries(baked, edited, intervention)
    evaluation = evaluate(
        loaded,
        edited,
        prompts,
        settings.measure,
        judge=judge,
        accuracies=accuracies,
        journal=journal,
        progress=progress,
    ).model_copy(update={"base": published_name(loaded.source), "edited": output_name})
    notes = (*warnings(evaluation), *notes)
    more = {
        "settings": settings.record(),
        "prompts": _prompt_records(used, prompts),
        "selection": None if selection is None else selection.summary(),
        "scores": evaluation,
        "warnings": notes,
    }
    record = baked.record.model_copy(update=more)
    _write_records(directory, record, selection, evaluation, baked)
    separation = _separation(loaded, prompts, settings, progress)
    if separation is not None:
        AnalysisRecord.made(separation).write(directory / "analysis.json")
    write_html_report(directory)
    return RunResult(replace(baked, record=record), evaluation, notes, selection)


def _write_records(
    directory: Path, record: AblationRecord, selection: Selection | None, evaluation: Evaluation, baked: Baked
) -> None:
    record.write(directory / "ablation.json", force=True)
    if selection is not None:
        selection.record().write(directory / "selection.json")
        save_candidates(_kept(selection), directory / CANDIDATES)
    evaluation.save(directory)
    card = model_card(record, baked.certificate)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _kept(selection: Selection) -> dict[int, Intervention]:
    """The candidates that somebody may want to try: all where they are few, else the front and what was confirmed."""
    if len(selection.candidates) <= _FEW_CANDIDATES:
        return {number: one.intervention for number, one in enumerate(selection.candidates)}
    confirmed = (number for number, one in enumerate(selection.candidates) if one.confirmation is not None)
    return {number: selection.candidates[number].intervention for number in sorted({*selection.front, *confirmed})}


def _separation(
    loaded: LoadedModel, prompts: EvaluationPrompts, settings: RunSettings, progress: Progress
) -> Separation | None:
    """Measure on the test prompts how far apart the base model holds harmful and harmless ones; None if too few."""
    if min(len(prompts.harmful), len(prompts.harmless)) < _FEWEST_APART:
        return None
    return measure_separation(
        loaded,
        prompts.harmful,
        prompts.harmless,
        position=settings.direction.positions[0],
        seed=settings.direction.seed,
        progress=progress,
    )


def _search_prompts(settings: RunSettings) -> tuple[SearchPrompts | None, tuple[str, ...]]:
    """Load the prompts of a search and split them; where there are too few, give None and say so."""
    direction = settings.direction
    harmful = prompts_from(direction.harmful, "harmful", "harmful_train")
    harmless = prompts_from(direction.harmless, "harmless", "harmless_train")
    select = (settings.select or SelectSettings()).model_copy(update={"seed": direction.seed})
    try:
        return split_for_search(harmful, harmless, direction.n_prompts, select), ()
    except SelectionError as error:
        return None, (_NOTHING_CHOSEN.format(error),)


def _selection(
    loaded: LoadedModel,
    settings: RunSettings,
    prompts: SearchPrompts,
    journal: Journal,
    progress: Progress,
) -> tuple[Selection | None, tuple[str, ...]]:
    """Search; where there is nothing to choose by, give None and say why."""
    if loaded.is_offloaded:
        return None, (
            _NOTHING_CHOSEN.format("The model lies on the disk, and a search would read it many times over."),
        )
    try:
        found = select(
            loaded,
            prompts,
            (settings.select or SelectSettings()).model_copy(update={"seed": settings.direction.seed}),
            settings.measure,
            position=settings.direction.positions[0],
            journal=journal,
            progress=progress,
        )
    except SelectionError as error:
        return None, (_NOTHING_CHOSEN.format(error),)
    return found, ()


def _found(
    loaded: LoadedModel,
    settings: RunSettings,
    given: tuple[Direction, ...] | None,
    drawn: tuple[PromptSet, PromptSet] | None,
    progress: Progress,
) -> FoundDirection:
    """The direction from a file, or found now."""
    if given is not None:
        return FoundDirection(given, (), None)
    return find_direction(loaded, settings.direction, prompts=drawn, progress=progress)


def _prompt_records(used: tuple[PromptSet, ...], prompts: EvaluationPrompts) -> dict[str, PromptsRecord]:
    sets = {part.name if "_" in part.name else f"{part.name}_train": part for part in used}
    sets |= {
        f"{part.name}_test": part
        for part in (prompts.harmful, prompts.harmless, prompts.alarming, *prompts.more)
        if part
    }
    return {
        name: PromptsRecord(source=published_name(part.source), n=len(part), sha256=part.sha256)
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


def compare(settings: RunSettings, edited: str, *, progress: Progress = SILENT) -> tuple[Evaluation, tuple[str, ...]]:
    """Measure an edited model against its base, `settings.model`.

    Returns:
        The scores, and what should be said of them.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong.
    """
    prompts = measuring_prompts(settings.measure)
    judge, accuracies = measuring_judge(settings.measure, settings.loading.device)
    told: dict[str, Any] = {"chat": settings.chat, "batch_size": settings.batch_size}
    base = load_model(settings.model, settings.loading, **told)
    other = load_edited(edited, settings.model, settings.loading, **told)
    evaluation = evaluate(base, other, prompts, settings.measure, judge=judge, accuracies=accuracies, progress=progress)
    return evaluation, warnings(evaluation)


_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Reproduction:
    """What a repeated run gave, by file name.

    Attributes:
        same: Files with the same SHA-256.
        different: Files that differ: name, hash in the directory, hash of the repeated run.
        missing: Files that the repeated run did not make.
        new: Files that only the repeated run made.
        versions: What runs in another version now: name, version of the record, version now.
    """

    same: tuple[tuple[str, str], ...]
    different: tuple[tuple[str, str, str], ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    versions: tuple[tuple[str, str, str], ...]

    @property
    def weights_alike(self) -> bool:
        """Whether every weight and direction file came out the same."""
        apart = [name for name, _, _ in self.different] + [*self.missing, *self.new]
        return not any(name.endswith(_WEIGHTS) for name in apart)

    def to_json(self) -> dict[str, Any]:
        """Give the attributes."""
        return {"weights_alike": self.weights_alike} | {field.name: getattr(self, field.name) for field in fields(self)}


def reproduce(
    directory: Path,
    *,
    model: str | None = None,
    files: Path | None = None,
    progress: Progress = SILENT,
) -> Reproduction:
    """Repeat a run.

    Args:
        directory: What `run` left.
        model: Where the base model is; by default as the record calls it.
        files: Where prompt files, and whatever else the settings name, lie; the record holds their names alone. By
            default the working directory.
        progress: Told of every stage.

    Returns:
        What came out the same.

    Raises:
        RecordError: If there is no record, or a file that it names cannot be found, or the base model is another one.
        RemoveRefusalsError: Of the type that fits what went wrong in the run.
    """
    record = AblationRecord.read(directory / "ablation.json", error=RecordError)
    try:
        settings = RunSettings.model_validate(record.settings)
    except ValidationError as error:
        raise RecordError(
            f"The record {directory / 'ablation.json'} does not hold the settings of a run ({type(error).__name__}), "
            "expected what this version writes; use the version that made it."
        ) from error
    located = _located(settings.model_dump(), files or Path())
    settings = RunSettings.model_validate({**located, "model": model or settings.model})
    _check_base(settings, record.base)
    given = None if any("_test" not in name for name in record.prompts or ()) else directory
    # Beside the directory, where there is room for a model.
    with tempfile.TemporaryDirectory(dir=directory.resolve().parent, prefix=".reproduce-") as scratch:
        # Under its own name, which stands in the records.
        again = Path(scratch) / directory.resolve().name
        result = run(settings, again, direction_file=given, progress=progress)
        return _compare(directory, again, record.versions, result.baked.record.versions)


def _located(settings: Any, files: Path) -> Any:
    """Give the settings' dump with every prompt file, judge and task directory where it lies."""
    if isinstance(settings, list | tuple):
        return [_located(part, files) for part in settings]
    if not isinstance(settings, dict):
        return settings
    changed = {name: _located(part, files) for name, part in settings.items()}
    for name in ("source", "task_directory", "calibration", "judge"):
        if isinstance(changed.get(name), str) and changed[name] != PhraseJudge.name:
            changed[name] = _found_reproduction(changed[name], files)
    return changed


def _found_reproduction(name: str, files: Path) -> str:
    place = files / name
    if place.exists():
        return str(place)
    # A hub id or an address is its own place; the name of a local file has no directory.
    if "/" in name:
        return name
    raise RecordError(
        f"The run was made with a file '{name}', expected it in {files.resolve()}; pass --files with the directory "
        "that holds it."
    )


def _check_base(settings: RunSettings, base: BaseRecord) -> None:
    place = local_directory(settings.model, settings.loading.revision)
    if place is None or base.sha256 is None:
        return
    now = file_hashes(place)
    differing = sorted(name for name, sha in base.sha256.items() if now.get(name) != sha)
    if differing:
        raise RecordError(
            f"The base model {settings.model} is not the one of the record: {differing[0]} "
            f"({len(differing)} files in all) differs, expected the same hashes; pass --model with the right one."
        )


def _compare(directory: Path, again: Path, before: dict[str, str], after: dict[str, str]) -> Reproduction:
    first, second = _hashes(directory), _hashes(again)
    shared = sorted(first.keys() & second.keys())
    return Reproduction(
        same=tuple((name, first[name]) for name in shared if first[name] == second[name]),
        different=tuple((name, first[name], second[name]) for name in shared if first[name] != second[name]),
        missing=tuple(sorted(first.keys() - second.keys())),
        new=tuple(sorted(second.keys() - first.keys())),
        versions=tuple(
            (name, version, after.get(name, "none"))
            for name, version in before.items()
            if after.get(name, "none") != version
        ),
    )


def _hashes(directory: Path) -> dict[str, str]:
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
