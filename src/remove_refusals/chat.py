"""Talk to a model in the terminal: as it is, with the direction taken out, or both one after the other."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from remove_refusals.apply.hooks import ablated
from remove_refusals.chat_template import render, render_conversation
from remove_refusals.generation import stream
from remove_refusals.models import LoadedModel
from remove_refusals.types import ChatFormat, Intervention, ModelMap

Sides = Literal["ablated", "original", "compare"]


def converse(
    loaded: LoadedModel,
    intervention: Intervention | None,
    prompts: Iterable[str],
    write: Callable[[str], None],
    *,
    sides: Sides = "ablated",
    chat: ChatFormat | None = None,
    model_map: ModelMap | None = None,
    max_new_tokens: int = 512,
) -> None:
    """Answer prompts one after the other, streaming; each side keeps a history of its own.

    Args:
        loaded: The model.
        intervention: What is taken out on the ablated side; None only with `sides="original"`.
        prompts: The user messages, for example lines that are typed; blank ones are skipped.
        write: Takes pieces of text as they come.
        sides: Which side answers; `compare` lets the original answer first.
        chat: How prompts are put before the model; in plain mode nothing is remembered.
        model_map: The model's map, if it is at hand.
        max_new_tokens: Where an answer is cut off.

    Raises:
        RemoveRefusalsError: If the model cannot be hooked or a prompt cannot be rendered.
    """
    chat = chat or ChatFormat()
    names = ("original", "ablated") if sides == "compare" else (sides,)
    histories: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for prompt in prompts:
        if not prompt.strip():
            continue
        for name in names:
            if sides == "compare":
                write(f"[{name}] ")
            context: AbstractContextManager[None] = nullcontext()
            if name == "ablated" and intervention is not None:
                context = ablated(loaded.model, intervention, model_map=model_map)
            with context:
                answer = _answer(loaded, prompt, histories[name], chat, write, max_new_tokens)
            histories[name].append((prompt, answer))
            write("\n")


def _answer(
    loaded: LoadedModel,
    prompt: str,
    history: list[tuple[str, str]],
    chat: ChatFormat,
    write: Callable[[str], None],
    max_new_tokens: int,
) -> str:
    if chat.plain:
        token_ids = render(loaded.tokenizer, [prompt], plain=True)[0]
    else:
        token_ids = render_conversation(
            loaded.tokenizer,
            prompt,
            history,
            system_prompt=chat.system_prompt,
            chat_template=chat.chat_template,
        )
    pieces = []
    for piece in stream(loaded, token_ids, max_new_tokens=max_new_tokens):
        pieces.append(piece)
        write(piece)
    return "".join(pieces)
