"""Edit plan → a LoRA that PEFT loads: exactly the edit, in files of a few megabytes beside the untouched base model.

How PEFT lays its tensors out is read from its version 0.19 and held by tests; PEFT itself is not needed to write them.
"""

import copy
import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from remove_refusals import formula
from remove_refusals.baking.base import Base
from remove_refusals.baking.memory import check_whole, peft_package
from remove_refusals.directions import DIRECTIONS, EditPlan, PlanEntry, save_directions
from remove_refusals.errors import ArchitectureError
from remove_refusals.files import atomic_directory
from remove_refusals.modelmap import skeleton
from remove_refusals.models import check_not_source
from remove_refusals.report import AblationRecord, AdapterRecord, adapter_card
from remove_refusals.settings import EditSettings
from remove_refusals.types import Intervention


def bake_lora(
    base: Base,
    intervention: Intervention,
    output: Path | str,
    settings: EditSettings | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> tuple[EditPlan, AblationRecord]:
    """Write a LoRA that is exactly the edit (in float32) as a directory that PEFT loads, with card and record."""
    peft_package()
    target = Path(output)
    check_not_source(target, base.source, revision=base.revision)
    plan = base.plan(intervention, settings)
    if plan.tied is not None and plan.tied.asked == "auto":
        why = "an adapter of the embedding leaves the unembedding alone"
        plan = replace(plan, tied=plan.tied.model_copy(update={"done": "untie", "why": why}))
    adapter = peft_adapter(base, plan, dtype)
    about = AdapterRecord(
        kind="peft-lora",
        rank=adapter.config["r"],
        dtype=str(dtype).removeprefix("torch."),
        tensors=len(adapter.tensors),
        biases=sum(".lora_" not in name for name in adapter.tensors),
    )
    record = base.ablation(intervention, plan, adapter=about)
    with atomic_directory(target, force=force) as directory:
        save_peft_adapter(adapter, directory)
        check_loads(base.model, directory)
        save_directions(intervention.directions, directory / DIRECTIONS)
        (directory / "README.md").write_text(adapter_card(record), encoding="utf-8")
        record.write(directory / "ablation.json")
    return plan, record


PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model."""

Target = Literal["linear", "conv1d", "embedding", "parameter", "bias"]
"""How PEFT takes hold of a writer."""

# PEFT refuses these modules there, since a fused kernel passes by what is put in their place while training.
_WITH_KERNELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}

# PEFT takes modules of these names for experts of a checkpoint from before Transformers 5, in models that have any.
_TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA in PEFT's layout: what `adapter_config.json` and `adapter_model.safetensors` hold."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def peft_adapter(base: Base, plan: EditPlan, dtype: torch.dtype = torch.float32) -> PeftAdapter:
    """Build the LoRA that is an edit: `B = -s Q` and `A = Qᵀ W` for a linear writer; an edited bias is stored whole."""
    model, targets = base.model, {entry.parameter: target_of(base.model, entry) for entry in plan.entries}
    check_low_rank(plan, with_biases=True)
    _check_uses(base, plan, targets)
    holders = [_module_of(name) for name, target in targets.items() if target != "bias"]
    for name in holders:
        if holders.count(name) > 1:
            raise ArchitectureError(
                f"Module '{name}' has {holders.count(name)} writers, expected one, since PEFT nests the adapters of "
                "several in an order of its own; save the edited weights instead."
            )
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for entry in plan.entries:
        tensor, target = base.tensor(entry.parameter), targets[entry.parameter]
        if target == "bias":
            edited = entry.edited(tensor.float())
            # Within a module that PEFT wraps it lies one level down.
            module, _, leaf = entry.parameter.rpartition(".")
            stored = {f"{PREFIX}{module}.base_layer.{leaf}" if module in holders else PREFIX + entry.parameter: edited}
        else:
            factors = low_rank(entry, tensor)
            ranks[entry.parameter if target == "parameter" else _module_of(entry.parameter)] = factors.rank
            stored = _peft_tensors(model, entry, target, factors)
        tensors |= {name: value.to("cpu", dtype).contiguous().clone() for name, value in stored.items()}
    return PeftAdapter(_config(targets, ranks, base), tensors)


def _check_uses(base: Base, plan: EditPlan, targets: dict[str, Target]) -> None:
    """Check that what PEFT puts in a module's place is called wherever its parameter is used, and nowhere else."""
    embedding, model_map = base.model_map.input_embedding, base.model_map
    if plan.tied is not None and not plan.untie:
        raise ArchitectureError(
            f"Parameter '{embedding}' is also the unembedding and both are to be edited as one, expected --tied untie, "
            "since an adapter of the embedding leaves the unembedding alone and adapters of both would be merged into "
            "the one tensor twice; leave --tied out, or save the edited weights instead."
        )
    for name, target in targets.items():
        # That a tied embedding is used by the unembedding as well is known and wanted.
        if name in model_map.used_elsewhere and target != "bias" and name != embedding:
            raise ArchitectureError(
                f"Parameter '{name}' is used outside of its own module in model type '{model_map.model_type}', where "
                "an adapter of PEFT does not reach, expected it to be used by its module alone; save the edited "
                "weights instead."
            )


def target_of(model: PreTrainedModel, entry: PlanEntry) -> Target:
    """Say how PEFT takes hold of a writer: by its parameter where the module's forward is not what PEFT expects."""
    if is_bias(entry):
        return "bias"
    name, whole = _module_of(entry.parameter), entry.parameter.endswith(".weight") and len(entry.shape) == 2
    module, leaf = model.get_submodule(name), name.rpartition(".")[2]
    if model.config.model_type in _WITH_KERNELS and leaf in ("out_proj", "conv1d"):
        raise ArchitectureError(
            f"Parameter '{entry.parameter}' belongs to a module that PEFT refuses to adapt in model type "
            f"'{model.config.model_type}', expected another one; leave its site out or save the edited weights instead."
        )
    mistaken = leaf in _TAKEN_FOR_EXPERTS and any(parameter.dim() == 3 for parameter in model.parameters())
    if whole and type(module).forward is torch.nn.Linear.forward and not mistaken:
        return "linear"
    if whole and type(module).forward is Conv1D.forward:
        return "conv1d"
    if whole and isinstance(module, torch.nn.Embedding) and _looks_up(module):
        return "embedding"
    return "parameter"


def _looks_up(module: torch.nn.Embedding) -> bool:
    """Whether an embedding gives rows of its weight, but for the factor that PEFT knows of."""
    rows = torch.eye(3, module.embedding_dim) + 1
    scale = getattr(module, "embed_scale", None)
    # A padding token would have to lie within the three rows.
    module = copy.copy(module)
    module.padding_idx = None
    given: dict[str, torch.Tensor] = {"weight": rows}
    if isinstance(scale, torch.Tensor):
        given["embed_scale"] = torch.full_like(scale, 3.0, device="cpu")
    try:
        found = torch.func.functional_call(module, given, (torch.tensor([[2, 0, 1]]),))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    factor = 3.0 if isinstance(scale, torch.Tensor) else float(scale or 1.0)
    expected = rows[[2, 0, 1]] * factor
    return found.shape[1:] == expected.shape and torch.allclose(found[0].float(), expected)


@dataclass(frozen=True, eq=False)
class LowRank:
    """`W' = W + left @ right` in float32: `[..., n_rows, k]` and `[..., k, n_columns]`, the leading axis experts."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        """The number k of columns of `left`."""
        return self.left.shape[-1]


def _peft_tensors(
    model: PreTrainedModel, entry: PlanEntry, target: Target, factors: LowRank
) -> dict[str, torch.Tensor]:
    """Name and lay out the factors as PEFT does for a kind of target."""
    name = PREFIX + _module_of(entry.parameter)
    left, right = factors.left, factors.right
    if target == "embedding":
        return {f"{name}.lora_embedding_A": left.T, f"{name}.lora_embedding_B": right.T}
    keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    if target == "conv1d":
        return dict(zip(keys, (left.T, right.T), strict=True))
    if left.dim() == 2:
        return dict(zip(keys, (right, left), strict=True))
    right = right.expand(left.shape[0], *right.shape[-2:])
    if getattr(model.get_submodule(_module_of(entry.parameter)), "is_transposed", False):
        left, right = right.mT, left.mT
    # A holds the experts one after the other; in B the expert is the innermost index.
    return dict(zip(keys, (right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)), strict=True))


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _config(targets: dict[str, Target], ranks: dict[str, int], base: Base) -> dict[str, Any]:
    modules = [_module_of(name) for name, target in targets.items() if target not in ("bias", "parameter")]
    parameters = [name for name, target in targets.items() if target == "parameter"]
    rank = max(ranks.values(), key=list(ranks.values()).count, default=1)
    others = {re.escape(name): other for name, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "fan_in_fan_out": "conv1d" in targets.values() and not parameters,
        "bias": "all" if "bias" in targets.values() else "none",
        "init_lora_weights": True,
        "use_rslora": False,
    }


def save_peft_adapter(adapter: PeftAdapter, directory: Path) -> None:
    """Write an adapter's two files into a directory."""
    (directory / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2) + "\n", encoding="utf-8")
    # What safetensors writes by itself is readable by its owner alone, whatever the umask says.
    content = safetensors.torch.save(adapter.tensors, metadata={"format": "pt"})
    (directory / "adapter_model.safetensors").write_bytes(content)


