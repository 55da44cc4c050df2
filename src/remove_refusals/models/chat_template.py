"""Prompts to token ids: the chat template with thinking closed, and which positions it makes comparable.

Thinking, in the forms that models write it, is taken out of answers, and closed where a prompt ends.
"""

import json
import re
from collections.abc import Sequence

import jinja2
from transformers import PreTrainedTokenizerBase as Tokenizer

from remove_refusals.errors import PromptError
from remove_refusals.models.batches import check_prompts
from remove_refusals.models.load import LoadedModel

SWITCHED_OFF = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}
"""What templates ask for: those of Qwen3 and many others; of DeepSeek-V3.1, Granite and Kimi; of Seed-OSS."""

_TAG = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"

# How thinking opens and closes beside XML's way: Magistral, Kimi, Cohere, Gemma 4.
_MARKS = {
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
}
_OPENINGS = "|".join((rf"<{_TAG}>", *map(re.escape, _MARKS)))
_ENDINGS = "|".join((rf"</{_TAG}>", *map(re.escape, _MARKS.values())))
_BLOCKS = re.compile(
    "|".join((rf"<({_TAG})>.*?</\1>", *(f"{re.escape(begin)}.*?{re.escape(end)}" for begin, end in _MARKS.items()))),
    re.DOTALL | re.IGNORECASE,
)
_END = re.compile(rf".*(?:{_ENDINGS})", re.DOTALL | re.IGNORECASE)
_START = re.compile(_OPENINGS, re.IGNORECASE)
_OPENED = re.compile(rf"({_OPENINGS})\s*\Z", re.IGNORECASE)

# gpt-oss answers in channels (the harmony format), of which the last, `final`, is for the user; where its special
# tokens were left out, the names of the channels are what is left of them.
_CHANNEL, _ASSISTANT = "<|channel|>", "<|start|>assistant"
_FINAL = f"{_CHANNEL}final<|message|>"
_BARE_CHANNEL = re.compile(r"\A(?:analysis|commentary)(?=[A-Z\"'])")

# Granite 3.2 has words for it.
_PROCESS = re.compile(r"\A\s*here is my thought process:", re.IGNORECASE)
_RESPONSE = re.compile(r"here is my response:\s*", re.IGNORECASE)

# What stands around the answer behind it: Cohere, Hunyuan.
_AROUND = re.compile(r"<\|(?:START|END)_RESPONSE\|>|\A\s*<answer>\s*|\s*</answer>\s*\Z", re.IGNORECASE)

_MARKER = re.compile(r"think|thought|reasoning|channel|_RESPONSE", re.IGNORECASE)
_OF_CHANNELS = ("<|start|>", "<|message|>", "<|end|>")

# Templates such as Llama 3.2's write today's date, which would give another result each day. This shadows the clock;
# the date is the default of the Llama 3 templates. The empty expression keeps a line end that the template begins with.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul') "
    "| replace('%B', 'July') | replace('%Y', '2024') }}{% endmacro %}{{ '' }}"
)

# Their last characters are what tokenizers may merge with the template's text behind them, each in its own way.
_PROBES = ("Tell me about apples", "What is 6 times 7?", "Stop there.", "Count to 42", "Wait!", 'Say "yes"', "(really)")


def render(loaded: LoadedModel, prompts: Sequence[str], turns: Sequence[tuple[str, str]] = ()) -> list[list[int]]:
    """Turn prompts into the token ids after which the model's answer starts, without padding.

    Each stands behind the earlier turns, prompts with their answers, but a plain one alone. Thinking is switched off or
    closed, so that the last position predicts the answer itself. The template alone adds the beginning of the sequence.
    """
    chat = loaded.chat
    if chat.plain:
        if chat.system_prompt is not None or chat.chat_template is not None:
            found = "a system prompt" if chat.system_prompt is not None else "a chat template"
            raise PromptError(f"Plain mode was given {found}, expected prompts alone; leave one of the two away.")
        texts = list(prompts)
    else:
        template = _template(loaded.tokenizer, chat.chat_template)
        parts = _wants_parts(loaded, template, turns)
        texts = [_render_one(loaded, prompt, template, turns, parts=parts) for prompt in prompts]
    if not texts:
        return []
    encoded = loaded.tokenizer(texts, add_special_tokens=chat.plain, return_attention_mask=False, verbose=False)
    rows: list[list[int]] = encoded["input_ids"]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise PromptError(
                f"The prompt {prompt!r} gives no tokens, expected at least one; take it out or use a chat template."
            )
    check_prompts(loaded, rows, prompts=prompts)
    return rows


