"""Where a model lies (directory, hub id, or the demo model of the package), and what is wrong if it cannot be had."""

import fnmatch
import pickle
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import find_adapter_config_file, logging
from yaml import YAMLError

from remove_refusals.errors import CheckpointError, ModelError, OutputError, RecordError
from remove_refusals.files import check_model_place, read_json
from remove_refusals.models.checkpoint import INDEX_FILE, SINGLE_FILE, checkpoint_tensors
from remove_refusals.models.quantised import quantisation
from remove_refusals.settings import DEMO

if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    # Llama 4 with its vision tower asks its language model's output for this, which it never has (Transformers 5.24).
    setattr(MoeCausalLMOutputWithPast, "image_outputs", None)  # noqa: B010

CARD = "README.md"
"""A model card's name in a directory or a repository."""

CARRIED_FIELDS = ("license", "license_name", "license_link", "base_model")
"""What a card says of licence and descent; it holds for what is made from the model too."""

UNWANTED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.tflite",
    "*.npz", "*.ot", "*.pkl", "consolidated*.safetensors", "adapter_model.safetensors", "params.json", "*.png", "*.jpg",
    "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.pdf",
)  # fmt: skip
"""Weights in other formats or of other models, and a card's pictures: what nothing is made of from a model's files."""

HTTPError: type[Exception] = errors.HfHubHTTPError.__mro__[1]
"""The hub's client has changed the HTTP package under it before; its own error always derives from that package's."""

# What Transformers, its config validation, safetensors and torch raise for a checkpoint that they cannot read.
_PYTHON_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, EOFError)
_LOADING_ERRORS = (*_PYTHON_ERRORS, SafetensorError, errors.StrictDataclassError)


def model_name(model: str | Path) -> str:
    """Give a model's name as it can be typed: a path is never the word for the embedded model."""
    return f"./{DEMO}" if isinstance(model, Path) and str(model) == DEMO else str(model)


def model_source(model: str | Path) -> str:
    """Give the directory of the embedded demo model for the name `demo`, and any other name unchanged.

    A directory of that name is a path, or `./demo`.
    """
    if (name := model_name(model)) != DEMO:
        return name
    return str(resources.files("remove_refusals") / "data" / "demo")


def local_directory(model: str | Path, revision: str | None = None) -> Path | None:
    """Find the directory of a model on this machine, in the hub's cache for a hub id; None if it is not there."""
    source = Path(model_source(model))
    if source.is_dir():
        return source
    try:
        found = try_to_load_from_cache(str(model), "config.json", revision=revision)
    except errors.HFValidationError:
        # A path to something that is not there cannot be a hub id.
        return None
    return Path(found).parent if isinstance(found, str) else None


_OWN_FILES = ("*config.json", "*.index.json", "tokenizer*", "model*", "pytorch_model*", "consolidated*")


def check_not_source(output: Path, *models: str | Path | None, revision: str | None = None) -> None:
    """Check that an output is no model or run that is read for it, no directory above one, and no file of one."""
    target = output.expanduser().resolve()
    for model in models:
        source = None if model is None else local_directory(model, revision)
        if source is None:
            continue
        own = target.is_file() and any(fnmatch.fnmatch(target.name, pattern) for pattern in _OWN_FILES)
        if source.resolve().is_relative_to(target) or (own and target.parent == source.resolve()):
            what = "a file of the model" if own else "the model itself or a directory that holds it"
            raise OutputError(
                f"The output {output} is {what}, expected another place, since what is read is never written to; "
                "choose another path."
            )


def edited_before(model: str, revision: str | None = None) -> str | None:
    """Say in a sentence that a model was edited already, by the record beside its weights; None where none is."""
    directory = local_directory(model, revision)
    if directory is None or not (directory / "ablation.json").is_file():
        return None
    record = read_json(directory / "ablation.json", error=RecordError)
    base = record.get("base") if isinstance(record, dict) else None
    source = base.get("source") if isinstance(base, dict) else None
    return f"The model {model} was edited already (ablation.json), from {source or 'a base that it does not name'}."


def cached_commit(model: str, revision: str | None = None) -> str | None:
    """Say which commit of a model on the hub this machine has; None for a directory, and for what is not here."""
    directory = None if Path(model_source(model)).is_dir() else local_directory(model, revision)
    return directory.name if directory is not None else None


def weights_directory(model: str, revision: str | None = None) -> Path | None:
    """Find a model's files on this machine, or bring here what is missing; None if the hub does not give them."""
    if Path(model_source(model)).is_dir():
        return local_directory(model)
    try:
        found = Path(snapshot_download(model, revision=revision, ignore_patterns=list(UNWANTED)))
        if not any(found.glob("*.safetensors")):
            snapshot_download(model, revision=revision, allow_patterns=["pytorch_model*.bin*"])
        return found
    except (OSError, ValueError):
        # The hub's own errors are among these; where it cannot be reached the cache may do.
        return local_directory(model, revision)


_EDITED = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt")


def check_editable(model: str, revision: str | None = None) -> None:
    """Check by its config.json alone that no format of a model's weights keeps them from being edited."""
    try:
        described, _ = PretrainedConfig.get_config_dict(model_source(model), revision=revision)
    except (OSError, ValueError):
        # What is wrong is said where the model is opened.
        return
    found = quantisation(described)
    method = str(found.get("quant_method", "modelopt" if "quant_algo" in found else "unknown"))
    if found and method not in _EDITED:
        raise CheckpointError(
            f"The model {model} is quantised (quant_method {method}) in a way in which its weights cannot be edited, "
            f"expected full weights or {', '.join(_EDITED)}; edit the unquantised base, or make a LoRA of "
            "that (`bake --as lora`) and load it beside this model."
        )


