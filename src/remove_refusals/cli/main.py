"""The command: parse, call, print. Nothing heavy is imported before a command runs."""

import copy
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from remove_refusals.cli import look as comparing
from remove_refusals.cli import look as configuring
from remove_refusals.cli import look as examining
from remove_refusals.cli import look as judging
from remove_refusals.cli import look as measuring
from remove_refusals.cli import look as undoing
from remove_refusals.cli import make as editing
from remove_refusals.cli import make as making
from remove_refusals.cli import make as sharing
from remove_refusals.cli import talk as talking
from remove_refusals.cli.options import with_output
from remove_refusals.errors import RemoveRefusalsError


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
    (talking.generate, "generate", "demo --direction demo.safetensors --prompts p.txt -o a.jsonl"),
    (editing.bake, "bake", "demo --direction demo.safetensors -o demo-ablated"),
    (measuring.evaluate, "evaluate", "demo demo-ablated -o scores.json"),
    (comparing.compare, "compare", "demo-ablated another-ablated"),
    (measuring.inspect, "inspect", "demo"),
    (measuring.certify, "certify", "demo-ablated --base demo"),
    (undoing.diff, "diff", "demo demo-ablated --direction demo.safetensors"),
    (configuring.config, "config", "-o run.toml"),
    (configuring.reproduce, "reproduce", "demo-ablated"),
    (examining.analyze, "analyze", "demo -o demo-analysis"),
    (measuring.report, "report", "demo-ablated -o report.html"),
    (sharing.push, "push", "demo-ablated me/demo-ablated"),
)


_NO_RESULT = ("chat", "ui")


class Command(TyperCommand):
    """A command whose `--help` may be shorter than its `--help-all`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page; where `--help-all` is an option and was not given, the short one, which says so."""
        page = self
        if any(parameter.name == "help_all" for parameter in self.params) and not ctx.meta.get(_ALL):
            page = copy.copy(self)
            page.params = [parameter for parameter in self.params if parameter.name not in FURTHER]
            left = len(self.params) - len(page.params)
            page.epilog = f"{self.epilog}\n\nThere are {left} more options; --help-all shows every one."
        TyperCommand.format_help(page, ctx, formatter)


def with_help(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command with many options the option `--help-all`.

    Args:
        command: A function whose parameters are options as Typer reads them.

    Returns:
        The same with that option, or the command itself where its options are few.
    """
    signature = inspect.signature(command)
    if len(signature.parameters) <= _MOST:
        return command

    @functools.wraps(command)
    def called(*args: Any, help_all: bool = False, **kwargs: Any) -> None:
        command(*args, **kwargs)

    added = inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)
    called.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    called.__annotations__ = {**command.__annotations__, "help_all": HelpAll}
    return called


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


FURTHER = frozenset(
    (
        *("dtype", "load_in_4bit", "trust_remote_code", "revision", "device_map", "offload", "max_memory"),
        *("chat_template", "plain", "batch_size", "column", "split", "n_prompts", "seed", "position", "projected"),
        *("per_layer", "max_kl", "tied", "variant", "allow_leak", "memory", "jobs", "certify"),
        *("harmful_test", "harmless_test", "alarming_test", "kl_tokens", "also", "tasks"),
        *("task_files", "task_limit", "calibration", "rows", "quiet", "log"),
    )
)
"""The parameters that a short page leaves out."""


_MOST = 22
"""Commands with more options than these have a short page; the others fit a screen."""


_ALL = "remove_refusals.all_options"


def _show_all(context: typer.Context, wanted: bool) -> None:
    # While a shell completes, nothing may be shown.
    if wanted and not context.resilient_parsing:
        context.meta[_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and exit.")
]


for _command, _name, _example in _COMMANDS:
    _whole = with_help(with_output(_command, json=_name not in _NO_RESULT))
    app.command(_name, cls=Command, epilog=f"Example: remove-refusals {_name} {_example}")(_whole)


app.add_typer(judging.judge_app, name="judge")
