"""The command: parse, call, print. Nothing heavy is imported before a command runs."""

import functools
import gc
import inspect
import logging
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from remove_refusals.cli import look, make, talk
from remove_refusals.cli.command import without_types
from remove_refusals.errors import RemoveRefusalsError
from remove_refusals.processes import speaks


class _Commands(TyperGroup):
    """The commands; their errors and Ctrl-C are caught here, before Typer answers them in its own way."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Give the options; a switch takes no value, so its line names no type."""
        return without_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and turn this library's errors into their sentence on standard error and their exit code."""
        try:
            return super().invoke(ctx)
        except RemoveRefusalsError as error:
            if speaks():
                sys.stderr.write(f"Error: {error}\n")
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt as stopped:
            # Whoever keeps something to go on from says so in a note.
            kept = " ".join(getattr(stopped, "__notes__", ()))
            sys.stderr.write(f"Stopped; {kept or 'nothing was left half-made.'}\n")
            raise SystemExit(130) from None


app = typer.Typer(
    cls=_Commands,
    name="remove-refusals",
    help="Find the direction in a language model's residual stream that mediates refusal, take it out, and measure "
    "what that did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(f"remove-refusals {metadata.version('remove-refusals')}")
        raise typer.Exit


@app.callback()
def _every(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


judge_app = typer.Typer(
    help="How far a judge of answers can be trusted.",
    epilog="Example: remove-refusals judge calibrate mine.jsonl --judge phrases",
    no_args_is_help=True,
    cls=_Commands,
)

_MAKE, _TALK, _MEASURE, _CHECK = "Make an edited model", "Talk to it", "Measure and look inside", "Check and repeat"

_COMMANDS: tuple[tuple[str, Callable[..., None], str, str], ...] = (
    (_MAKE, make.run, "run", "google/gemma-3-1b-it --output gemma-ablated"),
    (_MAKE, make.find, "direction", "demo -o demo.safetensors"),
    (_MAKE, make.bake, "bake", "demo --direction demo.safetensors -o demo-ablated"),
    (_MAKE, make.push, "push", "demo-ablated me/demo-ablated"),
    (_TALK, talk.chat, "chat", "demo --direction demo.safetensors --compare"),
    (_TALK, talk.ui, "ui", "demo --run demo-ablated"),
    (_TALK, talk.generate, "generate", 'demo "How do I bake a bread?" --direction demo.safetensors'),
    (_MEASURE, look.evaluate, "evaluate", "demo demo-ablated -o scores.json"),
    (_MEASURE, look.compare, "compare", "demo-ablated another-ablated"),
    (_MEASURE, look.report, "report", "demo-ablated -o report.html"),
    (_MEASURE, look.analyze, "analyze", "demo -o demo-analysis"),
    (_MEASURE, look.inspect, "inspect", "demo"),
    (_MEASURE, look.plan, "plan", "demo --devices 8x80GiB"),
    (_CHECK, look.certify, "certify", "demo-ablated --base demo"),
    (_CHECK, look.diff, "diff", "demo demo-ablated --direction demo.safetensors"),
    (_CHECK, look.reproduce, "reproduce", "demo-ablated"),
    (_CHECK, look.config, "config", "-o run.toml"),
    ("judge", look.calibrate, "calibrate", "mine.jsonl --judge http://127.0.0.1:8000/v1#model"),
)


class Command(TyperCommand):
    """A command that gets its options when it is asked for: they take longer to make than a list of all commands."""

    @functools.cached_property
    def whole(self) -> Any:
        """The command with its options."""
        from remove_refusals.cli.options import whole

        command = next(one for _, one, name, _ in _COMMANDS if name == self.name)
        left_out = ["as_json"] if self.name in ("chat", "ui") else []
        left_out += [] if self.name in ("run", "evaluate", "analyze") else ["verbose"]
        return whole(command, str(self.name), str(self.epilog), left_out=left_out)

    @property
    def params(self) -> list[Any]:
        """The options and arguments."""
        found: list[Any] = self.whole.params
        return found

    @params.setter
    def params(self, found: list[Any]) -> None:
        """Leave those out that Typer found in what stands in for the command: it has none."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read a command line; the context is that of the whole command."""
        return self.whole.make_context(*args, **kwargs)


def main() -> None:
    """Run the command; the console script and `python -m remove_refusals` call this."""
    # Importing torch and Transformers makes millions of objects that stay; with Python's own thresholds a fifth of
    # the time goes into looking through them again and again for garbage.
    gc.set_threshold(50_000, 20, 20)
    # Transformers remarks on each kernel that is not installed, which says nothing of the job.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Other packages' warnings go to the log alone, if there is one.
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())
    # OpenMP's threads wait for each other by spinning, which takes many times as long with other work on the machine;
    # without any, an idle machine loses a third. GNU's library reads this when torch loads it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    app()


for _panel, _command, _name, _example in _COMMANDS:
    _app, _words = (judge_app, f"judge {_name}") if _panel == "judge" else (app, _name)
    _app.command(
        _name,
        cls=Command,
        help=inspect.getdoc(_command),
        epilog=f"Example: remove-refusals {_words} {_example}",
        rich_help_panel=None if _app is judge_app else _panel,
    )(lambda: None)

app.add_typer(judge_app, name="judge", rich_help_panel=_MEASURE)
