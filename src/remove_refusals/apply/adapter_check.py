"""Load a written adapter into a model without weights, as PEFT does: what PEFT would pass by is found before it counts.

PEFT renames targets and tensors of mixtures of experts, for adapters of older versions, and takes no notice of tensors
that it then has no place for.
"""

import warnings
from pathlib import Path

import safetensors.torch
from transformers import PreTrainedModel

from remove_refusals.errors import ArchitectureError, OutputError
from remove_refusals.skeleton import skeleton


def check_installed() -> None:
    """Check that PEFT is there.

    Raises:
        OutputError: If it is not, or too old to lay out experts as adapters here do.
    """
    from importlib import metadata

    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        version = "none"
    if version == "none" or tuple(map(int, version.split(".")[:2])) < (0, 19):
        raise OutputError(
            f"The installed version of PEFT is {version}, expected at least 0.19 to check an adapter with; install "
            "the extra, remove-refusals[adapters]."
        )


def check_loads(model: PreTrainedModel, directory: Path) -> None:
    """Check that PEFT finds a place for every tensor of an adapter, and a tensor for every place.

    Args:
        model: The base model; it is left as it is, and its weights are not read.
        directory: The adapter's directory.

    Raises:
        ArchitectureError: If PEFT would pass a tensor by or refuses the adapter; the message names what it is about.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = PeftConfig.from_pretrained(directory)
            adapted = get_peft_model(skeleton(model), config, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ArchitectureError(
                f"PEFT refuses an adapter of model type '{model.config.model_type}' "
                f"({str(error).strip().splitlines()[0].rstrip('.')}), expected it to load; save the edited weights "
                "instead."
            ) from error
    lost = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
    if lost:
        raise ArchitectureError(
            f"PEFT finds no place or no value for '{lost[0]}' in model type '{model.config.model_type}' ({len(lost)} "
            "such in all), expected all of the adapter to be loaded; save the edited weights instead."
        )
