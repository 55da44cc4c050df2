"""The options of commands, made from the tree of settings, and the same options from a TOML file."""

import copy
import functools
import inspect
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from remove_refusals import settings
from remove_refusals.cli.command import IN_FILE, OUTPUT, TAKEN, as_asked, complete_judge, parameter, without_types
from remove_refusals.errors import ConfigurationError, DirectionError, JudgeError, PromptError, RecordError
from remove_refusals.files import check_model_place
from remove_refusals.processes import check_processes, is_first, joined
from remove_refusals.prompts import is_prompt_file
from remove_refusals.settings import (
    DEMO,
    SITE_KINDS,
    LoadSettings,
    Option,
    PromptSource,
    RunFiles,
    RunSettings,
    Settings,
)

Place = tuple[str, ...]
"""The names of settings from the root of a tree to one of them."""


@dataclass(frozen=True)
class Setting:
    """A setting that is an option; a data set's column is one for every prompt set, in several places of the tree."""

    name: str
    declared: FieldInfo = field(repr=False)
    option: Option
    panel: str
    places: tuple[Place, ...]

    @property
    def parameter(self) -> str:
        """The name of the command's parameter."""
        return self.name.replace("-", "_")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values, where it takes one of a few names."""
        names = get_args(self.declared.annotation) if get_origin(self.declared.annotation) is Literal else ()
        return (*names, "none") if self.option.may_be_none else names

    @property
    def default(self) -> Any:
        """The default as it is typed: a number, true or false, a text, or None."""
        default = self.declared.default
        if isinstance(default, tuple):
            return ",".join(default) or None
        return None if isinstance(default, PromptSource) else default

    def is_within(self, places: tuple[str, ...]) -> bool:
        """Whether it stands at or within one of the places, which are dotted; without any it does."""
        dotted = [".".join(place) + "." for place in self.places]
        return not places or any(one.startswith(f"{place}.") for one in dotted for place in places)

    def complete(self, incomplete: str) -> list[str]:
        """Give the choices that begin so."""
        return [name for name in self.choices if name.startswith(incomplete)]

    @property
    def is_list(self) -> bool:
        """Whether it can be given several times."""
        return self.places[0][-1] == "more"


@functools.cache
def settings_of(kind: type[Settings]) -> dict[str, Setting]:
    """Give the settings of a tree that are options, by their names."""
    found: dict[str, Setting] = {}
    for one in _walk(kind, ()):
        # What stands in several places, such as a column's name, comes last.
        known = found.pop(one.name, None)
        found[one.name] = one if known is None else replace(known, places=known.places + one.places)
    return found


def _walk(kind: type[Settings], before: Place) -> Iterator[Setting]:
    for name, declared in kind.model_fields.items():
        place, extra = (*before, name), declared.json_schema_extra
        parts = (declared.annotation, *get_args(declared.annotation))
        inner = next((part for part in parts if isinstance(part, type) and issubclass(part, Settings)), None)
        if isinstance(extra, dict):
            option = Option(**extra["option"])  # type: ignore[arg-type]
            place = (*place, "source") if inner is PromptSource else place
            yield Setting(option.name or name.replace("_", "-"), declared, option, kind.panel, (place,))
        if inner is not None:
            yield from _walk(inner, (*before, name))


_LIMITS = (("min", "ge"), ("max", "le"))


def _parameter(setting: Setting, defaults: Mapping[str, Any]) -> inspect.Parameter:
    """Declare a setting as Typer reads it."""
    default, option = defaults.get(setting.parameter, setting.default), setting.option
    parts = (setting.declared.annotation, *get_args(setting.declared.annotation))
    kind: Any = next((part for part in (bool, int, float, Path) if part in parts), Path if option.is_file else str)
    if setting.is_list:
        kind = list[str]
    elif option.metavar is not None or {int, float} <= set(parts):
        # What has more than one form is read by the tree.
        kind, default = str, str(default)
    shown: dict[str, Any] = {"help": setting.declared.description, "rich_help_panel": setting.panel}
    shown |= {"rich_help_panel": None} if setting.panel == Settings.panel else {}
    if option.is_argument:
        info: Any = typer.Argument(help=setting.declared.description)
    else:
        names = [f"--{setting.name}", *([option.flag] if option.flag else [])]
        if kind is bool and default:
            names = [f"--{setting.name}/--no-{setting.name}"]
        if kind in (int, float):
            for limit in setting.declared.metadata:
                # Of annotated_types, which Pydantic makes of `ge` and `le`.
                shown |= {name: value for name, at in _LIMITS if (value := getattr(limit, at, None)) is not None}
        complete = COMPLETIONS.get(setting.name, setting.complete if setting.choices else None)
        info = typer.Option(*names, metavar=option.metavar, autocompletion=complete, **shown)
    kind = kind if default is not None else kind | None
    return parameter(setting.parameter, Annotated[kind, info], default)


def made(tree: type[Settings], given: Mapping[str, Any], source: Path | None = None) -> Any:
    """Make settings of what is given by the options' parameter names, in the file `source`; only that counts as set."""
    known = {one.parameter: one for one in settings_of(tree).values()}
    owners = {place[:-1]: one.name for one in known.values() for place in one.places if place[-1] == "source"}
    data: dict[str, Any] = {}
    left_out: list[Place] = []
    for name, value in given.items():
        option = known[name]
        for place in option.places:
            part, here = data, _for_set(value, owners[place[:-1]]) if name in _TABLES else value
            for step in place[:-1]:
                part = part.setdefault(step, {})
            part[place[-1]] = _text_of(Path(str(value))) if option.option.is_file else here
            left_out += [place[:-1]] if option.option.may_be_none and value == "none" else []
    for parent in left_out:
        data[parent[0]] = None
    try:
        # A file has to name things by their kinds, as JSON does: true is no number there, and a number no text.
        strict = source is not None
        found = tree.model_validate_json(json.dumps(data, default=str), strict=True) if strict else tree(**data)
    except ValidationError as error:
        raise _wrong(error, list(known.values()), source) from None
    tables = {name: given[name] for name in _TABLES if given.get(name) is not None}
    if tables and isinstance(found, RunSettings):
        of_more = dict(found.measure.more)
        _check_sets(tables, [*owners.values(), *of_more])
        more = tuple(
            (name, one.model_copy(update={table: _for_set(value, name) for table, value in tables.items()}))
            for name, one in of_more.items()
        )
        return found.model_copy(update={"measure": found.measure.model_copy(update={"more": more})}) if more else found
    return found


