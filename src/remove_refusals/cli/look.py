"""Commands that look at models and change nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remove_refusals.cli import options as completion
from remove_refusals.cli.options import (
    AlarmingTest,
    Also,
    BatchSize,
    CalibrationFile,
    Column,
    Device,
    Dtype,
    Force,
    FourBit,
    Harmful,
    HarmfulTest,
    Harmless,
    HarmlessTest,
    JudgeOption,
    KlTokens,
    MaxNewTokens,
    ModelArgument,
    NTest,
    OptionalDirectionFile,
    Plain,
    RemoteCode,
    Revision,
    Seed,
    Split,
    SystemPrompt,
    TaskFiles,
    TaskLimit,
    Tasks,
    TemplateFile,
    chat_format,
    more_sets,
    task_names,
    with_output,
)
from remove_refusals.errors import CertificateError

if TYPE_CHECKING:
    from remove_refusals.examination import Examination


def evaluate(
    base: ModelArgument,
    edited: Annotated[str, typer.Argument(help="The edited model: a directory or a hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the scores (FILE.json), or all records (DIR).")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Also save every answer as JSON Lines.")] = None,
    force: Force = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    column: Column = None,
    split: Split = None,
    harmful_test: HarmfulTest = None,
    harmless_test: HarmlessTest = None,
    alarming_test: AlarmingTest = None,
    n_test: NTest = None,
    max_new_tokens: MaxNewTokens = 100,
    kl_tokens: KlTokens = 32,
    also: Also = None,
    tasks: Tasks = None,
    task_files: TaskFiles = None,
    task_limit: TaskLimit = None,
    judge: JudgeOption = "phrases",
    calibration: CalibrationFile = None,
) -> None:
    """Refusals, false refusals and damage of two models, side by side on the same prompts."""
    from remove_refusals import files as atomic
    from remove_refusals import files as records
    from remove_refusals import pipeline
    from remove_refusals.cli import printing as console
    from remove_refusals.report import write_html_report
    from remove_refusals.settings import LoadSettings, MeasureSettings, PromptSource, RunSettings

    whole = output is not None and output.suffix != ".json"
    for path in (output, rows):
        if path is not None:
            atomic.check_target(path, force=force, directory=whole and path is output)
    settings = RunSettings(
        model=base,
        loading=LoadSettings(
            device=device, dtype=dtype, load_in_4bit=load_in_4bit, trust_remote_code=trust_remote_code
        ),
        chat=chat_format(system_prompt, chat_template, plain),
        measure=MeasureSettings(
            harmful=PromptSource(source=harmful_test, column=column, split=split),
            harmless=PromptSource(source=harmless_test, column=column, split=split),
            alarming=PromptSource(source=alarming_test, column=column, split=split),
            n_test=n_test,
            max_new_tokens=max_new_tokens,
            kl_tokens=kl_tokens,
            more=more_sets(also, column, split),
            tasks=task_names(tasks),
            task_directory=task_files,
            task_limit=task_limit,
            judge=judge,
            calibration=calibration,
        ),
        batch_size=batch_size,
    )
    with console.progress() as progress:
        evaluation, notes = pipeline.compare(settings, edited, progress=progress)
    if output is not None and whole:
        with atomic.atomic_directory(output, force=force) as directory:
            records.write_json(directory / "scores.json", evaluation.to_json())
            records.write_jsonl(directory / "rows.jsonl", (row.to_json() for row in evaluation.rows))
            write_html_report(directory)
    elif output is not None:
        records.write_json(output, evaluation.to_json(), force=force)
    if rows is not None:
        records.write_jsonl(rows, (row.to_json() for row in evaluation.rows), force=force)
    data = evaluation.to_json() | {"warnings": list(notes)}
    console.finish(data, show=lambda: console.show_evaluation(evaluation, notes))


def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
) -> None:
    """What an edit would touch and what it would leave, from the configuration alone."""
    from remove_refusals import examination as inspection
    from remove_refusals.cli import printing as console

    found = inspection.inspect(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        console.say_json(found)
    else:
        console.show_map(found)


def certify(
    directory: Annotated[Path, typer.Argument(help="The edited model, with its ablation.json.")],
    base: Annotated[str, typer.Option(help="The model that it was made from.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure on saved files what is left of the direction; exit code 3 if they do not hold the edit."""
    from remove_refusals.baking import certify_directory
    from remove_refusals.cli import printing as console

    certificate = certify_directory(directory, base, trust_remote_code=trust_remote_code)
    if as_json:
        console.say_json(certificate.to_json())
    else:
        console.show_certificate(certificate)
    if not certificate.passed:
        raise CertificateError(
            f"{len(certificate.problems)} things in {directory} are not as its record says, expected none; "
            "make the directory again."
        )


