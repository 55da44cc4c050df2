"""Where a model lies (a directory, a hub id, or the demo model of the package), and whether its own code may be run."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from remove_refusals.errors import ModelError
from remove_refusals.settings import DEMO

CARD = "README.md"
"""A model card's name in a directory or a repository."""


CARRIED_FIELDS = ("license", "license_name", "license_link", "base_model")
"""What a card says of licence and descent; it holds for what is made from the model too."""


_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


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


def cached_commit(model: str, revision: str | None = None) -> str | None:
    """Say which commit of a model on the hub this machine has.

    Args:
        model: A directory, a hub id, or `demo`.
        revision: The hub's branch, tag or commit.

    Returns:
        The commit; None for a directory, and for what is not in the hub's cache.
    """
    directory = None if Path(model_source(model)).is_dir() else local_directory(model, revision)
    return directory.name if directory is not None else None


def weights_directory(model: str, revision: str | None = None) -> Path | None:
    """Find a model's safetensors files on this machine, or bring them here from the hub.

    Args:
        model: A directory, a hub id, or `demo`.
        revision: The hub's branch, tag or commit.

    Returns:
        The directory; None if the hub does not have the model or cannot be reached.
    """
    found = local_directory(model, revision)
    if found is not None and (Path(model_source(model)).is_dir() or any(found.glob("*.safetensors"))):
        return found
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_WANTED)))
    except (OSError, ValueError):
        # The hub's own errors are among these; loading the model says better what is wrong.
        return None


def licence_fields(directory: Path) -> dict[str, Any]:
    """Read what a directory's model card says of licence and descent.

    Args:
        directory: A model.

    Returns:
        Those of `CARRIED_FIELDS` that its card has; none where there is no card, or none that can be read.
    """
    try:
        found = metadata_load(directory / CARD) if (directory / CARD).is_file() else None
    except (OSError, ValueError, YAMLError):
        # A card is written by people, for people: what is wrong with it is no reason not to edit the model.
        found = None
    return {name: found[name] for name in CARRIED_FIELDS if name in found} if isinstance(found, dict) else {}


def check_trust(name: str, described: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Check that code which a checkpoint comes with and cannot do without may be run.

    Args:
        name: The checkpoint, for the error.
        described: The content of its `config.json`.
        trust_remote_code: Whether such code may be run.

    Raises:
        ModelError: If it may not.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = described.get("model_type")
    needed = "AutoModelForCausalLM" in (described.get("auto_map") or {})
    if needed and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        raise ModelError(
            f"The model {name} of type {model_type} needs code that comes with it, expected permission to run it; "
            "read that code and pass trust_remote_code if you trust it."
        )
