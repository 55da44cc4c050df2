"""Commands that look at models and change nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from remove_refusals.cli.command import (
    CandidateName,
    DirectionFile,
    Force,
    ModelArgument,
    RunDirectory,
    complete_judge,
    given_intervention,
    takes,
    to,
)
from remove_refusals.errors import CertificateError, DirectionError

if TYPE_CHECKING:
    from remove_refusals.examination import Examination
    from remove_refusals.settings import RunSettings


@takes(
    *("loading.device", "loading.dtype", "loading.load_in_4bit", "loading.load_in_8bit"),
    *("loading.trust_remote_code", "loading.device_map", "loading.offload", "loading.max_memory"),
    *("loading.tp", "loading.replicas", "one_at_a_time", "chat", "batch_size", "measure"),
    *("edit.strength", "edit.layers", "edit.sites"),
)
def evaluate(
    base: ModelArgument,
    settings: "RunSettings",
    edited: Annotated[
        str | None, Argument(help="The edited model: a directory or a hub id; none with --run or --direction.")
    ] = None,
    direction: DirectionFile = None,
    run: RunDirectory = None,
    candidate: CandidateName = None,
    output: Annotated[Path | None, to("Save the scores (FILE.json), or all records (DIR).")] = None,
    rows: Annotated[Path | None, Option(help="Also save every answer as JSON Lines.")] = None,
    force: Force = False,
) -> None:
    """Refusals, false refusals and damage of two models, side by side on the same prompts.

    With --run or --direction the edited model is the base with that taken out as it runs; nothing is saved.
    """
    from remove_refusals.cli import printing
    from remove_refusals.files import atomic_directory, check_target, write_json, write_jsonl
    from remove_refusals.report import write_html_report

    whole = output is not None and output.suffix != ".json"
    for path in (output, rows):
        if path is not None:
            check_target(path, force=force, directory=whole and path is output)
    if (edited is None) == (direction is None and run is None):
        raise DirectionError(
            f"{'Nothing' if edited is None else 'An edited model beside --direction or --run'} is given to compare "
            f"{base} with, expected one of an edited model, --direction FILE and --run DIR; pass one."
        )
    strength = settings.edit.strength
    part = None if strength == 1 else f"strength {strength:g}"
    name = edited or ", ".join(filter(None, [str(run or direction), candidate, part]))
    with printing.progress(printing.LOADING, printing.MEASURING) as progress:
        from remove_refusals.models import check_not_source
        from remove_refusals.pipeline import compare as measured

        for path in filter(None, (output, rows)):
            check_not_source(path, base, edited, run)
        taken = given_intervention(direction, run, candidate)
        evaluation, notes = measured(settings.model_copy(update={"model": base}), name, taken, progress=progress)
    if output is not None and whole:
        with atomic_directory(output, force=force) as directory:
            write_json(directory / "scores.json", evaluation.to_json())
            write_jsonl(directory / "rows.jsonl", (row.to_json() for row in evaluation.rows))
            write_html_report(directory)
    elif output is not None:
        write_json(output, evaluation.to_json(), force=force)
    if rows is not None:
        write_jsonl(rows, (row.to_json() for row in evaluation.rows), force=force)
    data = evaluation.to_json() | {"warnings": list(notes)}
    printing.finish(data, show=lambda: printing.show_evaluation(evaluation, notes))


@takes("loading.trust_remote_code", "loading.revision")
def inspect(model: ModelArgument, settings: "RunSettings") -> None:
    """What an edit would touch and what it would leave, from the configuration alone."""
    from remove_refusals.cli import printing

    loading = settings.loading
    with printing.progress("Tracing the model"):
        from remove_refusals import examination

        found = examination.inspect(model, revision=loading.revision, trust_remote_code=loading.trust_remote_code)
    printing.finish(found.to_json(), show=lambda: printing.show_map(found))


@takes(
    *("loading.dtype", "loading.trust_remote_code", "loading.revision", "batch_size", "direction.n_prompts"),
    *("select", "measure.n_test", "measure.max_new_tokens", "measure.kl_tokens"),
)
def plan(
    model: ModelArgument,
    settings: "RunSettings",
    devices: Annotated[str, Option(help="Such as 8x80GiB, 24GiB, cpu or cpu:64GiB.", metavar="NxSIZE")] = "cpu",
) -> None:
    """What `run` needs on given devices, from the configuration alone: placement, memory by stage, the line to type."""
    from remove_refusals.baking import Devices, plan_run
    from remove_refusals.cli import printing

    found = plan_run(settings.model_copy(update={"model": model}), Devices.read(devices))
    printing.finish(found.to_json(), show=lambda: printing.show_scale(found))


@takes("loading.trust_remote_code")
def certify(
    directory: Annotated[Path, Argument(help="The edited model, with its ablation.json.")],
    base: Annotated[str, Option(help="The model that it was made from.")],
    settings: "RunSettings",
) -> None:
    """Measure on saved files what is left of the direction; exit code 3 if they do not hold the edit."""
    from remove_refusals.cli import printing

    with printing.progress("Measuring what is left in the files"):
        from remove_refusals.baking import certify_directory

        certificate = certify_directory(directory, base, trust_remote_code=settings.loading.trust_remote_code)
    printing.finish(certificate.to_json(), show=lambda: printing.show_certificate(certificate))
    if not certificate.passed:
        raise CertificateError(
            f"{len(certificate.problems)} things in {directory} are not as its record says of {base}, expected none; "
            "give the model that it was made from, or make it again."
        )


def report(
    directory: Annotated[Path, Argument(help="A directory that `run` made, or one with some of its records.")],
    output: Annotated[Path | None, to("The HTML file; report.html in the directory by default.")] = None,
    full_answers: Annotated[
        bool, Option("--full-answers", help="Put whole answers to harmful prompts in, not their first sentence.")
    ] = False,
    card: Annotated[
        Path | None, Option("--card", help="Also draw the first figures as a picture to share, an SVG file.")
    ] = None,
    force: Force = False,
) -> None:
    """One HTML page of what was done and measured, to be read without network."""
    from remove_refusals.cli import printing
    from remove_refusals.report import write_card, write_html_report

    made = {} if card is None else {"card": write_card(directory, card, force=force)}
    made = {"output": write_html_report(directory, output, full_answers=full_answers, force=force)} | made
    printing.finish(
        {name: str(path) for name, path in made.items()}, f"Saved to {' and '.join(map(str, made.values()))}."
    )


@takes(
    *("loading.device", "loading.dtype", "loading.trust_remote_code", "loading.revision", "chat", "batch_size"),
    *("loading.device_map", "loading.offload", "loading.max_memory", "loading.tp", "loading.replicas"),
    *("direction.harmful", "direction.harmless", "direction.seed"),
    *("measure.harmful", "measure.harmless", "measure.alarming", "measure.n_test"),
    *("measure.max_new_tokens", "measure.kl_tokens", "measure.language"),
)
def analyze(
    model: ModelArgument,
    output: Annotated[Path, to("The directory to make, with report.html in it.")],
    settings: "RunSettings",
    force: Force = False,
    answers: Annotated[
        bool, Option("--answers/--no-answers", help="Also see what is left without one direction, by generation.")
    ] = True,
) -> None:
    """Where a model's refusal lives and how robust it is; the model is not changed."""
    from remove_refusals.cli import printing
    from remove_refusals.files import check_target

    check_target(output, force=force, directory=True)
    settings = settings.model_copy(update={"model": model})
    stages = (printing.LOADING, printing.READING, *([printing.MEASURING] if answers else []))
    with printing.progress(*stages) as progress:
        from remove_refusals import examination

        found = examination.analyze(settings, output, answers=answers, force=force, progress=progress)
    printing.finish(
        found.analysis.to_json() | {"output": str(output)},
        f"Saved to {output}: report.html, analysis.json" + (", scores.json and rows.jsonl." if answers else "."),
        lambda: _show(found),
    )


