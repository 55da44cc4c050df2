"""What loading any model takes: find it, pick a device, be quiet, and say in one sentence what is wrong with it."""

import pickle
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, errors
from safetensors import SafetensorError
from transformers.utils import logging

from remove_refusals.checkpoint import INDEX_FILE, SINGLE_FILE, checkpoint_tensors
from remove_refusals.errors import ModelError

_HUB_TIMEOUT_SECONDS = 10.0

HTTPError: type[Exception] = errors.HfHubHTTPError.__mro__[1]
"""The hub's client has changed the HTTP package under it before; its own error always derives from that package's."""

# What Transformers, its config validation, safetensors and torch raise for a checkpoint that they cannot read.
_PYTHON_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, EOFError)
_LOADING_ERRORS = (*_PYTHON_ERRORS, SafetensorError, errors.StrictDataclassError)


def find_source(name: str, revision: str | None) -> bool:
    """Check that a model is there.

    Args:
        name: A directory or a hub id.
        revision: The hub's branch, tag or commit.

    Returns:
        Whether only local files are to be read: it is a directory, or the hub is out of reach.

    Raises:
        ModelError: If it is neither a directory with a `config.json` nor on the hub.
        CheckpointError: If a weight file of a directory is truncated, corrupt or missing.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The directory {name} has no config.json, expected a Hugging Face model; check the path.")
        if (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists():
            checkpoint_tensors(path)
        return True
    if path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        what = "is a file" if path.exists() else "does not exist"
        raise ModelError(f"The model {name} {what}, expected a directory with a config.json; check the path.")
    return _hub_is_out_of_reach(name, revision)


def _hub_is_out_of_reach(name: str, revision: str | None) -> bool:
    """Ask the hub once, because each of the many requests of a load would be retried for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"The model {name}{at} is neither a directory nor on the hub for you to read, expected one of them; check "
            "the name, and log in with `hf auth login` if it is gated or private."
        ) from error
    except (OSError, HTTPError):
        return True
    return False


def check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Refuse what Transformers would fill with random numbers.

    Args:
        name: The model, for the error.
        report: What `from_pretrained` gives with `output_loading_info`.

    Raises:
        ModelError: If a tensor of the model is missing in the checkpoint or has another shape there.
    """
    for tensor, found, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"The tensor {tensor} of {name} has shape {tuple(found)}, expected {tuple(expected)} from its config.json; "
            "download or convert the model again."
        )
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"The checkpoint {name} lacks {', '.join(missing[:3])}{more}, expected every tensor of the model that its "
            "config.json describes; download or convert it again."
        )


def pick_device(device: str | torch.device | None) -> torch.device:
    """Give the device asked for, or by default `cuda`, `mps` or `cpu`, the first that is there.

    Args:
        device: What was asked for.

    Returns:
        The device.

    Raises:
        ModelError: If it is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [kind for kind, there in available.items() if there]
    if device is None:
        return torch.device(present[0])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or not available.get(chosen.type, True):
        raise ModelError(f"The device {device} is not there, expected one of {', '.join(present)}; choose one of them.")
    return chosen


def offloading(offload: str | Path | None, max_memory: str | None) -> dict[str, Any]:
    """Give what `from_pretrained` needs so that what fits into no memory stays on the disk.

    Args:
        offload: The directory for it.
        max_memory: How much of this machine's memory the weights may take, such as `8GiB`.

    Raises:
        ModelError: If the size cannot be read.
    """
    settings: dict[str, Any] = {} if offload is None else {"offload_folder": str(offload)}
    if max_memory is not None:
        from accelerate.utils import convert_file_size_to_int, get_max_memory

        try:
            size = convert_file_size_to_int(max_memory)
        except ValueError as error:
            raise ModelError(f"The size {max_memory!r} is none, expected one such as 8GiB; correct it.") from error
        settings["max_memory"] = get_max_memory() | {"cpu": size}
    return settings


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a broken checkpoint raises into one sentence.

    Args:
        what: What is being loaded, with its name, as the beginning of the sentence.

    Raises:
        ModelError: Instead of what was raised within.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"{what} does not fit into the device's memory, expected enough for its weights; use a smaller data type, "
            "4-bit loading or a device map."
        ) from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{what} has weights that are corrupt or hold more than tensors, expected plain tensors; do not load them "
            "in any other way, but look for safetensors files."
        ) from error
    except _LOADING_ERRORS as error:
        text = textwrap.shorten(str(error), 240, placeholder=" …").rstrip(".")
        if "couldn't connect" in text or isinstance(error, errors.OfflineModeIsEnabled):
            raise ModelError(
                f"{what} is neither a directory nor in the local cache and the hub cannot be reached, expected one of "
                "them; check the name or the network."
            ) from error
        raise ModelError(
            f"{what} cannot be loaded ({type(error).__name__}: {text}), expected files that Transformers can "
            "read; check or download them again."
        ) from error


@contextmanager
def quiet(*, bars: bool) -> Iterator[None]:
    """Silence Transformers' warnings while the context lasts.

    Args:
        bars: Whether to hide its progress bars too; hidden, those of downloads are not seen either.
    """
    verbosity, hide = logging.get_verbosity(), bars and logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            logging.enable_progress_bar()
