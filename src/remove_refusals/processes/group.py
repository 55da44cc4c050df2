"""Several processes of one job, as torchrun starts them: the first decides, writes and talks, the others follow.

Nothing heavy is imported before the processes are joined; without torchrun every function does nothing of its own.
"""

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from remove_refusals.errors import OutputError, ProcessError, RemoveRefusalsError

T = TypeVar("T")

COMMANDS = ("run", "direction", "analyze", "evaluate", "generate")
"""The commands that torchrun may start."""

# What the others see of a process that has ended is an error of the library that they wait in.
_GONE = ("closed by peer", "Connection reset", "Broken pipe", "Connection refused", "NCCL", "Timed out waiting")


def n_processes() -> int:
    """Say how many processes torchrun has started for this job; 1 without it."""
    started = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return int(os.environ["WORLD_SIZE"]) if started else 1


def number() -> int:
    """Say which of them this is, from 0."""
    return int(os.environ["RANK"]) if n_processes() > 1 else 0


def is_first() -> bool:
    """Whether this process decides, writes and talks."""
    return number() == 0


def check_processes(command: str, tp: str | None, replicas: int | None) -> None:
    """Check that what torchrun has started, or has not, is what was asked for."""
    n, asked = n_processes(), " and ".join([f"--tp {tp}"] * (tp is not None) + ["--replicas"] * (replicas is not None))
    if n > 1 and command not in COMMANDS:
        raise ProcessError(
            f"The command {command} was started {n} times by torchrun, expected one process; start it without torchrun."
        )
    if n > 1 and not asked:
        raise ProcessError(
            f"torchrun has started {n} processes without --tp or --replicas, expected one of them: each would do the "
            "whole job; add --tp auto to spread the model, or --replicas N for N copies that share the prompts."
        )
    if n == 1 and asked and "LOCAL_RANK" not in os.environ:
        wanted = tp if tp is not None and tp != "auto" else str(replicas or 8)
        raise ProcessError(
            f"{asked} is given without torchrun, expected several processes; start them with `torchrun "
            f"--nproc-per-node {wanted} -m remove_refusals {command} …`."
        )


def join() -> None:
    """Let the processes find each other, each with a device of its own; called again it does nothing."""
    import torch
    from torch import distributed

    if n_processes() == 1 or distributed.is_initialized():
        return
    local, device = int(os.environ["LOCAL_RANK"]), None
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ProcessError(
                f"Process {number()} is number {local} of a machine with {torch.cuda.device_count()} GPUs, expected "
                "one GPU for each; start fewer with --nproc-per-node."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Whoever waits for the first process may wait as long as it takes to write a checkpoint.
    distributed.init_process_group("gloo" if device is None else "nccl", timeout=_LONG, device_id=device)
    _talk()


_LONG = timedelta(days=7)


@cache
def _talk() -> Any:
    """Give the group in which objects are handed on: over the network of the hosts, which leaves GPUs alone."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=_LONG)


@cache
def _group(size: int) -> Any:
    """Give this process's group among those of so many that lie side by side."""
    from torch import distributed

    return distributed.new_subgroups(size)[0]  # type: ignore[no-untyped-call]


def _together() -> bool:
    torch = sys.modules.get("torch")
    return n_processes() > 1 and torch is not None and bool(torch.distributed.is_initialized())


def from_first(compute: Callable[[], T]) -> T:
    """Let the first process compute something and give it to all; an error there is raised everywhere."""
    if not _together():
        return compute()
    from torch import distributed

    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = compute()
        except RemoveRefusalsError as error:
            box[1] = error
    distributed.broadcast_object_list(box, src=0, group=_talk())
    if box[1] is not None:
        raise box[1]
    found: T = box[0]
    return found


def agreed(value: T) -> T:
    """Give the first process's value, where rounding could have made another of it elsewhere."""
    return from_first(lambda: value)


def same_everywhere(*tensors: Any, within: int | None = None) -> None:
    """Overwrite tensors with those of the first process, or of the first within each group of so many."""
    if not _together() or within == 1:
        return
    from torch import distributed

    whole = within is None or within == n_processes()
    group, source = (None, 0) if whole or within is None else (_group(within), number() // within * within)
    for tensor in tensors:
        distributed.broadcast(tensor.data, src=source, group=group)


def gathered(compute: Callable[[], T]) -> list[T]:
    """Let every process compute something and give all of it to all; the first error is raised everywhere."""
    if not _together():
        return [compute()]
    from torch import distributed

    own: tuple[Any, RemoveRefusalsError | None]
    try:
        own = compute(), None
    except RemoveRefusalsError as error:
        own = None, error
    parts: list[Any] = [None] * n_processes()
    distributed.all_gather_object(parts, own, group=_talk())
    failed = next((error for _, error in parts if error is not None), None)
    if failed is not None:
        raise failed
    return [value for value, _ in parts]


def check_shared(directory: Path) -> None:
    """Check that every process sees what the first one writes next to an output."""
    if not _together():
        return
    directory = directory.absolute()
    place = next(path for path in (directory, *directory.parents) if path.is_dir()) / f".shared.{os.getpid()}"

    def write() -> Path:
        try:
            place.touch()
        except OSError as error:
            raise OutputError(
                f"The directory {place.parent} cannot be written to ({error.strerror}), expected a place for the "
                "output; choose another path."
            ) from error
        return place

    seen = from_first(write)
    there = gathered(seen.exists)
    if is_first():
        place.unlink(missing_ok=True)
    if not all(there):
        raise OutputError(
            f"Process {there.index(False)} of {len(there)} does not see what is written to {seen.parent}, expected a "
            "file system that all machines share; choose an output there."
        )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes while the context lasts; only the first one prints."""
    if n_processes() == 1:
        yield
        return
    # torchrun ends the others where one has failed: what they have begun is cleared away as after any error.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                silence = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            # Remarks on how collectives are laid out, one of each process.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"torch\.distributed")
            logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
            join()
            yield
        _leave()
    except RuntimeError as error:
        if any(text in str(error) for text in _GONE):
            raise ProcessError(
                f"Another process of this job has ended before process {number()}, expected all {n_processes()} to "
                "come to the end; the same command goes on where it stopped."
            ) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave() -> None:
    from torch import distributed

    # Nobody leaves while another may still ask something of the group.
    distributed.barrier(group=_talk())
    distributed.destroy_process_group()


def speaks() -> bool:
    """Whether this process says what went wrong: the first that fails, as the store says that torchrun keeps."""
    if n_processes() == 1:
        return True
    from torch import distributed

    try:
        port = int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
        key = f"remove_refusals/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return bool(store.add(key, 1) == 1)
    except (RuntimeError, KeyError):
        # The machine that keeps it is gone.
        return True
