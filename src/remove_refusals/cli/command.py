"""What commands share: which settings they take, arguments, `--quiet`, `--log` and `--json`, and the log.

Nothing heavy is imported, Pydantic included: `--help` lists the commands and needs no settings.
"""

import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Annotated, Any

import typer

from remove_refusals.errors import DirectionError, OutputError

ModelArgument = Annotated[str, typer.Argument(help="A directory, a hub id, or 'demo', the embedded model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def to(text: str) -> Any:
    """Declare the option that says where to write."""
    return typer.Option("--output", "-o", help=text)


DirectionFile = Annotated[
    Path | None,
    typer.Option("--direction", help="A direction: .safetensors or .pt; or a directory of one for each layer."),
]


RunDirectory = Annotated[Path | None, typer.Option("--run", help="Take out what was taken out in this directory.")]
CandidateName = Annotated[str | None, typer.Option("--candidate", help="With --run: another candidate of its search.")]


def given_intervention(direction: Path | None, run: Path | None, candidate: str | None = None) -> Any:
    """Read directions, or the intervention of a run or of a candidate of its search; None where neither is given."""
    if direction is not None and run is not None:
        raise DirectionError("Both --direction and --run are given, expected one of them; pass one.")
    if candidate is not None and run is None:
        raise DirectionError("The option --candidate is given without --run, expected both; add --run DIR.")
    if run is None:
        from remove_refusals.directions import load_directions

        return None if direction is None else load_directions(direction)
    from remove_refusals.baking import load_intervention
    from remove_refusals.search import load_candidates

    if candidate is None:
        return load_intervention(run)
    found = load_candidates(run)
    if candidate not in found:
        raise DirectionError(
            f"The candidate {candidate!r} is not among those whose directions {run} keeps, expected one of "
            f"{', '.join(map(repr, found)) or 'none'}; choose one of these."
        )
    return found[candidate]


def complete_judge(incomplete: str) -> list[str]:
    """Complete a judge: the built-in one, a published one, or a directory with a classifier."""
    # Unlike that of `Path`, this one gives paths back as they were typed.
    directories = sorted(name.rstrip("/") for name in glob(f"{escape(incomplete)}*/"))  # noqa: PTH207
    return [name for name in ("phrases", "harmbench", "strongreject") if name.startswith(incomplete)] + directories


IN_FILE = "remove_refusals.options_in_the_file"
"""Where a context keeps what a configuration said."""


def _load(context: typer.Context, path: Path | None) -> Path | None:
    from remove_refusals.cli.options import read_configuration

    if path is not None:
        context.meta[IN_FILE] = read_configuration(path)
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=_load, help="Options from a TOML file; the command line wins."),
]

TAKEN: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}
"""By a command's qualified name what was said to `takes`."""


def takes(*places: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Note which settings a command has options for; they are made of its annotations when it is asked for.

    The places are in `RunSettings`, such as `loading` or `measure.n_test`, and stand for all that lies within; without
    any it is the whole tree. The defaults, by the options' parameter names, are those that the command has instead.
    """

    def note(command: Callable[..., None]) -> Callable[..., None]:
        TAKEN[f"{command.__module__}.{command.__qualname__}"] = places, defaults
        return command

    return note


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Declare a command's parameter; `...` stands for no default."""
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_LOGGER, _WARNINGS = logging.getLogger("remove_refusals"), logging.getLogger("py.warnings")
_TENTHS = 10


@dataclass(frozen=True)
class Output:
    """What was asked for: `quiet` leaves result and errors, `as_json` the result alone, `verbose` the whole tables."""

    quiet: bool = False
    as_json: bool = False
    verbose: bool = False


def without_types(parameters: list[Any]) -> list[Any]:
    """Leave out what a switch is said to take on a help page."""
    for one in parameters:
        if getattr(one, "is_flag", False):
            one.metavar = ""
    return parameters


_CURRENT: ContextVar[Output | None] = ContextVar("output", default=None)


def _option(name: str, kind: Any, text: str, *words: str) -> inspect.Parameter:
    option = Annotated[kind, typer.Option(*words, help=text, rich_help_panel="Output")]
    return parameter(name, option, False if kind is bool else None)


OUTPUT = (
    _option("quiet", bool, "Only the result and errors, no progress.", "--quiet", "-q"),
    _option("log", Path | None, "Append stages and their times to this file.", "--log"),
    _option("as_json", bool, "Print the result as JSON.", "--json"),
    _option("verbose", bool, "Whole tables, with intervals, and what the search tried.", "--verbose", "-v"),
)
"""Options of every command; the third only where there is a result, and the last where there is a long table."""


def current() -> Output:
    """Give what the command that runs was asked for."""
    return _CURRENT.get() or Output()


@contextmanager
def as_asked(quiet: bool, log: Path | None, as_json: bool = False, verbose: bool = False) -> Iterator[None]:
    """Print as asked while the context lasts, and write the log."""
    token = _CURRENT.set(Output(quiet, as_json, verbose))
    if "demo" in sys.argv[1:] and Path("demo", "config.json").is_file():
        sys.stderr.write("Note: 'demo' is the embedded model; for the directory of that name write ./demo.\n")
    try:
        with nullcontext() if log is None else _logged(log):
            yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Write to a log while the context lasts: the command line, what `write_log` is told, and how it ended."""
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"The log {path} cannot be written ({error.strerror}), expected a file in a directory that exists; choose "
            "another place."
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for logger in (_LOGGER, _WARNINGS):
        logger.addHandler(handler)
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
        for logger in (_LOGGER, _WARNINGS):
            logger.removeHandler(handler)
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