def report(
    directory: Annotated[Path, typer.Argument(help="A directory that `run` made, or one with some of its records.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file; report.html in the directory by default.")
    ] = None,
    full_answers: Annotated[
        bool, typer.Option("--full-answers", help="Put whole answers to harmful prompts in, not their first sentence.")
    ] = False,
    force: Force = False,
) -> None:
    """One HTML page of what was done and measured, to be read without network."""
    from remove_refusals.cli import printing as console
    from remove_refusals.report import write_html_report

    page = write_html_report(directory, output, full_answers=full_answers, force=force)
    console.finish({"output": str(page)}, f"Saved to {page}.")


def analyze(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make, with report.html in it.")],
    force: Force = False,
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="Also see what is left without one direction, by generation.")
    ] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    column: Column = None,
    split: Split = None,
    seed: Seed = 0,
    harmful_test: HarmfulTest = None,
    harmless_test: HarmlessTest = None,
    alarming_test: AlarmingTest = None,
    n_test: NTest = None,
    max_new_tokens: MaxNewTokens = 100,
    kl_tokens: KlTokens = 32,
) -> None:
    """Where a model's refusal lives and how robust it is; the model is not changed."""
    from remove_refusals import examination
    from remove_refusals import files as atomic
    from remove_refusals.cli import printing as console
    from remove_refusals.settings import DirectionSettings, LoadSettings, MeasureSettings, PromptSource, RunSettings

    atomic.check_target(output, force=force, directory=True)
    settings = RunSettings(
        model=model,
        loading=LoadSettings(device=device, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision),
        chat=chat_format(system_prompt, chat_template, plain),
        direction=DirectionSettings(
            harmful=PromptSource(source=harmful, column=column, split=split),
            harmless=PromptSource(source=harmless, column=column, split=split),
            seed=seed,
        ),
        measure=MeasureSettings(
            harmful=PromptSource(source=harmful_test, column=column, split=split),
            harmless=PromptSource(source=harmless_test, column=column, split=split),
            alarming=PromptSource(source=alarming_test, column=column, split=split),
            n_test=n_test,
            max_new_tokens=max_new_tokens,
            kl_tokens=kl_tokens,
        ),
        batch_size=batch_size,
    )
    with console.progress() as progress:
        found = examination.analyze(settings, output, answers=answers, force=force, progress=progress)
    console.finish(
        found.record().to_json() | {"output": str(output)},
        f"Saved to {output}: report.html, analysis.json" + (", scores.json and rows.jsonl." if answers else "."),
        lambda: _show(found),
    )


def _show(found: "Examination") -> None:
    """Say what was found."""
    from remove_refusals.cli import printing as console
    from remove_refusals.measure import warnings

    best = found.separation.layers[found.direction.origin.layer or 0].auroc
    if best is not None:
        console.say(
            f"Harmful and harmless prompts are told apart best at layer {found.direction.origin.layer} of "
            f"{len(found.separation.layers) - 1}: AUROC {best.value:.3f} [{best.low:.3f}, {best.high:.3f}], "
            f"{best.n_harmful} and {best.n_harmless} prompts, each by a direction that it had no part in."
        )
    most = sorted(found.contributions.sites, key=lambda site: -site.value)[:3]
    written = ", ".join(f"{site.site} {'' if site.layer is None else site.layer} {site.value:.3g}" for site in most)
    console.say(f"What adds most along that direction: {written}.")
    if found.evaluation is not None:
        console.show_evaluation(found.evaluation, warnings(found.evaluation))


