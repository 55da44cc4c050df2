"""Load a model and its tokenizer, or say in one sentence why that is not possible."""

import copy
import gc
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, BitsAndBytesConfig, ProcessorMixin
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from remove_refusals.arithmetic import compute_in_float32
from remove_refusals.errors import ModelError, require_package
from remove_refusals.files import read_json
from remove_refusals.models.checkpoint import FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE, checkpoint_tensors
from remove_refusals.models.distributed import Layout, is_spread, lay_out, layout_of, let_go, whole
from remove_refusals.models.quantised import quantisation
from remove_refusals.models.source import (
    ModelChoice,
    check_complete,
    explained,
    find_source,
    model_name,
    model_source,
    quiet,
    read_config,
)
from remove_refusals.processes import gathered, n_processes
from remove_refusals.progress import SILENT, Progress
from remove_refusals.settings import ChatFormat, LoadSettings


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, with its tokenizer; `model, tokenizer = loaded` takes it apart.

    Attributes:
        model: The model. Its parameters keep `requires_grad`: frozen weights make the CPU's `linear` pathologically
            slow on non-contiguous input, so callers run it under `torch.inference_mode` instead.
        tokenizer: The tokenizer as it was saved, so that saving it again gives it back; where it has no chat template,
            with that of the processor beside it.
        source: The directory or hub id it was loaded from, and whether there is an adapter; of a model that never was
            loaded, its class.
        revision: The hub's commit, or the revision that was asked for; None for a directory.
        checkpoint_dtype: The data type of the saved weights, which `model.dtype` need not be; None if unknown.
        unused_tensors: Names of tensors in the checkpoint that the model has no place for, sorted.
        trust_remote_code: Whether code that comes with the checkpoint may be run.
        chat: How prompts are put before it.
        batch_size: How many prompts are run at once; None is automatic.
        layout: How it lies over processes.
    """

    model: Model
    tokenizer: Tokenizer
    source: str
    revision: str | None = None
    checkpoint_dtype: torch.dtype | None = None
    unused_tensors: tuple[str, ...] = ()
    trust_remote_code: bool = False
    chat: ChatFormat = field(default_factory=ChatFormat)
    batch_size: int | None = None
    layout: Layout = field(default_factory=Layout)

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"LoadedModel({self.source!r}, {type(self.model).__name__}, {dtype} on {self.model.device})"

    def __iter__(self) -> Iterator[Any]:
        """Give the model and the tokenizer."""
        return iter((self.model, self.tokenizer))

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
        config = self.model.config.get_text_config(decoder=True)
        return int(head.weight.shape[0] if head is not None else config.vocab_size)


class InTurn(LoadedModel):
    """One of two models of which one is in memory at a time: it is loaded when it is asked for, the other freed."""

    def __init__(self, like: LoadedModel, load: Callable[[], Model], held: list[Any], source: str) -> None:
        """Take all but the weights from another; `held` is what both share: whose weights are there, and these."""
        known = {name: value for name, value in vars(like).items() if name != "model"}
        vars(self).update(known, source=source, _load=load, _held=held, _size=like.vocabulary_size)

    @property
    def vocabulary_size(self) -> int:
        """The other's, so that none is loaded for it."""
        return int(vars(self)["_size"])

    @property
    def model(self) -> Model:
        """The weights."""
        held: list[Any] = vars(self)["_held"]
        if held[0] is not self:
            held[:] = [self, None]
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            held[1] = vars(self)["_load"]()
        found: Model = held[1]
        return found


def in_turn(
    base: LoadedModel, load_base: Callable[[], LoadedModel], load_edited: Callable[[], LoadedModel], source: str
) -> tuple[LoadedModel, LoadedModel]:
    """Give a model that is in memory, and an edit of it, of which one is there at a time."""
    held: list[Any] = [None, None]
    first = InTurn(base, lambda: load_base().model, held, base.source)
    held[:] = [first, base.model]
    return first, InTurn(base, lambda: load_edited().model, held, source)


