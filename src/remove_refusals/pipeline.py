"""The whole job: model → activations → direction → edit → saved model → measured from the saved files."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, computed_field

from remove_refusals.baking import (
    Baked,
    base_of,
    check_base,
    load_changed,
    load_edited,
    with_boundaries,
    write_baked,
)
from remove_refusals.directions import (
    FoundDirection,
    ablated,
    as_intervention,
    check_exact,
    find_direction,
    load_directions,
    measure_separation,
    training_prompts,
)
from remove_refusals.errors import ModelError, RecordError, RemoveRefusalsError, SelectionError
from remove_refusals.files import Journal, Record, atomic_directory, check_target, hidden, scratch_directory
from remove_refusals.measure import (
    Evaluation,
    EvaluationPrompts,
    evaluate,
    measuring_judge,
    measuring_prompts,
    no_effect,
    warnings,
)
from remove_refusals.modelmap import map_model
from remove_refusals.models import (
    LoadedModel,
    check_editable,
    check_not_source,
    edited_before,
    fits_twice,
    in_turn,
    load_model,
)
from remove_refusals.processes import agreed, check_shared, from_first, is_first
from remove_refusals.progress import SILENT, Cost, Meter, Progress
from remove_refusals.prompts import prompts_from
from remove_refusals.report import (
    AblationRecord,
    AnalysisRecord,
    PromptsRecord,
    model_card,
    write_html_report,
)
from remove_refusals.search import CANDIDATES, SearchPrompts, Selection, save_candidates, select, split_for_search
from remove_refusals.settings import (
    ALARMING_SETS,
    HARMFUL_SETS,
    PUBLISHED_JUDGES,
    DirectionSettings,
    DiskSettings,
    LoadSettings,
    PromptSource,
    RunSettings,
    SelectSettings,
    published_name,
)
from remove_refusals.types import Direction, Intervention, PromptSet

OUTLIER_SHARE = 0.5
"""From here on a single coordinate is called an outlier: it holds more than all others together."""

_FEWEST_APART = 2
"""Separation is measured on halves: each set needs two prompts."""

_FEW_CANDIDATES = 16
"""So many candidates are all kept with their directions."""

_NOTHING_CHOSEN = "Nothing was chosen, and the settings were used as given: {}"


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run made and measured, and what each stage of it took, which no file says."""

    baked: Baked
    evaluation: Evaluation
    warnings: tuple[str, ...]
    selection: Selection | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"RunResult({self.baked!r}, {self.evaluation!r})"

    def _repr_html_(self) -> str:
        return self.evaluation._repr_html_()


def run(
    settings: RunSettings,
    output: Path | str,
    *,
    force: bool = False,
    direction_file: Path | str | None = None,
    progress: Progress = SILENT,
) -> RunResult:
    """Do the whole job and leave a directory with the edited model, all that was beside it, its records and its card.

    The final numbers are measured on the saved files: what the edit changed is read back from them, and the rest, which
    the certificate says is the base's byte for byte, stays as it is in memory. What is done is kept beside the output,
    in a directory whose name is a dot, the output's name and `.journal`; a run that was killed goes on from there when
    it is called again, and one that ends, well or with an error, removes it.

    Args:
        settings: What to do.
        output: The directory to be made.
        force: Whether to replace an existing output.
        direction_file: A direction that was found before, or a directory of one for each layer; otherwise they are
            found now.
        progress: Told of every stage.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong; nothing is left half-made.
        KeyboardInterrupt: If it is interrupted; a note names the journal, if there is one.

    Example:
        >>> run(RunSettings(model="google/gemma-3-1b-it"), "gemma-ablated").evaluation.sets["harmful"].refusals
    """
    bits = next((bits for bits in (4, 8) if getattr(settings.loading, f"load_in_{bits}bit")), None)
    if bits is not None:
        raise ModelError(
            f"The model is to be loaded in {bits} bits and saved, expected full weights for a permanent edit; leave "
            f"--load-in-{bits}bit out, or measure with `evaluate` and talk with `chat`."
        )
    check_editable(settings.model, settings.loading.revision)
    target = Path(output)
    check_not_source(target, settings.model, revision=settings.loading.revision)
    check_target(target, force=force, directory=True)
    check_shared(target.parent)
    journal, meter = hidden(target, "journal"), Meter()
    progress = replace(progress, meter=meter)
    with atomic_directory(target, force=force) as directory:
        try:
            kept = Journal(journal, on_found=lambda name: progress.note(f"Done before, and kept: {name}."))
            place = agreed(directory)
            result = _run_into(place, target.name, settings, direction_file, kept, progress)
        except RemoveRefusalsError:
            # It would end in the same way again.
            shutil.rmtree(journal, ignore_errors=True)
            raise
        except KeyboardInterrupt as stopped:
            if journal.is_dir():
                stopped.add_note(f"what was done is kept in {journal}, where the same command goes on.")
            raise
    return replace(result, baked=replace(result.baked, directory=target), costs=meter.costs())


