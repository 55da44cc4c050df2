"""Edit plan → a model that fits in memory: new tensors, and a directory that holds them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from remove_refusals.baking.base import (
    Baked,
    ablation_record,
    base_directory,
    base_record,
    check_not_source,
    check_passed,
)
from remove_refusals.baking.certificate import certify
from remove_refusals.directions import (
    DIRECTIONS,
    EditPlan,
    check_fit,
    measure_boundaries,
    resolve,
    save_directions,
)
from remove_refusals.errors import ModelError
from remove_refusals.files import atomic_directory
from remove_refusals.formula import project_out
from remove_refusals.modelmap import ModelMap, by_stored_name, disk_names, map_model, skeleton
from remove_refusals.models import (
    FLOAT_DTYPES,
    LoadedModel,
    checkpoint_tensors,
    load,
    quiet,
)
from remove_refusals.report import LeakRecord
from remove_refusals.settings import Tied, Variant
from remove_refusals.types import Intervention


def edited_tensors(
    model: PreTrainedModel,
    plan: EditPlan,
    model_map: ModelMap,
    *,
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> dict[str, torch.Tensor]:
    """Compute a model's tensors after an edit.

    Args:
        model: The model; it is left as it is.
        plan: What happens to which tensor.
        model_map: The model's map.
        dtype_of: Gives the dtype that a floating-point tensor of a given name is cast to; None keeps it as it is.
            Edits are computed in float32 from the model's tensors and cast once.

    Returns:
        Every tensor of the model's state by name. Tensors that the plan leaves alone and whose dtype does not change
        share memory with the model's. With `plan.untie` the unembedding is the unedited embedding.

    Raises:
        ModelError: If a tensor is quantised or not in memory.
    """
    tensors: dict[str, torch.Tensor] = dict(model.state_dict())
    originals = dict(tensors)
    for entry in plan.entries:
        tensor = tensors.get(entry.parameter)
        if tensor is None or tensor.is_meta or not tensor.is_floating_point() or tensor.shape != entry.shape:
            raise ModelError(
                f"Tensor '{entry.parameter}' is missing, quantised or not in memory, expected a floating-point tensor "
                f"of shape {entry.shape}; load the model without quantisation and without offloading."
            )
        edited = project_out(tensor.to(torch.float32), entry.basis, entry.strength, entry.axis, plan.variant)
        tensors[entry.parameter] = edited.to(dtype_of(entry.parameter) or tensor.dtype)
    if model_map.unembedding is not None and model_map.tied:
        source = originals if plan.untie else tensors
        for name in _names_of(model, model_map.input_embedding) - {model_map.input_embedding}:
            tensors[name] = source[model_map.input_embedding]
    return {
        name: tensor.to(dtype_of(name) or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _names_of(model: PreTrainedModel, parameter: str) -> set[str]:
    """Every name under which the state holds one parameter."""
    wanted = model.get_parameter(parameter)
    return {name for name, value in model.named_parameters(remove_duplicate=False) if value is wanted}


def with_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], *, untie: bool) -> PreTrainedModel:
    """Build a second model of the same class around given tensors.

    Args:
        model: The model whose class and configuration are used; it is left as it is.
        tensors: Its state, complete.
        untie: Whether the embedding and the unembedding become two parameters.

    Returns:
        The new model, in evaluation mode.
    """
    built = skeleton(model, tied=False) if untie else skeleton(model)
    built.load_state_dict(_apart(tensors) if untie else dict(tensors), strict=True, assign=True)
    if not untie:
        built.tie_weights()
    # The names on disk stay those of the checkpoint that the model was loaded from.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        built._weight_conversions = conversions
    if model.generation_config is not None:
        built.generation_config = model.generation_config
    return built


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give each tensor memory of its own: a model that ties nothing saves every one of them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def save_edited(
    model: PreTrainedModel,
    plan: EditPlan,
    model_map: ModelMap,
    directory: Path,
    *,
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> None:
    """Write an edited model as a Transformers directory: configuration, generation configuration and weights.

    Args:
        model: The model; it is left as it is.
        plan: What happens to which tensor.
        model_map: The model's map.
        directory: An existing directory.
        dtype_of: Gives the dtype of the saved tensor of a given name; None keeps the model's.

    Raises:
        ModelError: If a tensor is quantised or not in memory.
    """
    tensors = edited_tensors(model, plan, model_map, dtype_of=dtype_of)
    with quiet(bars=True):
        with_tensors(model, tensors, untie=plan.untie).save_pretrained(directory, max_shard_size="4GB")


def bake(
    loaded: LoadedModel,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    dtype: torch.dtype | None = None,
    allow_leak: bool = False,
    variant: Variant = "plain",
    force: bool = False,
    model_map: ModelMap | None = None,
) -> Baked:
    """Edit a model's weights and save it as a Transformers directory with its tokenizer and `ablation.json`.

    The model in memory is left as it is. The output is written beside its place and renamed at the end, so that an
    error, a full disk or Ctrl-C leaves nothing half-made.

    Args:
        loaded: The model, whole in memory and not quantised.
        intervention: What to take out where.
        output: The directory to be made.
        tied: What to do with an embedding that is also the unembedding.
        dtype: The dtype of the saved tensors; by default that of the model's checkpoint.
        allow_leak: Whether to edit a model whose weights no edit makes exact; the leak is measured and recorded.
        variant: What else the edit does to each tensor; only `plain` is what the hooks do.
        force: Whether to replace an existing output.
        model_map: The model's map, if it is at hand; otherwise it is derived.

    Returns:
        What was written.

    Raises:
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If no exact weight edit of the model exists.
        ModelError: If a tensor is quantised or not in memory.
        CertificateError: If the saved files do not hold what the plan says.
        OutputError: If the output is the model's own directory, exists and `force` is not given, or cannot be written.
    """
    target = Path(output)
    check_not_source(target, loaded.source, loaded.revision)
    with atomic_directory(target, force=force) as directory:
        baked = write_baked(
            loaded,
            intervention,
            directory,
            tied=tied,
            dtype=dtype,
            allow_leak=allow_leak,
            variant=variant,
            model_map=model_map,
        )
        baked.record.write(directory / "ablation.json")
    return replace(baked, directory=target)


def write_baked(
    loaded: LoadedModel,
    intervention: Intervention,
    directory: Path,
    *,
    tied: Tied = "untie",
    dtype: torch.dtype | None = None,
    allow_leak: bool = False,
    variant: Variant = "plain",
    model_map: ModelMap | None = None,
) -> Baked:
    """Write an edited model into a directory that exists; `ablation.json` is left to the caller, who may add to it.

    Args, Returns and Raises: as for `bake`.
    """
    model_map = model_map or map_model(loaded.model)
    check_fit(intervention, model_map)
    plan = resolve(
        intervention,
        model_map,
        loaded.model.get_parameter,
        tied=tied,
        allow_leak=allow_leak,
        variant=variant,
    )
    base = base_directory(loaded)
    saved = (lambda name: dtype) if dtype is not None else _saved_dtypes(loaded, base, model_map)
    save_edited(loaded.model, plan, model_map, directory, dtype_of=saved)
    loaded.tokenizer.save_pretrained(directory)
    certificate = None
    if base is not None and dtype is None:
        certificate = certify(
            directory, base, plan, model_map, boundaries=_boundaries(loaded, directory, intervention, model_map)
        )
        certificate.write(directory / "certificate.json")
        check_passed(certificate)
    save_directions(intervention.directions, directory / DIRECTIONS)
    described = base_record(loaded.source, loaded.revision, model_map.model_type, loaded.checkpoint_dtype)
    record = ablation_record(described, intervention, plan, model_map)
    if certificate is not None and plan.leaks and certificate.boundaries is not None:
        leak = LeakRecord(why=plan.leaks, largest_component=max(certificate.boundaries))
        record = record.model_copy(update={"leak": leak})
    return Baked(directory, plan, record, certificate)


def _saved_dtypes(loaded: LoadedModel, base: Path | None, model_map: ModelMap) -> Callable[[str], torch.dtype | None]:
    """Give each tensor the dtype that it has in the base's files, which need not be the same for all."""
    if base is None:
        return lambda name: loaded.checkpoint_dtype
    entries = by_stored_name(checkpoint_tensors(base), model_map)
    on_disk = {name: FLOAT_DTYPES.get(entry.dtype) for name, (_, entry) in entries.items()}
    if len({dtype for dtype in on_disk.values() if dtype is not None}) == 1:
        return lambda name: loaded.checkpoint_dtype

    def dtype_of(name: str) -> torch.dtype | None:
        return next((on_disk[disk] for disk in disk_names(loaded.model, name) if disk in on_disk), None)

    return dtype_of


def _boundaries(
    loaded: LoadedModel, directory: Path, intervention: Intervention, model_map: ModelMap
) -> tuple[float, ...] | None:
    """Run the saved model and measure what is left at every layer boundary, where nothing should be."""
    everywhere = {(edit.kind, edit.layer) for edit in intervention.edits if edit.strength == 1}
    if len(intervention.directions) != 1 or {(site.kind, site.layer) for site in model_map.sites} - everywhere:
        return None
    edited = load(directory, device=loaded.device, dtype=torch.float32, trust_remote_code=loaded.trust_remote_code)
    return measure_boundaries(edited, intervention.directions[0])
