"""Where a model lies: a directory, a hub id in the local cache, or the demo model that comes with the package."""

from importlib import resources
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

DEMO = "demo"
"""The name that stands for the embedded demo model."""


def model_source(model: str) -> str:
    """Give the directory of the embedded demo model for the name `demo`, and any other name unchanged.

    A directory of that name is taken for a model only if it holds one: many projects have a folder called demo.
    """
    if model != DEMO or (Path(model) / "config.json").is_file():
        return model
    return str(resources.files("remove_refusals") / "data" / "demo")


def local_directory(model: str, revision: str | None = None) -> Path | None:
    """Find a model's files on this machine.

    Args:
        model: A directory, a hub id, or `demo`.
        revision: The hub's branch, tag or commit.

    Returns:
        The directory, in the hub's cache for a hub id; None if it is in neither.
    """
    source = Path(model_source(model))
    if source.is_dir():
        return source
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        # A path to something that is not there cannot be a hub id.
        return None
    return Path(found).parent if isinstance(found, str) else None
