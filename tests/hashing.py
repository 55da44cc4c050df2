"""Hashes of a checkpoint's tensors, to tell which are the same in two of them."""

import hashlib
from pathlib import Path

from remove_refusals.models.checkpoint import checkpoint_tensors


def tensor_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of each tensor's raw bytes (little endian, row-major), sorted by tensor name."""
    found = {}
    for name, (path, entry) in sorted(checkpoint_tensors(directory).items()):
        with path.open("rb") as file:
            file.seek(entry.start)
            found[name] = hashlib.sha256(file.read(entry.stop - entry.start)).hexdigest()
    return found