def template_tail_length(loaded: LoadedModel) -> int:
    """Count the tokens that the template puts after the user's words: the same ones in every rendered prompt."""
    length = 0
    for tokens in zip(*(reversed(row) for row in render(loaded, _PROBES)), strict=False):
        # The token for the unknown stands for different words.
        if len(set(tokens)) > 1 or tokens[0] == loaded.tokenizer.unk_token_id:
            break
        length += 1
    return length


def tail_positions(loaded: LoadedModel, position: int = -1) -> tuple[int, ...]:
    """Give at most eight token positions of the template's tail, the last one first; of plain prompts the one."""
    if loaded.chat.plain:
        return (position,)
    return tuple(range(-1, -1 - min(max(template_tail_length(loaded), 1), 8), -1))


def check_positions(loaded: LoadedModel, positions: Sequence[int]) -> None:
    """Check that token positions, negative, mean the same in every rendered prompt; plain prompts are not checked."""
    if loaded.chat.plain:
        return
    tail = template_tail_length(loaded)
    # The answer is predicted from the last position, which always means the same.
    lowest = -max(tail, 1)
    for position in positions:
        if not lowest <= position <= -1:
            raise PromptError(
                f"The token position is {position}, expected {lowest} to -1 because the chat template puts {tail} "
                "tokens after the user's words; choose a position in this range."
            )


def _template(tokenizer: Tokenizer, chat_template: str | None) -> str:
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


def _wants_parts(loaded: LoadedModel, template: str, turns: Sequence[tuple[str, str]]) -> bool:
    """Whether a template fails on a message that is a text, or leaves it out, and takes one that is a list of parts."""
    for parts in (False, True):
        try:
            text = _render_one(loaded, _PROBES[0], template, turns, parts=parts)
        except PromptError:
            continue
        # What writes any content takes a list for its notation.
        return parts and f"'text': '{_PROBES[0]}'" not in text and f'"text": "{_PROBES[0]}"' not in text
    return False


def _holds(text: str, content: str) -> bool:
    """Whether a rendered text holds a message, as it is or as JSON writes it."""
    said = content.strip()
    return any(form in text for form in (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1]))


def _render_one(
    loaded: LoadedModel, prompt: str, template: str, turns: Sequence[tuple[str, str]], *, parts: bool
) -> str:
    system_prompt = loaded.chat.system_prompt
    said = [] if system_prompt is None else [("system", system_prompt)]
    for question, answer in turns:
        said += [("user", question), ("assistant", answer)]
    said.append(("user", prompt))
    messages = [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in said]
    try:
        text: str = loaded.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **SWITCHED_OFF
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
        if content is not None and not _holds(text, content):
            raise PromptError(
                f"The chat template leaves out the {kind} {content[:80]!r}, expected to find it in the rendered text; "
                "pass another one with `--chat-template FILE`."
            )
    return close_thinking(text)


def strip_thinking(text: str) -> str | None:
    """Take out thinking; return what is left, or None if it never ends."""
    if _CHANNEL in text:
        _, found, answer = text.rpartition(_FINAL)
        return re.sub(r"<\|(?:end|return)\|>\s*\Z", "", answer) if found else None
    if _BARE_CHANNEL.match(text):
        _, found, answer = text.rpartition("assistantfinal")
        return answer if found else None
    if _PROCESS.match(text):
        response = _RESPONSE.search(text)
        return None if response is None else text[response.end() :]
    rest = _END.sub("", _BLOCKS.sub("", text))
    if _START.search(rest):
        return None
    return rest if rest == text else _AROUND.sub("", rest)


def close_thinking(prompt: str) -> str:
    """Close the thinking that a rendered prompt ends in, so that the answer itself comes next."""
    if prompt.endswith(_ASSISTANT):
        return prompt + _FINAL
    opened = _OPENED.search(prompt)
    if opened is None:
        return prompt
    mark = opened.group(1)
    before = prompt[: opened.start()] + mark
    # An empty block as the Qwen3 template writes it for `enable_thinking=False`.
    end = next((end for begin, end in _MARKS.items() if begin.lower() == mark.lower()), None)
    return before + end if end is not None else f"{before}\n\n</{mark[1:]}\n\n"


def text_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Give the text of an answer without special tokens, but for those that mark thinking, which show where it ends."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    in_channels = _CHANNEL in special.values()
    marks = {
        number
        for number, content in special.items()
        if _MARKER.search(content) or (in_channels and content in _OF_CHANNELS)
    }
    if marks.isdisjoint(token_ids):
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))
    kept = [token for token in token_ids if token not in special or token in marks]
    return str(tokenizer.decode(kept, skip_special_tokens=False))
