"""The options that several commands share, and what their values mean."""

import functools
import inspect
import json
import logging
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remove_refusals.errors import ConfigurationError, DirectionError, OutputError, PromptError, SelectionError

if TYPE_CHECKING:
    from remove_refusals.settings import ChatFormat, DirectionSettings, EditSettings, PromptSource, SelectSettings


CHOICES = {
    "--select": ("auto", "layer", "none"),
    "--tied": ("untie", "both"),
    "--variant": ("plain", "norm-preserving"),
}
"""The values of options that take one name."""


SITES = ("embedding", "attn", "mlp")
"""What `--sites` takes, joined by commas."""


def one_of(option: str) -> Callable[[str], list[str]]:
    """Give what completes an option that takes one name."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in CHOICES[option] if name.startswith(incomplete)]

    return complete


def sites(incomplete: str) -> list[str]:
    """Complete the last of several kinds of sites; those that stand there already are not offered again."""
    *given, last = incomplete.split(",")
    left = (site for site in SITES if site not in given and site.startswith(last))
    return [",".join((*given, site)) for site in left]


def judge(incomplete: str) -> list[str]:
    """Complete a judge: the built-in one, or a directory with a classifier."""
    directory, _, last = incomplete.rpartition("/")
    parent = Path(directory or ("/" if incomplete.startswith("/") else "."))
    found = ["phrases"] if "phrases".startswith(incomplete) else []
    if parent.is_dir():
        beside = sorted(path for path in parent.iterdir() if path.is_dir() and path.name.startswith(last))
        prefix = incomplete[: len(incomplete) - len(last)]
        found += [f"{prefix}{path.name}" for path in beside if not path.name.startswith(".")]
    return found


MODEL, PROMPTS, EDIT, MEASURE = "Model", "Direction", "Edit", "Measurement"


CHOICE, DISK = "Choice", "Edit on disk"


ModelArgument = Annotated[str, typer.Argument(help="A directory, a hub id, or 'demo', the embedded model.")]


Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the first that is there.", rich_help_panel=MODEL)]


Dtype = Annotated[
    str,
    typer.Option(help="auto: the checkpoint's on an accelerator, float32 on the CPU.", rich_help_panel=MODEL),
]


FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Load with bitsandbytes.", rich_help_panel=MODEL)]


DeviceMap = Annotated[
    str | None, typer.Option(help="auto spreads it over GPUs, memory and disk.", rich_help_panel=MODEL)
]


Offload = Annotated[str | None, typer.Option(help="With a map: a directory for the rest.", rich_help_panel=MODEL)]


MaxMemory = Annotated[
    str | None, typer.Option(help="With a map: the most memory for weights, as 8GiB.", rich_help_panel=MODEL)
]


RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MODEL)
]


Revision = Annotated[str | None, typer.Option(help="The hub's branch, tag or commit.", rich_help_panel=MODEL)]


SystemPrompt = Annotated[str | None, typer.Option(help="A system message before each prompt.", rich_help_panel=MODEL)]


TemplateFile = Annotated[
    Path | None, typer.Option("--chat-template", help="A Jinja file in place of the model's.", rich_help_panel=MODEL)
]


Plain = Annotated[bool, typer.Option("--plain", help="No chat template, for base models.", rich_help_panel=MODEL)]


BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Prompts at once; found automatically.", rich_help_panel=MODEL)
]


Harmful = Annotated[str | None, typer.Option(help="File or data set of refused prompts.", rich_help_panel=PROMPTS)]


Harmless = Annotated[str | None, typer.Option(help="File or data set of answered prompts.", rich_help_panel=PROMPTS)]


Column = Annotated[str | None, typer.Option(help="The prompts' column in tables.", rich_help_panel=PROMPTS)]


Split = Annotated[str | None, typer.Option(help="The split of data sets.", rich_help_panel=PROMPTS)]


NPrompts = Annotated[int, typer.Option(min=1, help="How many of each are drawn.", rich_help_panel=PROMPTS)]


Seed = Annotated[int, typer.Option(help="What draws them.", rich_help_panel=PROMPTS)]


Layer = Annotated[str, typer.Option(help="Where: a fraction of depth (0.6) or an index (15).", rich_help_panel=PROMPTS)]


def _positions(text: str) -> int | tuple[int, ...]:
    """Read one token position or several, joined by commas."""
    parts = str(text).split(",")
    if not all(part.removeprefix("-").isdecimal() and int(part) < 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a negative number or several, such as -1 or -1,-2.")
    return int(text) if len(parts) == 1 else tuple(map(int, parts))


Position = Annotated[
    Any,
    typer.Option(
        parser=_positions,
        metavar="N[,N]",
        help="Which token, from the end; for several the direction has a column each.",
        rich_help_panel=PROMPTS,
    ),
]


Projected = Annotated[
    bool,
    typer.Option("--projected", help="Remove the component along the harmless mean.", rich_help_panel=PROMPTS),
]


PerLayer = Annotated[
    bool, typer.Option("--per-layer", help="For each layer a direction, found behind it.", rich_help_panel=PROMPTS)
]


DirectionFile = Annotated[
    Path, typer.Option("--direction", help="A direction: .safetensors or .pt; or a directory of one for each layer.")
]


OptionalDirectionFile = Annotated[
    Path | None, typer.Option("--direction", help="Use this direction instead.", rich_help_panel=PROMPTS)
]


Strength = Annotated[float, typer.Option(help="The share that is taken out.", rich_help_panel=EDIT)]


LayerRange = Annotated[
    str | None, typer.Option("--layers", help="Only these layers, such as 8-20.", rich_help_panel=EDIT)
]


Sites = Annotated[
    str,
    typer.Option(autocompletion=sites, help="Only these kinds, joined by commas.", rich_help_panel=EDIT),
]


TiedOption = Annotated[
    str,
    typer.Option(
        "--tied",
        autocompletion=one_of("--tied"),
        help="A tied embedding: untie, or edit both.",
        rich_help_panel=EDIT,
    ),
]


AllowLeak = Annotated[
    bool, typer.Option("--allow-leak", help="Edit even where no edit is exact; measure it.", rich_help_panel=EDIT)
]


VariantOption = Annotated[
    str,
    typer.Option(
        "--variant",
        autocompletion=one_of("--variant"),
        help="plain or norm-preserving.",
        rich_help_panel=EDIT,
    ),
]


def _size(text: str) -> int:
    """Read a number of bytes with a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)i?b?", text.strip().lower())
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
    if size < 1 << 20:
        raise typer.BadParameter(f"{text!r} is not a size of at least 1MiB, such as 500MiB or 2GiB.")
    return size


