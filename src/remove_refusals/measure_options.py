"""Options that say what is measured beside refusals and damage on the three sets."""

from typing import TYPE_CHECKING, Annotated

import typer

from remove_refusals import completion
from remove_refusals.errors import PromptError
from remove_refusals.options import MEASURE

if TYPE_CHECKING:
    from remove_refusals.settings import PromptSource

Longest = Annotated[
    int | None,
    typer.Option(min=1, help="Answers go on up to here, until refusals settle.", rich_help_panel=MEASURE),
]
Also = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Another harmless set, such as XSTest.", rich_help_panel=MEASURE),
]
Text = Annotated[str | None, typer.Option(help="A text file, for its perplexity.", rich_help_panel=MEASURE)]
Tasks = Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, by comma.", rich_help_panel=MEASURE)]
TaskFiles = Annotated[
    str | None, typer.Option(help="A directory with task files of your own.", rich_help_panel=MEASURE)
]
TaskLimit = Annotated[int | None, typer.Option(min=1, help="At most so many samples each.", rich_help_panel=MEASURE)]

JudgeOption = Annotated[
    str,
    typer.Option(
        "--judge",
        autocompletion=completion.judge,
        help="phrases, a classifier, or URL#MODEL.",
        rich_help_panel=MEASURE,
    ),
]
CalibrationFile = Annotated[
    str | None,
    typer.Option("--calibration", help="From `judge calibrate`: corrects the rates.", rich_help_panel=MEASURE),
]

_TAKEN = ("harmful", "harmless", "alarming")


def more_sets(also: list[str] | None, column: str | None, split: str | None) -> "tuple[tuple[str, PromptSource], ...]":
    """Read what `--also` says.

    Raises:
        PromptError: If it is not a name and a file, or a name is used twice.
    """
    from remove_refusals.settings import PromptSource

    found: dict[str, PromptSource] = {}
    for text in also or ():
        name, equals, place = text.partition("=")
        if not equals or not name.isidentifier() or not place:
            raise PromptError(
                f"The option --also is {text!r}, expected NAME=FILE, the name of letters, digits and _; write for "
                "example --also xstest=xstest.csv."
            )
        if name in _TAKEN or name in found:
            raise PromptError(f"The option --also names {name!r} twice, expected a name of its own; choose another.")
        found[name] = PromptSource(place, column, split)
    return tuple(found.items())


def task_names(tasks: str | None) -> tuple[str, ...]:
    """Split the names of tasks at commas."""
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
