"""Prompts: load them, draw from them, split them, and see that the parts have nothing in common."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from remove_refusals.errors import PromptError, require_package
from remove_refusals.settings import PromptSource
from remove_refusals.types import PromptSet

EMBEDDED_SETS = ("harmful_train", "harmful_test", "harmless_train", "harmless_test", "harmless_alarming")
"""The names of the prompt sets that come with the package."""


def prompts_from(source: PromptSource, name: str, embedded: str) -> PromptSet:
    """Load the prompts that settings name, or the embedded set of the given name."""
    if source.source is None:
        return replace(embedded_prompts(embedded), name=name)
    return load_prompts(source.source, name=name, column=source.column, split=source.split)


def load_prompts(source: str, *, name: str, column: str | None = None, split: str | None = None) -> PromptSet:
    """Load prompts from a file or a Hugging Face data set.

    Files are told by their suffix: `.txt` (or none) has one prompt a line, blank lines are skipped; `.json` is a list
    of strings or objects, or an object with such a list; `.jsonl` has one string or object a line; `.csv` and
    `.parquet` have columns. Anything else is a data set: an id such as `owner/name`, with `:name` added for a
    configuration, or a directory. Prompts are kept as they are, in their order, repeated ones too; one that is blank
    or not text is an error.

    Args:
        source: The file's path or the data set's id.
        name: What the set is to be called.
        column: The column or key of the prompts; by default the first of `DEFAULT_COLUMNS` that is there.
        split: The data set's split, `train` by default; an error for files, which have none.

    Returns:
        The prompts, at least one.

    Raises:
        PromptError: If the file is missing, unreadable, empty or of another form, if a prompt is blank or not text,
            or if the column is not there; with the line where that is possible.
    """
    values, where = _read(source, column, split)
    if not values:
        raise PromptError(f"The prompts {source} are empty, expected at least one; add prompts or choose another file.")
    return PromptSet(name, tuple(_checked(value, place, source) for place, value in values), where)


def embedded_prompts(name: str) -> PromptSet:
    """Load one of the prompt sets that come with the package.

    Args:
        name: One of `EMBEDDED_SETS`.

    Returns:
        The prompts, in the order of the file.

    Raises:
        PromptError: If there is no set of that name.
    """
    if name not in EMBEDDED_SETS:
        raise PromptError(
            f"There is no embedded prompt set {name!r}, expected one of {', '.join(EMBEDDED_SETS)}; choose one of them."
        )
    text = files("remove_refusals").joinpath("data", "prompts", f"{name}.txt").read_text(encoding="utf-8")
    return PromptSet(name, tuple(line for line in text.split("\n") if line), "embedded")


def draw(prompts: PromptSet, n: int, seed: int) -> PromptSet:
    """Draw a sample without replacement.

    The prompts are ordered by the SHA-256 of `seed:prompt`, so the sample depends on nothing but the prompts and the
    seed, and a smaller sample is the beginning of a larger one.

    Args:
        prompts: What to draw from.
        n: How many to draw.
        seed: The seed.

    Returns:
        A set of the same name and source with `n` prompts, in the order drawn.

    Raises:
        PromptError: If `n` is below 1 or above the number of prompts.
    """
    if not 1 <= n <= len(prompts):
        raise PromptError(
            f"{n} prompts were asked for from {prompts.name}, which has {len(prompts)}, expected 1 to {len(prompts)}; "
            "ask for fewer or add prompts."
        )
    ordered = sorted(prompts.prompts, key=lambda prompt: _digest(prompt, seed))
    return PromptSet(prompts.name, tuple(ordered[:n]), prompts.source)


def split_by_size(prompts: PromptSet, sizes: Mapping[str, int], seed: int) -> dict[str, PromptSet]:
    """Draw several sets that have no prompt in common; repeated prompts count once.

    Args:
        prompts: What to draw from.
        sizes: For each name of a set how many prompts it gets.
        seed: The seed; the order is that of `draw`.

    Returns:
        The sets by name.

    Raises:
        PromptError: If a size is below 1, or if together they exceed the number of different prompts.
    """
    distinct = PromptSet(prompts.name, tuple(dict.fromkeys(prompts.prompts)), prompts.source)
    total = sum(sizes.values())
    if min(sizes.values(), default=0) < 1 or total > len(distinct):
        asked = " + ".join(str(size) for size in sizes.values())
        raise PromptError(
            f"{asked} = {total} prompts were asked for from {prompts.name}, which has {len(distinct)} different ones, "
            "expected at least 1 for each set and no more than there are; ask for fewer or add prompts."
        )
    rest = draw(distinct, total, seed).prompts
    parts = {}
    for name, size in sizes.items():
        parts[name], rest = PromptSet(name, rest[:size], prompts.source), rest[size:]
    return parts


def split_by_fraction(prompts: PromptSet, fractions: Mapping[str, float], seed: int) -> dict[str, PromptSet]:
    """Split a set so that where a prompt goes depends on that prompt and the seed alone.

    Prompts that are added later move none of the others, and a repeated prompt goes to one place. The sizes therefore
    only come near the fractions. The order within each set is that of `prompts`.

    Args:
        prompts: What to split.
        fractions: For each name of a set its share; what they leave of 1 is left out.
        seed: The seed.

    Returns:
        The sets by name, each with at least one prompt.

    Raises:
        PromptError: If a share is not above 0, if together they exceed 1, or if a set stays empty.
    """
    total = sum(fractions.values())
    if not min(fractions.values(), default=0) > 0 or not total <= 1 + 1e-9:
        raise PromptError(
            f"The fractions {dict(fractions)} sum up to {total:g}, expected shares above 0 with a sum of at most 1; "
            "change them."
        )
    parts: dict[str, list[str]] = {part: [] for part in fractions}
    for prompt in prompts.prompts:
        rest = int(_digest(prompt, seed)[:16], 16) / 2**64
        for part, fraction in fractions.items():
            if rest < fraction:
                parts[part].append(prompt)
                break
            rest -= fraction
    empty = [part for part, chosen in parts.items() if not chosen]
    if empty:
        raise PromptError(
            f"The set {empty[0]} gets none of the {len(prompts)} prompts of {prompts.name}, expected at least one; "
            "raise its fraction or add prompts."
        )
    return {part: PromptSet(part, tuple(chosen), prompts.source) for part, chosen in parts.items()}


def check_disjoint(*sets: PromptSet) -> None:
    """Check that no two sets share a prompt, so that what was measured on one was not chosen on another.

    Prompts that differ only in white space or in upper and lower case count as the same.

    Args:
        sets: The sets.

    Raises:
        PromptError: With the first prompt that is shared.
    """
    owners: dict[str, int] = {}
    for number, prompts in enumerate(sets):
        for prompt in prompts.prompts:
            owner = owners.setdefault(" ".join(prompt.split()).casefold(), number)
            if owner != number:
                raise PromptError(
                    f"The prompt {_shortened(prompt)!r} is in both {sets[owner].name} and {prompts.name}, expected "
                    "sets without a prompt in common; take it out of one of them."
                )


Values = list[tuple[str, object]]
"""Pairs of a place, such as `line 3`, and what stands there."""


def _read(source: str, column: str | None, split: str | None) -> tuple[Values, str]:
    """Read the values, and say where they came from."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir() or not (path.exists() or _looks_like_a_file(source, suffix)):
        chosen_split = split or "train"
        values, chosen = read_data_set(source, column, chosen_split)
        shown = path.name if path.is_dir() else source
        return values, f"{shown}, split {chosen_split}, column {chosen}"
    if not path.exists():
        raise PromptError(f"The prompt file {source} is missing, expected a file; check the path.")
    if split is not None:
        raise PromptError(
            f"The prompts {source} are a file, expected a data set for the split {split!r}; leave the split away."
        )
    if suffix in (".txt", ""):
        if column is not None:
            raise PromptError(
                f"The prompts {source} are plain text, expected columns for the column {column!r}; leave it away."
            )
        return read_text(path), path.name
    readers: dict[str, Callable[[Path, str | None], tuple[Values, str | None]]] = {
        ".json": read_json,
        ".jsonl": read_jsonl,
        ".csv": read_csv,
        ".parquet": read_parquet,
    }
    if suffix not in readers:
        raise PromptError(
            f"The prompt file {source} has the suffix {suffix}, expected one of {', '.join(FILE_SUFFIXES)}; convert it."
        )
    values, used = readers[suffix](path, column)
    return values, path.name if used is None else f"{path.name}, column {used}"