def low_rank(entry: PlanEntry, tensor: torch.Tensor) -> LowRank:
    """Give the change of a tensor, `[n_rows, n_columns]` or one for each expert, along one of the last two axes."""
    check_whole(entry, tensor)
    axis = entry.axis % tensor.dim() - tensor.dim()
    if tensor.dim() not in (2, 3) or axis == -3:
        raise ArchitectureError(
            f"Tensor '{entry.parameter}' of shape {entry.shape} is edited along axis {entry.axis}, expected a matrix "
            "or one for each expert; leave its site out or save the edited weights instead."
        )
    shared = LowRank(*formula.low_rank(tensor, entry.basis, entry.strength, axis))
    return _with_experts(entry, tensor, shared) if entry.parts else shared


def _with_experts(entry: PlanEntry, tensor: torch.Tensor, shared: LowRank) -> LowRank:
    """Give experts that are edited in a way of their own factors of their own; what is silenced is of full rank."""
    if tensor.dim() != 3:
        raise ArchitectureError(
            f"Parameter '{entry.parameter}' of shape {entry.shape} holds all experts in one matrix, expected one "
            "matrix for each, since an adapter has no other place for a single one; save the edited weights instead."
        )
    own = {part.expert: part for part in entry.parts}
    pairs = []
    for expert, values in enumerate(tensor.detach().to(torch.float32)):
        left, right = (factor if factor.dim() == 2 else factor[expert] for factor in (shared.left, shared.right))
        if (part := own.get(expert)) is not None:
            change = entry.of_expert(expert).edited(values.unsqueeze(0))[0] - values
            if part.basis is None:
                rows, columns = change.shape
                left, right = (torch.eye(rows), change) if rows <= columns else (change, torch.eye(columns))
            else:
                span = torch.linalg.qr(torch.cat([part.basis, entry.basis], dim=1)).Q
                along_rows = entry.axis % tensor.dim() == 1
                left, right = (span, span.T @ change) if along_rows else (change @ span, span.T)
        pairs.append((left, right))
    rank = max(left.shape[1] for left, _ in pairs)
    pad = torch.nn.functional.pad
    return LowRank(
        torch.stack([pad(left, (0, rank - left.shape[1])) for left, _ in pairs]),
        torch.stack([pad(right, (0, 0, 0, rank - right.shape[0])) for _, right in pairs]),
    )


