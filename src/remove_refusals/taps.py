"""Measure at modules of a model while prompts run through it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from remove_refusals.activations import run_decoder
from remove_refusals.batching import MOST_PROMPTS, fitting_pass, longest_first, with_backoff
from remove_refusals.chat_template import render
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.terms import first_of_width
from remove_refusals.types import ChatFormat, PromptSet


@dataclass(frozen=True)
class Tap:
    """What is measured of a module.

    Attributes:
        module: The module's name.
        on_input: Whether its input is measured, or else its output.
        measure: From the states at the position, `[batch, d_model]`, float32, to `[batch, …]`.
    """

    module: str
    on_input: bool
    measure: Callable[[torch.Tensor], torch.Tensor]


def collect_at(
    loaded: LoadedModel,
    prompts: PromptSet,
    taps: Mapping[Any, Tap],
    position: int,
    chat: ChatFormat | None,
    batch_size: int | None,
    model_map: ModelMap,
) -> dict[Any, torch.Tensor]:
    """Run prompts through the decoder and measure at modules, at one token.

    Args:
        loaded: The model.
        prompts: The prompts.
        taps: What is measured, by any keys.
        position: The token position, negative.
        chat: How the prompts are put before the model.
        batch_size: How many prompts to run at once; None for as many as fit.
        model_map: The model's map.

    Returns:
        For each key `[n_prompts, …]`, float32, on the CPU; of a module that is run again, what its last run gave. Keys
        of modules that were not run are absent.

    Raises:
        PromptError: If the prompts cannot be rendered.
        ModelError: If memory runs out with a single prompt.
    """
    token_ids = render(loaded.tokenizer, prompts.prompts, **vars(chat or ChatFormat()))
    found: dict[Any, torch.Tensor] = {}

    def hook_for(key: Any, tap: Tap, n_prompts: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, *values: Any) -> None:
            stream = first_of_width(values[:2] if tap.on_input else values[-1], model_map.d_model)
            if stream is not None:
                # Some mixtures of experts run all tokens in one row.
                states = stream.reshape(n_prompts, -1, model_map.d_model)[:, position]
                found[key] = tap.measure(states.to(torch.float32)).to("cpu")

        return hook

    def run(indices: Sequence[int]) -> dict[Any, torch.Tensor]:
        found.clear()
        handles = []
        for key, tap in taps.items():
            module, hook = loaded.model.get_submodule(tap.module), hook_for(key, tap, len(indices))
            if tap.on_input:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        try:
            with torch.inference_mode():
                run_decoder(loaded, [token_ids[index] for index in indices])
        finally:
            for handle in handles:
                handle.remove()
        return dict(found)

    def fitting(indices: Sequence[int]) -> int:
        return batch_size or fitting_pass(loaded, [len(token_ids[index]) for index in indices])

    whole: dict[Any, torch.Tensor] = {}
    for indices, part in with_backoff(run, longest_first(token_ids), batch_size or MOST_PROMPTS, fitting=fitting):
        for key, value in part.items():
            whole.setdefault(key, torch.empty(len(token_ids), *value.shape[1:]))[list(indices)] = value
    return whole