def _looks_like_a_file(source: str, suffix: str) -> bool:
    # A data set's id has at most one slash, inside it; so `data/prompts.txt` is a file and `owner/name` is not.
    return (
        suffix in FILE_SUFFIXES
        or source.startswith((".", "/", "~"))
        or source.endswith("/")
        or source.count("/") > 1
        or "\\" in source
    )


def _checked(value: object, place: str, source: str) -> str:
    if not isinstance(value, str):
        raise PromptError(
            f"The prompts {source} hold {_shortened(repr(value))} at {place}, expected text; correct it or name "
            "another column."
        )
    if not value.strip():
        raise PromptError(f"The prompts {source} hold a blank prompt at {place}, expected text; take it out.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise PromptError(
            f"The prompts {source} hold half of a surrogate pair at {place}, expected valid Unicode; correct it."
        )
    return value


def _digest(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


DEFAULT_COLUMNS = ("prompt", "instruction", "text", "goal", "question", "behavior", "forbidden_prompt", "query")
"""The columns looked for where none is named, in this order and in any case of letters."""


FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")


def read_text(path: Path) -> Values:
    """Read a text file in UTF-8: one value a line, without its line ending; blank lines are skipped."""
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [(f"line {number}", line.removesuffix("\r")) for number, line in lines if line.strip()]


def read_json(path: Path, column: str | None) -> tuple[Values, str | None]:
    """Read a JSON file: a list of strings or objects, or an object with such a list under one key.

    Args:
        path: The file.
        column: The key of the values, or None for the default.

    Returns:
        The values, and the column that was used, if any.

    Raises:
        PromptError: If the file is not JSON or of another form, or lacks the column.
    """
    content = _parsed(_decoded(path), path)
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) == 1 and column not in lists:
            content = next(iter(lists.values()))
        elif lists:
            column = choose_column(list(lists), column, path)
            return [(f"item {number}", value) for number, value in enumerate(lists[column], start=1)], column
    if not isinstance(content, list):
        raise PromptError(
            f"The prompts {path} are a JSON {type(content).__name__} without a list in it, expected a list of strings "
            "or of objects; write one of these."
        )
    return _from_rows([(f"item {number}", row) for number, row in enumerate(content, start=1)], column, path)