def check_low_rank(plan: EditPlan, *, with_biases: bool = False) -> None:
    """Check that a plan's edits are of low rank, and that the carrier takes the edits of its biases."""
    if plan.variant != "plain":
        raise ArchitectureError(
            f"The variant is '{plan.variant}', whose change of a tensor has full rank, expected 'plain' for an "
            "adapter; leave the variant out or save the edited weights instead."
        )
    for entry in plan.entries:
        if is_bias(entry) and not (with_biases and "bias" in entry.parameter.rpartition(".")[2]):
            raise ArchitectureError(
                f"Parameter '{entry.parameter}' of shape {entry.shape} writes to the residual stream and is no matrix, "
                "expected matrices alone, since this kind of adapter carries no other change; save the edited weights "
                "instead, or an adapter of another kind."
            )


def is_bias(entry: PlanEntry) -> bool:
    """Whether an entry's tensor is a vector, or one for each expert, that a writer adds."""
    return len(entry.shape) == 1 or "bias" in entry.parameter.rpartition(".")[2]


def check_loads(model: PreTrainedModel, directory: Path) -> None:
    """Check that PEFT finds a place for every tensor of an adapter, and a tensor for every place."""
    peft = peft_package()
    tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = peft.PeftConfig.from_pretrained(directory)
            adapted = peft.get_peft_model(skeleton(model), config, low_cpu_mem_usage=True)
            result = peft.set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
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
