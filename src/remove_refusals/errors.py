"""What can go wrong, one type per kind of remedy.

Every message is one sentence: what was found (with its name and value), what was expected, what to do.
The command turns any of these into that sentence on standard error and `exit_code`, without a traceback.
"""

import ast
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class RemoveRefusalsError(Exception):
    """Anything this library refuses to do, with a message for the user."""

    exit_code = 2


class PromptError(RemoveRefusalsError):
    """A prompt file, data set or chat template is missing, unreadable or of the wrong form."""


class ModelError(RemoveRefusalsError):
    """A model or tokenizer cannot be found or loaded."""


class ArchitectureError(RemoveRefusalsError):
    """The model has a part that the map cannot classify, or no exact edit exists for it."""


class CheckpointError(RemoveRefusalsError):
    """A checkpoint on disk is corrupt, incomplete or of an unknown format."""


class DirectionError(RemoveRefusalsError):
    """A direction does not fit the model, is not finite, or cannot be computed from what was given."""


class NumericalError(RemoveRefusalsError):
    """NaN or infinity turned up where finite numbers are needed."""


class OutputError(RemoveRefusalsError):
    """The output cannot be written: it exists already, or the disk is full or read-only."""


class CertificateError(RemoveRefusalsError):
    """The saved files do not hold what the plan says they hold."""

    exit_code = 3


class SelectionError(RemoveRefusalsError):
    """A search has nothing to choose by."""


class RecordError(RemoveRefusalsError):
    """A record of what was done or measured is missing, unreadable or of an unknown form."""


class JudgeError(RemoveRefusalsError):
    """A judge cannot be loaded, reached or used, or labelled answers or a calibration are of the wrong form."""


class ConfigurationError(RemoveRefusalsError):
    """A configuration file is missing, unreadable, or has a key or value that is not known."""


class ProcessError(RemoveRefusalsError):
    """The processes of a job do not fit together, or one of them has ended before the others."""


class HubError(RemoveRefusalsError):
    """A directory is not to be shared as it is, or the hub does not take it or cannot be reached."""


def require_package(
    name: str, extra: str, purpose: str, error: type[RemoveRefusalsError], at_least: tuple[int, ...] = ()
) -> Any:
    """Import a package, or a module of it, that only an extra brings along."""
    package = "protobuf" if name == "google.protobuf" else name.partition(".")[0]
    remedy = f"expected for {purpose}; install it with `pip install 'remove-refusals[{extra}]'`."
    try:
        module = import_module(name)
    except ImportError as cause:
        raise error(f"The package {package} is missing, {remedy}") from cause
    if at_least and tuple(map(int, module.__version__.split(".")[: len(at_least)])) < at_least:
        wanted = ".".join(map(str, at_least))
        raise error(f"The package {package} is of version {module.__version__}, at least {wanted} {remedy}")
    return module


def lazy_face(room: str) -> None:
    """Let a room import each name of its face when it is first used; what it imports for type checkers says whence."""
    face = sys.modules[room]
    found = ast.walk(ast.parse(face.__spec__.loader.get_source(room)))  # type: ignore[union-attr]
    parts = [node for node in found if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{room}.")]
    home = {alias.name: str(node.module) for node in parts for alias in node.names}

    class Face(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in home:
                raise AttributeError(f"module {room!r} has no attribute {name!r}")
            return self.__dict__.setdefault(name, getattr(import_module(home[name]), name))

        def __setattr__(self, name: str, value: Any) -> None:
            # Python puts a file that is imported into its room, where it would hide a function of the same name.
            if name not in home or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

    face.__class__ = Face
