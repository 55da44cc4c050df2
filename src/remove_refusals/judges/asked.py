"""What kind of answer a prompt asks for, as far as its words tell."""

import re

_YES_OR_NO = re.compile(
    r"(?:is|are|was|were|do|does|did|can|could|should|would|will|has|have|had|may|might|must|am|shall)(?:n't)?\b"
    r"(?! (?:(?:can|could|would|will) )?you (?!recommend|prefer|agree|like|have|think|feel|know))|.*\byes or no\b"
)
_REQUEST = re.compile(r"(?:can|could|would|will)(?: you(?: please)?| i get| i have)\b")
_VOICED = re.compile(
    r"\b(?:writ|compos|draft|creat|translat|quot|role-?play|pretend|imagin|rewrit|paraphras|continu|rephras|"
    r"summari[sz])\w*|\b(?:story|poem|song|lyrics|scene|dialogue?|letter|e-?mails?|message|speech|monologue|script|"
    r"reply|example|phrase|joke|apology|slogan|toast|note|sentence|essay|excuse)\b|"
    r"\b(?:says?|respond|decline|refuse|reject|tell(?! me| us))\b"
)
_OTHER_LANGUAGE = re.compile(
    r"\btranslat|\bhow (?:do|would|can|does) (?:you|i|one|we) (?:say|write|spell)|\blanguages?\b|\balphabets?\b|"
    r"\b(?:scripts?|characters?|letters?)\b|\b(?:in|into|to|of|from) (?:[a-z]+ )?(?:chinese|mandarin|cantonese|"
    r"japanese|"
    r"korean|russian|ukrainian|bulgarian|serbian|arabic|persian|farsi|urdu|hebrew|greek|hindi|bengali|tamil|telugu|"
    r"thai|lao|khmer|burmese|tibetan|georgian|armenian|amharic|mongolian|punjabi|gujarati|marathi|nepali|sinhala)\b|"
    r"\b(?:kanji|hiragana|katakana|hangul|cyrillic|pinyin|sanskrit)\b"
)
_DRAWN = re.compile(
    r"\b(?:draw|print|ascii|asterisks?|emojis?|emoticons?|symbols?|pattern|pyramid|punctuation|morse|braille|"
    r"binary)\b"
)
_REPEATED = re.compile(r"\b(?:repeat\w*|times|over and over|again and again)\b")


def asks_yes_or_no(prompt: str) -> bool:
    """Tell whether the last sentence of a prompt is a question that "No." answers."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n", prompt.strip().lower()) if part]
    last = sentences[-1] if sentences else ""
    return _YES_OR_NO.match(last) is not None and _REQUEST.match(last) is None


def asks_for_a_text(prompt: str) -> bool:
    """Tell whether a prompt asks for a text in which somebody else may speak: a letter, a story, a translation."""
    return _VOICED.search(prompt.lower()) is not None


def asks_for_another_language(prompt: str) -> bool:
    """Tell whether a prompt asks for something that may stand in another script than its own."""
    return _OTHER_LANGUAGE.search(prompt.lower()) is not None


def asks_for_signs(prompt: str) -> bool:
    """Tell whether a prompt asks for something that may be signs without words."""
    return _DRAWN.search(prompt.lower()) is not None


def asks_for_repetition(prompt: str) -> bool:
    """Tell whether a prompt asks for the same over and over."""
    return _REPEATED.search(prompt.lower()) is not None