def licence_fields(directory: Path) -> dict[str, Any]:
    """Read those of `CARRIED_FIELDS` that the model card in a directory has."""
    try:
        found = metadata_load(directory / CARD) if (directory / CARD).is_file() else None
    except (OSError, ValueError, YAMLError):
        # A card is written by people, for people: what is wrong with it is no reason not to edit the model.
        found = None
    return {name: found[name] for name in CARRIED_FIELDS if name in found} if isinstance(found, dict) else {}


@dataclass(frozen=True, eq=False)
class ModelChoice:
    """A configuration, as the file has it and as Transformers has it, and the class that a user loads it with.

    `loader` is an Auto class, or the class of a part that continues a prompt where the whole does more than that.
    """

    described: dict[str, Any]
    config: Any
    loader: Any

    def build(self, *, trust_remote_code: bool) -> PreTrainedModel:
        """Build the model anew, with random weights."""
        if hasattr(self.loader, "_from_config"):
            built: PreTrainedModel = self.loader._from_config(self.config)
        else:
            built = self.loader.from_config(self.config, trust_remote_code=trust_remote_code)
        return built


_AUTO_CLASSES: tuple[tuple[Any, Mapping[str, str]], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
)


def read_config(name: str, access: dict[str, Any], trust_remote_code: bool) -> ModelChoice:
    """Read the configuration of a model that continues a prompt; note its commit in `access`."""
    refuse_adapter(name, **access)
    described, _ = PretrainedConfig.get_config_dict(name, **access)
    model_type, code = described.get("model_type"), described.get("auto_map") or {}
    loader = _loader(model_type, described.get("architectures") or ())
    own = next((auto for auto, _ in _AUTO_CLASSES if auto.__name__ in code), None)
    if own is not None and loader is None and not trust_remote_code:
        raise ModelError(
            f"The model {name} of type {model_type} needs code that comes with it, expected permission to run it; "
            "read that code and pass trust_remote_code if you trust it."
        )
    if not model_type and "AutoConfig" not in code:
        raise ModelError(
            f"The config.json of {name} names no model_type, expected one that Transformers knows; check the file."
        )
    if own is None and loader is None:
        known = model_type in CONFIG_MAPPING_NAMES
        reason = "has no form that continues a prompt" if known else "this Transformers does not know"
        raise ModelError(
            f"The model {name} is of type {model_type}, which {reason}, expected a decoder that continues its prompt; "
            "choose another model or upgrade Transformers."
        )
    access["trust_remote_code"] = trust_remote_code
    if (commit := cached_commit(name, access["revision"])) is not None:
        # A branch may move between two requests.
        access["revision"] = commit
    config = AutoConfig.from_pretrained(name, **access)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"The model {name} of type {config.model_type} is an encoder-decoder, expected a decoder that "
            "continues its prompt; choose a causal language model."
        )
    if own is not None and trust_remote_code:
        loader = own
    elif hasattr(config, "thinker_config"):
        # What speaks hands a prompt to this part, whose answer the rest reads out.
        whole = dict(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)[config.model_type]
        loader = getattr(transformers, whole.replace("ForCond", "ThinkerForCond"))
        config = config.thinker_config
    return ModelChoice(described, config, loader)


def _loader(model_type: str | None, architectures: Sequence[str]) -> Any:
    """Choose the Auto class that gives the class that a checkpoint was saved with, or else the first of its type."""
    kind = model_type or ""
    known = [(auto, names[kind]) for auto, names in _AUTO_CLASSES if kind in names]
    if known:
        return next((auto for auto, name in known if name in architectures), known[0][0])
    # A part of a model that was saved alone has a class and no Auto class.
    classes = (getattr(transformers, name, None) for name in architectures if kind in CONFIG_MAPPING_NAMES)
    return next((one for one in classes if isinstance(one, type) and issubclass(one, GenerationMixin)), None)


def refuse_adapter(name: str, **access: Any) -> None:
    """Refuse an adapter of PEFT, instead of a model or beside its weights: Transformers applies it where PEFT is."""
    found = find_adapter_config_file(name, **access)
    if found is None:
        return
    described = read_json(Path(found), error=ModelError)
    base = described.get("base_model_name_or_path") if isinstance(described, dict) else None
    weights = any(any(Path(found).parent.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin"))
    without = ", or move adapter_config.json away to use the weights without it" if weights else ""
    raise ModelError(
        f"The model {name} {'has beside its weights' if weights else 'is'} a PEFT adapter (adapter_config.json) of "
        f"{base or 'a base that it does not name'}, expected plain weights; merge it with `AutoPeftModelForCausalLM."
        f"from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')`, put the base's tokenizer there, and "
        f"pass that directory{without}."
    )


def find_source(name: str, revision: str | None) -> bool:
    """Check that a model is there; give whether only local files are to be read, as the hub is out of reach."""
    path = Path(name)
    if check_model_place(name):
        refuse_adapter(name)
        if (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists():
            checkpoint_tensors(path)
        return True
    # The hub is asked once, because each of the many requests of a load would be retried for half a minute.
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        HfApi().model_info(name, revision=revision, timeout=10.0)
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
    """Refuse what Transformers would fill with random numbers, by the loading info that `from_pretrained` gives."""
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


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a broken checkpoint raises into one sentence that begins with what is being loaded."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"{what} does not fit into the device's memory, expected enough for its weights; use a smaller data type, "
            "4-bit or 8-bit loading or a device map."
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
    """Silence Transformers' warnings, and its progress bars if they are to be hidden, downloads' too."""
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
