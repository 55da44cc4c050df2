"""Output that is there whole or not at all: written beside its place, renamed into it at the end."""

import copy
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from remove_refusals.errors import ModelError, NumericalError, OutputError, RecordError, RemoveRefusalsError
from remove_refusals.processes import agreed, from_first, is_first, n_processes
from remove_refusals.settings import DEMO

if sys.platform != "win32":
    import fcntl

MODEL_FILES = ("config.json", "ablation.json", "adapter_config.json", "scores.json", "analysis.json")
"""A directory that holds one of these is a model's or a measurement's and may be replaced by force; others may not."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY)


_THROWN_AWAY = "remove-refusals-follower-"
"""How the directories are called in which processes write that only follow the first."""


@contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside `target` that becomes `target` when the block ends without an exception.

    On any exception, Ctrl-C included, it is removed, with the parents made for it, and `target` is as it was; after a
    kill the next call for `target` does that. With `force` an old `target` that is empty or a model's is set aside by a
    rename, and deleted after the new one's.
    """
    with _staged(target, force=force, directory=True) as staging:
        yield staging
        _flush_tree(staging)


@contextmanager
def atomic_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a free path of `target`'s name, whose file becomes `target` if the block ends well, as a directory does."""
    with _staged(target, force=force, directory=False) as staging:
        yield staging
        _flush(staging)


@contextmanager
def resumable_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a directory beside `target` that becomes `target` when the block ends well, and stays if it does not.

    The same call finds it again, with what was written, whatever ended the process. Where nothing was written yet it
    is removed.
    """
    target, staging = _resolved(target), hidden(target, "partial")
    made: list[Path] = []
    try:
        _clear(target)
        check_target(target, force=force, directory=True)
        _make_parents(target.parent, made)
        staging.mkdir(exist_ok=True)
        with _locked(staging):
            yield staging
            _flush_tree(staging)
            _move_into_place(staging, target, force=force, directory=True)
    except BaseException as error:
        _remove_empty(staging, *reversed(made))
        if isinstance(error, KeyboardInterrupt) and staging.is_dir():
            error.add_note(f"what was written is kept in {staging}, where the same command goes on.")
        sentence = _explain(error, staging, target)
        if sentence is None:
            raise
        if staging.is_dir():
            sentence = f"{sentence.rstrip('.')}; what was written is kept in {staging}, where the same call goes on."
        raise OutputError(sentence) from error
    _flush_entries(target.parent)


@contextmanager
def scratch_directory(beside: Path) -> Iterator[Path]:
    """Give a directory beside another, where there is room for a model, for as long as the block lasts."""
    _clear(_resolved(beside))
    with _room(hidden(beside, _unique("unfinished"))) as room:
        yield room


def hidden(target: Path, kind: str) -> Path:
    """Name what lies beside an output as long as it is being made."""
    target = _resolved(target)
    return target.with_name(f".{target.name}.{kind}")


def _resolved(target: Path) -> Path:
    return Path(os.path.realpath(target.expanduser()))


def _unique(kind: str) -> str:
    return f"{secrets.token_hex(4)}.{kind}"


@contextmanager
def _room(place: Path) -> Iterator[Path]:
    """Make a directory that is locked as long as its process lives; if it has not moved, it is removed at the end."""
    place.mkdir()
    try:
        with _locked(place):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Keep other processes that would write the same directory out; the system frees it if this one is killed.

    False says that the file system has no locks.
    """
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    held = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"The unfinished output {directory} is being written by another process, expected none; wait for it "
                "or choose another path."
            ) from error
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _clear(target: Path, *more: Path) -> None:
    """Remove what killed processes have left beside an output; what one has set aside goes back to an empty place."""
    unique = f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}."
    for left in (*target.parent.glob(f"{unique}unfinished"), *target.parent.glob(f"{unique}replaced"), *more):
        try:
            with _locked(left) as held:
                if held and left.suffix == ".replaced" and not target.exists():
                    (left / target.name).rename(target)
                if held:
                    shutil.rmtree(left, ignore_errors=True)
        except (OutputError, OSError):
            # Another process writes there, or nothing is there.
            continue