@dataclass(frozen=True, eq=False)
class _Choice:
    """What is taken out, the prompts that this was found on, and what should be said of it."""

    intervention: Intervention
    prompts: tuple[PromptSet, ...]
    notes: tuple[str, ...]
    selection: Selection | None = None


def _run_into(
    directory: Path,
    output_name: str,
    settings: RunSettings,
    direction_file: Path | str | None,
    journal: Journal,
    progress: Progress,
) -> RunResult:
    # What can be wrong with files is said before a model is loaded.
    progress.begin("prompts")
    given = None if direction_file is None else load_directions(direction_file)
    search, said = _search_prompts(settings) if settings.select is not None and given is None else (None, ())
    drawn = training_prompts(settings.direction) if given is None else None
    prompts = measuring_prompts(settings.measure, search.sets() if search is not None else drawn or ())
    judge, accuracies = measuring_judge(settings.measure, settings.loading.device)
    progress.begin("loading")
    loaded = load_model(
        settings.model, settings.loading, chat=settings.chat, batch_size=settings.batch_size, progress=progress
    )
    progress.begin("mapping")
    check_exact(map_model(loaded.model), allow_leak=settings.edit.allow_leak)
    choice = None
    if search is not None:
        choice, said = _searched(loaded, settings, search, journal, progress)
    if choice is None:
        progress.note(*said)
        found = FoundDirection(given or (), (), None)
        if given is None:
            found = find_direction(loaded, settings.direction, prompts=drawn, progress=progress)
        notes = (*said, *_outlier_warning(found, settings))
        choice = _Choice(as_intervention(found.directions, loaded, settings.edit), found.prompts, notes)
    before = edited_before(settings.model, settings.loading.revision)
    choice = replace(choice, notes=(*choice.notes, *filter(None, [before])))
    # Another takes the model's place where two do not fit: nothing else may hold on to it.
    baked, loaded, edited = _saved(loaded, choice.intervention, directory, settings, progress)
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
    progress.begin("records")
    said = (*no_effect(evaluation), *warnings(evaluation), *choice.notes)
    result = RunResult(baked[-1], evaluation, said, choice.selection)
    if is_first():
        result = _recorded(result, directory, settings, _prompt_records(choice.prompts, prompts))
    separation = _separation(loaded, prompts, settings.direction, progress)
    progress.begin("report")
    if is_first():
        if separation is not None:
            separation.write(directory / "analysis.json")
        write_html_report(directory)
    return result


def _separation(
    loaded: LoadedModel, prompts: EvaluationPrompts, finding: DirectionSettings, progress: Progress
) -> AnalysisRecord | None:
    """Measure how far apart the test prompts lie, where there are enough."""
    if min(len(prompts.harmful), len(prompts.harmless)) < _FEWEST_APART:
        return None
    place = {"position": finding.positions[0], "seed": finding.seed}
    return AnalysisRecord.made(
        measure_separation(loaded, prompts.harmful, prompts.harmless, progress=progress, **place)
    )


def _saved(
    loaded: LoadedModel, intervention: Intervention, directory: Path, settings: RunSettings, progress: Progress
) -> tuple[list[Baked], LoadedModel, LoadedModel]:
    """Write the edited model, and give it as the files have it, beside its base or in turn with it.

    What was written is a list, the last of which says what was measured on the model between its layers, too.
    """
    progress.begin("saving")
    base = base_of(loaded)
    plan = base.plan(intervention, settings.edit)
    # The model itself is in memory beside this.
    disk = DiskSettings(memory=1 << 28)
    baked = from_first(lambda: write_baked(base, intervention, plan, directory, disk=disk, progress=progress))
    progress.begin("reading back")
    written, local = [baked], settings.loading.model_copy(update={"revision": None})

    def read(loading: LoadSettings = local) -> LoadedModel:
        found = load_model(str(directory), loading, chat=settings.chat, batch_size=settings.batch_size)
        written.append(with_boundaries(written[-1], found, intervention))
        return found

    alone = settings.one_at_a_time
    edited = None if settings.from_files or alone else load_changed(loaded, base, plan, directory)
    if edited is not None:
        written.append(with_boundaries(baked, edited, intervention))
    elif alone or _is_alone(loaded, progress):
        return written, *in_turn(loaded, partial(load_model, settings.model, settings.loading), read, str(directory))
    return written, loaded, edited or _beside(loaded, read(), progress)