_TABLES = ("column", "split")
"""What is said of every prompt set, or of each apart."""


def _for_set(value: Any, name: str) -> Any:
    """Give what is meant for a prompt set, of a value such as goal or harmful=goal,harmless-test=text."""
    parts = [part.partition("=") for part in value.split(",")] if isinstance(value, str) else []
    if not parts or not all(equals for _, equals, _ in parts):
        return value
    return next((said for key, _, said in parts if key == name), None)


def _check_sets(tables: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that what is said of one set each is said of sets that there are."""
    for table, value in tables.items():
        for part in str(value).split(",") if "=" in str(value) else ():
            if part.partition("=")[0] not in names:
                raise ConfigurationError(
                    f"--{table} is {value!r}, expected one for all files or SET={table.upper()} for some, joined by "
                    f"commas; the sets are {', '.join(names)}."
                )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"The chat template {path} cannot be read ({error}), expected a Jinja file in UTF-8."
        ) from error


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "path": "a text",
    "tuple": "a list of texts",
    "greater": "at least {ge}",
    "less": "at most {le}",
}


def _wrong(error: ValidationError, known: list[Setting], source: Path | None) -> ConfigurationError:
    """Say in one sentence what is wrong with the first of the settings that are."""
    first = error.errors()[0]
    place = tuple(map(str, first["loc"]))
    setting = next(one for one in known if any(place[: len(part)] == part for part in one.places))
    sentence = str(first["ctx"]["error"]) if first["type"] == "value_error" else None
    if setting.choices:
        expected = f"one of {', '.join(setting.choices)}"
    elif sentence is not None:
        expected = sentence.partition(", expected ")[2].partition(";")[0].removesuffix(".")
    else:
        expected = _EXPECTED.get(first["type"].split("_")[0], first["msg"]).format(**first.get("ctx", {}))
    if source is not None:
        return ConfigurationError(
            f"The configuration {source} gives '{setting.name}' the value {first['input']!r}, expected {expected}; "
            "correct it."
        )
    return ConfigurationError(sentence or f"--{setting.name} is {first['input']!r}, expected {expected}.")


def read_configuration(path: Path) -> dict[str, Any]:
    """Read options of `run`, by their parameters' names, from a TOML file; keys may stand in any tables or none."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(
            f"The configuration {path} cannot be read ({error}), expected TOML in UTF-8; `remove-refusals config` "
            "writes one to begin with."
        ) from error
    flat: dict[str, Any] = {}
    for key, value in content.items():
        for inner, part in value.items() if isinstance(value, dict) else ((key, value),):
            name = inner.replace("-", "_")
            if name in flat:
                raise ConfigurationError(
                    f"The configuration {path} has the key '{inner}' in two tables, expected it once; remove one."
                )
            flat[name] = part
    trees = {tree: {one.parameter: one.name for one in settings_of(tree).values()} for tree in (RunSettings, RunFiles)}
    known = {name: key for names in trees.values() for name, key in names.items()}
    for name in flat:
        if name not in known:
            key = name.replace("_", "-")
            near = get_close_matches(key, known.values(), 1)
            remedy = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known.values())}."
            raise ConfigurationError(
                f"The configuration {path} has the key '{key}', expected an option of `run`; {remedy}"
            )
    for tree, names in trees.items():
        made(tree, {name: value for name, value in flat.items() if name in names}, path)
    return flat


