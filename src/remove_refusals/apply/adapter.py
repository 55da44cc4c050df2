"""Edit plan → a LoRA that PEFT loads: exactly the edit, in files of a few megabytes beside the untouched base model.

How PEFT lays its tensors out is read from its version 0.19 and held by tests; PEFT itself is not needed to write them.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from remove_refusals.apply.factors import LowRank, check_low_rank, is_bias, low_rank
from remove_refusals.errors import ArchitectureError
from remove_refusals.linalg import project_out
from remove_refusals.map_types import EditPlan, ModelMap, PlanEntry

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
    """A LoRA in PEFT's layout.

    Attributes:
        config: The content of `adapter_config.json`.
        tensors: The content of `adapter_model.safetensors`, float32 unless another dtype was asked for.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def peft_adapter(
    model: PreTrainedModel,
    plan: EditPlan,
    model_map: ModelMap,
    tensor_of: Callable[[str], torch.Tensor],
    *,
    base: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PeftAdapter:
    """Build the LoRA that is an edit.

    With `B` and `A` as PEFT calls them, a linear writer gets `B = -s Q` and `A = Qᵀ W`; the scale is 1 whatever the
    rank. An edited bias is stored whole, as PEFT does with `bias="all"`.

    Args:
        model: The model; it is left as it is, and only its modules' types are looked at, so it may have no weights.
        plan: What happens to which tensor.
        model_map: The model's map.
        tensor_of: Gives a parameter by its name in the model.
        base: What PEFT loads the base model by, if it is not given one.
        revision: The hub's branch, tag or commit.
        dtype: The dtype of the stored tensors; float32 keeps the edit exact.

    Returns:
        The adapter.

    Raises:
        ArchitectureError: If a change cannot be carried by a LoRA of PEFT; the message names the parameter.
        ModelError: If a tensor is quantised or not in memory.
    """
    check_low_rank(plan, allowed_bias=lambda entry: "bias" in entry.parameter.rpartition(".")[2])
    check_tied(plan, model_map)
    targets = {entry.parameter: target_of(model, entry) for entry in plan.entries}
    _check_uses(targets, model_map)
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
        tensor, target = tensor_of(entry.parameter), targets[entry.parameter]
        if target == "bias":
            stored = {_bias_key(entry.parameter, holders): _edited_bias(entry, tensor)}
        else:
            factors = low_rank(entry, tensor)
            ranks[entry.parameter if target == "parameter" else _module_of(entry.parameter)] = factors.rank
            stored = _peft_tensors(model, entry, target, factors)
        tensors |= {name: value.to("cpu", dtype).contiguous().clone() for name, value in stored.items()}
    return PeftAdapter(_config(targets, ranks, base, revision), tensors)


def check_tied(plan: EditPlan, model_map: ModelMap) -> None:
    """Check that an adapter can do what a plan does to a tied embedding.

    Raises:
        ArchitectureError: If the plan edits the unembedding with the embedding.
    """
    if model_map.tied and not plan.untie and any(e.parameter == model_map.input_embedding for e in plan.entries):
        raise ArchitectureError(
            f"Parameter '{model_map.input_embedding}' is also the unembedding and both are to be edited as one, "
            "expected --tied untie, since an adapter of the embedding leaves the unembedding alone and adapters of "
            "both would be merged into the one tensor twice; leave --tied out, or save the edited weights instead."
        )


def _check_uses(targets: dict[str, Target], model_map: ModelMap) -> None:
    """Check that what PEFT puts in a module's place is called wherever its parameter is used."""
    for name, target in targets.items():
        # That a tied embedding is used by the unembedding as well is known and wanted.
        if name in model_map.used_elsewhere and target != "bias" and name != model_map.input_embedding:
            raise ArchitectureError(
                f"Parameter '{name}' is used outside of its own module in model type '{model_map.model_type}', where "
                "an adapter of PEFT does not reach, expected it to be used by its module alone; save the edited "
                "weights instead."
            )


def target_of(model: PreTrainedModel, entry: PlanEntry) -> Target:
    """Say how PEFT takes hold of a writer.

    A module whose forward pass is not the one that PEFT expects of its type is not replaced; its parameter is adapted
    instead, which is right whatever the module does with it.

    Args:
        model: The model.
        entry: The plan's entry for the writer.

    Returns:
        The kind of target.

    Raises:
        ArchitectureError: If PEFT refuses the writer's module.
    """
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


def _edited_bias(entry: PlanEntry, tensor: torch.Tensor) -> torch.Tensor:
    return project_out(tensor.to(torch.float32), entry.basis, entry.strength, entry.axis)


def _bias_key(parameter: str, holders: list[str]) -> str:
    """The name of a bias in a model with adapters: within a module that PEFT wraps it lies one level down."""
    module, _, leaf = parameter.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in holders else PREFIX + parameter


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _config(targets: dict[str, Target], ranks: dict[str, int], base: str, revision: str | None) -> dict[str, Any]:
    modules = [_module_of(name) for name, target in targets.items() if target not in ("bias", "parameter")]
    parameters = [name for name, target in targets.items() if target == "parameter"]
    rank = max(ranks.values(), key=list(ranks.values()).count, default=1)
    others = {re.escape(name): other for name, other in ranks.items() if other != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
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
    """Write an adapter's two files.

    Args:
        adapter: The adapter.
        directory: An existing directory.
    """
    (directory / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(adapter.tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
