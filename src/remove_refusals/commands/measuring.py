"""Commands that look at models and change nothing."""

from pathlib import Path
from typing import Annotated

import typer

from remove_refusals.errors import CertificateError
from remove_refusals.measure_options import (
    Also,
    CalibrationFile,
    JudgeOption,
    Longest,
    TaskFiles,
    TaskLimit,
    Tasks,
    Text,
    more_sets,
    task_names,
)
from remove_refusals.options import (
    AlarmingTest,
    BatchSize,
    Column,
    Device,
    Dtype,
    Force,
    FourBit,
    HarmfulTest,
    HarmlessTest,
    KlTokens,
    MaxNewTokens,
    ModelArgument,
    NTest,
    Plain,
    RemoteCode,
    Revision,
    Split,
    SystemPrompt,
    TemplateFile,
    chat_format,
)


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
    longest: Longest = None,
    also: Also = None,
    text: Text = None,
    tasks: Tasks = None,
    task_files: TaskFiles = None,
    task_limit: TaskLimit = None,
    judge: JudgeOption = "phrases",
    calibration: CalibrationFile = None,
) -> None:
    """Refusals, false refusals and damage of two models, side by side on the same prompts."""
    from remove_refusals import atomic, console, pipeline, records
    from remove_refusals.report_page.page import write_html_report
    from remove_refusals.settings import LoadSettings, MeasureSettings, PromptSource, RunSettings

    whole = output is not None and output.suffix != ".json"
    for path in (output, rows):
        if path is not None:
            atomic.check_target(path, force=force, directory=whole and path is output)
    source = PromptSource
    settings = RunSettings(
        model=base,
        loading=LoadSettings(device, dtype, load_in_4bit, trust_remote_code),
        chat=chat_format(system_prompt, chat_template, plain),
        measure=MeasureSettings(
            source(harmful_test, column, split),
            source(harmless_test, column, split),
            source(alarming_test, column, split),
            n_test,
            max_new_tokens,
            kl_tokens,
            longest,
            more_sets(also, column, split),
            text,
            task_names(tasks),
            task_files,
            task_limit,
            judge,
            calibration,
        ),
        batch_size=batch_size,
    )
    with console.progress() as on_progress:
        evaluation, notes = pipeline.compare(settings, edited, on_progress=on_progress)
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
    from remove_refusals import console, inspection

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
    from remove_refusals import console, inspection

    certificate = inspection.certify_directory(directory, base, trust_remote_code=trust_remote_code)
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
    from remove_refusals import console
    from remove_refusals.report_page.page import write_html_report

    page = write_html_report(directory, output, full_answers=full_answers, force=force)
    console.finish({"output": str(page)}, f"Saved to {page}.")