def default_configuration() -> str:
    """Write every option of `run` with its description and its default, all of them as comments, as TOML."""
    lines = [
        "# Options of `remove-refusals run --config FILE`. Each line that begins with a key shows its default; take",
        "# away the # to change it. What the command line says counts more.",
    ]
    panels: dict[str, list[Setting]] = {}
    for tree in (RunFiles, RunSettings):
        for setting in settings_of(tree).values():
            panels.setdefault(setting.panel, []).append(setting)
    for panel, members in panels.items():
        lines += ["", f"## {panel}"]
        for setting in members:
            # JSON's numbers, booleans and texts are TOML's.
            literal = " is not set" if setting.default is None else f" = {json.dumps(setting.default)}"
            literal = " = []" if setting.is_list else literal
            lines += ["", f"# {setting.declared.description}", f"# {setting.name}{literal}"]
    return "\n".join(lines) + "\n"


def complete_sites(incomplete: str) -> list[str]:
    """Complete the last of several kinds of sites; those that stand there already are not offered again."""
    *given, last = incomplete.split(",")
    left = (site for site in SITE_KINDS if site not in given and site.startswith(last))
    return [",".join((*given, site)) for site in left]


COMPLETIONS: dict[str, Callable[[str], list[str]]] = {"sites": complete_sites, "judge": complete_judge}
"""What completes the value of an option that takes more than one of a few names."""

FURTHER = {one.parameter for one in settings_of(RunSettings).values() if not one.option.short} | {
    "rows",
    "quiet",
    "log",
}
"""The parameters that a short page leaves out."""

_MOST = 22
"""Commands with more options than these have a short page; the others fit a screen."""

_ALL = "remove_refusals.all_options"


