"""A model that lies over several processes: how it is spread, and what is needed of parameters that are.

Transformers does the spreading (`DistributedConfig`), and every process runs the same prompts; groups of processes that
hold a copy each share the prompts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from remove_refusals.errors import ModelError
from remove_refusals.models.source import ModelChoice
from remove_refusals.processes import join, n_processes
from remove_refusals.settings import LoadSettings


@dataclass(frozen=True)
class Layout:
    """How a model lies over processes: `size` of them hold it together, and there are `replicas` such groups."""

    size: int = 1
    replicas: int = 1
    config: Any = None
    """What Transformers is told; None where each process holds the whole model."""
    said: str | None = None
    """What should be said of it."""


def layout_of(model: Any) -> Layout:
    """Say how a model lies that somebody else has loaded."""
    config = getattr(model.config, "distributed_config", None)
    if not is_spread(model) or config is None:
        return Layout()
    if config.pp_size > 1:
        raise ModelError(
            f"The model was loaded with pipeline parallelism (pp_size {config.pp_size}), expected tensor parallelism "
            "or FSDP2: each process would see its own layers alone; load it with tp_size or fsdp_size."
        )
    return Layout(config.tp_size * config.fsdp_size, config.dp_replicate_size, config)


def lay_out(name: str, chosen: ModelChoice, settings: LoadSettings) -> Layout:
    """Choose how a model is spread over the processes that there are: tensor parallel where its type has a plan."""
    n, asked = n_processes(), None if settings.tp in (None, "auto") else int(settings.tp or 1)
    if settings.tp is None and settings.replicas is None:
        return Layout()
    replicas = settings.replicas or (1 if asked is None else max(1, n // asked))
    size = asked or max(1, n // replicas)
    if size * replicas != n:
        raise ModelError(
            f"There are {n} processes for --tp {size} and --replicas {replicas}, expected {size * replicas}; start "
            "that many with torchrun, or leave one of the two out."
        )
    unfit = next((name for name in ("device_map", "load_in_4bit", "load_in_8bit") if getattr(settings, name)), None)
    if unfit is not None:
        option = unfit.replace("_", "-")
        raise ModelError(f"Both --{option} and --tp or --replicas are given, expected one of them; leave one out.")
    join()
    if size == 1:
        return Layout(1, replicas, said=f"{replicas} processes hold a copy of the model each and share the prompts.")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device not in (None, kind):
        raise ModelError(
            f"The device is {settings.device} for a model that is spread over processes, expected {kind}; leave "
            "--device out, or hide GPUs with CUDA_VISIBLE_DEVICES=''."
        )
    try:
        from transformers.distributed import DistributedConfig

        with torch.device("meta"):
            options, how = _plan(chosen, chosen.build(trust_remote_code=settings.trust_remote_code), size)
        config = DistributedConfig(**options, **({"dp_replicate_size": replicas} if replicas > 1 else {}))
    except (ImportError, TypeError, AttributeError) as error:
        raise ModelError(
            f"This version of Transformers cannot spread {name} over processes ({error}), expected 5.24 or newer; "
            "upgrade it."
        ) from error
    groups = f" {replicas} such groups share the prompts." if replicas > 1 else ""
    return Layout(size, replicas, config, f"{size} processes hold the model together: {how}.{groups}")


def _plan(chosen: ModelChoice, model: PreTrainedModel, size: int) -> tuple[dict[str, Any], str]:
    """Give the options of a `DistributedConfig` for a model without weights, and say what they are."""
    config: Any = chosen.config.get_text_config(decoder=True)
    heads = config.num_attention_heads if isinstance(getattr(config, "num_attention_heads", None), int) else 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    shared = getattr(config, "attention_k_eq_v", None) or not isinstance(kv_heads, int)
    # The stack of layers, where a type has no plan of its own.
    stacks = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)]
    stack = next((name for name, part in stacks if len(part) == config.num_hidden_layers), None)
    plan = {} if model.fsdp_plan or stack is None else {"fsdp_plan": {f"{stack}.*": "free_full_weight"}}
    if model.tp_plan and heads and not shared and heads % size == 0 and kv_heads % size == 0:
        n_experts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
        n = next((n for n in n_experts if isinstance(n, int)), 0)
        if model.ep_plan and n and n % size == 0:
            return {"tp_size": size, "ep_size": size, **plan}, "tensor parallel, with its experts dealt out"
        return {"tp_size": size, **plan}, "tensor parallel"
    why = f"it has {heads} attention heads and {kv_heads} for keys" if model.tp_plan else "its type has no plan"
    return {
        "fsdp_size": size,
        **plan,
    }, f"not tensor parallel, since {why}, but each layer is fetched as it runs (FSDP2)"


def is_spread(model: torch.nn.Module) -> bool:
    """Whether a model's weights are spread over processes."""
    return bool(getattr(model, "_is_distributed_loading_by_transformers", False))


def is_fetched(model: torch.nn.Module) -> bool:
    """Whether layers are fetched as they run (FSDP2), which has to be run as a whole and to its end."""
    return bool(getattr(model, "_is_fsdp_managed_module", False))


def let_go(model: PreTrainedModel) -> None:
    """Let a model that fetches layers let go of all of them behind each run: what is fetched is not tied any more."""

    def reshard(root: torch.nn.Module, *given: Any) -> None:
        for module in root.modules():
            release: Any = getattr(module, "reshard", None)
            if release is not None:
                release()

    if is_fetched(model):
        model.register_forward_hook(reshard)


def without_gradients(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Run a model for its numbers alone; what fetches layers cannot do so under inference mode."""
    return torch.no_grad() if is_fetched(model) else torch.inference_mode()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Give the whole of a tensor, for which every process has to ask."""
    full: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def whole_parameter(model: PreTrainedModel) -> Callable[[str], torch.Tensor]:
    """Give what gives a parameter whole by its name."""
    return lambda name: whole(model.get_parameter(name).detach())


def rows_of(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Give some rows of a matrix on its own device; of one that is spread they alone travel."""
    rows, mesh = rows.to(matrix.device), getattr(matrix, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import DTensor, Replicate

        rows = DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole(torch.nn.functional.embedding(rows, matrix))
