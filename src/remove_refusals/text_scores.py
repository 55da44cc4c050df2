"""How well both models predict a text of the user's."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remove_refusals.distances import Context, distances_along
from remove_refusals.errors import PromptError
from remove_refusals.metrics import Mean, Perplexity, mean_with_interval, perplexity
from remove_refusals.models import LoadedModel

WINDOW = 256
"""How many tokens are predicted from one start; a text is cut into windows of so many."""


@dataclass(frozen=True)
class TextScores:
    """What was found on a text, cut into windows.

    Attributes:
        base: The base model's perplexity, with an interval over windows.
        edited: The edited model's.
        kl: The KL divergence of a token, base from edited, in nats; averaged over each window, mean over windows.
    """

    base: Perplexity
    edited: Perplexity
    kl: Mean

    def to_json(self) -> dict[str, Any]:
        """Give the attributes; `prompts_sha256` in them is the hash of the file."""
        return {name: part.to_json() for name, part in vars(self).items()}


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        PromptError: If it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"The text {path} cannot be read ({error}), expected a file in UTF-8; check the path and the encoding."
        ) from error
    if not text.strip():
        raise PromptError(f"The text {path} is empty, expected at least a paragraph; name another file.")
    return text


def score_text(
    base: LoadedModel,
    edited: LoadedModel,
    text: str,
    *,
    edited_context: Context = nullcontext,
    batch_size: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> TextScores:
    """Measure the perplexity of a text under both models, and how far apart their predictions are along it.

    The text is cut into windows of `WINDOW` tokens that do not overlap; each begins with the tokenizer's start token
    where it has one, otherwise its first token is not predicted.

    Args:
        base: The base model.
        edited: The edited model; it may be the same one, with the edit in `edited_context`.
        text: The text.
        edited_context: Entered around every run of the edited model.
        batch_size: How many windows to run at once; None is automatic.
        seed: The seed of the intervals.
        on_progress: Called with the number of windows that are done.

    Returns:
        The scores.

    Raises:
        PromptError: If the text has less than two tokens.
        ModelError: If memory runs out.
        NumericalError: If logits are NaN.
    """
    tokens = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts, windows = _cut(tokens, base.tokenizer.bos_token_id)
    if not windows:
        raise PromptError(f"The text has {len(tokens)} tokens, expected at least 2; name a longer one.")
    found = distances_along(
        base,
        edited,
        starts,
        windows,
        WINDOW,
        edited_context=edited_context,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    counts, sha = [len(window) for window in windows], hashlib.sha256(text.encode()).hexdigest()
    first = perplexity([distance.base_loss for distance in found], counts, sha, seed=seed)
    second = perplexity([distance.edited_loss for distance in found], counts, sha, seed=seed)
    kl = mean_with_interval([sum(distance.kl) / len(distance.kl) for distance in found], sha, seed=seed)
    assert first is not None and second is not None and kl is not None
    return TextScores(first, second, kl)


def _cut(tokens: list[int], start: int | None) -> tuple[list[list[int]], list[list[int]]]:
    windows = [tokens[place : place + WINDOW] for place in range(0, len(tokens), WINDOW)]
    if start is not None:
        return [[start] for _ in windows], windows
    windows = [window for window in windows if len(window) > 1]
    return [window[:1] for window in windows], [window[1:] for window in windows]
