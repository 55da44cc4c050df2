"""Edit plan → a LoRA for llama.cpp: one GGUF file beside any quantised GGUF of the model, which is left as it is.

The layout is that of llama.cpp's own converter: for a tensor NAME, `NAME.lora_a` of shape `[k, n_in]` and `NAME.lora_b`
of shape `[n_out, k]`, with a leading axis of experts where the tensor has one. The token embedding's are the other way
round, `[n_vocab, k]` and `[d_model, k]`, since llama.cpp looks tokens up in the first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from remove_refusals.apply.factors import LowRank, check_low_rank, low_rank
from remove_refusals.apply.gguf_names import GgufNames, gguf_package
from remove_refusals.errors import ArchitectureError
from remove_refusals.map_types import EditPlan, ModelMap, PlanEntry

EMBEDDING = "token_embd.weight"
_LOOKED_UP = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True, eq=False)
class GgufLora:
    """A LoRA in llama.cpp's layout.

    Attributes:
        architecture: The value of `general.architecture`, which must be that of the model's GGUF file.
        rank: The rank k of most tensors, which is also the value of `adapter.lora.alpha`, so that the scale is 1.
        tensors: Float32 tensors by name, shapes in NumPy's order.
    """

    architecture: str
    rank: int
    tensors: dict[str, torch.Tensor]


def gguf_lora(plan: EditPlan, model_map: ModelMap, tensor_of: Callable[[str], torch.Tensor]) -> GgufLora:
    """Build the llama.cpp LoRA that is an edit.

    Args:
        plan: What happens to which tensor.
        model_map: The model's map.
        tensor_of: Gives a parameter by its name in the model.

    Returns:
        The adapter.

    Raises:
        ArchitectureError: If GGUF has no place for a writer, or llama.cpp cannot carry a change; the message names the
            parameter.
        ModelError: If a tensor is quantised or not in memory.
        OutputError: If the `gguf` package is not installed.
    """
    names = GgufNames(model_map)
    writers = [writer for site in model_map.sites for writer in site.writers]
    planned = {entry.parameter for entry in plan.entries}
    named = names.of_writers(writer for writer in writers if writer.parameter in planned)
    check_low_rank(plan)
    for entry in plan.entries:
        _check_applied(entry, named[entry.parameter], model_map)
    factors = {entry.parameter: low_rank(entry, tensor_of(entry.parameter)) for entry in plan.entries}
    ranks = [found.rank for found in factors.values()]
    rank = max(ranks, key=ranks.count, default=1)
    tensors: dict[str, torch.Tensor] = {}
    for entry in plan.entries:
        first, second = _laid_out(entry, named[entry.parameter], factors[entry.parameter])
        name = named[entry.parameter]
        # llama.cpp multiplies by alpha over each tensor's own rank.
        tensors[f"{name}.lora_a"] = first.to("cpu").contiguous()
        tensors[f"{name}.lora_b"] = (second * (second.shape[-1] / rank)).to("cpu").contiguous()
    return GgufLora(names.architecture, rank, tensors)


def _check_applied(entry: PlanEntry, name: str, model_map: ModelMap) -> None:
    """Check that llama.cpp applies an adapter to a tensor, and only where it should."""
    if name in _LOOKED_UP:
        raise ArchitectureError(
            f"Parameter '{entry.parameter}' is '{name}' in GGUF files, to which llama.cpp applies no adapter, expected "
            "the token embedding or a projection; leave the embedding out with --sites attn,mlp, or edit a GGUF file "
            "itself with --as gguf."
        )
    if name == EMBEDDING and model_map.tied:
        raise ArchitectureError(
            f"Parameter '{entry.parameter}' is also the unembedding, and llama.cpp breaks off on an adapter of such a "
            "tensor, expected an embedding of its own; leave the embedding out with --sites attn,mlp, or edit a GGUF "
            "file itself with --as gguf."
        )


def _laid_out(entry: PlanEntry, name: str, factors: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Give `lora_a` and `lora_b`."""
    left, right = factors.left, factors.right
    if name == EMBEDDING:
        return left, right.mT
    if left.dim() == 3:
        right = right.expand(left.shape[0], *right.shape[-2:])
    # GGUF files hold every projection with its outputs as rows.
    return (right, left) if entry.axis % len(entry.shape) == len(entry.shape) - 2 else (left.mT, right.mT)


def write_gguf_lora(adapter: GgufLora, path: Path, *, name: str, base: str, record: str = "") -> None:
    """Write an adapter to a file.

    Args:
        adapter: The adapter.
        path: The file; whoever calls moves it into place.
        name: What the adapter is called in its metadata.
        base: What the base model is called in its metadata.
        record: JSON that says how it was made, kept under `remove_refusals.ablation`.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, adapter.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    writer.add_name(name)
    writer.add_description(f"The refusal direction taken out of {base}; it is not the base model.")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    writer.add_tags(["ablation"])
    if record:
        writer.add_string("remove_refusals.ablation", record)
    for tensor_name, tensor in adapter.tensors.items():
        writer.add_tensor(tensor_name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
