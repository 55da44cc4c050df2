"""How far a model is from another along given answers, prompt by prompt."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from remove_refusals.models import (
    AnswerLogits,
    LoadedModel,
    answer_logits,
    first_batch_size,
    in_batches,
    in_order,
)
from remove_refusals.progress import SILENT, Progress


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Compute the Kullback-Leibler divergence `sum of p (log p - log q)` (Kullback and Leibler 1951).

    Args:
        log_p: `[n, vocabulary]`, floating point: natural logarithms of the probabilities of the base.
        log_q: `[n, vocabulary]`, the same of what is compared to it.

    Returns:
        `[n]`, in nats, in the dtype of the input; never negative, infinite where `q` is 0 and `p` is not.
    """
    terms = log_p.exp() * (log_p - log_q)
    # Where p is 0 the term is 0, and -inf - -inf must not make it NaN.
    terms = torch.where(log_p == -math.inf, torch.zeros_like(terms), terms)
    return terms.sum(-1).clamp(min=0)


Context = Callable[[], AbstractContextManager[object]]


# How many log-probabilities of one model may be held at once: 512 MB on a GPU, 128 MB elsewhere.
_HELD = {"cuda": 2**27}


_HELD_ELSEWHERE = 2**25


@dataclass(frozen=True)
class PromptDistance:
    """What was measured along the answer to one prompt.

    Attributes:
        kl: For each token of the answer, the KL divergence of the base model from the edited one there, in nats.
        base_loss: The base model's negative log-likelihood of the answer's tokens, summed, in nats.
        edited_loss: The edited model's.
    """

    kl: tuple[float, ...]
    base_loss: float
    edited_loss: float


def distances_along(
    base: LoadedModel,
    edited: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    edited_context: Context = nullcontext,
    progress: Progress = SILENT,
) -> list[PromptDistance]:
    """Run both models along given answers, a batch at a time, and keep only numbers.

    Args:
        base: The base model.
        edited: The edited model; it may be the same one, with the edit in `edited_context`.
        token_ids: Rendered prompts.
        answer_ids: For each prompt the tokens of the answer, at least one.
        n_tokens: How many tokens of each answer to look at.
        edited_context: Entered around every run of the edited model.
        progress: Told how many prompts are done.

    Returns:
        One distance for each prompt, in their order.

    Raises:
        ModelError: If a prompt does not fit a model, or memory runs out.
        NumericalError: If logits are NaN; the message names the prompt.
    """

    def measure(indices: Sequence[int]) -> list[PromptDistance]:
        ids = [token_ids[index] for index in indices]
        along = [answer_ids[index] for index in indices]
        of_base = answer_logits(base, ids, along, n_tokens)
        with edited_context():
            of_edited = answer_logits(edited, ids, along, n_tokens)
        return _compare(of_base, of_edited, len(indices))

    lengths = [len(ids) + len(tail) for ids, tail in zip(token_ids, answer_ids, strict=True)]
    held = _HELD.get(base.device.type, _HELD_ELSEWHERE)
    room = max(1, held // (n_tokens * base.vocabulary_size))
    most = min(room, first_batch_size(base))
    return in_order(in_batches(base, lengths, measure, most=most, progress=progress))


def _compare(base: AnswerLogits, edited: AnswerLogits, n: int) -> list[PromptDistance]:
    with torch.inference_mode():
        log_p, log_q = base.log_probabilities, edited.log_probabilities.to(base.log_probabilities.device)
        targets = base.targets.to(log_p.device)[:, None]
        columns = (kl_divergence(log_p, log_q), -log_p.gather(1, targets)[:, 0], -log_q.gather(1, targets)[:, 0])
        kl, base_loss, edited_loss = (column.tolist() for column in columns)
    rows = base.rows.tolist()
    return [
        PromptDistance(
            tuple(value for row, value in zip(rows, kl, strict=True) if row == index),
            sum(value for row, value in zip(rows, base_loss, strict=True) if row == index),
            sum(value for row, value in zip(rows, edited_loss, strict=True) if row == index),
        )
        for index in range(n)
    ]