def _is_alone(loaded: LoadedModel, progress: Progress) -> bool:
    """Whether another model of its size does not fit beside one, which is said."""
    if fits_twice(loaded):
        return False
    progress.note("Two models do not fit into memory: base and edited one are loaded in turn.")
    return True


def _beside(base: LoadedModel, edited: LoadedModel, progress: Progress) -> LoadedModel:
    """Say where a model that was loaded beside its base lies in slower memory than that."""
    places = [set(map(str, getattr(one.model, "hf_device_map", {}).values())) for one in (base, edited)]
    slower = sorted((places[1] - places[0]) & {"cpu", "disk"})
    if slower:
        progress.note(
            f"Parts of the edited model lie on {' and '.join(slower)}, since the base takes the devices, and are slow "
            "there; --one-at-a-time gives each model all of them."
        )
    return edited


def _recorded(
    result: RunResult, directory: Path, settings: RunSettings, prompts: dict[str, PromptsRecord]
) -> RunResult:
    """Write what a run has done and measured, and its model card."""
    baked, evaluation, selection = result.baked, result.evaluation, result.selection
    more = {
        "settings": settings.record(),
        "prompts": prompts,
        "selection": None if selection is None else selection.summary(),
        "scores": evaluation.to_json(),
        "warnings": result.warnings,
    }
    record = baked.record.model_copy(update=more)
    record.write(directory / "ablation.json", force=True)
    if selection is not None:
        selection.record().write(directory / "selection.json")
        save_candidates(_kept(selection), directory / CANDIDATES)
    evaluation.save(directory)
    card = model_card(record, evaluation, baked.certificate)
    (directory / "README.md").write_text(card, encoding="utf-8")
    return replace(result, baked=replace(baked, record=record))


def _kept(selection: Selection) -> dict[int, Intervention]:
    """The candidates that somebody may want to try: all where they are few, else the front and what was confirmed."""
    candidates = dict(enumerate(selection.candidates))
    if len(candidates) > _FEW_CANDIDATES:
        confirmed = (number for number, one in candidates.items() if one.confirmation is not None)
        candidates = {number: candidates[number] for number in sorted({*selection.front, *confirmed})}
    return {number: one.intervention for number, one in candidates.items()}


def _search_prompts(settings: RunSettings) -> tuple[SearchPrompts | None, tuple[str, ...]]:
    """Load the prompts of a search and split them; where there are too few, give None and say so."""
    direction = settings.direction
    harmful = prompts_from(direction.harmful, "harmful", "harmful_train")
    harmless = prompts_from(direction.harmless, "harmless", "harmless_train")
    try:
        return split_for_search(harmful, harmless, direction.n_prompts, _select_settings(settings)), ()
    except SelectionError as error:
        return None, (_NOTHING_CHOSEN.format(error),)


def _select_settings(settings: RunSettings) -> SelectSettings:
    return (settings.select or SelectSettings()).model_copy(update={"seed": settings.direction.seed})


def _searched(
    loaded: LoadedModel, settings: RunSettings, prompts: SearchPrompts, journal: Journal, progress: Progress
) -> tuple[_Choice | None, tuple[str, ...]]:
    """Search; where there is nothing to choose by, give None and say why."""
    if loaded.is_offloaded:
        why = "The model lies on the disk, and a search would read it many times over."
        return None, (_NOTHING_CHOSEN.format(why),)
    try:
        found = select(
            loaded,
            prompts,
            _select_settings(settings),
            settings.measure,
            position=settings.direction.positions[0],
            tied=settings.edit.tied,
            journal=journal,
            progress=progress,
        )
    except SelectionError as error:
        return None, (_NOTHING_CHOSEN.format(error),)
    return _Choice(found.intervention, prompts.sets(), found.notes, found), ()


def _prompt_records(used: tuple[PromptSet, ...], prompts: EvaluationPrompts) -> dict[str, PromptsRecord]:
    measured = (part for part in (prompts.harmful, prompts.harmless, prompts.alarming, *prompts.more) if part)
    sets = {part.name if "_" in part.name else f"{part.name}_train": part for part in used}
    sets |= {f"{part.name}_test": part for part in measured}
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


