"""Batches of token sequences: padding on the left, an order that wastes little, back-off when memory runs out."""

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from remove_refusals.errors import ModelError, PromptError
from remove_refusals.models.load import LoadedModel

T = TypeVar("T")


R = TypeVar("R")


_FIRST_BATCH_SIZE = {"cuda": 128}


_FIRST_BATCH_SIZE_ELSEWHERE = 32


# Tokens of one forward pass, padding included, and how many of them may be padding. On a CPU, a pass of 1500 tokens is
# as quick for each token as any (more fall out of its cache), and a pass of its own costs about as much as 30 tokens.
_TOKENS, _TOKENS_ELSEWHERE = {"cpu": 1500}, 32768


_PADDING, _PADDING_ELSEWHERE = {"cpu": 64}, 1024


MOST_PROMPTS = 128
"""How many prompts `fitting_pass` puts into one forward pass at most."""


# PyTorch has no exception type of its own for memory that runs out on the CPU or on Apple's GPU.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token sequences padded on the left to one length, so that all of them end at the last column.

    Attributes:
        input_ids: `[n, length]`, int64.
        attention_mask: `[n, length]`, int64; 0 where padded.
        position_ids: `[n, length]`, int64; counted from 0 at each sequence's first token, 0 where padded.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor

    def inputs(self, loaded: LoadedModel) -> dict[str, Any]:
        """Give the arguments for the model's `forward`, on its device; positions only if it takes them."""
        tensors = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if accepts(loaded, "position_ids"):
            tensors["position_ids"] = self.position_ids
        return {name: tensor.to(loaded.device) for name, tensor in tensors.items()}


def left_pad(token_ids: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Pad token sequences on the left.

    Args:
        token_ids: At least one sequence, none of them empty.
        pad_id: The token to fill up with; it is masked.

    Returns:
        The batch, on the CPU.

    Raises:
        PromptError: If a sequence is empty.
    """
    if any(len(ids) == 0 for ids in token_ids):
        raise PromptError("A rendered prompt has 0 tokens, expected at least 1; leave empty prompts out.")
    length = max(len(ids) for ids in token_ids)
    input_ids = torch.tensor([[pad_id] * (length - len(ids)) + list(ids) for ids in token_ids])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in token_ids])
    return TokenBatch(input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))


def longest_first(token_ids: Sequence[Sequence[int]]) -> list[int]:
    """Order prompts so that batches waste little padding and the one that needs most memory comes first.

    Returns:
        The indices of the prompts by falling length; equally long ones keep their order.
    """
    return sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))


def with_backoff(
    function: Callable[[Sequence[T]], R],
    items: Sequence[T],
    batch_size: int,
    *,
    fitting: Callable[[Sequence[T]], int] = len,
) -> Iterator[tuple[Sequence[T], R]]:
    """Run a function over batches; when memory runs out, halve the batch size and go on from where it failed.

    Args:
        function: Called with consecutive items; a call that runs out of memory must leave nothing behind.
        items: All items.
        batch_size: How many to begin with.
        fitting: Given the next so many items, says how many of them, at least 1, make a batch; by default all.

    Yields:
        Each batch with its result, in order; every item is in one batch.

    Raises:
        ModelError: If memory runs out with a single item.
    """
    start, size = 0, max(1, batch_size)
    while start < len(items):
        batch = items[start : start + size]
        batch = batch[: fitting(batch)]
        result = _unless_out_of_memory(function, batch)
        if result is not None:
            yield batch, result[0]
            start += len(batch)
        elif len(batch) == 1:
            raise ModelError(
                "Memory ran out with a batch of 1 prompt, expected room for it; use shorter prompts, a smaller data "
                "type or a larger device."
            )
        else:
            size = len(batch) // 2


def first_batch_size(loaded: LoadedModel, batch_size: int | None) -> int:
    """Pick the batch size to begin with: the one that was asked for, or one that suits the kind of device."""
    return batch_size or _FIRST_BATCH_SIZE.get(loaded.device.type, _FIRST_BATCH_SIZE_ELSEWHERE)


def fitting_pass(loaded: LoadedModel, lengths: Sequence[int]) -> int:
    """Tell how many prompts go into one forward pass, so that the device is busy and little of it is padding.

    Args:
        loaded: The model, whose device decides.
        lengths: The prompts' numbers of tokens, falling.

    Returns:
        The number of prompts, counted from the first; at least 1.
    """
    device = loaded.device.type
    tokens, padding = _TOKENS.get(device, _TOKENS_ELSEWHERE), _PADDING.get(device, _PADDING_ELSEWHERE)
    padded = 0
    for n, length in enumerate(lengths[:MOST_PROMPTS]):
        padded += lengths[0] - length
        if n and (padded > padding or (n + 1) * lengths[0] > tokens):
            return n
    return min(len(lengths), MOST_PROMPTS)


def check_prompts(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], n_new_tokens: int = 0) -> None:
    """Check that the model can take each prompt and some new tokens, before any work is done.

    Raises:
        PromptError: If a prompt has no tokens.
        ModelError: If a prompt with the new tokens is longer than the model's positions, or has a token that is not
            in its vocabulary.
    """
    limit = n_positions(loaded)
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    for number, ids in enumerate(token_ids, start=1):
        if len(ids) == 0:
            raise PromptError(f"Prompt {number} has 0 tokens, expected at least 1; leave empty prompts out.")
        if limit is not None and limit < len(ids) + n_new_tokens:
            raise ModelError(
                f"Prompt {number} has {len(ids)} tokens and {n_new_tokens} more are wanted, expected at most {limit} "
                "together; shorten it or ask for fewer."
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ModelError(
                f"Prompt {number} has the token {max(ids)}, expected tokens from 0 to {vocabulary - 1}; use the "
                "tokenizer that belongs to the model."
            )


def n_positions(loaded: LoadedModel) -> int | None:
    """Tell how many tokens the model can hold, prompt and answer together; None if its config sets no limit."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def accepts(loaded: LoadedModel, argument: str) -> bool:
    """Tell whether the model's `forward` takes an argument of this name; an adapter around it is looked through."""
    model = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    return argument in inspect.signature(model.forward).parameters


@contextmanager
def contiguous_head(loaded: LoadedModel) -> Iterator[None]:
    """Make the unembedding's input contiguous as long as the context lasts.

    The slice of the last positions is not, and with weights that need no gradient (as in every model that PEFT has
    touched) the CPU's `linear` then takes a path over the batch that is slower and, in some versions of PyTorch, needs
    gigabytes: with 32 prompts, the whole prefill of a 270M model with a vocabulary of 262144 took 1.7 times as long.
    """
    head = loaded.model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(
        lambda _, inputs: tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs)
    )
    try:
        yield
    finally:
        handle.remove()


def _unless_out_of_memory(function: Callable[[Sequence[T]], R], batch: Sequence[T]) -> tuple[R] | None:
    """Run a batch; return its result in a tuple, or None when memory ran out, with what it held given back."""
    try:
        return (function(batch),)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
    # Only here, after the handler, is the traceback gone that kept the batch's tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