def compare(
    directories: Annotated[list[Path], typer.Argument(help="What `run` or `evaluate -o DIR` left, one or more.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Any number of measured models in one table, and which of their differences are real."""
    from remove_refusals.cli import printing as console_tables
    from remove_refusals.cli.printing import say_json
    from remove_refusals.measure import side_by_side

    found = side_by_side(directories)
    if as_json:
        say_json(found.to_json())
    else:
        console_tables.show_side_by_side(found)


judge_app = typer.Typer(
    help="How far a judge of answers can be trusted.",
    epilog="Example: remove-refusals judge calibrate mine.jsonl --judge phrases",
    no_args_is_help=True,
)


def calibrate(
    labelled: Annotated[
        Path | None,
        typer.Argument(help="JSON Lines with prompt, answer and label; by default the answers that come with it."),
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            autocompletion=completion.judge,
            help="phrases, a classifier's directory or hub id, or URL#MODEL of a chat endpoint.",
        ),
    ] = "phrases",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the calibration as JSON.")] = None,
    force: Force = False,
    device: Device = None,
    cache: Annotated[Path | None, typer.Option(help="Where an endpoint's judgements are kept.")] = None,
    prompt_price: Annotated[float | None, typer.Option(min=0, help="Of a million tokens that are sent.")] = None,
    completion_price: Annotated[float | None, typer.Option(min=0, help="Of a million tokens of replies.")] = None,
    text_format: Annotated[str | None, typer.Option(help="What a classifier reads: {prompt} and {answer}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A judge's labels against those of people: who is taken for what, sensitivity and specificity with intervals."""
    from remove_refusals import files as atomic
    from remove_refusals import files as records
    from remove_refusals.cli import printing as console
    from remove_refusals.measure import calibrate as measure_judge
    from remove_refusals.measure import load_answers, make_judge

    if output is not None:
        atomic.check_target(output, force=force, directory=False)
    answers = None if labelled is None else load_answers(labelled)
    made = make_judge(
        judge,
        device=device,
        cache=cache,
        prompt_price=prompt_price,
        completion_price=completion_price,
        text_format=text_format,
    )
    found = measure_judge(made, answers)
    if as_json:
        console.say_json(found.to_json())
    else:
        console.show_calibration(found, getattr(made, "usage", None))
    if output is not None:
        records.write_json(output, found.to_json(), force=force)


judge_app.command(epilog="Example: remove-refusals judge calibrate mine.jsonl --judge http://127.0.0.1:8000/v1#model")(
    with_output(calibrate)
)


_MOST_ROWS = 40


def diff(
    first: ModelArgument,
    second: Annotated[str, typer.Argument(help="The other one, by the same kinds of names.")],
    direction: OptionalDirectionFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Which tensors differ between two checkpoints, by how much, and what share of that lies along a direction."""
    from remove_refusals import errors
    from remove_refusals import examination as differences
    from remove_refusals.cli import printing as console
    from remove_refusals.directions import direction as direction_files

    given = direction_files.load_directions(direction) if direction is not None else (None,)
    if len(given) != 1:
        raise errors.DirectionError(f"{direction} holds {len(given)} directions, expected one; give one of its files.")
    found = differences.diff(first, second, given[0], trust_remote_code=trust_remote_code)
    if as_json:
        console.say_json(found.to_json())
        return
    for row in found.tensors[:_MOST_ROWS]:
        numbers = "" if row.relative is None else f", {row.relative:.2e} of its norm"
        numbers += "" if row.along is None else f", {row.along:.1%} of that along the direction"
        console.say(f"{row.name}: {row.status}{numbers}")
    if len(found.tensors) > _MOST_ROWS:
        console.say(f"… and {len(found.tensors) - _MOST_ROWS} more; --json gives all.")
    whole = "" if found.relative is None else f" by {found.relative:.2e} of their norm"
    whole += "" if found.along is None else f", {found.along:.1%} of that (squared) along the direction"
    console.say(f"{len(found.tensors)} tensors differ{whole}; {found.identical} are identical.")


def config(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file; printed by default.")] = None,
    force: Force = False,
) -> None:
    """Every option of `run` with its default, as a commented TOML file for `run --config`."""
    from remove_refusals import files as atomic
    from remove_refusals.cli import options as configuration
    from remove_refusals.cli import printing as console

    assert context.parent is not None
    group = context.parent.command
    found = group.get_command(context.parent, "run")  # type: ignore[attr-defined]
    text = configuration.default_configuration(found.params)
    if output is None:
        console.write(text)
        return
    with atomic.atomic_file(output, force=force) as staging:
        staging.write_text(text, encoding="utf-8")
    console.finish({"output": str(output)}, f"Saved to {output}.")


def reproduce(
    directory: Annotated[Path, typer.Argument(help="What `run` left.")],
    model: Annotated[str | None, typer.Option(help="Where the base model is, if not where it was.")] = None,
    files: Annotated[Path | None, typer.Option(help="The directory with the prompt files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Repeat a run and say, hash by hash, what came out the same; exit code 3 if the weights did not."""
    from remove_refusals import pipeline as reproduction
    from remove_refusals.cli import printing as console

    with console.progress() as progress:
        found = reproduction.reproduce(directory, model=model, files=files, progress=progress)
    if as_json:
        console.say_json(found.to_json())
    else:
        for name, version, now in found.versions:
            console.say(f"Version: {name} was {version}, is {now}.")
        for name, sha in found.same:
            console.say(f"same       {sha[:16]}  {name}")
        for name, sha, other in found.different:
            console.say(f"different  {sha[:16]}  {name} (now {other[:16]})")
        for name in found.missing:
            console.say(f"missing    {'':16}  {name}")
        for name in found.new:
            console.say(f"new        {'':16}  {name}")
        total = len(found.same) + len(found.different) + len(found.missing)
        console.say(f"{len(found.same)} of {total} files came out the same.")
    if not found.weights_alike:
        raise CertificateError(
            f"The weights of {directory} did not come out the same, expected equal hashes; compare the versions and "
            "the machine."
        )
