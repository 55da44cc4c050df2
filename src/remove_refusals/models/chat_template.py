"""Prompts to token ids: the chat template with thinking closed, and which positions it makes comparable."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jinja2

from remove_refusals.errors import PromptError
from remove_refusals.settings import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CLOSED_THINKING = "<think>\n\n</think>\n\n"
"""A thinking block that stays empty, as the Qwen3 template writes it for `enable_thinking=False`."""


# Templates such as Llama 3.2's write today's date, which would give another result each day. This shadows the clock;
# the date is the default of the Llama 3 templates. The empty expression keeps a line end that the template begins with.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul') "
    "| replace('%B', 'July') | replace('%Y', '2024') }}{% endmacro %}{{ '' }}"
)


# Their last characters are what tokenizers may merge with the template's text behind them, each in its own way.
_PROBES = ("Tell me about apples", "What is 6 times 7?", "Stop there.", "Count to 42", "Wait!", 'Say "yes"', "(really)")


def render(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    plain: bool = False,
) -> list[list[int]]:
    """Turn prompts into the token ids after which the model's answer starts.

    Each prompt becomes a user message in the chat template, with the beginning of the answer added. Where the template
    can switch thinking off it is told to, and a thinking block that is still open at the end is closed, so that the
    last position is the one from which the answer itself is predicted. The beginning-of-sequence token comes from the
    template alone, never twice. A template that asks for today's date is given 26 July 2024.

    Args:
        tokenizer: The model's tokenizer.
        prompts: The user messages.
        system_prompt: A system message to put before each.
        chat_template: The text of a Jinja template to use in place of the tokenizer's own.
        plain: Whether to use no template: the prompt alone, with the tokenizer's special tokens.

    Returns:
        For each prompt its token ids, without padding.

    Raises:
        PromptError: If there is no template, if it fails or does not show the prompt or the system prompt, if plain
            mode is combined with either, or if a prompt gives no tokens.
    """
    if plain:
        if system_prompt is not None or chat_template is not None:
            found = "a system prompt" if system_prompt is not None else "a chat template"
            raise PromptError(f"Plain mode was given {found}, expected prompts alone; leave one of the two away.")
        texts = list(prompts)
    else:
        template = _template(tokenizer, chat_template)
        texts = [_render_one(tokenizer, prompt, system_prompt, template) for prompt in prompts]
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=plain, return_attention_mask=False)["input_ids"]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise PromptError(
                f"The prompt {prompt!r} gives no tokens, expected at least one; take it out or use a chat template."
            )
    return rows


def render_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    turns: Sequence[tuple[str, str]],
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
) -> list[int]:
    """Turn a prompt and the turns before it into the token ids after which the model's answer starts.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The last user message.
        turns: The earlier user messages, each with its answer.
        system_prompt: As for `render`.
        chat_template: As for `render`.

    Returns:
        The token ids, as `render` gives them for a single prompt.

    Raises:
        PromptError: If there is no template, or if it fails or does not show the prompt or the system prompt.
    """
    text = _render_one(tokenizer, prompt, system_prompt, _template(tokenizer, chat_template), turns)
    row: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return row


def template_tail_length(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    plain: bool = False,
) -> int:
    """Count the tokens that the template puts after the user's words: the same ones in every rendered prompt.

    Found by rendering messages that end differently and counting the tokens they have in common at the end. A token
    that merges with the end of a message does not count.

    Args:
        tokenizer: The model's tokenizer.
        system_prompt: As for `render`.
        chat_template: As for `render`.
        plain: As for `render`.

    Returns:
        The number of tokens, 0 or more.

    Raises:
        PromptError: As for `render`.
    """
    rows = render(tokenizer, _PROBES, system_prompt=system_prompt, chat_template=chat_template, plain=plain)
    length = 0
    for tokens in zip(*(reversed(row) for row in rows), strict=False):
        # The token for the unknown stands for different words.
        if len(set(tokens)) > 1 or tokens[0] == tokenizer.unk_token_id:
            break
        length += 1
    return length


def check_position(position: int, tail: int) -> None:
    """Check that a token position means the same in every rendered prompt.

    The last position always does: the answer is predicted from it.

    Args:
        position: Counted from the end of the rendered prompt, -1 for its last token.
        tail: What `template_tail_length` returned.

    Raises:
        PromptError: If the position is not negative, or lies before the template's tail.
    """
    lowest = -max(tail, 1)
    if not lowest <= position <= -1:
        raise PromptError(
            f"The token position is {position}, expected {lowest} to -1 because the chat template puts {tail} tokens "
            "after the user's words; choose a position in this range."
        )


def _template(tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> str:
    if chat_template is None and not tokenizer.chat_template:
        raise PromptError(
            "The tokenizer has no chat template, expected one; use a chat model, pass `--chat-template FILE`, or use "
            "plain mode."
        )
    try:
        template: str = tokenizer.get_chat_template(chat_template)
    except ValueError as error:
        raise PromptError(
            f"The tokenizer has the chat templates {', '.join(sorted(tokenizer.chat_template))}, expected one named "
            "default; pass `--chat-template FILE`."
        ) from error
    return _FIXED_CLOCK + template if "strftime_now" in template else template


def _render_one(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    system_prompt: str | None,
    template: str,
    turns: Sequence[tuple[str, str]] = (),
) -> str:
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt})
    options = {"enable_thinking": False} if "enable_thinking" in template else {}
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
    except (jinja2.TemplateError, TypeError) as error:
        expected, remedy = (
            ("a user message", "")
            if system_prompt is None
            else ("a system prompt and a user message", "leave the system prompt away or ")
        )
        raise PromptError(
            f"The chat template failed ({error}), expected it to take {expected}; {remedy}pass another one with "
            "`--chat-template FILE`."
        ) from error
    for kind, content in (("system prompt", system_prompt), ("prompt", prompt)):
        if content is not None and content.strip() not in text:
            raise PromptError(
                f"The chat template leaves out the {kind} {content[:80]!r}, expected to find it in the rendered text; "
                "pass another one with `--chat-template FILE`."
            )
    return _with_thinking_closed(text)


def _with_thinking_closed(text: str) -> str:
    opened = text.rstrip()
    return opened.removesuffix("<think>") + CLOSED_THINKING if opened.endswith("<think>") else text


def check_positions(tokenizer: "PreTrainedTokenizerBase", positions: Sequence[int], chat: ChatFormat) -> None:
    """Check that token positions lie within the chat template's tail; plain prompts have none and are not checked.

    Raises:
        PromptError: If one does not, or the template cannot be rendered.
    """
    if chat.plain:
        return
    tail = template_tail_length(tokenizer, system_prompt=chat.system_prompt, chat_template=chat.chat_template)
    for position in positions:
        check_position(position, tail)
