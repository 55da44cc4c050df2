"""Edited models in memory: by the formula in their parameters, from saved files, or with an adapter merged."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from remove_refusals.baking.base import Base, has_weights, refuse_layers_with_adapter
from remove_refusals.directions import EditPlan, PlanEntry, resolve
from remove_refusals.errors import CheckpointError, ModelError, OutputError, require_package
from remove_refusals.modelmap import map_model
from remove_refusals.models import FLOAT_DTYPES, LoadedModel, is_spread, load_model, model_of, model_source
from remove_refusals.settings import ChatFormat, EditSettings, LoadSettings
from remove_refusals.types import Intervention


def bake_in_place(model: Any, intervention: Intervention, settings: EditSettings | None = None) -> EditPlan:
    """Take directions out of a model's own parameters and say what was done to which; nothing is written."""
    model = model_of(model)
    refuse_layers_with_adapter(model)
    if is_spread(model):
        raise ModelError(
            f"The {type(model).__name__} is spread over processes, expected whole parameters to edit; edit its files "
            "with `bake`."
        )
    plan = resolve(intervention, map_model(model), model.get_parameter, settings)
    for entry in plan.entries:
        owner, _, name = entry.parameter.rpartition(".")
        module = model.get_submodule(owner)
        check_whole(entry, getattr(module, name, None), type(module).__name__)
    if plan.untie:
        untie(model)
    with torch.no_grad():
        for entry in plan.entries:
            parameter = model.get_parameter(entry.parameter)
            parameter.copy_(entry.edited(parameter, plan.variant))
    return plan


def check_whole(entry: PlanEntry, found: Any, holder: str = "checkpoint") -> None:
    """Check that a tensor is in memory as the plan knows it; what is quantised is another type, or not there."""
    is_tensor = isinstance(found, torch.Tensor)
    plain = type(found) in (torch.nn.Parameter, torch.Tensor) and found.dtype in FLOAT_DTYPES.values()
    if not plain or found.is_meta or found.shape != entry.shape:
        what = f"{tuple(found.shape)} in {found.dtype} on {found.device}" if is_tensor else "not there"
        raise ModelError(
            f"Tensor '{entry.parameter}' of a {holder} is {what}, expected a floating-point tensor of shape "
            f"{entry.shape} in memory; load the model without quantisation and without offloading."
        )


def untie(model: PreTrainedModel) -> None:
    """Give an unembedding that is also the embedding a tensor of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and getattr(head, "weight", None) is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def load_changed(loaded: LoadedModel, base: Base, plan: EditPlan, directory: Path) -> LoadedModel | None:
    """Give the saved edit of a loaded model as loading its files does, but read from them only what the plan changes.

    All else is the base's own memory, which the certificate says the files agree with. None where the base is not
    whole in the memory of this process, or its own files, read in the same way, do not give what is there.
    """
    model = loaded.model
    elsewhere = loaded.is_offloaded or is_spread(model)
    if elsewhere or getattr(model.config, "quantization_config", None) is not None:
        return None
    saved = replace(base, directory=directory, converted=None)
    # What stands in the second argument is not copied.
    edited = copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})
    for entry in plan.entries:
        own = model.get_parameter(entry.parameter)
        try:
            before, after = (one.tensor(entry.parameter).to(own.device, own.dtype) for one in (base, saved))
        except CheckpointError:
            return None
        if not torch.equal(before, own):
            return None
        read = torch.nn.Parameter(after, requires_grad=own.requires_grad)
        for place in base.places(plan, entry.parameter):
            owner, _, attribute = place.rpartition(".")
            setattr(edited.get_submodule(owner), attribute, read)
    return replace(loaded, model=edited, source=str(directory), revision=None)


def is_adapter(source: str | Path) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (Path(source) / "adapter_config.json").is_file()


def load_edited(
    edited: str, base: str, settings: LoadSettings, chat: ChatFormat | None = None, batch_size: int | None = None
) -> LoadedModel:
    """Load an edited model; a directory with an adapter of PEFT is merged into the base first."""
    place = Path(model_source(edited))
    if is_adapter(place) and not has_weights(place):
        return with_adapter(load_model(base, settings, chat=chat, batch_size=batch_size), place)
    return load_model(edited, settings.model_copy(update={"revision": None}), chat=chat, batch_size=batch_size)


def peft_package() -> Any:
    """Give PEFT, which before 0.19 lays out experts in another way."""
    return require_package("peft", "adapters", "adapters", OutputError, at_least=(0, 19))


def with_adapter(base: LoadedModel, directory: Path) -> LoadedModel:
    """Merge an adapter into its base model, which is loaded for this alone: its weights are changed."""
    peft = peft_package()
    model = base.model
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError(
            f"The base {base.source} is quantised, expected its full weights to merge the adapter {directory} into; "
            "leave --load-in-4bit and --load-in-8bit out."
        )
    # So that the merged model gives the logits of the adapted one.
    untie(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            merged = peft.PeftModel.from_pretrained(model, directory).merge_and_unload()
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
