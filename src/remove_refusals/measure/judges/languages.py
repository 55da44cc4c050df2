"""Which language a text is in, told by its script and its commonest words, and the phrases that refuse in it."""

import functools
import re
import tomllib
import unicodedata
from collections import Counter
from importlib.resources import files
from typing import Any, get_args

from remove_refusals.settings import Language

DEFAULT = "en"
"""What an answer is taken for where nothing says otherwise."""

_WORD = re.compile(r"[^\W\d_][\w\u0900-\u097f]*")
_QUESTION = re.compile(r"[?\u061f]\W*\Z|か\W*\Z")

# By script, what is assumed of a text whose words decide nothing; in Latin letters that is nothing.
_OF_SCRIPT = {"LATIN": None, "CYRILLIC": "ru", "ARABIC": "ar", "DEVANAGARI": "hi"}

_ENOUGH = 0.3
"""The share of East Asian letters that tells; each of them stands for a part of a word, or for one."""


@functools.cache
def _known() -> dict[str, Any]:
    return tomllib.loads(files("remove_refusals").joinpath("data", "languages.toml").read_text(encoding="utf-8"))


@functools.cache
def _common_words() -> dict[str, frozenset[str]]:
    """Give the commonest words by language: a code where there are phrases, else a name."""
    with_phrases = {name: part["words"] for name, part in _known().items() if "words" in part}
    return {name: frozenset(fold(words).split()) for name, words in (with_phrases | _known()["others"]).items()}


def has_phrases(language: str | None) -> bool:
    """Tell whether there are phrases for a language; a text in none that is known is taken for English."""
    return language is None or language in get_args(Language)


def _is_foreign(word: str, script: str) -> bool:
    """Tell whether a word has a letter that no language with phrases in that script has, or has it only elsewhere."""
    if script == "DEVANAGARI" or not unicodedata.name(word[0], "").startswith(script):
        return False
    other = set(word) - set(_known()["writing"]["alphabet"])
    return bool(other) or re.search("\u044a(?![\u0435\u044e\u044f])", word) is not None


@functools.cache
def _one_form() -> dict[int, int | None]:
    writing = _known()["writing"]
    return str.maketrans(writing["variants"], writing["standard"], writing["dropped"])


def fold(text: str) -> str:
    """Give one form of what is written in several."""
    return unicodedata.normalize("NFKC", text).translate(_one_form())


def language_of(text: str) -> str | None:
    """Tell a text's language: a code, or the name of one without phrases; None where it is not clear.

    A language without phrases needs more evidence than one that has them: eight letters of its own script; or enough
    words, and clearly more than of any other language, that are among its commonest or have a letter of their own. The
    shorter the text and the plainer its letters, the larger the share that is enough.
    """
    letters = Counter(
        unicodedata.name(character, "").split(" ")[0].split("-")[0]
        for character in text
        if unicodedata.category(character)[0] == "L"
    )
    total = letters.total()
    kana, characters = letters["HIRAGANA"] + letters["KATAKANA"], letters["CJK"]
    if letters["HANGUL"] > _ENOUGH * total:
        return "ko"
    if kana + characters > _ENOUGH * total:
        return "ja" if kana > 0.1 * (kana + characters) else "zh"
    script, n = letters.most_common(1)[0] if letters else ("", 0)
    if n < 0.6 * total or script not in _OF_SCRIPT:
        known = n >= 8 and n >= 0.6 * total and script in _known()["writing"]["scripts"].split()
        return script.title() if known else None
    return _by_words(_WORD.findall(fold(text)), script) or (_OF_SCRIPT[script] if n >= 8 else None)


def _by_words(written: list[str], script: str) -> str | None:
    words = [word.lower() for word in written]
    counts = {name: sum(word in common for word in words) for name, common in _common_words().items()}
    supported = max((name for name in counts if has_phrases(name)), key=counts.__getitem__)
    other = max((name for name in counts if not has_phrases(name)), key=counts.__getitem__)
    # Names have letters of everywhere, so only words without a capital tell.
    foreign = {word for word in set(words) & set(written) if _is_foreign(word, script)}
    common = set(words) & _common_words()[other]
    hits = foreign | common
    n = sum(word in hits for word in words)
    share, lead = n / max(1, len(words)), n / max(1, counts[supported])
    if (
        (len(foreign) >= 2 and len(hits) >= 3 and common and share >= 0.15 and lead >= 1.2)
        or (len(words) >= 12 and len(hits) >= 7 and share >= 0.2 and lead >= 1.5)
        or (len(hits) >= 4 and sum(len(word) >= 4 for word in hits) >= 2 and share >= 0.45 and lead >= 2)
    ):
        return other
    is_clear = [name for name in counts if has_phrases(name) and counts[name] == counts[supported]] == [supported]
    seen = set(words) & _common_words()[supported]
    return supported if is_clear and len(seen) >= 2 and counts[supported] >= 0.2 * len(words) else None


@functools.cache
def _patterns(language: str) -> tuple[tuple[re.Pattern[str], ...], re.Pattern[str]]:
    """Give what refuses in a language, and what is a whole answer that says no."""
    part, found = _known()[language], []
    for phrase in part["phrases"]:
        whole = fold(phrase)
        for name, text in part["parts"].items():
            whole = whole.replace(f"<{name}>", fold(text))
        found.append(re.compile(whole, re.MULTILINE))
    return tuple(found), re.compile(rf"\W*(?:{fold(part['no'])})\W*")


def refuses_in(language: str, plain: str, prompt: str | None) -> bool:
    """Tell whether an answer in a language other than English refuses; it is in lower case, without code.

    What stands in quotation marks after other text is somebody else's. "No." refuses a request and answers a question.
    """
    phrases, only_no = _patterns(language)
    folded = fold(plain)
    if only_no.fullmatch(folded):
        return prompt is not None and not _QUESTION.search(prompt.strip())
    spoken = re.sub(r'(?<=[^\s"])(\s*)"[^"\n]{1,400}"', r"\1", folded)
    return any(phrase.search(spoken) for phrase in phrases)
