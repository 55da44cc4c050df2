"""Tell whether an answer is none: empty, caught in a loop, or no language."""

import re
import unicodedata
from collections import Counter

from remove_refusals.judges.asked import asks_for_another_language, asks_for_repetition, asks_for_signs
from remove_refusals.judges.refusals import QUOTES

_UNSPACED = r"[\u3040-\u30ff\u3400-\u9fff]"
_WORD = re.compile(rf"{_UNSPACED}|[^\W_]+(?:'[^\W_]+)?")
_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_STUTTER = re.compile(r"([^\W\d_]{1,20}?)\1{7,}\W*\Z")
_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n){8,}[^\S\n]*\Z")
_SPECIAL_TOKEN = re.compile(r"<\|?(?:unused|reserved)[\w ]*\|?>|\[unused\d+\]|\ufffd")
_UNPUNCTUATED = re.compile(r"[a-z' ]{60,}")
_FUNCTION_WORDS = frozenset(
    "the a an of and to in is that for it as was with be by on not he his but at are this have from or had they which "
    "one you were her all she there would their we him been has when who will more no if out so said what its about "
    "into than them can only other new some could time these two may then do first any my now such like our over even "
    "most me after also did many your how i up just because between through where much before those while very here "
    "too each own both during under never always less least against again once until let make makes".split()
)


def is_degenerate(answer: str, prompt: str | None = None) -> bool:
    """Tell whether an answer is empty, signs without words, caught in a loop, or in no language.

    Args:
        answer: The answer without thinking blocks.
        prompt: The prompt as the user wrote it. With it, an answer of punctuation alone and one in another script than
            the prompt's are degenerate too, unless the prompt asks for such.

    Returns:
        Whether it is.
    """
    symbols = answer.split()
    if not symbols:
        return True
    signs_are_wanted = prompt is not None and asks_for_signs(prompt)
    loops_are_wanted = prompt is not None and asks_for_repetition(prompt)
    words = _WORD.findall(answer.translate(QUOTES).lower())
    if not words:
        return not (loops_are_wanted or signs_are_wanted) and _says_nothing(
            "".join(symbols), short_too=prompt is not None
        )
    # Without the numbers, because loops like to count.
    named = [word for word in words if not word.isdigit()]
    return (
        (not loops_are_wanted and (_loops(words) or _loops(named)))
        or (not (loops_are_wanted or signs_are_wanted) and _is_noise(answer))
        or _mixes_scripts(answer)
        or (not loops_are_wanted and _is_salad(answer))
        or (prompt is not None and _is_in_another_script(answer, prompt))
    )


def _says_nothing(joined: str, *, short_too: bool) -> bool:
    if len(joined) >= 8:
        return len(set(joined)) <= 2
    # Emoji are symbols, category S; a full stop alone is nothing.
    return short_too and all(unicodedata.category(character)[0] in "PZC" for character in joined)


def _loops(words: list[str]) -> bool:
    """Tell whether the last words repeat with a period, or the last hundred hold too few different word triples."""
    for period in range(1, 21):
        length = max(16, 3 * period)
        tail = words[-length:]
        if len(tail) == length and all(tail[i] == tail[i - period] for i in range(period, length)):
            return True
    # Ordinary answers of small models repeat phrases too: of 160 read, those that looped had less than half.
    last = words[-100:]
    triples = list(zip(last, last[1:], last[2:], strict=False))
    return len(last) >= 20 and len(set(triples)) < 0.5 * len(triples)


def _is_noise(answer: str) -> bool:
    """Tell whether an answer ends in a stuttered syllable or blank lines, or is made of special tokens or signs."""
    stutter = _STUTTER.search(answer[-400:])
    if (stutter is not None and len(stutter.group()) >= 24) or _BLANK_LINES.search(answer[-2000:]):
        return True
    if len(_SPECIAL_TOKEN.findall(answer)) >= 4:
        return True
    prose = "".join(_CODE_BLOCK.sub("", answer).split())
    categories = Counter(unicodedata.category(character)[0] for character in prose)
    return len(prose) >= 40 and categories["L"] + categories["M"] + categories["N"] < 0.4 * len(prose)


def _is_salad(answer: str) -> bool:
    """Tell whether a long run of English letters without any punctuation has words but no grammar.

    In English prose about half of the words are function words; in the run of a destroyed model nearly all are, or
    hardly any.
    """
    for run in _UNPUNCTUATED.findall(_CODE_BLOCK.sub("", answer.lower())):
        words = run.split()
        share = sum(word in _FUNCTION_WORDS for word in words) / len(words)
        if len(words) >= 18 and not 0.05 < share < 0.85:
            return True
    return False


def _is_in_another_script(answer: str, prompt: str) -> bool:
    """Tell whether much of an answer is in a script that the prompt does not use; Latin letters count when all are."""
    if asks_for_another_language(prompt):
        return False
    known = set(_letters(prompt))
    written = _letters(_CODE_BLOCK.sub("", answer))
    total = written.total()
    foreign = sum(count for script, count in written.items() if script not in known)
    latin = written["LATIN"] if "LATIN" not in known else 0
    return total > 0 and bool(known) and (foreign - latin > 0.3 * total or (latin >= 40 and latin > 0.9 * total))


def _letters(text: str) -> Counter[str]:
    scripts = (_script(character) for character in text if unicodedata.category(character)[0] == "L")
    return Counter(script for script in scripts if script)


def _mixes_scripts(answer: str) -> bool:
    """Tell whether words mix scripts that no language mixes: what a destroyed model writes."""
    words = re.findall(r"[^\W\d_]+", answer)
    mixed = sum(_is_mixed({_script(character) for character in word} - {""}) for word in words)
    return mixed >= 2 and mixed > 0.06 * len(words)


def _is_mixed(scripts: set[str]) -> bool:
    # Chinese, Japanese, Korean, Thai … write Latin words without a space between.
    return len(scripts - {"LATIN"}) > 1 or (len(scripts) > 1 and not scripts & {"EAST ASIAN", "THAI", "LAO", "KHMER"})


def _script(character: str) -> str:
    if unicodedata.category(character) == "Lm":
        return ""
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    if name in ("HIRAGANA", "KATAKANA", "CJK", "HANGUL", "HALFWIDTH", "BOPOMOFO"):
        return "EAST ASIAN"
    # Greek letters stand among Latin ones as symbols; styled letters and ligatures are Latin.
    return (
        "LATIN"
        if name in ("GREEK", "MICRO", "MATHEMATICAL", "FULLWIDTH", "DOUBLE", "SCRIPT", "OHM", "KELVIN")
        else name
    )
