"""A PEFT adapter in a loaded model's weights, to be measured like any edited model."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from remove_refusals.apply.adapter_check import check_installed
from remove_refusals.errors import ModelError
from remove_refusals.models import LoadedModel


def is_adapter(source: str | Path) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (Path(source) / "adapter_config.json").is_file()


def with_adapter(base: LoadedModel, directory: Path) -> LoadedModel:
    """Merge an adapter into its base model, in memory.

    An embedding that is also the unembedding is given a copy first where the adapter changes it, so that the merged
    model gives the logits of the adapted one.

    Args:
        base: The base model, loaded for this alone: its weights are changed.
        directory: The adapter's directory.

    Returns:
        The same model with the adapter in its weights; `source` is the adapter's directory.

    Raises:
        ModelError: If the base is quantised, or the adapter does not fit it.
        OutputError: If PEFT is not installed.
    """
    check_installed()
    from peft import PeftModel

    model = base.model
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError(
            f"The base {base.source} is quantised, expected its full weights to merge the adapter {directory} into; "
            "leave --load-in-4bit out."
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and getattr(head, "weight", None) is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            merged = PeftModel.from_pretrained(model, directory).merge_and_unload()
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".:")
            raise ModelError(
                f"The adapter {directory} cannot be loaded into {base.source} ({reason}), expected one that was made "
                "for this model; check both paths."
            ) from error
    # PEFT freezes the base, which makes the CPU's `linear` pathologically slow.
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return replace(base, model=merged.eval(), source=str(directory), revision=None)
