"""What the command shows: progress, tables, the chat prompt. Numbers come from records; nothing is computed here."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from remove_refusals.evaluate import Evaluation
from remove_refusals.types import EditPlan, ModelMap


def say(text: str) -> None:
    """Print one line to standard output."""
    Console(highlight=False).print(text, soft_wrap=True, markup=False)


def write(text: str) -> None:
    """Print a piece of text at once, without a line end."""
    sys.stdout.write(text)
    sys.stdout.flush()


def typed_lines() -> Iterator[str]:
    """Give what is typed line by line until the end of input; asks with `> ` in a terminal, not in a pipe."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            write("> ")
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar per stage on standard error while the context lasts; nothing where that is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield on_progress


def show_plan(plan: EditPlan, model_map: ModelMap) -> None:
    """Say how many tensors were edited at which kinds of site, and what was left."""
    counts: dict[str, int] = {}
    for entry in plan.entries:
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
    edited = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    say(f"Edited tensors of model type {model_map.model_type}: {edited}; left as they were: {len(plan.left)} writers.")
    if model_map.tied:
        how = "it was untied first, so the unembedding is unchanged" if plan.untie else "both are one tensor still"
        say(f"The embedding is tied to the unembedding: {how}.")


def show_evaluation(evaluation: Evaluation, notes: tuple[str, ...]) -> None:
    """Print the scores of base and edited model side by side, and what should be said of them."""
    console = Console(highlight=False)
    table = Table(title="Base and edited model on the same prompts")
    for column in ("", "base", "edited", "paired"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for row in evaluation.table():
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(f"Warning: {note}", style="yellow", markup=False)