def load(
    source: Any,
    tokenizer: Any = None,
    *,
    chat: ChatFormat | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, or take those that are in memory already.

    Args:
        source: A directory with a `config.json`, a hub id, `demo` for the model that comes with the package, a
            `PreTrainedModel` (with an adapter of PEFT, too), a pipeline of Transformers, or what `load` gave.
        tokenizer: The tokenizer, or where it comes from, if not from `source`; a processor counts too.
        chat: How prompts are put before it; by default in the tokenizer's own chat template.
        batch_size: How many prompts are run at once; by default automatic.
        options: The fields of `LoadSettings`, for what is not in memory.

    Returns:
        The model in evaluation mode with its tokenizer; `model, tokenizer = load(...)` takes it apart.

    Raises:
        ModelError: If it cannot be found or loaded, is no causal language model, needs code that is not trusted, or
            lacks tensors, which Transformers would fill with random numbers.
        CheckpointError: If a weight file of a directory is truncated, corrupt or missing.

    Example:
        >>> model, tokenizer = load("Qwen/Qwen2.5-0.5B-Instruct", device="cuda")
    """
    if isinstance(source, LoadedModel) and not options:
        given = source.tokenizer if tokenizer is None else _in_memory(source, tokenizer, source.chat, None).tokenizer
        batch_size = source.batch_size if batch_size is None else batch_size
        return replace(source, tokenizer=given, chat=chat or source.chat, batch_size=batch_size)
    chat = chat or ChatFormat()
    if isinstance(source, str | Path):
        named: dict[str, Any] = {
            name: str(value) if isinstance(value, Path | torch.device | torch.dtype) else value
            for name, value in options.items()
        }
        try:
            settings = LoadSettings(**named)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(
                f"The option {first['loc'][0]} of `load` is {first['input']!r} ({first['msg']}), expected values for "
                f"{', '.join(LoadSettings.model_fields)}; correct it."
            ) from error
        return load_model(model_name(source), settings, chat=chat, batch_size=batch_size, tokenizer=tokenizer)
    if options:
        raise ModelError(
            f"The option {next(iter(options))} is given with a model that is in memory already, expected none; leave "
            "it out, or give a directory or hub id."
        )
    return _in_memory(source, tokenizer, chat, batch_size)


def model_of(source: Any) -> Model:
    """Give the model of Transformers in what `load` gave, in a pipeline, or in what PEFT has wrapped."""
    if isinstance(source, LoadedModel):
        return source.model
    whole: Any = source if isinstance(source, torch.nn.Module) else getattr(source, "model", source)
    if getattr(getattr(whole, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            f"The {type(whole).__name__} puts tokens of its own before every prompt, expected an adapter within the "
            "layers, such as LoRA; use the base model."
        )
    # A model that PEFT wrapped holds the base with the adapter in its layers.
    inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    # Of a model that speaks, the part that a prompt is put before.
    inner = getattr(inner, "thinker", inner)
    if not isinstance(inner, Model):
        raise ModelError(
            f"The model is a {type(inner).__name__}, expected a directory or hub id that `load` takes, what it gave, a "
            "pipeline, or a PreTrainedModel with its tokenizer; load it with `load` or AutoModelForCausalLM."
        )
    return inner


def has_adapter(model: Model) -> bool:
    """Whether PEFT has put an adapter into a model's layers."""
    return any({"base_layer", "original_module"} & set(name.split(".")) for name, _ in model.named_modules())


def _in_memory(source: Any, tokenizer: Any, chat: ChatFormat, batch_size: int | None) -> LoadedModel:
    """Take a model that is in memory, or a pipeline's, with its tokenizer."""
    model = _checked(model_of(source))
    if tokenizer is None:
        tokenizer = getattr(source, "processor", None) or getattr(source, "tokenizer", None)
    if isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(str(tokenizer))
    if isinstance(tokenizer, ProcessorMixin):
        template, tokenizer = tokenizer.chat_template, tokenizer.tokenizer
        if template and not tokenizer.chat_template:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = template
    if not isinstance(tokenizer, Tokenizer):
        raise ModelError(
            f"The tokenizer of {type(model).__name__} is a {type(tokenizer).__name__}, expected a tokenizer of "
            "Transformers; pass it beside the model, or `load(model, tokenizer)` in place of the model."
        )
    names = (getattr(one, "name_or_path", "") for one in (source, model))
    name = next((str(name) for name in names if name), type(model).__name__)
    return LoadedModel(
        model,
        tokenizer,
        source=f"{name} with an adapter" if has_adapter(model) else name,
        revision=getattr(model.config, "_commit_hash", None),
        checkpoint_dtype=next(model.parameters()).dtype,
        trust_remote_code=type(model).__module__.startswith("transformers_modules."),
        chat=chat,
        batch_size=batch_size,
        layout=layout_of(model),
    )


def _checked(model: Model) -> Model:
    """Check that a model is a causal language model, ready to answer."""
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"The model is a {type(model).__name__}, expected a decoder with a head that continues its prompt; load it "
            "with AutoModelForCausalLM."
        )
    if any(part.training for part in model.modules()):
        raise ModelError(
            f"The {type(model).__name__} is in training mode, where dropout makes answers random, expected evaluation "
            "mode; call `model.eval()`."
        )
    return model


