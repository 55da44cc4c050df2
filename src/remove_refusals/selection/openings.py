"""How a model opens its refusals, learned from its own answers and not from a list."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

N_OPENING_TOKENS = 6
"""How many tokens of a refusal are looked at: enough that hardly another answer begins with them."""

_MOST = 24


@dataclass(frozen=True)
class Openings:
    """The first tokens of a model's refusals.

    Attributes:
        prefixes: Token sequences, none of which is the beginning of another; the most frequent first.
    """

    prefixes: tuple[tuple[int, ...], ...]

    def branches(self, path: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Give the tokens by which another opening leaves a path, for each place on it.

        Args:
            path: The first tokens of an answer.

        Returns:
            For each token of the path the other tokens that come next in openings that share the path up to there.
        """
        found = []
        for place, token in enumerate(path):
            shared = tuple(path[:place])
            others = {prefix[place] for prefix in self.prefixes if len(prefix) > place and prefix[:place] == shared} - {
                token
            }
            found.append(tuple(sorted(others)))
        return tuple(found)

    def more(self, answers: Iterable[Sequence[int]]) -> "Openings":
        """Add the openings of more refusals."""
        return learn_openings([*self.prefixes, *answers])


def learn_openings(refusals: Iterable[Sequence[int]], n_tokens: int = N_OPENING_TOKENS) -> Openings:
    """Learn openings from refusals.

    Args:
        refusals: The tokens of answers that refuse.
        n_tokens: How many tokens of each are looked at.

    Returns:
        Their distinct first tokens, at most 24 of them; longer ones that begin with a shorter one are left out.
    """
    counts = Counter(tuple(answer[:n_tokens]) for answer in refusals if len(answer))
    kept: list[tuple[int, ...]] = []
    for prefix, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if not any(other != prefix and prefix[: len(other)] == other for other in counts):
            kept.append(prefix)
    return Openings(tuple(kept[:_MOST]))
