"""What `--help` shows: of a command with many options those that most people need; `--help-all` shows every one."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

FURTHER = frozenset(
    (
        *("dtype", "load_in_4bit", "trust_remote_code", "revision", "device_map", "offload", "max_memory"),
        *("chat_template", "plain", "batch_size", "column", "split", "n_prompts", "seed", "position", "projected"),
        *("per_layer", "max_kl", "trials", "tied", "variant", "affine", "allow_leak", "memory", "jobs", "certify"),
        *("harmful_test", "harmless_test", "alarming_test", "kl_tokens", "longest", "also", "text", "tasks"),
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
