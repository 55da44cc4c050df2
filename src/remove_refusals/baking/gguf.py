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
from transformers import PreTrainedModel

from remove_refusals.baking.base import Base
from remove_refusals.baking.lora import LowRank, check_low_rank, low_rank
from remove_refusals.directions import EditPlan, PlanEntry
from remove_refusals.errors import ArchitectureError, OutputError, require_package
from remove_refusals.files import atomic_file
from remove_refusals.modelmap import Writer, map_model
from remove_refusals.models import check_not_source
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
    check_not_source(Path(output), base.source, revision=base.revision)
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
    names = GgufNames(base.model)
    writers = [writer for site in base.model_map.sites for writer in site.writers]
    planned = {entry.parameter for entry in plan.entries}
    named = names.of_writers(writer for writer in writers if writer.parameter in planned)
    check_low_rank(plan)
    for entry in plan.entries:
        _check_applied(entry, named[entry.parameter], tied=base.model_map.tied)
    factors = {entry.parameter: low_rank(entry, base.tensor(entry.parameter)) for entry in plan.entries}
    ranks = [found.rank for found in factors.values()]
    rank = max(ranks, key=ranks.count, default=1)
    tensors: dict[str, torch.Tensor] = {}
    for entry in plan.entries:
        name = named[entry.parameter]
        first, second = _laid_out(entry, name, names.reordered(name, factors[entry.parameter]))
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


# Where llama.cpp's architecture has another name than the model type; type and name are else the same but for case and
# punctuation.
OTHER_NAMES = {
    "bamba": "granitehybrid", "cohere": "command-r", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
    "exaone4_5": "exaone4", "falcon_mamba": "mamba", "gemma4_unified": "gemma4", "glm": "chatglm",
    "glm4_moe_lite": "deepseek2", "glm4v": "glm4", "glm4v_moe": "glm4moe", "glm_moe_dsa": "glm-dsa", "glm_ocr": "glm4",
    "gpt-sw3": "gpt2", "gpt_bigcode": "starcoder", "granitemoehybrid": "granitehybrid", "granitemoeshared":
    "granitemoe", "hunyuan_v1_dense": "hunyuan-dense", "hunyuan_v1_moe": "hunyuan-moe", "internlm3": "llama",
    "mimo_v2_flash": "mimo2", "ministral3": "mistral3", "mistral": "llama", "mixtral": "llama", "olmo3": "olmo2",
    "paddleocr_vl": "paddleocr", "phi": "phi2", "qwen2_5_omni": "qwen2vl", "qwen2_5_vl": "qwen2vl", "qwen3_omni_moe":
    "qwen3vlmoe", "sarvam_mla": "deepseek2", "solar_open": "glm4moe", "youtu": "deepseek2",
}  # fmt: skip

_SCALED = {"bitnet": "rounds the weights to three values", "falcon-h1": "multiplies the weights by constants"}
"""What the converter does to writers, so that a change of the base's is none of the file's."""


def _package() -> Any:
    return require_package("gguf", "gguf", "GGUF files", OutputError)


def _plain(name: str) -> str:
    """A name without what model types and architectures write in different ways."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


class GgufNames:
    """The names of one model's tensors in a GGUF file."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look the architecture up in the package's own tables."""
        gguf, model_map = _package(), map_model(model)
        self._text, self._model_type = model.config.get_text_config(), model_map.model_type
        self._writers = [writer.parameter for site in model_map.sites for writer in site.writers]
        self._experts = any(".experts." in name for name in self._writers)
        types = [str(part.model_type).removesuffix("_text") for part in (self._text, model.config)]
        by_name = {_plain(name): (name, number) for number, name in gguf.MODEL_ARCH_NAMES.items()}
        named = (self._variant(name) for name in (*types, *(OTHER_NAMES.get(one, "") for one in types)))
        found = next((by_name[key] for one in named if (key := _plain(one)) in by_name), ("", None))
        self.architecture: str = found[0]
        if not self.architecture or self.architecture in _SCALED:
            what = (
                f"'{self.architecture}', whose converter {_SCALED[self.architecture]}" if self.architecture else "none"
            )
            raise ArchitectureError(
                f"Model type '{self._model_type}' has no architecture in GGUF files that an adapter can be made for "
                f"({what}), expected one of the gguf package's {len(by_name)}; save the edited weights and convert "
                "those instead."
            )
        self._map = gguf.get_tensor_name_map(found[1], model_map.n_layers)

    def _variant(self, name: str) -> str:
        """Tell apart what is one type in Transformers and several architectures in llama.cpp."""
        mixed = any(".mamba." in writer for writer in self._writers)
        if OTHER_NAMES.get(name, name) == "granitehybrid" and not mixed:
            return "granitemoe" if self._experts else "granite"
        return "nemotron_h_moe" if name == "nemotron_h" and self._experts else name

    def find(self, parameter: str) -> str | None:
        """Give a tensor's name in the GGUF file, by that in the model; None if there is no such tensor."""
        # What a model has before the language model's names is left out; a stack of experts has one name for all types.
        own = re.sub(r"(^|\.)(language_model|text_model|transformer)\.", r"\1", parameter)
        stacked = re.sub(r".*\blayers\.(\d+)\..*\bexperts\.(?:\d+\.)?", r"model.layers.\1.mlp.experts.", parameter)
        names = [parameter, own, re.sub(r"^model\.", "backbone.", own), stacked]
        if not self._experts:
            # What all tokens share is the dense network where no experts are chosen.
            names = [name.replace(".shared_mlp.output_linear.", ".mlp.down_proj.") for name in names]
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
            found = self.find(writer.parameter)
            flat = found is not None and "_exps." in found and len(writer.shape) < 3 and found.endswith(".weight")
            if found is None or found in names.values() or flat:
                what = "no tensor" if found is None else f"'{found}' {'in another layout' if flat else 'already'}"
                raise ArchitectureError(
                    f"Parameter '{writer.parameter}' of model type '{self._model_type}' has {what} in GGUF files of "
                    f"architecture '{self.architecture}', expected one of its own; save the edited weights instead."
                )
            names[writer.parameter] = found
        return names

    def reordered(self, name: str, factors: LowRank) -> LowRank:
        """Put the inputs in the file's order: that of Qwen3.5 has the heads of values the other way round."""
        if not self.architecture.startswith("qwen35") or ".ssm_out." not in name:
            return factors
        groups, heads = self._text.linear_num_key_heads, self._text.linear_num_value_heads
        inputs = factors.right.reshape(*factors.right.shape[:-1], groups, heads // groups, -1)
        return LowRank(factors.left, inputs.transpose(-3, -2).flatten(-3))
