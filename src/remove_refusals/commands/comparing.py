"""The command that puts measured models side by side."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    directories: Annotated[list[Path], typer.Argument(help="What `run` or `evaluate -o DIR` left, one or more.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Any number of measured models in one table, and which of their differences are real."""
    from remove_refusals import console_tables, side_by_side
    from remove_refusals.console import say_json

    found = side_by_side.side_by_side(directories)
    if as_json:
        say_json(found.to_json())
    else:
        console_tables.show_side_by_side(found)
