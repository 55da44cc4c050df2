"""The command: parse, call, print. Nothing heavy is imported before a command runs."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from remove_refusals.commands import (
    comparing,
    configuring,
    editing,
    examining,
    judging,
    making,
    measuring,
    sharing,
    talking,
    undoing,
)
from remove_refusals.errors import RemoveRefusalsError
from remove_refusals.help_pages import Command, with_help
from remove_refusals.output import with_output


class _Commands(TyperGroup):
    """The commands; their errors and Ctrl-C are caught here, before Typer answers them in its own way."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _one_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    name="remove-refusals",
    help="Find the direction in a language model's residual stream that mediates refusal, take it out, and measure "
    "what that did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)

_COMMANDS: tuple[tuple[Callable[..., None], str, str], ...] = (
    (making.run, "run", "google/gemma-3-1b-it --output gemma-ablated --layers 12-25"),
    (making.find, "direction", "demo -o demo.safetensors"),
    (talking.chat, "chat", "demo --direction demo.safetensors --compare"),
    (talking.ui, "ui", "demo --run demo-ablated"),
    (talking.serve, "serve", "demo --direction demo.safetensors"),
    (talking.generate, "generate", "demo --direction demo.safetensors --prompts p.txt -o a.jsonl"),
    (editing.bake, "bake", "demo --direction demo.safetensors -o demo-ablated"),
    (measuring.evaluate, "evaluate", "demo demo-ablated -o scores.json"),
    (comparing.compare, "compare", "demo-ablated another-ablated"),
    (measuring.inspect, "inspect", "demo"),
    (measuring.certify, "certify", "demo-ablated --base demo"),
    (undoing.diff, "diff", "demo demo-ablated --direction demo.safetensors"),
    (undoing.restore, "restore", "demo-ablated --base demo"),
    (configuring.config, "config", "-o run.toml"),
    (configuring.reproduce, "reproduce", "demo-ablated"),
    (examining.analyze, "analyze", "demo -o demo-analysis"),
    (measuring.report, "report", "demo-ablated -o report.html"),
    (sharing.push, "push", "demo-ablated me/demo-ablated"),
)
_NO_RESULT = ("chat", "ui", "serve")
for _command, _name, _example in _COMMANDS:
    _whole = with_help(with_output(_command, json=_name not in _NO_RESULT))
    app.command(_name, cls=Command, epilog=f"Example: remove-refusals {_name} {_example}")(_whole)
app.add_typer(judging.judge_app, name="judge")


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn this library's errors into their sentence on standard error and their exit code."""
    try:
        yield
    except RemoveRefusalsError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt as stopped:
        # Whoever keeps something to go on from says so in a note.
        kept = " ".join(getattr(stopped, "__notes__", ()))
        sys.stderr.write(f"Stopped; {kept or 'nothing was left half-made.'}\n")
        raise SystemExit(130) from None


def main() -> None:
    """Run the command; the console script and `python -m remove_refusals` call this."""
    # Importing torch and Transformers makes millions of objects that stay; with Python's own thresholds a fifth of
    # the time goes into looking through them again and again for garbage.
    gc.set_threshold(50_000, 20, 20)
    app()
