"""Edit plan → files on disk, shard by shard: no model is built, and memory is what the caller allots."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path

from remove_refusals.apply.ledger import Ledger
from remove_refusals.apply.shard import StoppedError, can_clone, check_memory, write_shard
from remove_refusals.apply.streamplan import FilePlan, StreamPlan
from remove_refusals.checkpoint import INDEX_FILE
from remove_refusals.errors import OutputError
from remove_refusals.records import write_json
from remove_refusals.workers import shares, workers

DEFAULT_MEMORY = 1 << 30
"""How much a process takes beside what Python and its packages take."""

_LARGEST_SHARE = 288 << 20


def stream_edited(
    stream: StreamPlan,
    directory: Path,
    *,
    memory: int = DEFAULT_MEMORY,
    jobs: int | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, str], Ledger]:
    """Write the weight files of an edited checkpoint, those that are not whole yet.

    A file shares the base's blocks on the disk where the file system can do that, and is copied where not; of an edited
    tensor only its own bytes are written anew. Tensors larger than a worker's memory are edited in slices.

    Args:
        stream: What happens to each file.
        directory: An existing directory, empty or as an interrupted call has left it.
        memory: How many bytes may be held beside what Python and its packages take.
        jobs: How many files to write at once; fewer where the memory is too small for so many.
        force: Whether an output that was begun from something else is thrown away.
        on_progress: Called with the number of whole files and of all.

    Returns:
        SHA-256 of each of the base's weight files by name, and the ledger, which is to be closed when the output is
        finished.

    Raises:
        CheckpointError: If the base cannot be read, or changes meanwhile, or the variant needs more memory.
        OutputError: If the output was begun from something else, or the disk has no room for it.
        OSError: If a file cannot be written.
    """
    jobs, share = shares(memory, jobs, len(stream.files))
    share = min(share, _LARGEST_SHARE)
    for file in stream.files:
        check_memory(file, stream.plan.variant, share)
    ledger = Ledger(directory, stream.made_from(), force=force)
    left = [file for file in stream.files if file.header.path.name not in ledger.whole]
    _check_room(left, directory)
    ledger.begin()
    ended = threading.Event()

    def write(file: FilePlan) -> None:
        name = file.header.path.name
        try:
            digest = write_shard(file, directory / name, stream.plan.variant, share, ended.is_set)
            ledger.add(name, file.size, base_sha256=digest)
            if on_progress is not None:
                on_progress(len(ledger.whole), len(stream.files))
        except BaseException:
            ended.set()
            raise

    with workers(jobs) as pool:
        futures = [pool.submit(write, file) for file in left]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            ended.set()
    failures = [future.exception() for future in futures if not future.cancelled()]
    for failure in failures:
        if failure is not None and not isinstance(failure, StoppedError):
            raise failure
    index = stream.index()
    if index is not None:
        write_json(directory / INDEX_FILE, index, force=True)
    return {name: str(record["base_sha256"]) for name, record in ledger.whole.items()}, ledger


def _check_room(left: list[FilePlan], directory: Path) -> None:
    """Check that the disk has room for what is still to be written.

    Raises:
        OutputError: If it has not.
    """
    if not left:
        return
    free = shutil.disk_usage(directory).free
    needed = sum(file.size for file in left)
    if needed > free and can_clone(left[0].header.path, directory):
        needed = sum(_written(file) for file in left)
    if needed > free:
        raise OutputError(
            f"The output {directory.parent} has {free / 1e9:.2f} GB free ({os.strerror(errno.ENOSPC)}), expected room "
            f"for {needed / 1e9:.2f} GB; free some space or choose another path."
        )


def _written(file: FilePlan) -> int:
    """How many bytes of a file that shares the base's blocks are its own."""
    return file.size if file.copies else sum(e.tensor.stop - e.tensor.start for e in file.edits.values())
