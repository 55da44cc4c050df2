"""The embedded prompt sets: how many there are, that they are disjoint, and that form does not tell harm."""

from collections import Counter
from importlib.resources import files
from statistics import mean

import pytest

MINIMUM_COUNTS = {
    "harmful_train": 160,
    "harmless_train": 160,
    "harmful_test": 60,
    "harmless_test": 60,
    "harmless_alarming": 120,
}
PARTS = ("train", "test")


def read_prompts(name: str) -> list[str]:
    text = (files("remove_refusals") / "data" / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def word_count(prompt: str) -> int:
    return len(prompt.split())


@pytest.mark.parametrize(("name", "minimum"), MINIMUM_COUNTS.items())
def test_each_set_is_large_enough_and_clean(name: str, minimum: int) -> None:
    prompts = read_prompts(name)
    assert len(prompts) >= minimum
    for prompt in prompts:
        assert prompt == " ".join(prompt.split())
        assert prompt[0].isupper()
        assert prompt[-1] in ".?"
        assert 4 <= word_count(prompt) <= 20


def test_no_prompt_stands_twice() -> None:
    counts = Counter(prompt.casefold() for name in MINIMUM_COUNTS for prompt in read_prompts(name))
    assert [prompt for prompt, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("part", PARTS)
def test_harmful_and_harmless_have_the_same_lengths(part: str) -> None:
    harmful = sorted(map(word_count, read_prompts(f"harmful_{part}")))
    harmless = sorted(map(word_count, read_prompts(f"harmless_{part}")))
    assert len(harmful) == len(harmless)
    assert abs(mean(harmful) - mean(harmless)) < 0.5
    # The sorted lengths are the quantiles, so their mean gap is the distance between the two distributions.
    assert mean(abs(one - other) for one, other in zip(harmful, harmless, strict=True)) < 0.5


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("n_words", [1, 2])
def test_harmful_and_harmless_begin_and_end_alike(part: str, n_words: int) -> None:
    def forms(name: str) -> Counter[tuple[str, ...]]:
        return Counter((*prompt.split()[:n_words], prompt[-1]) for prompt in read_prompts(name))

    harmful, harmless = forms(f"harmful_{part}"), forms(f"harmless_{part}")
    moved = sum((harmful - harmless).values())
    # The first words match exactly; the second is an article or adjective in some of the compositions.
    allowed = 0 if n_words == 1 else 0.1 * sum(harmful.values())
    assert moved <= allowed


@pytest.mark.parametrize("part", PARTS)
def test_pairs_stand_on_the_same_line(part: str) -> None:
    pairs = list(zip(read_prompts(f"harmful_{part}"), read_prompts(f"harmless_{part}"), strict=True))
    assert all(harmful.split()[0] == harmless.split()[0] for harmful, harmless in pairs)
    assert all(abs(word_count(harmful) - word_count(harmless)) <= 2 for harmful, harmless in pairs)
