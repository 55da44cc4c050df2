"""Commands about judges."""

from pathlib import Path
from typing import Annotated

import typer

from remove_refusals import completion
from remove_refusals.options import Device, Force
from remove_refusals.output import with_output

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
    from remove_refusals import atomic, calibration, console, records
    from remove_refusals.judges import choosing

    if output is not None:
        atomic.check_target(output, force=force, directory=False)
    answers = None if labelled is None else calibration.load_answers(labelled)
    made = choosing.make_judge(
        judge,
        device=device,
        cache=cache,
        prompt_price=prompt_price,
        completion_price=completion_price,
        text_format=text_format,
    )
    found = calibration.calibrate(made, answers)
    if as_json:
        console.say_json(found.to_json())
    else:
        console.show_calibration(found, getattr(made, "usage", None))
    if output is not None:
        records.write_json(output, found.to_json(), force=force)


judge_app.command(epilog="Example: remove-refusals judge calibrate mine.jsonl --judge http://127.0.0.1:8000/v1#model")(
    with_output(calibrate)
)