def _show(found: "Examination") -> None:
    """Say what was found."""
    from remove_refusals.cli import printing
    from remove_refusals.measure import warnings

    best = found.analysis.layers[found.direction.origin.layer or 0].auroc
    if best is not None:
        printing.say(
            f"Harmful and harmless prompts are told apart best at layer {found.direction.origin.layer} of "
            f"{len(found.analysis.layers) - 1}: AUROC {best.value:.3f} [{best.low:.3f}, {best.high:.3f}], "
            f"{best.n_harmful} and {best.n_harmless} prompts, each by a direction that it had no part in."
        )
    sites = found.analysis.contributions.sites if found.analysis.contributions is not None else ()
    most = sorted(sites, key=lambda site: -site.value)[:3]
    written = ", ".join(f"{site.site} {'' if site.layer is None else site.layer} {site.value:.3g}" for site in most)
    printing.say(f"What adds most along that direction: {written}.")
    if found.evaluation is not None:
        printing.show_evaluation(found.evaluation, warnings(found.evaluation))


def compare(
    directories: Annotated[list[Path], Argument(help="What `run` or `evaluate -o DIR` left, one or more.")],
) -> None:
    """Any number of measured models in one table, and which of their differences are real."""
    from remove_refusals.cli import printing
    from remove_refusals.measure import side_by_side

    found = side_by_side(directories)
    printing.finish(found.to_json(), show=lambda: printing.show_side_by_side(found))


