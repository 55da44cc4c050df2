"""How a command was asked to speak: quietly, as JSON, and with a log beside; every command has these options."""

import functools
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from remove_refusals.errors import OutputError

_PANEL = "Output"
_LOGGER = logging.getLogger("remove_refusals")
_TENTHS = 10


@dataclass(frozen=True)
class Output:
    """What was asked for.

    Attributes:
        quiet: Neither progress nor remarks; only the result and errors.
        as_json: The result as JSON, and nothing else, on standard output.
    """

    quiet: bool = False
    as_json: bool = False


_CURRENT: ContextVar[Output | None] = ContextVar("output", default=None)

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only the result and errors, no progress.", rich_help_panel=_PANEL)
]
Log = Annotated[
    Path | None, typer.Option("--log", help="Append stages and their times to this file.", rich_help_panel=_PANEL)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_PANEL)]

OPTIONS: dict[str, Any] = {"quiet": Quiet, "log": Log, "as_json": Json}
"""The options by the names of their parameters."""


def current() -> Output:
    """Give what the command that runs was asked for."""
    return _CURRENT.get() or Output()


def with_output(command: Callable[..., None], *, json: bool = True) -> Callable[..., None]:
    """Give a command the options of this module.

    Args:
        command: A function whose parameters are options as Typer reads them.
        json: Whether it prints a result that can be JSON.

    Returns:
        The same, with `--quiet`, `--log` and, if asked for, `--json`; a parameter of its own by such a name stays.
    """
    signature = inspect.signature(command)
    own = {name: OPTIONS[name] for name in signature.parameters if name in OPTIONS}
    added = {name: option for name, option in OPTIONS.items() if (json or name != "as_json") and name not in own}
    defaults = {"quiet": False, "log": None, "as_json": False}

    @functools.wraps(command)
    def called(*args: Any, **kwargs: Any) -> None:
        asked = defaults | {name: kwargs[name] for name in own if name in kwargs}
        asked |= {name: kwargs.pop(name) for name in added if name in kwargs}
        with _as_asked(**asked):
            command(*args, **kwargs)

    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=option)
        for name, option in added.items()
    ]
    called.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
    called.__annotations__ = {**command.__annotations__, **own, **added}
    return called


@contextmanager
def _as_asked(*, quiet: bool, log: Path | None, as_json: bool) -> Iterator[None]:
    token = _CURRENT.set(Output(quiet, as_json))
    try:
        with _logged(log):
            yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def _logged(path: Path | None) -> Iterator[None]:
    """Write to a log while the context lasts: the command line, what `write_log` is told, and how it ended."""
    if path is None:
        yield
        return
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"The log {path} cannot be written ({error.strerror}), expected a file in a directory that exists; choose "
            "another place."
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    began = time.monotonic()
    _LOGGER.info("remove-refusals %s", " ".join(sys.argv[1:]))
    try:
        yield
    except BaseException as error:
        _LOGGER.error("ended after %.1f s: %s: %s", time.monotonic() - began, type(error).__name__, error)
        raise
    else:
        _LOGGER.info("done after %.1f s", time.monotonic() - began)
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(logging.NOTSET)
        handler.close()


def write_log(text: str) -> None:
    """Write a line to the log, if there is one."""
    if _LOGGER.handlers:
        _LOGGER.info("%s", text)


class StageLog:
    """Writes to the log what the bars of progress show: where a stage begins, each tenth of it, and its time."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._began: dict[str, float] = {}
        self._tenths: dict[str, int] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Take note of how far a stage is."""
        began, now = self._began.setdefault(stage, self._last), time.monotonic()
        self._last = now
        tenth = _TENTHS * done // total if total else _TENTHS
        if tenth != self._tenths.get(stage):
            self._tenths[stage] = tenth
            write_log(f"{stage}: {done} of {total} after {now - began:.1f} s")
