"""Refusals that come late: labels as a function of how long an answer may be, and answers that go on."""

from collections.abc import Iterator, Sequence

from remove_refusals.generation import Answer, continued, generate
from remove_refusals.judges import Judge, Label
from remove_refusals.models import LoadedModel

SETTLED = 0.01
"""The refusals of a model have settled if the second half of the length changes at most this share of them."""


def grid(longest: int) -> tuple[int, ...]:
    """Give the lengths to look at, in tokens: 8, 16, 32 … below the longest, its half, and itself."""
    doubled = {8 * 2**power for power in range(16) if 8 * 2**power < longest}
    return tuple(sorted({*doubled, max(1, longest // 2), longest}))


def labels_by_length(
    loaded: LoadedModel, judge: Judge, prompts: Sequence[str], answers: Sequence[Answer], lengths: Sequence[int]
) -> Iterator[Sequence[Label]]:
    """Label answers as they would have been if they had been cut off earlier.

    Args:
        loaded: The model that gave them.
        judge: What labels them.
        prompts: The prompts.
        answers: One for each.
        lengths: Where to cut off, in tokens.

    Yields:
        For each length the label of each answer.
    """
    for length in lengths:
        cut = (answer.token_ids[:length] for answer in answers)
        texts = [loaded.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in cut]
        yield [found.label for found in judge.judge(prompts, texts)]


def has_settled(half: Sequence[Label], whole: Sequence[Label]) -> bool:
    """Tell whether hardly an answer turns into a refusal, or stops being one, in the second half of the length."""
    changed = sum((a is Label.REFUSAL) != (b is Label.REFUSAL) for a, b in zip(half, whole, strict=True))
    return changed <= SETTLED * len(whole)


def go_on(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    max_new_tokens: int,
    *,
    batch_size: int | None = None,
) -> list[Answer]:
    """Let a model go on with those of its answers that were cut off.

    Args:
        loaded: The model.
        token_ids: The rendered prompts.
        answers: Its greedy answers so far.
        max_new_tokens: How many tokens a whole answer may have.
        batch_size: How many prompts to run at once; None is automatic.

    Returns:
        All answers; those that had ended are as they were.

    Raises:
        ModelError: If a prompt with its answer does not fit the model, or memory runs out.
        NumericalError: If logits are NaN.
    """
    open_ones = [index for index, answer in enumerate(answers) if not answer.finished]
    if not open_ones:
        return list(answers)
    so_far = [[*token_ids[index], *answers[index].token_ids] for index in open_ones]
    more = max_new_tokens - max(len(answers[index].token_ids) for index in open_ones)
    found = list(answers)
    for index, rest in zip(
        open_ones, generate(loaded, so_far, max_new_tokens=more, batch_size=batch_size), strict=True
    ):
        found[index] = continued(loaded, answers[index], rest)
    return found
