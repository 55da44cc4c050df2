"""Numbers as a report prints them."""

import re

from remove_refusals.measure import Estimate, number, percent
from remove_refusals.types import Auroc, Contribution

_WIDE_ENDS = "\u3002\uff01\uff1f"
"""The full stop, exclamation and question mark of Chinese and Japanese, after which no space stands."""

_SENTENCE = re.compile(rf".*?(?:[.!?\u2026]+[\"')\u201d\u2019]*(?=\s|$)|[{_WIDE_ENDS}])")

_CUT_AFTER = 240
"""A first sentence longer than that is cut off there."""


def tick(value: float) -> str:
    """Print a number of a scale, without digits that say nothing."""
    shown = f"{value:g}" if abs(value) < 1e5 else f"{value:.2e}".replace(".00e", "e").replace("0e", "e")
    return shown.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


Measured = Estimate | Auroc | Contribution
"""A number with the ends of its interval."""


def interval(found: Measured) -> str:
    """Print the ends of an interval."""
    return f"[{number(found.low)}, {number(found.high)}]"


def estimate(found: Measured) -> str:
    """Print a number with its interval."""
    return f"{number(found.value)} {interval(found)}"


def percent_interval(found: Measured) -> str:
    """Print the ends of a rate's interval as percentages."""
    return f"[{percent(found.low).removesuffix('%')}, {percent(found.high)}]"


def place(share: float) -> str:
    """Print where a share lies on a line from 0 to 100; a corrected rate may lie beyond its ends."""
    return f"{100 * min(1.0, max(0.0, share)):.2f}"


def p_value(value: float) -> str:
    """Print a p-value."""
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def first_sentence(text: str) -> tuple[str, int]:
    """Give the first sentence of a text's first line, of at most 240 characters, and how many were left out."""
    whole = text.strip()
    line = whole.split("\n", 1)[0]
    found = _SENTENCE.match(line)
    sentence = (found[0] if found else line)[:_CUT_AFTER]
    return sentence, len(whole) - len(sentence)