def calibrate(
    labelled: Annotated[
        Path | None,
        Argument(help="JSON Lines with prompt, answer and label; by default the answers that come with it."),
    ] = None,
    judge: Annotated[
        str,
        Option(
            autocompletion=complete_judge,
            help="phrases, harmbench, strongreject, a classifier's directory or hub id, or URL#MODEL.",
        ),
    ] = "phrases",
    output: Annotated[Path | None, to("Also save the calibration as JSON.")] = None,
    force: Force = False,
    device: Annotated[str | None, Option(help="cuda, mps or cpu; the first that is there.")] = None,
    cache: Annotated[Path | None, Option(help="Where an endpoint's judgements are kept.")] = None,
    prompt_price: Annotated[float | None, Option(min=0, help="Of a million tokens that are sent.")] = None,
    completion_price: Annotated[float | None, Option(min=0, help="Of a million tokens of replies.")] = None,
    text_format: Annotated[str | None, Option(help="What a classifier reads: {prompt} and {answer}.")] = None,
    language: Annotated[str, Option(help="As of `evaluate`, for answers that do not tell theirs.")] = "auto",
) -> None:
    """A judge's labels against those of people: who is taken for what, sensitivity and specificity with intervals."""
    from remove_refusals.cli import printing
    from remove_refusals.files import check_target, write_json
    from remove_refusals.measure import calibrate as calibrated
    from remove_refusals.measure import load_answers, make_judge

    if output is not None:
        check_target(output, force=force, directory=False)
    answers = None if labelled is None else load_answers(labelled)
    made = make_judge(
        judge,
        device=device,
        cache=cache,
        prompt_price=prompt_price,
        completion_price=completion_price,
        text_format=text_format,
        language=language,
    )
    found = calibrated(made, answers)
    printing.finish(found.to_json(), show=lambda: printing.show_calibration(found, getattr(made, "usage", None)))
    if output is not None:
        write_json(output, found.to_json(), force=force)


_MOST_ROWS = 40


@takes("loading.trust_remote_code")
def diff(
    first: ModelArgument,
    second: Annotated[str, Argument(help="The other one, by the same kinds of names.")],
    settings: "RunSettings",
    direction: DirectionFile = None,
) -> None:
    """Which tensors differ between two checkpoints, by how much, and what share of that lies along a direction."""
    from remove_refusals.cli import printing

    with printing.progress("Comparing the tensors"):
        from remove_refusals import errors, examination
        from remove_refusals.directions import load_directions

        given = load_directions(direction) if direction is not None else (None,)
        if len(given) != 1:
            raise errors.DirectionError(f"{direction} holds {len(given)} directions, expected one; give one of them.")
        found = examination.diff(first, second, given[0], trust_remote_code=settings.loading.trust_remote_code)

    def show() -> None:
        for row in found.tensors[:_MOST_ROWS]:
            numbers = "" if row.relative is None else f", {row.relative:.2e} of its norm"
            numbers += "" if row.along is None else f", {row.along:.1%} of that along the direction"
            printing.say(f"{row.name}: {row.status}{numbers}")
        if len(found.tensors) > _MOST_ROWS:
            printing.say(f"… and {len(found.tensors) - _MOST_ROWS} more; --json gives all.")
        whole = "" if found.relative is None else f" by {found.relative:.2e} of their norm"
        whole += "" if found.along is None else f", {found.along:.1%} of that (squared) along the direction"
        printing.say(f"{len(found.tensors)} tensors differ{whole}; {found.identical} are identical.")

    printing.finish(found.to_json(), show=show)


def config(output: Annotated[Path | None, to("The file; printed by default.")] = None, force: Force = False) -> None:
    """Every option of `run` with its default, as a commented TOML file for `run --config`."""
    from remove_refusals.cli import printing
    from remove_refusals.cli.options import default_configuration
    from remove_refusals.files import atomic_file

    text = default_configuration()
    if output is None:
        printing.write(text)
        return
    with atomic_file(output, force=force) as staging:
        staging.write_text(text, encoding="utf-8")
    printing.finish({"output": str(output)}, f"Saved to {output}.")


def reproduce(
    directory: Annotated[Path, Argument(help="What `run` left.")],
    model: Annotated[str | None, Option(help="Where the base model is, if not where it was.")] = None,
    files: Annotated[Path | None, Option(help="The directory with the prompt files.")] = None,
) -> None:
    """Repeat a run and say, hash by hash, what came out the same; exit code 3 if the weights did not."""
    from remove_refusals.cli import printing

    with printing.progress(*printing.SEARCHED) as progress:
        from remove_refusals import pipeline

        found = pipeline.reproduce(directory, model=model, files=files, progress=progress)

    def show() -> None:
        lines = [f"Version: {name} was {version}, is {now}." for name, version, now in found.versions]
        lines += [f"same       {sha[:16]}  {name}" for name, sha in found.same]
        lines += [f"different  {sha[:16]}  {name} (now {other[:16]})" for name, sha, other in found.different]
        lines += [f"missing    {'':16}  {name}" for name in found.missing]
        lines += [f"new        {'':16}  {name}" for name in found.new]
        total = len(found.same) + len(found.different) + len(found.missing)
        printing.say(*lines, f"{len(found.same)} of {total} files came out the same.")

    printing.finish(found.to_json(), show=show)
    if not found.weights_alike:
        raise CertificateError(
            f"The weights of {directory} did not come out the same, expected equal hashes; compare the versions and "
            "the machine."
        )
