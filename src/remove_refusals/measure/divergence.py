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

Context = Callable[[], AbstractContextManager[object]]

# How many log-probabilities of one model may be held at once: 512 MB on a GPU, 128 MB elsewhere.
_HELD, _HELD_ELSEWHERE = {"cuda": 2**27}, 2**25


@dataclass(frozen=True)
class PromptDistance:
    """Along one answer, in nats: KL of base from edited at each token, both summed negative log-likelihoods."""

    kl: tuple[float, ...]
    base_loss: float
    edited_loss: float


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Compute `sum of p (log p - log q)` (Kullback and Leibler 1951) from natural logarithms, `[n, vocabulary]` each.

    It is `[n]`, in nats, in their dtype; never negative, infinite where `q` is 0 and `p` is not.
    """
    terms = log_p.exp() * (log_p - log_q)
    # Where p is 0 the term is 0, and -inf - -inf must not make it NaN.
    terms = torch.where(log_p == -math.inf, torch.zeros_like(terms), terms)
    return terms.sum(-1).clamp(min=0)


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
    """Run both models along the first `n_tokens` of given answers, a batch at a time, and keep only numbers.

    `token_ids` are the rendered prompts. The edited model may be the base, with the edit in `edited_context`.
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
    most = min(max(1, held // (n_tokens * base.vocabulary_size)), first_batch_size(base))
    return in_order(in_batches(base, lengths, measure, most=most, progress=progress))


def _compare(base: AnswerLogits, edited: AnswerLogits, n: int) -> list[PromptDistance]:
    with torch.inference_mode():
        log_p, log_q = base.log_probabilities, edited.log_probabilities.to(base.log_probabilities.device)
        targets = base.targets.to(log_p.device)[:, None]
        losses = (-log_p.gather(1, targets)[:, 0], -log_q.gather(1, targets)[:, 0])
        columns = [column.tolist() for column in (kl_divergence(log_p, log_q), *losses)]
    rows = base.rows.tolist()
    of_prompt = [
        [[value for row, value in zip(rows, column, strict=True) if row == index] for column in columns]
        for index in range(n)
    ]
    return [PromptDistance(tuple(kl), sum(first), sum(second)) for kl, first, second in of_prompt]
