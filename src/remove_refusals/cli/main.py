"""The command: parse, call, print. Nothing heavy is imported before a command runs."""

import functools
import gc
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from remove_refusals.cli import look, make, talk
from remove_refusals.errors import RemoveRefusalsError
from remove_refusals.processes import speaks


class _Commands(TyperGroup):
    """The commands; their errors and Ctrl-C are caught here, before Typer answers them in its own way."""

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
)

judge_app = typer.Typer(
    help="How far a judge of answers can be trusted.",
    epilog="Example: remove-refusals judge calibrate mine.jsonl --judge phrases",
    no_args_is_help=True,
)

_COMMANDS: tuple[tuple[typer.Typer, Callable[..., None], str, str], ...] = (
    (app, make.run, "run", "google/gemma-3-1b-it --output gemma-ablated --layers 12-25"),
    (app, make.find, "direction", "demo -o demo.safetensors"),
    (app, talk.chat, "chat", "demo --direction demo.safetensors --compare"),
    (app, talk.ui, "ui", "demo --run demo-ablated"),
    (app, talk.generate, "generate", "demo --direction demo.safetensors --prompts p.txt -o a.jsonl"),
    (app, make.bake, "bake", "demo --direction demo.safetensors -o demo-ablated"),
    (app, look.evaluate, "evaluate", "demo demo-ablated -o scores.json"),
    (app, look.compare, "compare", "demo-ablated another-ablated"),
    (app, look.inspect, "inspect", "demo"),
    (app, look.plan, "plan", "demo --devices 8x80GiB"),
    (app, look.certify, "certify", "demo-ablated --base demo"),
    (app, look.diff, "diff", "demo demo-ablated --direction demo.safetensors"),
    (app, look.config, "config", "-o run.toml"),
    (app, look.reproduce, "reproduce", "demo-ablated"),
    (app, look.analyze, "analyze", "demo -o demo-analysis"),
    (app, look.report, "report", "demo-ablated -o report.html"),
    (app, make.push, "push", "demo-ablated me/demo-ablated"),
    (judge_app, look.calibrate, "calibrate", "mine.jsonl --judge http://127.0.0.1:8000/v1#model"),
)


class Command(TyperCommand):
    """A command that gets its options when it is asked for: they take longer to make than a list of all commands."""

    @functools.cached_property
    def whole(self) -> Any:
        """The command with its options."""
        from remove_refusals.cli.options import whole

        command = next(one for _, one, name, _ in _COMMANDS if name == self.name)
        return whole(command, str(self.name), str(self.epilog), json=self.name not in ("chat", "ui"))

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
    # OpenMP's threads wait for each other by spinning, which takes many times as long with other work on the machine.
    # GNU's library reads this when torch loads it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    app()


for _app, _command, _name, _example in _COMMANDS:
    _words = _name if _app is app else f"judge {_name}"
    _app.command(
        _name, cls=Command, help=inspect.getdoc(_command), epilog=f"Example: remove-refusals {_words} {_example}"
    )(lambda: None)

app.add_typer(judge_app, name="judge")
