"""Answers to a file of prompts, for scripts."""

import contextlib
from collections.abc import Callable
from typing import Any

from remove_refusals.apply.hooks import ablated
from remove_refusals.chat_template import render
from remove_refusals.generation import generate
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.types import ChatFormat, Intervention, PromptSet


def answer_rows(
    loaded: LoadedModel,
    prompts: PromptSet,
    intervention: Intervention | None,
    *,
    model_map: ModelMap | None = None,
    chat: ChatFormat | None = None,
    max_new_tokens: int = 100,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answer prompts, with a direction taken out if an intervention is given.

    Returns:
        One JSON object per prompt, in order: `prompt`, `answer`, `n_tokens`, `finished`, `ablated`.

    Raises:
        RemoveRefusalsError: If the model cannot be hooked, or a prompt cannot be rendered or does not fit.
    """
    token_ids = render(loaded.tokenizer, prompts.prompts, **vars(chat or ChatFormat()))
    context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if intervention is not None:
        context = ablated(loaded.model, intervention, model_map=model_map)
    with context:
        answers = generate(
            loaded,
            token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    return [
        {
            "prompt": prompt,
            "answer": answer.text,
            "n_tokens": len(answer.token_ids),
            "finished": answer.finished,
            "ablated": intervention is not None,
        }
        for prompt, answer in zip(prompts.prompts, answers, strict=True)
    ]