Memory = Annotated[
    Any,
    typer.Option(
        "--memory",
        parser=_size,
        metavar="SIZE",
        help="What is held at once beside Python itself, such as 2GiB.",
        rich_help_panel=DISK,
    ),
]


Jobs = Annotated[int | None, typer.Option(min=1, help="Files written at once; up to 4.", rich_help_panel=DISK)]


Certify = Annotated[
    bool, typer.Option("--certify/--no-certify", help="Read the files back and measure.", rich_help_panel=DISK)
]


SelectOption = Annotated[
    str | None,
    typer.Option(
        "--select",
        autocompletion=one_of("--select"),
        help="auto, layer or none; auto, unless options below say what to take out.",
        rich_help_panel=CHOICE,
    ),
]


MaxKl = Annotated[float | None, typer.Option(min=0, help="Pick: the most damage, in nats.", rich_help_panel=CHOICE)]


MaxRefusals = Annotated[
    float | None, typer.Option(min=0, max=1, help="Pick: the largest share refused; 0.05.", rich_help_panel=CHOICE)
]


HarmfulTest = Annotated[str | None, typer.Option(help="Refused prompts to measure on.", rich_help_panel=MEASURE)]


HarmlessTest = Annotated[str | None, typer.Option(help="Answered prompts to measure on.", rich_help_panel=MEASURE)]


AlarmingTest = Annotated[str | None, typer.Option(help="Alarming but harmless prompts.", rich_help_panel=MEASURE)]


NTest = Annotated[int | None, typer.Option(min=1, help="At most so many of each; all.", rich_help_panel=MEASURE)]


MaxNewTokens = Annotated[int, typer.Option(min=1, help="Where an answer is cut off.", rich_help_panel=MEASURE)]


KlTokens = Annotated[
    int, typer.Option(min=1, help="Tokens of each answer that the KL is measured on.", rich_help_panel=MEASURE)
]


Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def direction_settings(
    harmful: Any,
    harmless: Any,
    n_prompts: int,
    seed: int,
    layer: str,
    position: int | tuple[int, ...],
    projected: bool,
    per_layer: bool,
) -> "DirectionSettings":
    """Give the settings that the options mean.

    Raises:
        DirectionError: If the layer is no number.
    """
    from remove_refusals.settings import DirectionSettings

    return DirectionSettings(
        harmful=harmful,
        harmless=harmless,
        n_prompts=n_prompts,
        seed=seed,
        layer=_layer(layer),
        position=position,
        projected=projected,
        per_layer=per_layer,
    )


