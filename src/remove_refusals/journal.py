"""What a long job has done already, kept in a file, so that a killed one goes on where it stopped."""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from remove_refusals.errors import OutputError
from remove_refusals.models import LoadedModel

Found = TypeVar("Found")

STAGES, TRIALS = "stages.jsonl", "trials.log"
"""The files in a journal's directory: the stages, and what the search by trials keeps for itself."""

_N_VALUES = 64


class Journal:
    """Results by what they depend on: one line of JSON for each, on the disk before the next stage begins.

    A result is found again only under the same name, inputs and context; everything else is computed. Without a
    directory nothing is kept.
    """

    def __init__(self, directory: Path | None = None, context: str = "") -> None:
        """Open a journal; the half of a line that a killed job may have left at its end is cut off.

        Args:
            directory: Where it is kept; it is made with the first result. None keeps nothing.
            context: What all results depend on, for example the model's fingerprint.

        Raises:
            OutputError: If the directory cannot be read or written, or holds something else.
        """
        self.directory, self.context = directory, context
        self._kept: dict[str, Any] = {}
        if directory is not None:
            try:
                self._read(directory / STAGES)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"The journal {directory} cannot be used ({error}), expected that of an earlier run or a new "
                    "directory that can be written to; remove it, or name another one."
                ) from error

    @property
    def trials(self) -> Path | None:
        """The file for the trials of a search that keeps its own."""
        return None if self.directory is None else self.directory / TRIALS

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
        """Give a result: the one that was kept, or a new one that is kept from now on.

        Args:
            name: What it is.
            inputs: What it depends on beside the journal's context, as JSON can hold it.
            compute: Makes a new one.
            pack: Turns it into what JSON can hold.
            unpack: The reverse of `pack`.

        Raises:
            OutputError: If it cannot be written.
        """
        if self.directory is None:
            return compute()
        content = json.dumps([self.context, name, inputs], ensure_ascii=False)
        key = hashlib.sha256(content.encode()).hexdigest()
        if key in self._kept:
            return unpack(self._kept[key])
        found = compute()
        self._write(self.directory / STAGES, {"key": key, "name": name, "value": pack(found)})
        return found

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._kept[entry["key"]] = entry["value"]

    def _write(self, path: Path, entry: dict[str, Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"The journal {path} cannot be written ({error.strerror}), expected room for it; free some space, or "
                "choose another disk."
            ) from error
        self._kept[entry["key"]] = entry["value"]


def fingerprint(loaded: LoadedModel) -> str:
    """Tell models apart by their configurations and parameters.

    What counts is the configuration, the kind of device, and of each parameter its shape, dtype, sum, norm, and values
    spread over it.

    Returns:
        16 hexadecimal digits of a hash.
    """
    config = loaded.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps([config, loaded.device.type], sort_keys=True, default=str).encode())
    for name, parameter in loaded.model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta and parameter.is_floating_point():
            values = parameter.detach().flatten()
            digest.update(str(values[:: max(1, len(values) // _N_VALUES)].float().tolist()).encode())
            # Rounded, since the order of a sum depends on how many threads there are.
            norm = torch.linalg.vector_norm(values, dtype=torch.float32)
            sums = float(values.sum(dtype=torch.float64)), float(norm)
            digest.update(" ".join(f"{value:.5g}" for value in sums).encode())
    return digest.hexdigest()[:16]