def read_jsonl(path: Path, column: str | None) -> tuple[Values, str | None]:
    """Read a file with one JSON string or object a line; blank lines are skipped. Otherwise as `read_json`."""
    lines = [(f"line {number}", line) for number, line in enumerate(_decoded(path).split("\n"), start=1)]
    rows: Values = [(place, _parsed(line, path, place)) for place, line in lines if line.strip()]
    return _from_rows(rows, column, path)


def read_csv(path: Path, column: str | None) -> tuple[Values, str]:
    """Read a comma-separated file with a line of column names, quoted by double quotes. Otherwise as `read_json`."""
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    values: Values = []
    try:
        columns = next(reader, [])
        chosen = choose_column(columns, column, path)
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                raise PromptError(
                    f"The prompts {path} have {len(row)} fields at line {reader.line_num}, expected {len(columns)} as "
                    "in the first line; put fields with commas into double quotes."
                )
            values.append((f"line {reader.line_num}", row[columns.index(chosen)]))
    except csv.Error as error:
        raise PromptError(
            f"The prompts {path} are not valid CSV at line {reader.line_num} ({error}), expected comma-separated "
            "fields; check the double quotes."
        ) from error
    return values, chosen


def read_parquet(path: Path, column: str | None) -> tuple[Values, str]:
    """Read one column of a Parquet file. Needs pyarrow; otherwise as `read_json`."""
    pyarrow = require_package("pyarrow", "data", f"the prompts {path}", PromptError)
    parquet = import_module("pyarrow.parquet")
    try:
        chosen = choose_column(parquet.read_schema(path).names, column, path)
        values = parquet.read_table(path, columns=[chosen]).column(chosen).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PromptError(
            f"The prompts {path} cannot be read as Parquet ({_first_line(error)}), expected a whole Parquet file; "
            "write or download it again."
        ) from error
    return [(f"row {number}", value) for number, value in enumerate(values, start=1)], chosen


