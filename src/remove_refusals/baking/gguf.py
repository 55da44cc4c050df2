"""Edit plan → a LoRA for llama.cpp: one GGUF file beside any quantised GGUF of the model, which is left as it is.

The layout is that of llama.cpp's own converter: for a tensor NAME, `NAME.lora_a` of shape `[k, n_in]` and `NAME.lora_b`
of shape `[n_out, k]`, with a leading axis of experts where the tensor has one. The token embedding's are the other way
round, `[n_vocab, k]` and `[d_model, k]`, since llama.cpp looks tokens up in the first.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from remove_refusals.baking.base import Base
from remove_refusals.baking.lora import LowRank, check_low_rank, low_rank
from remove_refusals.directions import EditPlan, PlanEntry
from remove_refusals.errors import ArchitectureError, OutputError, require_package
from remove_refusals.files import atomic_file
from remove_refusals.modelmap import DiskTensor, ModelMap, Writer
from remove_refusals.report import AblationRecord, AdapterRecord
from remove_refusals.settings import EditSettings
from remove_refusals.types import Intervention


def bake_gguf_lora(
    base: Base,
    intervention: Intervention,
    output: Path | str,
    settings: EditSettings | None = None,
    *,
    force: bool = False,
) -> tuple[EditPlan, AblationRecord]:
    """Write a LoRA that is exactly the edit of a base in full precision, with its record in the file's metadata."""
    plan = base.plan(intervention, settings)
    adapter = gguf_lora(base, plan)
    about = AdapterRecord(kind="gguf-lora", rank=adapter.rank, dtype="float32", tensors=len(adapter.tensors))
    record = base.ablation(intervention, plan, adapter=about)
    name, text = f"{base.name} without refusals", json.dumps(record.to_json())
    with atomic_file(Path(output), force=force) as staging:
        write_gguf_lora(adapter, staging, name=name, base=base.name, record=text)
    return plan, record


EMBEDDING = "token_embd.weight"
_LOOKED_UP = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True, eq=False)
class GgufLora:
    """A LoRA in llama.cpp's layout: float32 tensors by name; `rank`, that of most, is also `adapter.lora.alpha`."""

    architecture: str
    rank: int
    tensors: dict[str, torch.Tensor]


def gguf_lora(base: Base, plan: EditPlan) -> GgufLora:
    """Build the llama.cpp LoRA that is an edit."""
    names = GgufNames(base.model_map)
    writers = [writer for site in base.model_map.sites for writer in site.writers]
    planned = {entry.parameter for entry in plan.entries}
    named = names.of_writers(writer for writer in writers if writer.parameter in planned)
    check_low_rank(plan)
    for entry in plan.entries:
        _check_applied(entry, named[entry.parameter], tied=base.tied)
    factors = {entry.parameter: low_rank(entry, base.tensor(entry.parameter)) for entry in plan.entries}
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


def _check_applied(entry: PlanEntry, name: str, *, tied: bool) -> None:
    """Check that llama.cpp applies an adapter to a tensor, and only where it should."""
    if name in _LOOKED_UP:
        raise ArchitectureError(
            f"Parameter '{entry.parameter}' is '{name}' in GGUF files, to which llama.cpp applies no adapter, expected "
            "the token embedding or a projection; leave the embedding out with --sites attn,mlp, or convert an "
            "edited checkpoint."
        )
    if name == EMBEDDING and tied:
        raise ArchitectureError(
            f"Parameter '{entry.parameter}' is also the unembedding, and llama.cpp breaks off on an adapter of such a "
            "tensor, expected an embedding of its own; leave the embedding out with --sites attn,mlp, or convert "
            "an edited checkpoint."
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
    """Write an adapter to a file, with what it and its base are called and the record of how it was made."""
    gguf = _package()
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


# Read in the converter and the graphs of llama.cpp as of 2026; the architecture has the model type's name in most.
_SAME = (
    "arcee bloom cohere2 dots1 ernie4_5 exaone4 falcon gemma gemma2 gemma3 glm4 gpt2 granite granitemoe "
    "llama mamba mamba2 nemotron olmo olmo2 olmoe phi3 phimoe qwen2 qwen3 seed_oss smollm3 stablelm "
    "starcoder2"
)

ARCHITECTURES = {name: name for name in _SAME.split()} | {
    "cohere": "command-r", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "ernie4_5_moe": "ernie4_5-moe",
    "gemma3_text": "gemma3", "glm4_moe": "glm4moe", "gpt_bigcode": "starcoder", "gpt_neox": "gptneox", "gpt_oss":
    "gpt-oss", "hunyuan_v1_dense": "hunyuan-dense", "hunyuan_v1_moe": "hunyuan-moe", "mistral": "llama", "mixtral":
    "llama", "olmo3": "olmo2", "phi": "phi2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip


def _package() -> Any:
    return require_package("gguf", "gguf", "GGUF files", OutputError)


class GgufNames:
    """The names of one model's tensors in a GGUF file."""

    def __init__(self, model_map: ModelMap) -> None:
        """Look the architecture up."""
        gguf, self._model_type = _package(), model_map.model_type
        self.architecture = ARCHITECTURES.get(self._model_type, "")
        known = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if known is None:
            raise ArchitectureError(
                f"Model type '{self._model_type}' has no known architecture in GGUF files, expected one of "
                f"{', '.join(sorted(ARCHITECTURES))}; save the edited weights and convert those instead."
            )
        self._map = gguf.get_tensor_name_map(known, model_map.n_layers)

    def find(self, parameter: str, on_disk: Iterable[DiskTensor] = ()) -> str | None:
        """Give a tensor's name in the GGUF file, by that in the model or on disk; None if there is no such tensor."""
        names = [parameter, *(tensor.name for tensor in on_disk)]
        # The converter stacks what a checkpoint has for each expert, and calls the stack by the name without a number.
        names += [re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in names]
        # It leaves out what a checkpoint puts before the language model's names.
        names += [re.sub(r"(^|\.)(language_model|transformer)\.", r"\1", name) for name in names]
        for name in names:
            whole = name if name.endswith((".weight", ".bias")) else re.sub(r"_bias$", ".bias", name)
            stem, _, suffix = whole.rpartition(".") if whole.endswith((".weight", ".bias")) else (whole, "", "weight")
            found = self._map.get_name(stem)
            if found is not None:
                return f"{found}.{suffix}"
        return None

    def of_writers(self, writers: Iterable[Writer]) -> dict[str, str]:
        """Give the names in the GGUF file by those in the model."""
        names: dict[str, str] = {}
        for writer in writers:
            found = self.find(writer.parameter, writer.on_disk)
            if found is None or found in names.values():
                what = "no tensor" if found is None else f"'{found}' already"
                raise ArchitectureError(
                    f"Parameter '{writer.parameter}' of model type '{self._model_type}' has {what} in GGUF files of "
                    f"architecture '{self.architecture}', expected one of its own; save the edited weights instead."
                )
            names[writer.parameter] = found
        return names
