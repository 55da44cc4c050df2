"""Edit plan → a LoRA for llama.cpp: one GGUF file beside any quantised GGUF of the model, which is left as it is.

The layout is that of llama.cpp's own converter: for a tensor NAME, `NAME.lora_a` of shape `[k, n_in]` and `NAME.lora_b`
of shape `[n_out, k]`, with a leading axis of experts where the tensor has one. The token embedding's are the other way
round, `[n_vocab, k]` and `[d_model, k]`, since llama.cpp looks tokens up in the first.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from remove_refusals.baking.base import BaseModel, Carried, ablation_record, plan_for
from remove_refusals.baking.lora import LowRank, check_low_rank, low_rank
from remove_refusals.directions import EditPlan, PlanEntry
from remove_refusals.errors import ArchitectureError, OutputError, require_package
from remove_refusals.files import atomic_file
from remove_refusals.modelmap import DiskTensor, ModelMap, Writer
from remove_refusals.report import AdapterRecord
from remove_refusals.settings import Tied, Variant
from remove_refusals.types import Intervention


def bake_gguf_lora(
    base: BaseModel,
    intervention: Intervention,
    output: Path | str,
    *,
    tied: Tied = "untie",
    allow_leak: bool = False,
    variant: Variant = "plain",
    force: bool = False,
) -> Carried:
    """Write a LoRA that is exactly the edit, as a GGUF file for llama.cpp's `--lora`.

    Args:
        base: The model that it is made for, in full precision.
        intervention: What to take out where.
        output: The file to be made.
        tied: As for `bake`; llama.cpp takes no adapter of a tied embedding.
        allow_leak: As for `bake`.
        variant: As for `bake`; only `plain` is of low rank.
        force: Whether to replace an existing output.

    Returns:
        What was written; the record lies in the metadata, under `remove_refusals.ablation`.

    Raises:
        ArchitectureError: If llama.cpp does not know the model or cannot carry the edit; the message names what.
        OutputError: If the `gguf` package is not installed, or the output exists and `force` is not given, or cannot be
            written.
        DirectionError: If the intervention does not fit the model.
    """
    plan = plan_for(base, intervention, tied=tied, allow_leak=allow_leak, variant=variant)
    adapter = gguf_lora(plan, base.model_map, base.tensor_of)
    described = AdapterRecord(kind="gguf-lora", rank=adapter.rank, dtype="float32", tensors=len(adapter.tensors))
    record = ablation_record(base.record, intervention, plan, base.model_map, described)
    with atomic_file(Path(output), force=force) as staging:
        write_gguf_lora(
            adapter, staging, name=f"{base.name} without refusals", base=base.name, record=json.dumps(record.to_json())
        )
    return Carried(Path(output), plan, record)


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
    gguf = require_package("gguf", "gguf", "GGUF files", OutputError)
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
ARCHITECTURES = {
    "arcee": "arcee",
    "bloom": "bloom",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "dots1": "dots1",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone4": "exaone4",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "gpt2": "gpt2",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "llama": "llama",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "mistral": "llama",
    "mixtral": "llama",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmoe": "olmoe",
    "phi": "phi2",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}


def architecture_of(model_type: str) -> str:
    """Give the architecture of a model type in GGUF files.

    Args:
        model_type: The `model_type` of a configuration.

    Returns:
        The value of `general.architecture`.

    Raises:
        ArchitectureError: If the type is not listed, or the installed package does not know its architecture.
        OutputError: If the `gguf` package is not installed.
    """
    found = ARCHITECTURES.get(model_type)
    if (
        found is None
        or found not in require_package("gguf", "gguf", "GGUF files", OutputError).MODEL_ARCH_NAMES.values()
    ):
        raise ArchitectureError(
            f"Model type '{model_type}' has no known architecture in GGUF files, expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}; save the edited weights and convert those instead."
        )
    return found


class GgufNames:
    """The names of one model's tensors in a GGUF file."""

    def __init__(self, model_map: ModelMap) -> None:
        """Look the architecture up.

        Args:
            model_map: The model's map.

        Raises:
            ArchitectureError: As from `architecture_of`.
            OutputError: As from `architecture_of`.
        """
        gguf = require_package("gguf", "gguf", "GGUF files", OutputError)
        self.architecture = architecture_of(model_map.model_type)
        known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._map = gguf.get_tensor_name_map(known, model_map.n_layers)
        self._model_type = model_map.model_type

    def find(self, parameter: str, on_disk: Iterable[DiskTensor] = ()) -> str | None:
        """Give a tensor's name.

        Args:
            parameter: Its name in the model.
            on_disk: The tensors of a checkpoint that hold it.

        Returns:
            The name in the GGUF file, suffix included; None if the architecture has no such tensor.
        """
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
        """Name writers.

        Args:
            writers: The writers.

        Returns:
            The name in the GGUF file by that in the model.

        Raises:
            ArchitectureError: If the architecture has no place for one, or one place for two.
        """
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