@contextmanager
def _staged(target: Path, *, force: bool, directory: bool) -> Iterator[Path]:
    """Give a free path beside `target` and move what lies there into place; if the block fails, leave no trace.

    Of several processes only the first makes an output: what the others write is thrown away.
    """
    if not is_first() and not any(part.startswith(_THROWN_AWAY) for part in _resolved(target).parts):
        with tempfile.TemporaryDirectory(prefix=_THROWN_AWAY) as scratch:
            yield Path(scratch) if directory else Path(scratch) / target.name
        return
    target, room = _resolved(target), hidden(target, _unique("unfinished"))
    staging = room if directory else room / target.name
    made: list[Path] = []
    try:
        _clear(target)
        check_target(target, force=force, directory=directory)
        _make_parents(target.parent, made)
        with _room(room):
            yield staging
            _move_into_place(staging, target, force=force, directory=directory)
    except BaseException as error:
        _remove_empty(*reversed(made))
        sentence = _explain(error, staging, target)
        if sentence is None:
            raise
        raise OutputError(sentence) from error
    _flush_entries(target.parent)


def check_target(target: Path, *, force: bool, directory: bool) -> None:
    """Check that an output may be made at a place, without making anything."""
    if _resolved(target.parent) / target.name == _resolved(Path(DEMO).parent) / DEMO:
        raise OutputError(
            f"The output {target} would have the name of the embedded model, which commands would take in its place, "
            f"expected another name; choose one such as {DEMO}-edited."
        )
    if not target.exists():
        return
    if not force:
        what = "exists already and holds an edited model" if (target / "ablation.json").exists() else "exists already"
        raise OutputError(f"The output {target} {what}, expected a new path; choose another one or pass `--force`.")
    if directory != target.is_dir():
        found, expected = ("a file", "a directory") if directory else ("a directory", "a file")
        raise OutputError(
            f"The output {target} is {found}, expected {expected} or nothing; choose another path or remove it "
            "yourself."
        )
    names = {path.name for path in target.iterdir()} if directory else set()
    if names and names.isdisjoint(MODEL_FILES):
        raise OutputError(
            f"The output directory {target} is not empty and holds none of {', '.join(MODEL_FILES)}, expected a saved "
            "model before it is replaced; choose another path or remove it yourself."
        )


def check_model_place(name: str) -> bool:
    """Check that a model can be where a name says, without opening it; give whether that is a directory."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ModelError(f"The directory {name} has no config.json, expected a Hugging Face model; check the path.")
        return True
    if path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        what = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"The model {name} {what}, expected a directory with a config.json; check the path.")
    return False


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make `parent` and what is missing above it, noting each in `made` so that a failure can undo it."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)


def _move_into_place(staging: Path, target: Path, *, force: bool, directory: bool) -> None:
    """Move what was made into its place, and remove what killed commands with the same output had kept to go on."""
    # Looked at again, since to make it may have taken hours.
    check_target(target, force=force, directory=directory)
    _clear(target, hidden(target, "partial"))
    shutil.rmtree(hidden(target, "journal"), ignore_errors=True)
    if not target.is_dir():
        staging.replace(target)
        return
    with _room(hidden(target, _unique("replaced"))) as aside:
        try:
            target.rename(aside / target.name)
            staging.rename(target)
        finally:
            # Also reached by Ctrl-C between the two.
            if not target.exists():
                (aside / target.name).rename(target)


def _remove_empty(*directories: Path) -> None:
    """Remove directories one after the other as long as they are empty."""
    try:
        for directory in directories:
            directory.rmdir()
    except OSError:
        # The failure that led here is the one to tell; one in which others have put something stays.
        return


def _flush_tree(directory: Path) -> None:
    """Make the system write all of a directory to the disk now."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _flush(Path(folder) / name)
        _flush_entries(Path(folder))


