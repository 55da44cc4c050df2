"""Models without weights, built from a configuration."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from remove_refusals.models import explained, model_source, read_config


def skeleton(model: PreTrainedModel, *, dtype: torch.dtype | None = None, tied: bool | None = None) -> PreTrainedModel:
    """Copy a model without weights and quantisation, onto the meta device, its embeddings `tied` or not.

    Of two embeddings that the files hold with different bytes Transformers ties none, whatever the configuration says.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if tied is not None:
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = tied
    with torch.device("meta"):
        built: PreTrainedModel = type(model)._from_config(config, dtype=dtype or model.dtype)
    if tied is None and is_tied(built) and not is_tied(model) and not model.get_output_embeddings().weight.is_meta:
        return skeleton(model, dtype=dtype, tied=False)
    return _without_weights(built)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether a model's unembedding is its embedding."""
    both = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(part, "weight", None) for part in both)
    return first is not None and first is last


def skeleton_of(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model without weights, as `skeleton` does, from a checkpoint's configuration alone."""
    name = model_source(source)
    with explained(f"The configuration of {source}"):
        chosen = read_config(name, {"revision": revision}, trust_remote_code)
        with torch.device("meta"):
            built = chosen.build(trust_remote_code=trust_remote_code)
    return _without_weights(built)


def _without_weights(built: PreTrainedModel) -> PreTrainedModel:
    """Move to the meta device what a model has built elsewhere in spite of the device it was told to use."""
    if any(not parameter.is_meta for parameter in built.parameters()):
        built = built.to("meta")
        built.tie_weights()
    return built.eval()
