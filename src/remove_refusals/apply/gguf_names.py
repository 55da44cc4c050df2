"""What a model's tensors are called in a GGUF file, by the name map of the `gguf` package.

The map is the one that llama.cpp's converter uses. Which model types may be looked up in it is listed here: those whose
output projections and embeddings the converter writes as they are, without reordering or scaling them, and whose graph
in llama.cpp applies an adapter to each of them.
"""

import re
from collections.abc import Iterable
from typing import Any

from remove_refusals.errors import ArchitectureError, OutputError
from remove_refusals.map_types import DiskTensor, ModelMap, Writer

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


def gguf_package() -> Any:
    """Import the `gguf` package.

    Raises:
        OutputError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise OutputError(
            "The package 'gguf' is not installed, expected it for GGUF files; install the extra, remove-refusals[gguf]."
        ) from error
    return gguf


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
    if found is None or found not in gguf_package().MODEL_ARCH_NAMES.values():
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
        gguf = gguf_package()
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