def _flush(path: Path) -> None:
    """Make the system write a file's content to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_entries(directory: Path) -> None:
    """Make the system write a directory's entries to the disk now, where it lets us."""
    try:
        _flush(directory)
    except OSError:
        # Some file systems cannot flush a directory and some directories cannot be opened; the files are whole anyway.
        return


def _explain(error: BaseException, staging: Path, target: Path) -> str | None:
    """Return the sentence for a failure to write the output, or None if the exception is about something else."""
    if isinstance(error, OSError):
        number = error.errno
        about_output = error.filename is None or _concerns(str(error.filename), staging, target)
    elif isinstance(error, Exception) and (match := re.search(r"\(os error (\d+)\)", str(error))):
        # The Rust parts of safetensors and tokenizers report a failed write as text with the system's number in it.
        number, about_output = int(match.group(1)), True
    else:
        return None
    if number in _FULL:
        return (
            f"The output {target} could not be written ({os.strerror(number)}), expected a disk with room for all of "
            "it; free some space or choose another path."
        )
    if (number in _FORBIDDEN and about_output) or (number == errno.ENOENT and _could_not_be_made(error, staging)):
        return (
            f"The output {target} could not be written ({os.strerror(number)}), expected a place that this user can "
            "write to; choose another path or change its permissions."
        )
    return None


def _could_not_be_made(error: BaseException, staging: Path) -> bool:
    """Whether what is missing is the output's place itself or a directory above it, as where the system allows none."""
    name = error.filename if isinstance(error, OSError) else None
    return name is not None and staging.is_relative_to(os.path.realpath(str(name)))


def _concerns(name: str, staging: Path, target: Path) -> bool:
    """Whether `name` is the output, something in it, or a directory above it."""
    path = Path(os.path.realpath(name))
    return any(path.is_relative_to(root) or root.is_relative_to(path) for root in (staging, target))


_PACKAGES = ("remove-refusals", "torch", "transformers", "safetensors")


@cache
def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that decide a result; one that is not installed is absent."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # Run from a source tree that was never installed: a version that is not known is not written down.
            continue
    return found


