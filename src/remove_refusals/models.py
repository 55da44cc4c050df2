"""Load a model and its tokenizer, or say in one sentence why that is not possible."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from remove_refusals.checkpoint import INDEX_FILE, SINGLE_FILE, checkpoint_tensors
from remove_refusals.errors import ModelError
from remove_refusals.loading import check_complete, explained, find_source, offloading, pick_device, quiet
from remove_refusals.slices import FLOAT_DTYPES
from remove_refusals.sources import cached_commit, check_trust, model_source


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, with its tokenizer.

    Attributes:
        model: The model. Its parameters keep `requires_grad`: frozen weights make the CPU's `linear` pathologically
            slow on non-contiguous input, so callers run it under `torch.inference_mode` instead.
        tokenizer: The tokenizer as it was saved; nothing in it is changed, so that saving it again gives it back.
        source: The directory or hub id it was loaded from.
        revision: The hub's commit, or the revision that was asked for; None for a directory.
        checkpoint_dtype: The data type of the saved weights, which `model.dtype` need not be; None if unknown.
        unused_tensors: Names of tensors in the checkpoint that the model has no place for, sorted.
        trust_remote_code: Whether code that comes with the checkpoint may be run.
    """

    model: Model
    tokenizer: Tokenizer
    source: str
    revision: str | None = None
    checkpoint_dtype: torch.dtype | None = None
    unused_tensors: tuple[str, ...] = ()
    trust_remote_code: bool = False

    @property
    def device(self) -> torch.device:
        """The device that token ids have to be on."""
        module = self.model.get_input_embeddings()
        embedding: torch.Tensor = module.weight
        # Weights that lie on the disk are put on their hook's device when they are needed.
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", self.model.device)
        return torch.device(place) if embedding.is_meta else embedding.device

    @property
    def is_offloaded(self) -> bool:
        """Whether some of the weights are read from the disk each time that they are needed."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    @property
    def pad_token_id(self) -> int:
        """The token that fills up a batch: the pad token, else the end token, else 0; it is masked in any case."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in candidates if token is not None), 0)

    @property
    def vocabulary_size(self) -> int:
        """The number of logits at each position."""
        head = self.model.get_output_embeddings()
        return int(head.weight.shape[0]) if head is not None else int(self.model.config.get_text_config().vocab_size)


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload: str | Path | None = None,
    max_memory: str | None = None,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer from a directory or the Hugging Face hub.

    Args:
        source: A directory with a `config.json`, a hub id, or `demo` for the model that comes with the package.
        device: Where the model goes; by default `cuda`, `mps` or `cpu`, the first that is there.
        dtype: `auto` takes the checkpoint's data type on an accelerator and float32 on the CPU (which holds bfloat16
            and float16 values exactly); or a data type such as `bfloat16`.
        load_in_4bit: Quantise the linear layers to 4 bits (NF4) with bitsandbytes while loading.
        trust_remote_code: Run Python code that comes with the checkpoint.
        revision: The hub's branch, tag or commit; the default branch if not given.
        device_map: Passed on to Transformers instead of `device`, for example `auto`.
        offload: With a device map: the directory for what fits into no memory. Safetensors files are read where they
            lie; other weights are written there.
        max_memory: With a device map: how much of this machine's memory the weights may take, such as `8GiB`.
        tokenizer: Where the tokenizer comes from, if not from `source`.

    Returns:
        The model in evaluation mode with its tokenizer.

    Raises:
        ModelError: If it cannot be found or loaded, is no causal language model, needs code that is not trusted, or
            lacks tensors (which Transformers would fill with random numbers).
        CheckpointError: If a weight file of a directory is truncated, corrupt or missing.
    """
    name = model_source(str(source))
    if device is not None and device_map is not None:
        raise ModelError(f"Both device {device} and device_map {device_map} are given, expected one; leave one out.")
    if device_map is None and (offload is not None or max_memory is not None):
        raise ModelError(
            "The options offload and max_memory are given without a device map, expected both; add --device-map auto."
        )
    where = pick_device(device)
    wanted = _parse_dtype(dtype)
    local = find_source(name, revision)
    with quiet(bars=Path(name).is_dir()), explained(f"The model {name}"):
        settings: dict[str, Any] = {"revision": revision, "local_files_only": local}
        described, _ = PretrainedConfig.get_config_dict(name, **settings)
        _check_model_type(name, described, trust_remote_code)
        settings["trust_remote_code"] = trust_remote_code
        if (commit := cached_commit(name, revision)) is not None:
            # A branch may move between two requests.
            settings["revision"] = commit
        config = AutoConfig.from_pretrained(name, **settings)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"The model {name} of type {config.model_type} is an encoder-decoder, expected a decoder that "
                "continues its prompt; choose a causal language model."
            )
        saved = saved_dtype(name, described)
        quantised = load_in_4bit or "quantization_config" in described
        if wanted is None and where.type == "cpu" and device_map is None and not quantised:
            wanted = torch.float32
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if wanted is None else wanted,
            device_map=device_map or {"": where},
            **offloading(offload, max_memory),
            quantization_config=_four_bit(wanted or saved or torch.float32) if load_in_4bit else None,
            ignore_mismatched_sizes=True,  # so that they are reported with their names, below
            output_loading_info=True,
            **settings,
        )
        check_complete(name, report)
    with quiet(bars=True), explained(f"The tokenizer of {tokenizer or name}"):
        loaded_tokenizer = AutoTokenizer.from_pretrained(tokenizer or name, **(settings if tokenizer is None else {}))
    unused = tuple(sorted(report["unexpected_keys"]))
    return LoadedModel(model.eval(), loaded_tokenizer, name, commit or revision, saved, unused, trust_remote_code)


def _check_model_type(name: str, described: Mapping[str, Any], trust_remote_code: bool) -> None:
    check_trust(name, described, trust_remote_code)
    model_type, code = described.get("model_type"), described.get("auto_map") or {}
    if not model_type and "AutoConfig" not in code:
        raise ModelError(
            f"The config.json of {name} names no model_type, expected one that Transformers knows; check the file."
        )
    if "AutoModelForCausalLM" not in code and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = "has no causal form" if model_type in CONFIG_MAPPING_NAMES else "this Transformers does not know"
        raise ModelError(
            f"The model {name} is of type {model_type}, which {reason}, expected a decoder that continues its prompt; "
            "choose another model or upgrade Transformers."
        )


def saved_dtype(name: str, described: Mapping[str, Any]) -> torch.dtype | None:
    """Read the saved data type from the content of config.json, else the weight files: what most bytes have."""
    for part in (described, described.get("text_config") or {}):
        value = part.get("dtype") or part.get("torch_dtype")
        parsed = getattr(torch, str(value).removeprefix("torch."), None)
        if isinstance(parsed, torch.dtype):
            return parsed
    sizes: dict[str, int] = {}
    if (Path(name) / SINGLE_FILE).exists() or (Path(name) / INDEX_FILE).exists():
        for _, entry in checkpoint_tensors(Path(name)).values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.stop - entry.start
    return FLOAT_DTYPES.get(max(sizes, key=sizes.__getitem__)) if sizes else None


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ModelError(f"The dtype {dtype} is unknown, expected auto, float32, bfloat16 or float16; choose one.")
    return parsed


def _four_bit(compute: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "The package bitsandbytes is missing, expected for 4-bit loading; pip install 'remove-refusals[4bit]'."
        )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