def load_model(
    model: str,
    settings: LoadSettings,
    chat: ChatFormat | None = None,
    batch_size: int | None = None,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    progress: Progress = SILENT,
) -> LoadedModel:
    """Load a model by directory, hub id or the name `demo`; never with tensors that Transformers made up."""
    name, revision = model_source(model), settings.revision
    where, places = _placed(settings)
    wanted = parse_dtype(settings.dtype)
    access: dict[str, Any] = {"revision": revision, "local_files_only": find_source(name, revision)}
    with quiet(bars=Path(name).is_dir()), explained(f"The model {name}"):
        chosen = read_config(name, access, settings.trust_remote_code)
        saved = saved_dtype(name, chosen.described)
        is_quantised, options = _quantisation(settings, chosen, where, wanted or saved or torch.float32)
        layout = lay_out(name, chosen, settings)
        places |= options
        if layout.config is not None:
            del places["device_map"]
            places["distributed_config"] = layout.config
        # Float32 holds bfloat16 and float16 values exactly.
        if wanted is None and where.type == "cpu" and settings.device_map is None and not is_quantised:
            wanted = torch.float32
        if tokenizer is None:
            tokenizer = _load_tokenizer(name, **access)
        elif isinstance(tokenizer, str | Path):
            tokenizer = _load_tokenizer(str(tokenizer), trust_remote_code=settings.trust_remote_code)
        built, report = chosen.loader.from_pretrained(
            name,
            config=chosen.config,
            dtype="auto" if wanted is None else wanted,
            **places,
            ignore_mismatched_sizes=True,  # so that they are reported with their names, below
            output_loading_info=True,
            **access,
        )
        check_complete(name, report)
    if layout.said is not None:
        progress.note(layout.said)
    let_go(built)
    if not is_spread(built):
        compute_in_float32(built, getattr(built, built.base_model_prefix, built))
    return LoadedModel(
        built.eval(),
        tokenizer,
        source=name,
        revision=access["revision"],
        checkpoint_dtype=saved,
        unused_tensors=tuple(sorted(report["unexpected_keys"])),
        trust_remote_code=settings.trust_remote_code,
        chat=chat or ChatFormat(),
        batch_size=batch_size,
        layout=layout,
    )


def _quantisation(
    settings: LoadSettings, chosen: ModelChoice, where: torch.device, dtype: torch.dtype
) -> tuple[bool, dict[str, Any]]:
    """Say whether the weights are quantised, in the files or by loading them, and what `from_pretrained` then needs."""
    method = quantisation(chosen.described).get("quant_method")
    if method == "compressed-tensors":
        require_package("compressed_tensors", "compressed", "The format compressed-tensors", ModelError)
        if where.type == "cpu":
            # Its own modules have no place for fused experts.
            held = getattr(chosen.config, "quantization_config", None)
            (held or chosen.config.get_text_config(decoder=True).quantization_config)["dequantize"] = True
    in_bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else None
    if in_bits is None:
        return method is not None, {}
    require_package("bitsandbytes", "4bit", f"{in_bits}-bit loading", ModelError)
    # It says of every layer in every pass that 8 bits are made of float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    kind = {"load_in_8bit": True} if in_bits == 8 else {"load_in_4bit": True, **four_bit}
    return True, {"quantization_config": BitsAndBytesConfig(**kind)}


def _load_tokenizer(name: str, *, trust_remote_code: bool = False, **access: Any) -> Tokenizer:
    """Load a tokenizer; one that has no chat template of its own gets that of the processor beside it."""
    beside = partial(cached_file, name, _raise_exceptions_for_missing_entries=False, **access)
    without_words = ModelError(
        f"The tokenizer of {name} has no vocabulary, expected one such as tokenizer.json; copy the files of its base's "
        "tokenizer there."
    )
    with quiet(bars=True), explained(f"The tokenizer of {name}"):
        tekken = beside("tekken.json") if beside("tokenizer.json") is None else None
        own = {} if tekken is None else {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        try:
            # With mistral-common's own tokenizer it would depend on that package whether a chat template is heeded.
            found: Tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code, mistral_format=False, **own, **access
            )
        except (ValueError, ImportError) as error:
            if "custom code" in str(error):
                raise ModelError(
                    f"The tokenizer of {name} needs code that comes with it, expected permission to run it; read that "
                    "code and pass trust_remote_code if you trust it."
                ) from error
            if "instantiate the backend tokenizer" in str(error):
                raise without_words from error
            if beside("tokenizer.json") is not None or beside("tokenizer.model") is None:
                raise
            for package in ("sentencepiece", "google.protobuf"):
                require_package(package, "sentencepiece", "a tokenizer that is tokenizer.model alone", ModelError)
            raise ValueError(
                f"tokenizer.model is no whole SentencePiece file, nor another that is known: {error}"
            ) from error
        for file in ("chat_template.json", "processor_config.json"):
            template, path = found.chat_template, beside(file)
            if path is not None and (not template or (isinstance(template, dict) and "default" not in template)):
                described = read_json(Path(path), error=ModelError)
                found.chat_template = (isinstance(described, dict) and described.get("chat_template")) or template
        if tekken is not None and not found.chat_template:
            module = "mistral_common.integrations.chat_templates.chat_templates"
            package = require_package(module, "mistral", "the chat template of a tekken.json", ModelError)
            found.chat_template = package.convert_tokenizer_to_chat_template(tekken)
    if set(found.get_vocab()) <= set(found.all_special_tokens):
        # Without files Transformers makes one all the same, for some types.
        raise without_words
    return found


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