def write_json(path: Path, data: object, *, force: bool = False) -> None:
    """Write JSON in UTF-8 with the keys in the order given, indented by 2, ending in a newline; whole or not at all."""
    _check_finite(data, path, "$")
    text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    with atomic_file(path, force=force) as staging:
        staging.write_text(text, encoding="utf-8", newline="\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]], *, force: bool = False) -> None:
    """Write JSON Lines; the rows are written as they come, so a generator need not fit in memory."""
    with atomic_file(path, force=force) as staging, staging.open("w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(rows, start=1):
            _check_finite(row, path, f"row {number}")
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, error: type[RemoveRefusalsError]) -> object:
    """Read a JSON file in UTF-8."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(
            f"The file {path} cannot be read ({cause.strerror}), expected JSON; check the path and its permissions."
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise error(
            f"The file {path} is not JSON in UTF-8 ({cause}), expected a whole JSON file; write or download it again."
        ) from cause


def _check_finite(data: object, path: Path, place: str) -> None:
    if isinstance(data, float) and not math.isfinite(data):
        raise NumericalError(
            f"The value at {place} for {path} is {data}, expected a finite number; what was not measured is left out."
        )
    if isinstance(data, Mapping):
        for key, value in data.items():
            _check_finite(value, path, f"{place}.{key}")
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            _check_finite(value, path, f"{place}[{index}]")


class Record(BaseModel):
    """What is written to disk and read back: frozen, strict about its fields, and what is None is left out.

    What a class computes (`computed_field`) is written and not read: such a class has `extra="ignore"`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON, without what was not measured."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def write(self, path: Path | str, *, force: bool = False) -> None:
        """Write it as indented JSON, whole or not at all."""
        write_json(Path(path), self.to_json(), force=force)

    @classmethod
    def read(cls, path: Path | str, *, error: type[RemoveRefusalsError] = RecordError) -> Self:
        """Read it back."""
        return cls.of(read_json(Path(path), error=error), path, error=error)

    @classmethod
    def of(cls, data: object, source: object, *, error: type[RemoveRefusalsError]) -> Self:
        """Check data that was read from `source`, which the error names."""
        # As JSON, where a list may be a tuple and nothing else is turned into what it is not. Half a character, which
        # JSON can hold and no file can, becomes a question mark.
        text = json.dumps(data, ensure_ascii=False).encode(errors="replace")
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as cause:
            first = cause.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the top"
            raise error(
                f"The record {source} has at {place} {_shortened(first['input'])} ({first['msg']}), expected what this "
                "version writes; make it again."
            ) from cause


def _shortened(value: object) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")


Found = TypeVar("Found")

STAGES = "stages.jsonl"
"""The log in a journal's directory."""


class Log:
    """Lines of JSON that outlive a kill: each is on the disk before the next; half a line at the end is cut off."""

    def __init__(self, path: Path, error: type[RemoveRefusalsError] = OutputError) -> None:
        """Read what is there; the file is made with the first line."""
        self.path, self._error, self._lock = path, error, threading.Lock()
        self.entries: list[dict[str, Any]] = []
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
            self.entries += map(json.loads, whole.splitlines())
        except (OSError, ValueError) as cause:
            raise error(
                f"The log {path} cannot be used ({cause}), expected that of an earlier run or a place that can be "
                "written to; remove it, or name another one."
            ) from cause

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line and wait until it is on the disk; threads may do so at once."""
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8", newline="\n") as file:
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                self.entries.append(entry)
        except OSError as cause:
            raise self._error(
                f"The log {self.path} cannot be written ({cause.strerror}), expected room for it; free some space, or "
                "choose another disk."
            ) from cause


class Journal:
    """Results by what they depend on: a line of a log for each, on the disk before the next stage begins.

    A result is found again only under the same name, inputs and context; everything else is computed. Without a
    directory nothing is kept. Of several processes the first keeps the log and says what is in it.
    """

    def __init__(
        self, directory: Path | None = None, context: str = "", on_found: Callable[[str], None] | None = None
    ) -> None:
        """Open the journal in a directory, which is made with the first result; None keeps nothing.

        `on_found` is told the name of each result that need not be computed again.
        """
        self.directory, self.context, self._on_found = directory, context, on_found
        self._log = Log(directory / STAGES) if directory is not None and is_first() else None
        try:
            self._kept = {entry["key"]: entry["value"] for entry in (self._log.entries if self._log else ())}
        except (KeyError, TypeError) as cause:
            raise OutputError(
                f"The journal {directory} holds a line without {cause}, expected that of an earlier run; remove it, or "
                "name another one."
            ) from cause

    def within(self, context: str) -> "Journal":
        """Give the same journal for results that depend on `context` too."""
        inner = copy.copy(self)
        inner.context = f"{self.context}/{context}"
        return inner

    @property
    def n_kept(self) -> int:
        """How many results are kept."""
        return len(self._kept)

    def remember(
        self,
        name: str,
        inputs: object,
        compute: Callable[[], Found],
        pack: Callable[[Found], Any],
        unpack: Callable[[Any], Found],
    ) -> Found:
        """Give the result that was kept for the name and inputs, or compute one and keep it.

        `pack` turns it into what JSON can hold, and `unpack` is the reverse.
        """
        if self.directory is None:
            return compute()
        key = self._key(name, inputs)
        known, value = from_first(lambda: (key in self._kept, self._kept.get(key)))
        if known:
            if self._on_found is not None:
                self._on_found(name)
            return unpack(value)
        found = compute()
        value = agreed(pack(found))
        if self._log is not None:
            self._log.append({"key": key, "name": name, "value": value})
        self._kept[key] = value
        return found if is_first() else unpack(value)

    def unfinished(self, name: str, inputs: object) -> Path | None:
        """Give a file for what is done so far of a long result; None where nothing is kept, or by several processes."""
        if self.directory is None or n_processes() > 1:
            return None
        return self.directory / f"{self._key(name, inputs)[:16]}.unfinished"

    def _key(self, name: str, inputs: object) -> str:
        content = json.dumps([self.context, name, inputs], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()