class Page(TyperCommand):
    """A command whose `--help` may be shorter than its `--help-all`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Give the parameters; a switch takes no value, so its line names no type."""
        return without_types(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page; where `--help-all` is an option and was not given, the short one, which says so."""
        page = self
        if any(parameter.name == "help_all" for parameter in self.params) and not ctx.meta.get(_ALL):
            page = copy.copy(self)
            page.params = [parameter for parameter in self.params if parameter.name not in FURTHER]
            left = len(self.params) - len(page.params)
            page.epilog = f"{self.epilog}\n\nThere are {left} more options; --help-all shows every one."
        TyperCommand.format_help(page, ctx, formatter)


def _show_all(context: typer.Context, wanted: bool) -> None:
    # While a shell completes, nothing may be shown.
    if wanted and not context.resilient_parsing:
        context.meta[_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


_MODELS = ("model", "base", "edited", "first", "second")
_THERE = {
    **dict.fromkeys(("directory", "run", "repeat"), RecordError),
    **{"direction": DirectionError, "labelled": JudgeError, "calibration": JudgeError, "files": PromptError},
}
"""Parameters that name a model, and those that name something else that has to be there."""


def check_there(given: Mapping[str, Any]) -> None:
    """Check that what is named as a path is there, before anything heavy is imported."""
    for name, value in given.items():
        if name in _MODELS and isinstance(value, str) and value != DEMO:
            check_model_place(value)
        elif isinstance(value, Settings):
            check_there({part: getattr(value, part) for part in type(value).model_fields})
        elif name == "source" and value is not None:
            is_prompt_file(value)
        elif name == "more":
            check_there(dict(value))
        elif name in _THERE and value is not None and not Path(value).expanduser().exists():
            raise _THERE[name](f"The {name} {value} does not exist, expected what is to be read; check the path.")


_HELP_ALL = parameter(
    "help_all",
    Annotated[bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option and exit.")],
    False,
)


def whole(command: Callable[..., None], name: str, epilog: str, *, left_out: Sequence[str]) -> Any:
    """Make a command as Click knows it, with options in place of the parameters that are annotated with settings."""
    places, defaults = TAKEN.get(f"{command.__module__}.{command.__qualname__}", ((), {}))
    own = inspect.signature(command, locals=vars(settings), eval_str=True).parameters
    kinds = {name: one.annotation for name, one in own.items()}
    trees = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)}
    used = {
        name: [one for one in settings_of(tree).values() if tree is not RunSettings or one.is_within(places)]
        for name, tree in trees.items()
    }

    def called(context: typer.Context, **values: Any) -> None:
        values.pop("help_all", None)
        asked = {one.name: values.pop(one.name) for one in OUTPUT if one.name in values}
        with as_asked(**asked | ({} if is_first() else {"log": None})):
            for role, tree in trees.items():
                given = dict(defaults) if tree is RunSettings else {}
                for one in used[role]:
                    value, source = values.pop(one.parameter), context.get_parameter_source(one.parameter)
                    if source is not None and source.name == "COMMANDLINE":
                        given[one.parameter] = value
                    elif one.parameter in context.meta.get(IN_FILE, {}):
                        given[one.parameter] = context.meta[IN_FILE][one.parameter]
                values[role] = made(tree, given)
            check_there(values)
            loading = next((one.loading for one in values.values() if isinstance(one, RunSettings)), LoadSettings())
            check_processes(name, loading.tp, loading.replicas)
            with joined():
                command(**values)

    added = [(one, _parameter(one, defaults)) for each in used.values() for one in each]
    parameters = [parameter("context", typer.Context, ...)]
    parameters += [one for setting, one in added if setting.option.is_argument]
    parameters += [one for name, one in own.items() if name not in trees]
    parameters += [one for setting, one in added if not setting.option.is_argument]
    parameters += [one for one in OUTPUT if one.name not in left_out]
    parameters += [_HELP_ALL] if len(parameters) > _MOST else []
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    functools.update_wrapper(called, command)
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command(name, cls=Page, epilog=epilog)(called)
    return typer.main.get_command(alone)
