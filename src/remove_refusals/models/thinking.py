"""Thinking before an answer, in the forms that models write it: taken out of answers, closed where a prompt ends."""

import re

from transformers import PreTrainedTokenizerBase as Tokenizer

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
