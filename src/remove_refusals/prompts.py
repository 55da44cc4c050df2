"""Prompts: load them, draw from them, split them, and see that the parts have nothing in common."""

import hashlib
import json
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from remove_refusals.errors import PromptError, require_package
from remove_refusals.settings import ALARMING_SETS, HARMFUL_SETS, Language, PromptSource
from remove_refusals.types import PromptSet

EMBEDDED_SETS = ("harmful_train", "harmful_test", "harmless_train", "harmless_test", "harmless_alarming")
"""The names of the prompt sets that come with the package."""

DEFAULT_COLUMNS = ("prompt", "instruction", "text", "goal", "question", "behavior", "forbidden_prompt", "query")
"""The columns looked for where none is named, in this order and in any case of letters."""

FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")

Values = list[tuple[str, object]]
"""Pairs of a place, such as `line 3`, and what stands there."""


def prompts_from(source: PromptSource, name: str, embedded: str, language: Language = "auto") -> PromptSet:
    """Load the prompts that settings name, or the embedded set of the given name."""
    if source.source is None:
        return replace(embedded_prompts(embedded, language), name=name)
    if source.source in (*HARMFUL_SETS, *ALARMING_SETS):
        return _published(source.source, name, embedded)
    return load_prompts(source.source, name=name, column=source.column, split=source.split)


def _published(word: str, name: str, embedded: str) -> PromptSet:
    """Load the published set that a word stands for, at its pinned revision, where such prompts are asked for."""
    harmful = word in HARMFUL_SETS
    fitting = ("harmful_train", "harmful_test") if harmful else ("harmless_alarming",)
    if embedded in EMBEDDED_SETS and embedded not in fitting:
        kind = "harmful" if harmful else "harmless but alarming"
        options = "--harmful, --harmful-test or --also" if harmful else "--alarming-test or --also"
        raise PromptError(
            f"The prompts of {word} are {kind} and were given as {name} ones, expected at {options}; give them there."
        )
    text = files("remove_refusals").joinpath("data", "published.toml").read_text(encoding="utf-8")
    known = tomllib.loads(text)["sets"][word]
    source, revision, where = known["source"], known["revision"], known.get("where", {})
    values, used = _read_data_set(source, known["column"], known["split"], revision, where)
    # A conversation is a list of one turn.
    values = [(place, value[0] if isinstance(value, list) and len(value) == 1 else value) for place, value in values]
    at = "" if Path(source.partition(":")[0]).is_dir() else f"@{revision}"
    told = "".join(f", {key} {value}" for key, value in where.items())
    return _set(name, values, source, f"{source}{at}, split {known['split']}, column {used}{told}")


def as_prompts(name: str, prompts: PromptSet | Iterable[str]) -> PromptSet:
    """Give a set as it is, and texts as a set of that name."""
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str):
        raise PromptError(
            f"The {name} prompts are the single text {_shortened(prompts)!r}, expected a list of texts; put it into "
            "one, or load a file with `load_prompts`."
        )
    return _set(name, [(f"item {number}", text) for number, text in enumerate(prompts, start=1)], name, "given")