def read_data_set(source: str, column: str | None, split: str) -> tuple[Values, str]:
    """Read one column of a data set. Needs datasets; otherwise as `read_json`.

    Args:
        source: A Hugging Face data set id, or a directory with a data set; `id:name` chooses a configuration.
        column: The column, or None for the default.
        split: The split.

    Returns:
        The values, and the column that was used.

    Raises:
        PromptError: If the data set cannot be loaded or lacks the split or the column.
    """
    datasets = require_package("datasets", "data", f"the prompts {source}", PromptError)
    identifier, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(identifier, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PromptError(
            f"The prompts {source} are no file here and cannot be loaded as a Hugging Face data set with the split "
            f"{split!r} ({_first_line(error)}), expected one or the other; check the name, the split and the network."
        ) from error
    chosen = choose_column(rows.column_names, column, source)
    return [(f"row {number}", value) for number, value in enumerate(rows[chosen], start=1)], chosen


def choose_column(columns: list[str], column: str | None, source: object) -> str:
    """Choose the column that holds the prompts.

    Args:
        columns: The columns that are there.
        column: The one asked for, or None for the first of `DEFAULT_COLUMNS` that is there.
        source: The file or data set, for the message.

    Returns:
        Its name, as it is written there.

    Raises:
        PromptError: If it is not there; the message lists those that are.
    """
    present = ", ".join(columns) or "none"
    if column is not None:
        if column in columns:
            return column
        raise PromptError(
            f"The prompts {source} have no column {column!r}, expected one of those there: {present}; name one of them."
        )
    by_lower_case = {name.lower(): name for name in reversed(columns)}
    for name in DEFAULT_COLUMNS:
        if name in by_lower_case:
            return by_lower_case[name]
    raise PromptError(
        f"The prompts {source} have the columns {present}, expected one of {', '.join(DEFAULT_COLUMNS)}; name the "
        "column that holds the prompts."
    )


def _from_rows(rows: Values, column: str | None, source: Path) -> tuple[Values, str | None]:
    """Take the column out of rows that are objects; rows that are strings stay as they are."""
    if all(not isinstance(row, dict) for _, row in rows):
        if column is not None and rows:
            raise PromptError(
                f"The prompts {source} have no columns, expected the column {column!r}; leave the column away."
            )
        return rows, None
    names = _union(row for _, row in rows if isinstance(row, dict))
    chosen = choose_column(names, column, source)
    values: Values = []
    for place, row in rows:
        if not isinstance(row, dict) or chosen not in row:
            raise PromptError(
                f"The prompts {source} have no {chosen!r} at {place}, expected one in each object; add it or name "
                "another column."
            )
        values.append((place, row[chosen]))
    return values, chosen


def _union(rows: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _decoded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptError(
            f"The prompts {path} cannot be read ({error.strerror}), expected a file; check the path and its "
            "permissions."
        ) from error
    try:
        # A byte order mark, as some editors write it, is no part of the first prompt.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"The prompts {path} hold the byte {content[error.start]:#04x} at line {line}, expected text in UTF-8; "
            "convert the file."
        ) from error


def _parsed(text: str, path: Path, place: str | None = None) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"The prompts {path} are not JSON at {place or f'line {error.lineno}'} ({error.msg}), expected valid JSON; "
            "correct the file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"The prompts {path} are not JSON that can be read ({error}), expected a list of prompts; correct the file."
        ) from error
    return value


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0] or type(error).__name__
