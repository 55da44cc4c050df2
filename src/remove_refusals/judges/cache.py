"""Judgements that were paid for once, kept in a file."""

import hashlib
import json
import os
import threading
from pathlib import Path

from remove_refusals.errors import JudgeError
from remove_refusals.judges.labels import Label


def default_cache() -> Path:
    """Give the file in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remove-refusals" / "judgements.jsonl"


class JudgementCache:
    """Labels by a hash of all that they depend on, one line of JSON each; prompts and answers are not in it."""

    def __init__(self, path: Path | None) -> None:
        """Open a cache.

        Args:
            path: The file; it is made with the first judgement. None keeps nothing beyond this object.

        Raises:
            JudgeError: If the file cannot be read.
        """
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, Label] = {}
        if path is not None and path.exists():
            try:
                lines = path.read_bytes().split(b"\n")
            except OSError as error:
                raise JudgeError(
                    f"The cache of judgements {path} cannot be read ({error.strerror}), expected a file of this "
                    "library's; name another one."
                ) from error
            for line in lines:
                self._take(line)

    def get(self, key: str) -> Label | None:
        """Give the label kept under a key, if there is one."""
        return self._known.get(key)

    def put(self, key: str, label: Label) -> None:
        """Keep a label, on the disk before this returns.

        Args:
            key: As `judgement_key` gives it.
            label: The label.

        Raises:
            JudgeError: If the file cannot be written.
        """
        with self._lock:
            self._known[key] = label
            if self._path is None:
                return
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # The line break first: a job killed in the middle of a line spoils that line only.
                with self._path.open("ab") as file:
                    file.write(b"\n" + json.dumps({"key": key, "label": str(label)}).encode())
            except OSError as error:
                raise JudgeError(
                    f"The cache of judgements {self._path} cannot be written ({error.strerror}), expected a file in a "
                    "directory that can be; name another one."
                ) from error

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self._known[str(entry["key"])] = Label(entry["label"])
        except (ValueError, KeyError, TypeError):
            # Half a line of a killed job: that judgement is asked for again.
            return


def judgement_key(*parts: str) -> str:
    """Hash all that a judgement depends on: SHA-256 of the parts as a JSON list, in hex."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