def load_prompts(
    source: str | Path, *, name: str = "prompts", column: str | None = None, split: str | None = None
) -> PromptSet:
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
        The prompts, which know their source and their hash.

    Raises:
        PromptError: If there is nothing to read, or a prompt is blank or no text; the message names file and line.

    Example:
        >>> load_prompts("harmful.csv", column="goal")
    """
    # A path is a file even where an id of the hub could look like it.
    source, is_path = str(source), isinstance(source, Path)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not is_prompt_file(source, is_path=is_path):
        split = split or "train"
        values, used = _read_data_set(source, column, split)
        return _set(name, values, source, f"{path.name if path.is_dir() else source}, split {split}, column {used}")
    if split is not None:
        raise PromptError(
            f"The prompts {source} are a file, expected a data set for the split {split!r}; leave the split away."
        )
    if suffix in (".txt", ""):
        if column is not None:
            raise PromptError(
                f"The prompts {source} are plain text, expected columns for the column {column!r}; leave it away."
            )
        return _set(name, _lines(path), source, path.name)
    readers: dict[str, Callable[[Path, str | None], tuple[Values, str | None]]] = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".csv": _read_table,
        ".parquet": _read_table,
    }
    if suffix not in readers:
        raise PromptError(
            f"The prompt file {source} has the suffix {suffix}, expected one of {', '.join(FILE_SUFFIXES)}; convert it."
        )
    values, chosen = readers[suffix](path, column)
    return _set(name, values, source, path.name if chosen is None else f"{path.name}, column {chosen}")


def is_prompt_file(source: str, *, is_path: bool = False) -> bool:
    """Tell a file of prompts from a data set; what is named as a file, or given as a path, has to be there."""
    path = Path(source).expanduser()
    if path.is_dir() or not (is_path or path.exists() or _looks_like_a_file(source, path.suffix.lower())):
        return False
    if not path.exists():
        raise PromptError(f"The prompt file {source} is missing, expected a file; check the path.")
    return True


def embedded_prompts(name: str, language: Language = "en") -> PromptSet:
    """Load one of `EMBEDDED_SETS`, the prompts that come with the package, in the order of its file.

    Args:
        name: One of `harmful_train`, `harmless_train`, `harmful_test`, `harmless_test` and `harmless_alarming`.
        language: `en` or `auto`, which is the same here, or the code of another language, which has 40 prompts in each
            set but those for training.

    Returns:
        The prompts; requests alone, without answers.

    Raises:
        PromptError: If there is no set of that name, or none in that language.

    Example:
        >>> len(embedded_prompts("harmful_test"))
        60
    """
    if name not in EMBEDDED_SETS:
        raise PromptError(
            f"There is no embedded prompt set {name!r}, expected one of {', '.join(EMBEDDED_SETS)}; choose one of them."
        )
    english = language in ("auto", "en")
    place = files("remove_refusals").joinpath("data", "prompts", *([] if english else [language]))
    if language not in get_args(Language) or not place.joinpath(f"{name}.txt").is_file():
        raise PromptError(
            f"There is no embedded prompt set {name} in the language {language!r}, expected a test set in one of "
            f"{', '.join(get_args(Language)[1:])}, or English; choose one of these."
        )
    text = place.joinpath(f"{name}.txt").read_text(encoding="utf-8")
    source = "embedded" if english else f"embedded, {language}"
    return PromptSet(name, tuple(line for line in text.split("\n") if line), source)


def draw(prompts: PromptSet, n: int, seed: int) -> PromptSet:
    """Draw `n` prompts without replacement, in the order drawn.

    The prompts are ordered by the SHA-256 of `seed:prompt`, so the sample depends on nothing but the prompts and the
    seed, and a smaller sample is the beginning of a larger one.
    """
    if not 1 <= n <= len(prompts):
        raise PromptError(
            f"There are {len(prompts)} {prompts.name} prompts in {prompts.source} and {n} were asked for, expected 1 "
            f"to {len(prompts)}; add prompts, or ask for fewer (--n-prompts {len(prompts)})."
        )
    ordered = sorted(prompts.prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest())
    return PromptSet(prompts.name, tuple(ordered[:n]), prompts.source)


def split_by_size(prompts: PromptSet, sizes: Mapping[str, int], seed: int) -> dict[str, PromptSet]:
    """Draw sets of the sizes by their names, without a prompt in common; repeated prompts count once."""
    distinct = PromptSet(prompts.name, tuple(dict.fromkeys(prompts.prompts)), prompts.source)
    total = sum(sizes.values())
    if min(sizes.values(), default=0) < 1 or total > len(distinct):
        asked = " + ".join(str(size) for size in sizes.values())
        raise PromptError(
            f"{asked} = {total} prompts were asked for from {prompts.name}, which has {len(distinct)} different ones, "
            "expected at least 1 for each set and no more than there are; ask for fewer or add prompts."
        )
    rest = iter(draw(distinct, total, seed).prompts)
    return {name: PromptSet(name, tuple(islice(rest, size)), prompts.source) for name, size in sizes.items()}


def check_disjoint(*sets: PromptSet) -> None:
    """Check that no two sets share a prompt, be it one that differs in white space or case alone."""
    owners: dict[str, int] = {}
    for number, prompts in enumerate(sets):
        for prompt in prompts.prompts:
            owner = owners.setdefault(" ".join(prompt.split()).casefold(), number)
            if owner != number:
                raise PromptError(
                    f"The prompt {_shortened(prompt)!r} is in both {sets[owner].name} and {prompts.name}, expected "
                    "sets without a prompt in common; take it out of one of them."
                )


def _looks_like_a_file(source: str, suffix: str) -> bool:
    # A data set's id has at most one slash, inside it; so `data/prompts.txt` is a file and `owner/name` is not.
    return (
        suffix in FILE_SUFFIXES
        or source.startswith((".", "/", "~"))
        or source.endswith("/")
        or source.count("/") > 1
        or "\\" in source
    )


def _set(name: str, values: Values, source: str, shown: str) -> PromptSet:
    """Check that there are prompts, each of them text."""
    if not values:
        raise PromptError(f"The prompts {source} are empty, expected at least one; add prompts or choose another file.")
    prompts = []
    for place, value in values:
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
        prompts.append(value)
    return PromptSet(name, tuple(prompts), shown)


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


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


def _lines(path: Path) -> Values:
    """Read the lines of a text in UTF-8 that are not blank, without their endings."""
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [(f"line {number}", line.removesuffix("\r")) for number, line in lines if line.strip()]


def _read_json(path: Path, column: str | None) -> tuple[Values, str | None]:
    """Read a list of strings or objects, or an object with such a list under one key."""
    content = _parsed(_decoded(path), path)
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) == 1 and column not in lists:
            content = next(iter(lists.values()))
        elif lists:
            column = _choose_column(list(lists), column, path)
            return [(f"item {number}", value) for number, value in enumerate(lists[column], start=1)], column
    if not isinstance(content, list):
        raise PromptError(
            f"The prompts {path} are a JSON {type(content).__name__} without a list in it, expected a list of strings "
            "or of objects; write one of these."
        )
    return _from_rows([(f"item {number}", row) for number, row in enumerate(content, start=1)], column, path)


def _read_jsonl(path: Path, column: str | None) -> tuple[Values, str | None]:
    """Read one string or object a line; blank lines are skipped."""
    return _from_rows([(place, _parsed(str(line), path, place)) for place, line in _lines(path)], column, path)


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


def _read_table(path: Path, column: str | None) -> tuple[Values, str | None]:
    """Read a CSV file with a line of column names, or a Parquet file."""
    kind = path.suffix.lower().removeprefix(".")
    # Texts such as NA are texts. The first column is no index where rows have a field too many: that is a comma without
    # quotes, which pandas only warns of where all rows have it.
    options = {"keep_default_na": False, "index_col": False} if kind == "csv" else {}
    datasets = require_package("datasets", "data", f"the prompts {path}", PromptError)
    # It would print what is wrong with a file beside the error.
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Length of header")
            # Streaming leaves no copy of the prompts in a cache.
            rows = list(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options))
    except (OSError, ValueError, RuntimeError, Warning, datasets.exceptions.DatasetsError) as error:
        raise PromptError(
            f"The prompts {path} cannot be read as {kind} ({_first_line(error)}), expected a whole file with a column "
            "of prompts; in CSV put fields with commas into double quotes."
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    return _from_rows([(f"row {number}", row) for number, row in enumerate(rows, start=1)], column, path)


def _read_data_set(
    source: str, column: str | None, split: str, revision: str | None = None, where: Mapping[str, str] | None = None
) -> tuple[Values, str]:
    """Read one column of a data set: an id, `id:name` of one of its configurations, or a directory.

    `where` are the values that other columns must have.
    """
    datasets = require_package("datasets", "data", f"the prompts {source}", PromptError)
    identifier, _, configuration = source.partition(":")
    try:
        rows: Any = datasets.load_dataset(identifier, configuration or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise PromptError(
            f"The prompts {source} are no file here and cannot be loaded as a Hugging Face data set with the split "
            f"{split!r} ({_first_line(error)}), expected one or the other; check the name, the split and the network."
        ) from error
    chosen = _choose_column(rows.column_names, column, source)
    asked = {_choose_column(rows.column_names, name, source): value for name, value in (where or {}).items()}
    kept = [all(rows[name][at] == value for name, value in asked.items()) for at in range(len(rows))] if asked else ()
    values = [(f"row {number}", value) for number, value in enumerate(rows[chosen], start=1)]
    return [one for one, keep in zip(values, kept, strict=True) if keep] if asked else values, chosen


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0] or type(error).__name__


def _choose_column(columns: list[str], column: str | None, source: object) -> str:
    """Choose the column of the prompts: the one asked for, else the first of `DEFAULT_COLUMNS` that is there."""
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
    objects = [row for _, row in rows if isinstance(row, dict)]
    if not objects:
        if column is not None and rows:
            raise PromptError(
                f"The prompts {source} have no columns, expected the column {column!r}; leave the column away."
            )
        return rows, None
    chosen = _choose_column(list(dict.fromkeys(name for row in objects for name in row)), column, source)
    values: Values = []
    for place, row in rows:
        if not isinstance(row, dict) or chosen not in row:
            raise PromptError(
                f"The prompts {source} have no {chosen!r} at {place}, expected one in each object; add it or name "
                "another column."
            )
        values.append((place, row[chosen]))
    return values, chosen
