"""Options from a TOML file, and a file with every option's default, commented."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from remove_refusals.errors import ConfigurationError

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