def compare(
    settings: RunSettings,
    edited: str,
    taken: Sequence[Direction] | Intervention | None = None,
    *,
    progress: Progress = SILENT,
) -> tuple[Evaluation, tuple[str, ...]]:
    """Measure an edited model against its base, `settings.model`; give the scores, and what should be said of them.

    With `taken` it is the base with that taken out by hooks, as `settings.edit` says, and `edited` is what records call
    it.
    """
    prompts = measuring_prompts(settings.measure)
    judge, accuracies = measuring_judge(settings.measure, settings.loading.device)
    base = load_model(
        settings.model, settings.loading, chat=settings.chat, batch_size=settings.batch_size, progress=progress
    )
    context: Any = nullcontext
    if taken is not None:
        other, context = base, partial(ablated, base, as_intervention(taken, base, settings.edit))
    else:
        read = partial(load_edited, edited, settings.model, settings.loading, settings.chat, settings.batch_size)
        if settings.one_at_a_time or _is_alone(base, progress):
            base, other = in_turn(base, partial(load_model, settings.model, settings.loading), read, edited)
        else:
            other = _beside(base, read(), progress)
    evaluation = evaluate(
        base,
        other,
        prompts,
        settings.measure,
        edited_context=context,
        judge=judge,
        accuracies=accuracies,
        progress=progress,
    ).model_copy(update={} if taken is None else {"edited": edited})
    before = edited_before(settings.model, settings.loading.revision)
    return evaluation, (*no_effect(evaluation), *warnings(evaluation), *filter(None, [before]))


class Reproduction(Record):
    """What a repeated run gave: files by name, each with its SHA-256 before and now, and the versions that differ."""

    model_config = ConfigDict(extra="ignore")

    same: tuple[tuple[str, str], ...]
    different: tuple[tuple[str, str, str], ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    versions: tuple[tuple[str, str, str], ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def weights_alike(self) -> bool:
        """Whether every weight and direction file came out the same."""
        apart = [name for name, _, _ in self.different] + [*self.missing, *self.new]
        return not any(name.endswith(".safetensors") for name in apart)


def reproduce(
    directory: Path, *, model: str | None = None, files: Path | None = None, progress: Progress = SILENT
) -> Reproduction:
    """Repeat the run that left a directory, and say what came out the same.

    The record holds names alone: `files` is where prompt files lie, and `model` where the base is, if elsewhere.
    """
    record = AblationRecord.read(directory / "ablation.json", error=RecordError)
    try:
        settings = RunSettings.model_validate(record.settings)
    except ValidationError as error:
        raise RecordError(
            f"The record {directory / 'ablation.json'} does not hold the settings of a run ({type(error).__name__}), "
            "expected what this version writes; use the version that made it."
        ) from error
    # How it lay over devices decides nothing, and those of another machine may not be there.
    loading = settings.loading.model_copy(update={"tp": None, "replicas": None})
    settings = _located(settings, files or Path())
    settings = settings.model_copy(update={"model": model or settings.model, "loading": loading})
    check_base(record.base, settings.model, directory, settings.loading.revision)
    given = None if any("_test" not in name for name in record.prompts or ()) else directory
    with scratch_directory(directory) as scratch:
        # Under its own name, which stands in the records.
        again = scratch / directory.resolve().name
        result = run(settings, again, direction_file=given, progress=progress)
        return _compare(directory, again, record.versions, result.baked.record.versions)


def _located(settings: RunSettings, files: Path) -> RunSettings:
    """Give the settings with every prompt file, judge and task directory where it lies."""

    def place(name: str | None) -> str | None:
        if name is None or name in ("phrases", *PUBLISHED_JUDGES, *HARMFUL_SETS, *ALARMING_SETS):
            return name
        if (files / name).exists():
            return str(files / name)
        # A hub id or an address is its own place; the name of a local file has no directory.
        if "/" in name:
            return name
        raise RecordError(
            f"The run was made with a file '{name}', expected it in {files.resolve()}; pass --files with the directory "
            "that holds it."
        )

    def found(source: PromptSource) -> PromptSource:
        return source.model_copy(update={"source": place(source.source)})

    direction, measure = settings.direction, settings.measure
    training = {"harmful": found(direction.harmful), "harmless": found(direction.harmless)}
    tests = {name: found(getattr(measure, name)) for name in ("harmful", "harmless", "alarming")}
    more = tuple((name, found(source)) for name, source in measure.more)
    others = {name: place(getattr(measure, name)) for name in ("task_directory", "calibration", "judge")}
    return settings.model_copy(
        update={
            "direction": direction.model_copy(update=training),
            "measure": measure.model_copy(update={**tests, "more": more, **others}),
        }
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
