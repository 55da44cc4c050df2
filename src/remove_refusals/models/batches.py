"""Batches of token sequences: padding on the left, an order that wastes little, back-off when memory runs out."""

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from remove_refusals.errors import ModelError, PromptError
from remove_refusals.models.load import LoadedModel, model_of
from remove_refusals.processes import gathered, is_first, number
from remove_refusals.progress import SILENT, Progress

B = TypeVar("B")
R = TypeVar("R")

MOST_PROMPTS = 128
"""How many prompts `fitting_pass` puts into one forward pass at most."""

# PyTorch has no exception type of its own for memory that runs out on the CPU or on Apple's GPU.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)


def left_padded(loaded: LoadedModel, token_ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Pad token sequences on the left; give the arguments of the model's `forward`, `[n, length]`, on its device.

    Whatever runs the model gets its arguments here, so that nothing is run which it cannot take.
    """
    check_prompts(loaded, token_ids)
    length = max(len(ids) for ids in token_ids)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in token_ids])
    inputs = {
        "input_ids": torch.tensor([[loaded.pad_token_id] * (length - len(ids)) + list(ids) for ids in token_ids]),
        "attention_mask": mask,
    }
    if accepts(loaded, "position_ids"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {name: tensor.to(loaded.device) for name, tensor in inputs.items()}


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Order prompts by falling length: little padding is wasted, and the batch that needs most memory comes first."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def in_batches(
    loaded: LoadedModel,
    lengths: Sequence[int],
    run: Callable[[Sequence[int]], R],
    *,
    most: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[Sequence[int], R]]:
    """Run prompts batch by batch, the longest first; a batch that memory is too small for is halved.

    Yields the indices of each batch with what `run`, which leaves nothing behind when memory runs out, gave for them. A
    batch has `most` prompts, else the model's batch size, else as many as keep the device busy and pad little. Where
    several groups of processes hold a copy of the model, each runs its share, and all get everything, on the CPU.
    """
    layout, order, room = loaded.layout, longest_first(lengths), free_memory(loaded)
    if layout.replicas == 1:
        yield from _batches(loaded, lengths, order, run, most or loaded.batch_size, room, progress)
        return
    own, told = order[number() // layout.size :: layout.replicas], progress if is_first() else SILENT
    parts = gathered(lambda: list(_batches(loaded, lengths, own, run, most or loaded.batch_size, room, told)))
    for part in parts[:: layout.size]:
        yield from part
    progress.done(len(order))


def _batches(
    loaded: LoadedModel,
    lengths: Sequence[int],
    order: Sequence[int],
    run: Callable[[Sequence[int]], R],
    asked: int | None,
    room: int | None,
    progress: Progress,
) -> Iterator[tuple[Sequence[int], R]]:
    done, size = 0, asked or MOST_PROMPTS
    while done < len(order):
        batch = order[done : done + size]
        if asked is None:
            batch = batch[: fitting_pass(loaded, [lengths[index] for index in batch], room)]
        result = unless_out_of_memory(run, batch)
        if result is not None:
            yield batch, result[0]
            done += len(batch)
            progress.done(done)
        elif loaded.layout.size > 1:
            raise ModelError(
                f"Memory ran out in process {number()} with a batch of {len(batch)} prompts, expected room for it: one "
                "of several processes cannot go on with fewer alone; pass a smaller --batch-size."
            )
        elif len(batch) == 1:
            raise ModelError(
                "Memory ran out with a batch of 1 prompt, expected room for it; use shorter prompts, a smaller data "
                "type or a larger device."
            )
        else:
            size = len(batch) // 2


def in_order(batches: Iterable[tuple[Sequence[int], Sequence[R]]]) -> list[R]:
    """Put what `in_batches` gave, a result for each prompt, into the order of the prompts."""
    found = {index: one for indices, results in batches for index, one in zip(indices, results, strict=True)}
    return [found[index] for index in range(len(found))]


def first_batch_size(loaded: LoadedModel) -> int:
    """Pick how many prompts to generate for at once: as many as was asked for, or as suit the kind of device."""
    return loaded.batch_size or (128 if loaded.device.type == "cuda" else 32)


def free_memory(loaded: LoadedModel) -> int | None:
    """Say how many bytes the fullest GPU has left, where processes have to agree on batches; None where not."""
    if loaded.layout.size == 1 or loaded.device.type != "cuda":
        return None
    return min(gathered(lambda: int(torch.cuda.mem_get_info(loaded.device)[0])))


def fitting_pass(loaded: LoadedModel, lengths: Sequence[int], room: int | None = None) -> int:
    """Tell how many prompts of falling lengths make a forward pass that keeps the device busy and pads little."""
    # Tokens of the pass, padding included, and how many may be padding. On a CPU, 1500 tokens are as quick for each as
    # any number (more fall out of its cache), and a pass of its own costs about as much as 30 tokens.
    tokens, padding = (1500, 64) if loaded.device.type == "cpu" else (32768, 1024)
    if room is not None:
        # Streams, what attention reads and writes, and the inside of an MLP, generously.
        config = loaded.model.config.get_text_config(decoder=True)
        each = 8 * config.hidden_size + 4 * int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
        tokens = max(1, min(tokens, room // 2 // (each * loaded.model.dtype.itemsize)))
    padded = 0
    for n, length in enumerate(lengths[:MOST_PROMPTS]):
        padded += lengths[0] - length
        if n and (padded > padding or (n + 1) * lengths[0] > tokens):
            return n
    return min(len(lengths), MOST_PROMPTS)


def check_prompts(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    n_new_tokens: int = 0,
    prompts: Sequence[str] | None = None,
) -> None:
    """Check that the model can take each prompt and some new tokens, before any work is done."""
    limit = n_positions(loaded)
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    for index, ids in enumerate(token_ids):
        long = limit is not None and limit < len(ids) + n_new_tokens
        if ids and not long and 0 <= min(ids) <= max(ids) < vocabulary:
            continue
        text = loaded.tokenizer.decode(ids, skip_special_tokens=True) if prompts is None else prompts[index]
        text = " ".join(text.split())
        prompt = f"The prompt {text if len(text) <= 80 else f'{text[:80]} …'!r}"
        if not ids:
            raise PromptError(f"{prompt} has 0 tokens, expected at least 1; leave empty prompts out.")
        if long:
            more = f" and {n_new_tokens} more are wanted" if n_new_tokens else ""
            raise ModelError(
                f"{prompt} has {len(ids)} tokens{more}, expected at most {limit} in all, for which the model has "
                f"positions; shorten it{' or ask for fewer' if n_new_tokens else ' or take it out'}."
            )
        raise ModelError(
            f"{prompt} has the token {max(ids) if max(ids) >= vocabulary else min(ids)}, expected tokens from 0 to "
            f"{vocabulary - 1}, for which the model has embeddings; use the tokenizer that belongs to the model."
        )


def n_positions(loaded: LoadedModel) -> int | None:
    """Tell how many tokens the model can hold, prompt and answer together; None if its config sets no limit."""
    config = loaded.model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def accepts(loaded: LoadedModel, argument: str) -> bool:
    """Tell whether the model's `forward` takes an argument of this name; an adapter around it is looked through."""
    return argument in inspect.signature(model_of(loaded.model).forward).parameters


@contextmanager
def hooked(
    model: torch.nn.Module,
    *,
    before: Iterable[tuple[str, Callable[..., Any]]] = (),
    behind: Iterable[tuple[str, Callable[..., Any]]] = (),
) -> Iterator[None]:
    """Hook named modules (the model itself is "") as long as the context lasts, in the order of the pairs.

    `before` is called as `hook(module, args, kwargs)`, `behind` as `hook(module, args, kwargs, output)`; what they give
    stands in the place of the arguments and of the output.
    """
    with ExitStack() as hooks:
        for name, hook in before:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for name, hook in behind:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        yield


def contiguous_head(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Make the unembedding's input contiguous as long as the context lasts.

    The slice of the last positions is not; where weights need no gradient (PEFT), the CPU's `linear` is then slow (32
    prompts of a 270M model: the prefill 1.7 times) and, in some versions of PyTorch, needs gigabytes.
    """
    head = loaded.model.get_output_embeddings()

    def contiguous(module: torch.nn.Module, inputs: Any, options: Any) -> Any:
        return tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs), options

    return nullcontext() if head is None else hooked(head, before=[("", contiguous)])


def unless_out_of_memory(function: Callable[[B], R], batch: B) -> tuple[R] | None:
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