def _layer(text: str) -> float | int:
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise DirectionError(
            f"The layer is {text!r}, expected a fraction of depth such as 0.6 or an index such as 15."
        ) from None


def edit_settings(
    strength: float,
    layers: str | None,
    sites: str,
    tied: str = "untie",
    variant: str = "plain",
    allow_leak: bool = False,
) -> "EditSettings":
    """Give the settings that the options mean.

    Raises:
        DirectionError: If a value is not among the accepted ones.
    """
    from remove_refusals.settings import SITE_KINDS, VARIANTS, EditSettings

    kinds = tuple(kind for kind in SITE_KINDS if kind in sites.split(","))
    if set(kinds) != set(sites.split(",")):
        raise DirectionError(f"The sites are {sites!r}, expected some of {','.join(SITE_KINDS)}, joined by commas.")
    return EditSettings(
        strength=strength,
        layers=_range(layers),
        sites=kinds,
        tied=_one_of("--tied", tied, ("untie", "both")),
        variant=_one_of("--variant", variant, VARIANTS),
        allow_leak=allow_leak,
    )


def _one_of(option: str, value: str, accepted: tuple[Any, ...]) -> Any:
    if value not in accepted:
        raise DirectionError(f"{option} is {value!r}, expected one of {', '.join(accepted)}.")
    return value


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not dash:
        last = first
    if not (first.isdecimal() and last.isdecimal()):
        raise DirectionError(f"The layers are {text!r}, expected a range such as 8-20 or one layer such as 12.")
    return int(first), int(last)


def chat_format(system_prompt: str | None, chat_template: Path | None, plain: bool) -> "ChatFormat":
    """Give the chat format that the options mean; the template is read from its file.

    Raises:
        PromptError: If the file cannot be read.
    """
    from remove_refusals.settings import ChatFormat

    text = None
    if chat_template is not None:
        try:
            text = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"The chat template {chat_template} cannot be read ({error}), expected a Jinja file in UTF-8."
            ) from error
    return ChatFormat(system_prompt=system_prompt, chat_template=text, plain=plain)


def select_settings(
    method: str | None, max_kl: float | None, max_refusals: float | None, *, as_given: bool
) -> "SelectSettings | None":
    """Give the settings of the search that the options mean.

    Args:
        method: The option `--select`; None if it was not given.
        max_kl: The most damage.
        max_refusals: The largest share of refusals.
        as_given: Whether other options say what to take out, so that nothing is searched unless it is asked for.

    Returns:
        The settings, or None where nothing is searched.

    Raises:
        SelectionError: If the method is not among the accepted ones.
    """
    from remove_refusals.settings import METHODS, Method, Rule, SelectSettings

    accepted = (*METHODS, "none")
    if method not in (None, *accepted):
        raise SelectionError(f"--select is {method!r}, expected one of {', '.join(accepted)}.")
    if method == "none" or (method is None and as_given):
        return None
    rule = Rule(max_kl=max_kl, max_refusals=max_refusals if max_refusals is not None or max_kl is not None else 0.05)
    chosen: Method = next((known for known in METHODS if known == method), METHODS[0])
    return SelectSettings(method=chosen, rule=rule)


def check_choice(method: str | None, *, as_given: bool) -> None:
    """Check that a search is not asked for beside options that it would have to ignore.

    Args:
        method: The option `--select`; None if it was not given.
        as_given: Whether other options say what to take out.

    Raises:
        SelectionError: If it is.
    """
    if method not in (None, "none") and as_given:
        raise SelectionError(
            f"--select {method} and options that say what to take out are both given, expected one of them; leave "
            "--select out, or --direction, --layer, --strength, --layers, --sites, --variant, --projected, "
            "--per-layer and all positions but one."
        )


Also = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Another harmless set, such as XSTest.", rich_help_panel=MEASURE),
]


Tasks = Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, by comma.", rich_help_panel=MEASURE)]


TaskFiles = Annotated[
    str | None, typer.Option(help="A directory with task files of your own.", rich_help_panel=MEASURE)
]


TaskLimit = Annotated[int | None, typer.Option(min=1, help="At most so many samples each.", rich_help_panel=MEASURE)]


