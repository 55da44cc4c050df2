"""Which files of an unfinished output are whole: one line of JSON each, on the disk before the next file ends."""

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remove_refusals.errors import OutputError

LEDGER_FILE = ".whole-files.jsonl"
"""The ledger's name in the unfinished output; the finished one has none."""


class Ledger:
    """What is whole in a directory, as long as it is made from the same things.

    The first line says from what the directory is made; every other line is a file that was written and flushed.
    """

    def __init__(self, directory: Path, made_from: Mapping[str, Any], *, force: bool = False) -> None:
        """Open the ledger of a directory, and remove everything there that is not known to be whole.

        Args:
            directory: The unfinished output.
            made_from: What decides the bytes of every file, as JSON.
            force: Whether an output that was begun from something else is thrown away.

        Raises:
            OutputError: If the output was begun from something else and `force` is not given.
        """
        self._path = directory / LEDGER_FILE
        self._lock = threading.Lock()
        self._made_from = dict(made_from)
        begun, records = self._read()
        if begun is not None and begun != dict(made_from) and not force:
            differs = sorted(key for key in {*begun, *made_from} if begun.get(key) != made_from.get(key))
            raise OutputError(
                f"The unfinished output {directory} was begun with another {' and '.join(differs)}, expected the same "
                "to go on from; repeat the command that began it, pass --force to begin anew, or remove it."
            )
        self.whole: dict[str, dict[str, Any]] = {}
        if begun == dict(made_from):
            self.whole = {name: record for name, record in records.items() if _is_whole(directory / name, record)}
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.whole and path != self._path:
                path.unlink()
        self._begun = begun == dict(made_from)

    def begin(self) -> None:
        """Write the first line, if it is not there."""
        if not self._begun:
            self._append(self._made_from, fresh=True)
            self._begun = True

    def add(self, name: str, size: int, **facts: Any) -> None:
        """Note that a file is whole; it has been flushed to the disk."""
        record = {"file": name, "bytes": size, **facts}
        with self._lock:
            self._append(record)
            self.whole[name] = record

    def close(self) -> None:
        """Remove the ledger: the output is finished."""
        self._path.unlink()

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        lines: list[dict[str, Any]] = []
        if self._path.is_file():
            text = self._path.read_text(encoding="utf-8", errors="replace")
            # A killed process may have left half of a line, which is cut off so that the next one stands alone.
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                os.truncate(self._path, len(whole.encode()))
            lines = [json.loads(line) for line in whole.splitlines()]
        return (lines[0] if lines else None), {line["file"]: line for line in lines[1:]}

    def _append(self, record: Mapping[str, Any], *, fresh: bool = False) -> None:
        with self._path.open("w" if fresh else "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _is_whole(path: Path, record: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == record["bytes"]