def parse_dtype(dtype: str) -> torch.dtype | None:
    """Read the name of a data type; None for auto."""
    if dtype == "auto":
        return None
    parsed = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ModelError(f"The dtype {dtype} is unknown, expected auto, float32, bfloat16 or float16; choose one.")
    return parsed


def fingerprint(loaded: LoadedModel) -> str:
    """Hash what tells models apart, 16 hexadecimal digits: configuration, device, and a sample of each parameter."""
    config = loaded.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "distributed_config"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps([config, loaded.device.type], sort_keys=True, default=str).encode())
    for name, parameter in loaded.model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta and parameter.is_floating_point():
            values = whole(parameter.detach()).flatten()
            digest.update(str(values[:: max(1, len(values) // 64)].float().tolist()).encode())
            # In parts, since a sum in another data type copies what it adds up to that.
            parts = torch.split(values, 1 << 22)
            norm = math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float32)) for part in parts))
            sums = sum(float(part.sum(dtype=torch.float64)) for part in parts), norm
            # Rounded, since the order of a sum depends on how many threads there are.
            digest.update(" ".join(f"{value:.5g}" for value in sums).encode())
    return digest.hexdigest()[:16]


def free_bytes(device: torch.device) -> int:
    """Say how much memory a device has left."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    from accelerate.utils import get_max_memory

    return int(get_max_memory()["cpu"])


def fits_twice(loaded: LoadedModel) -> bool:
    """Whether every device that holds a part of a model, in every process, has room for as much again."""
    if loaded.is_offloaded:
        return True
    held: dict[torch.device, int] = {}
    for tensor in loaded.model.parameters():
        part: torch.Tensor = getattr(tensor, "to_local", lambda own=tensor: own)()
        held[part.device] = held.get(part.device, 0) + part.nbytes
    return all(gathered(lambda: all(free_bytes(device) > 1.1 * size for device, size in held.items())))


def pick_device(device: str | torch.device | None) -> torch.device:
    """Give the device asked for, or by default `cuda`, `mps` or `cpu`, the first that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [kind for kind, there in available.items() if there]
    if n_processes() > 1 and present[0] == "cuda" and device in (None, "cuda"):
        # Each process has chosen its own.
        return torch.device("cuda", torch.cuda.current_device())
    if device is None:
        return torch.device(present[0])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or not available.get(chosen.type, True):
        raise ModelError(f"The device {device} is not there, expected one of {', '.join(present)}; choose one of them.")
    return chosen


def _placed(settings: LoadSettings) -> tuple[torch.device, dict[str, Any]]:
    """Say where a model goes, and what `from_pretrained` needs so that what fits into no memory stays on the disk."""
    if settings.device is not None and settings.device_map is not None:
        raise ModelError(
            f"Both device {settings.device} and device_map {settings.device_map} are given, expected one; leave one "
            "out."
        )
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ModelError("Both load_in_4bit and load_in_8bit are given, expected one; leave one out.")
    if settings.device_map is None and (settings.offload is not None or settings.max_memory is not None):
        raise ModelError(
            "The options offload and max_memory are given without a device map, expected both; add --device-map auto."
        )
    where = pick_device(settings.device)
    places: dict[str, Any] = {"device_map": settings.device_map or {"": where}}
    if settings.offload is not None:
        places["offload_folder"] = settings.offload
    if settings.max_memory is not None:
        from accelerate.utils import convert_file_size_to_int, get_max_memory

        try:
            size = convert_file_size_to_int(settings.max_memory)
        except ValueError as error:
            raise ModelError(
                f"The size {settings.max_memory!r} is none, expected one such as 8GiB; correct it."
            ) from error
        places["max_memory"] = get_max_memory() | {"cpu": size}
    return where, places