JudgeOption = Annotated[
    str,
    typer.Option(
        "--judge",
        autocompletion=judge,
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
        found[name] = PromptSource(source=place, column=column, split=split)
    return tuple(found.items())


def task_names(tasks: str | None) -> tuple[str, ...]:
    """Split the names of tasks at commas."""
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())


_NOT_IN_A_FILE = ("config", "help", "help_all", "quiet", "log", "as_json")


def read_configuration(path: Path, parameters: Sequence[Any]) -> dict[str, Any]:
    """Read a command's options from a TOML file.

    Args:
        path: The file; its keys are the options' names without the dashes before them, in any tables or none.
        parameters: The command's parameters, as Click knows them.

    Returns:
        Values by parameter name, for Click's `default_map`, so that the command line wins.

    Raises:
        ConfigurationError: If the file cannot be read, or a key or the kind of a value is not known.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(
            f"The configuration {path} cannot be read ({error}), expected TOML in UTF-8; `remove-refusals config` "
            "writes one to begin with."
        ) from error
    known = {parameter.name: parameter for parameter in parameters if parameter.name not in _NOT_IN_A_FILE}
    values: dict[str, Any] = {}
    for key, value in _flat(found, path).items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigurationError(
                f"The configuration {path} has the key '{key}', expected one of "
                f"{', '.join(_key(parameter) for parameter in known.values())}; correct or remove it."
            )
        values[name] = _checked(path, key, value, known[name])
    return values


def _flat(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Put the keys of all tables together."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        for inner, content in value.items() if isinstance(value, dict) else ((key, value),):
            if inner in flat:
                raise ConfigurationError(
                    f"The configuration {path} has the key '{inner}' in two tables, expected it once; remove one."
                )
            flat[inner] = content
    return flat


def _checked(path: Path, key: str, value: object, parameter: Any) -> Any:
    """Check a value's kind; what it may be within that is checked as on the command line."""
    multiple, kind = bool(getattr(parameter, "multiple", False)), _kind(parameter)
    if getattr(parameter, "is_flag", False):
        expected, right = "true or false", isinstance(value, bool)
    elif multiple:
        expected = "a list of texts"
        right = isinstance(value, list) and all(isinstance(part, str) for part in value)
    elif kind is int:
        expected, right = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif kind is float:
        expected, right = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        expected = "a text"
        right = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not right:
        raise ConfigurationError(
            f"The configuration {path} gives '{key}' the value {value!r}, expected {expected}; correct it."
        )
    return value if multiple or kind in (int, float, bool) else str(value)


def _kind(parameter: Any) -> type:
    """Give what a parameter's value is: newer versions of Typer keep the annotation, older ones a type of Click."""
    descriptor = getattr(parameter, "type_descriptor", None)
    if descriptor is not None:
        return descriptor.annotation if isinstance(descriptor.annotation, type) else str
    names = {"integer": int, "integer range": int, "float": float, "float range": float, "boolean": bool}
    return names.get(parameter.type.name, str)


def default_configuration(parameters: Sequence[Any]) -> str:
    """Write every option with its help and its default, all of them as comments.

    Args:
        parameters: The command's parameters, as Click knows them.

    Returns:
        TOML; what is left as it is changes nothing.
    """
    lines = [
        "# Options of `remove-refusals run --config FILE`. Each line that begins with a key shows its default; take",
        "# away the # to change it. What the command line says counts more.",
    ]
    panels: dict[str, list[Any]] = {}
    for parameter in parameters:
        if parameter.name not in _NOT_IN_A_FILE:
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "General", []).append(parameter)
    for panel, members in panels.items():
        lines += ["", f"## {panel}"]
        for parameter in members:
            lines += ["", *(f"# {line}" for line in (getattr(parameter, "help", None) or "").splitlines())]
            lines.append(f"# {_key(parameter)}{_literal(parameter)}")
    return "\n".join(lines) + "\n"


def _key(parameter: Any) -> str:
    return str(parameter.name).replace("_", "-")


def _literal(parameter: Any) -> str:
    default = parameter.default
    if default is None:
        return " = []" if getattr(parameter, "multiple", False) else " is not set"
    # JSON's numbers, booleans and texts are TOML's.
    return " = " + json.dumps(default if isinstance(default, bool | int | float) else str(default))


def _load(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = read_configuration(path, context.command.params)
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_load,
        help="Options from a TOML file; the command line wins.",
    ),
]


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
