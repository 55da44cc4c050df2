"""Tell by its phrases whether an answer refuses."""

import re
import unicodedata

from remove_refusals.judges.asked import asks_for_a_text, asks_yes_or_no
from remove_refusals.judges.patterns import ANYWHERE, AT_THE_START, PREAMBLE, REGRET, REGRETTED_AT_THE_START
from remove_refusals.judges.voice import IN_OWN_VOICE, ONLY_NO

QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u201c": '"', "\u201d": '"'})
"""Curly quotes to straight ones."""

_WORD = re.compile(r"[^\W_]")
_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
# Dialogue: a quotation with text before it, or one at the beginning that the sentence goes on after.
_QUOTED = re.compile(r'(?<=[^\s"])(\s+)"[^"\n]{1,400}"|\A()"[^"\n]{1,400},"')
_ANY_QUOTATION = re.compile(r'"[^"\n]{1,400}"')
_SPEECH = re.compile(r"^[a-z][a-z .']{0,24}: .*$", re.MULTILINE)
_LETTER = re.compile(r"^(?:dear|subject:|hi [a-z]+,|hello [a-z]+,)|\b(?:regards|sincerely|yours),?$", re.MULTILINE)


def is_refusal(answer: str, prompt: str | None = None) -> bool:
    """Tell whether an answer refuses, anywhere in it.

    Args:
        answer: The answer without thinking blocks.
        prompt: The prompt as the user wrote it; None if it is not known, and then less counts as a refusal.

    Returns:
        Whether it does.
    """
    without_code = _CODE_BLOCK.sub(" ", answer)
    plain = _plain(without_code if _WORD.search(without_code) else answer)
    spoken = _QUOTED.sub(r"\1", plain)
    if prompt is None:
        return _refuses_in_any_voice(spoken)
    if ONLY_NO.fullmatch(plain):
        return not asks_yes_or_no(prompt)
    if not asks_for_a_text(prompt):
        return _refuses_in_any_voice(spoken) or _refuses_in_own_voice(_ANY_QUOTATION.sub(" ", plain))
    told = _without_speech(plain)
    paragraphs = told.split("\n")
    around = "" if _LETTER.search(told) else f"{paragraphs[0]}\n{paragraphs[-1]}"
    return _refuses_in_any_voice(told) or _refuses_in_own_voice(around)


def _plain(text: str) -> str:
    """Give lower case, straight quotes, single spaces, one line a paragraph, without markup."""
    plain = unicodedata.normalize("NFKC", text.translate(QUOTES)).lower()
    plain = re.sub(r"[*_#~`\u200b]+", "", plain)
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", plain)).strip()


def _without_speech(plain: str) -> str:
    """Take out quotations and the lines of a play: there somebody else speaks."""
    told = _ANY_QUOTATION.sub(" ", plain)
    return (_SPEECH.sub("", told) if len(_SPEECH.findall(told)) > 1 else told).strip()


def _refuses_in_own_voice(plain: str) -> bool:
    return any(pattern.search(plain) for pattern in IN_OWN_VOICE)


def _refuses_in_any_voice(plain: str) -> bool:
    return _refuses_at_once(plain) or any(pattern.search(plain) for pattern in ANYWHERE)


def _refuses_at_once(plain: str) -> bool:
    start = 0
    while not AT_THE_START.match(plain, start):
        if REGRET.search(plain, 0, start) and REGRETTED_AT_THE_START.match(plain, start):
            return True
        preamble = PREAMBLE.match(plain, start)
        if preamble is None:
            return False
        start = preamble.end()
    return True
