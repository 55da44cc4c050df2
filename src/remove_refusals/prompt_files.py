"""Read what is to be prompts out of files and data sets: each value with the place where it stands, unchecked."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from remove_refusals.errors import PromptError

DEFAULT_COLUMNS = ("prompt", "instruction", "text", "goal", "question", "behavior", "forbidden_prompt", "query")
"""The columns looked for where none is named, in this order and in any case of letters."""

FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")

Values = list[tuple[str, object]]
"""Pairs of a place, such as `line 3`, and what stands there."""


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
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing_package("pyarrow", path) from error
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
    try:
        import datasets
    except ImportError as error:
        raise _missing_package("datasets", source) from error
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


def _missing_package(package: str, source: object) -> PromptError:
    return PromptError(
        f"The prompts {source} need the package {package}, which is not installed, expected the extra `data`; install "
        "it with `pip install 'remove-refusals[data]'`."
    )


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0] or type(error).__name__
