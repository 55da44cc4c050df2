"""Run a model on rendered prompts: batched greedy answers, streamed answers, log-probabilities of given answers."""

import copy
import functools
import math
import textwrap
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, TextIteratorStreamer

from remove_refusals.errors import NumericalError
from remove_refusals.files import Record
from remove_refusals.models.batches import (
    accepts,
    check_prompts,
    contiguous_head,
    first_batch_size,
    free_memory,
    in_batches,
    in_order,
    left_padded,
    n_positions,
    unless_out_of_memory,
)
from remove_refusals.models.chat_template import text_of
from remove_refusals.models.distributed import without_gradients
from remove_refusals.models.load import LoadedModel
from remove_refusals.processes import agreed, same_everywhere
from remove_refusals.progress import SILENT, Progress

_LEAST_SHARED = 64
"""How many tokens a common beginning has to save: it takes a forward pass of its own."""

_ERRORS: "weakref.WeakKeyDictionary[PreTrainedModel, dict[bool, float]]" = weakref.WeakKeyDictionary()
"""What `_error` measured of a model, with a common beginning and without one; NaN is measured again."""


class Answer(Record):
    """A greedy continuation of one prompt: its text without special tokens; `finished` unless it was cut off."""

    text: str
    token_ids: tuple[int, ...] = Field(repr=False)
    finished: bool


@dataclass(frozen=True, eq=False)
class AnswerLogits:
    """What a model predicts along given answers; one row for each answer token that was looked at.

    `rows`, `offsets` and `targets`, `[n]`, int64, are each token's answer in the batch, ascending, its place there, and
    the token; `logits`, `[n, vocabulary]`, in the model's data type, are given the prompt and the answer so far.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    targets: torch.Tensor
    logits: torch.Tensor


def generate(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 100,
    progress: Progress = SILENT,
) -> list[Answer]:
    """Continue rendered prompts greedily; of the model's own generation settings only the end tokens apply."""
    check_prompts(loaded, token_ids, max_new_tokens)
    ends = _end_token_ids(loaded)
    held = unless_out_of_memory(lambda rows: begin(loaded, rows, max_new_tokens), token_ids)
    begun = None if held is None else held[0]
    decode = _run_generate if begun is None else functools.partial(_decode, begun)

    def answer(indices: Sequence[int]) -> list[Answer]:
        rows, check = [token_ids[index] for index in indices], _finite(loaded, token_ids, indices)
        found = []
        for row in decode(loaded, rows, max_new_tokens, check):
            length = next((index for index, token in enumerate(row) if token in ends), None)
            kept = row if length is None else row[: length + 1]
            text = text_of(loaded.tokenizer, row[:length])
            found.append(Answer(text=text, token_ids=tuple(kept), finished=length is not None))
        return found

    lengths = [len(ids) for ids in token_ids]
    most = _batch_size(loaded, begun, max(lengths, default=0) + max_new_tokens)
    return agreed(in_order(in_batches(loaded, lengths, answer, most=most, progress=progress)))


@dataclass(frozen=True, eq=False)
class Beginning:
    """The tokens that all prompts of a call begin with, maybe none, and what attention keeps of them, for one row."""

    n_tokens: int
    cache: Any

    def rest(self, loaded: LoadedModel, token_ids: Sequence[Sequence[int]]) -> tuple[dict[str, torch.Tensor], Any]:
        """Give the arguments of `forward` for the rest of the prompts, and a cache for as many rows."""
        inputs, cache = left_padded(loaded, [ids[self.n_tokens :] for ids in token_ids]), copy.deepcopy(self.cache)
        if self.n_tokens:
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.n_tokens), mask], dim=1)
            inputs["position_ids"] += self.n_tokens
            cache.batch_repeat_interleave(len(token_ids))
        return inputs, cache


def begin(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], n_new_tokens: int = 0) -> Beginning | None:
    """Run what prompts begin with, where that saves work; None where it is not exact to go on from a cache.

    The last token of a prompt is never part of it, so that what a model says behind a prompt can be read off the rest.
    """
    takes_all = accepts(loaded, "position_ids") and accepts(loaded, "use_cache")
    errors, tolerated = _ERRORS.setdefault(loaded.model, {}), 1e-3 if loaded.model.dtype == torch.float32 else 0.1
    known = any(error > tolerated for error in errors.values())
    if len(token_ids) < 2 or loaded.is_offloaded or not takes_all or known:
        return None
    longest, shortest = max(token_ids, key=len), min(token_ids, key=len)
    columns = enumerate(zip(*token_ids, strict=False))
    n = next((index for index, column in columns if len(set(column)) > 1), len(shortest))
    n = min(n, len(shortest) - 1)
    begun = Beginning(0, None)
    with without_gradients(loaded.model), contiguous_head(loaded):
        if n * (len(token_ids) - 1) >= _LEAST_SHARED:
            _, cache = _run(loaded, left_padded(loaded, [longest[:n]]))
            if not _is_of_attention(cache):
                errors[True] = math.inf
                return None
            # Padding lies between the beginning and the rest, where a window over the last tokens would count it.
            windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
            if all(window is None or len(longest) + n_new_tokens <= window for window in windows):
                begun = Beginning(n, cache)
        if not errors.get(begun.n_tokens > 0, math.nan) >= 0:
            looked_at = min((row for row in token_ids if len(row) > n + 1), key=len, default=longest)
            error = torch.tensor(_error(loaded, begun, looked_at), device=loaded.device)
            same_everywhere(error, within=loaded.layout.size)
            errors[begun.n_tokens > 0] = float(error)
    return begun if errors[begun.n_tokens > 0] <= tolerated else None


def continued(
    loaded: LoadedModel, token_ids: Sequence[Sequence[int]], begun: Beginning | None
) -> dict[str, torch.Tensor | Any]:
    """Give the arguments of `forward` for one pass over prompts: what they begin with comes from a cache, if it can."""
    if begun is None or not begun.n_tokens:
        return {**left_padded(loaded, token_ids), **({"use_cache": False} if accepts(loaded, "use_cache") else {})}
    inputs, cache = begun.rest(loaded, token_ids)
    return {**inputs, "use_cache": True, _cache_name(loaded): cache}


def _batch_size(loaded: LoadedModel, begun: Beginning | None, n_tokens: int) -> int:
    """Pick how many prompts, of so many tokens with their answers, to generate for at once."""
    room, first = free_memory(loaded), first_batch_size(loaded)
    if room is not None and not loaded.batch_size and (begun is None or not begun.n_tokens):
        # Keys and values of every head, and the logits: no process can go on with fewer prompts alone.
        config = loaded.model.config.get_text_config(decoder=True)
        each: int = 2 * config.num_hidden_layers * config.hidden_size * loaded.model.dtype.itemsize
        return max(1, min(first, room // 2 // (each * n_tokens + 8 * loaded.vocabulary_size)))
    if loaded.batch_size or begun is None or not begun.n_tokens or loaded.device.type not in ("cpu", "cuda"):
        return first
    kept = [tensor for layer in begun.cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    # And the last logits in float32, twice.
    row: int = sum(tensor.nbytes for tensor in kept) // begun.n_tokens * n_tokens + 8 * loaded.vocabulary_size
    if loaded.device.type == "cuda":
        least = 128 if room is None else 1
        return min(512, max(least, (room or int(torch.cuda.mem_get_info(loaded.device)[0])) // 2 // row))
    from accelerate.utils import get_max_memory

    return agreed(min(64, max(1, int(get_max_memory()["cpu"]) // 2 // row)))


def _error(loaded: LoadedModel, begun: Beginning, prompt: Sequence[int]) -> float:
    """Measure how far a padded pass from a cache and a step from there are from a pass without a cache."""
    rows = [prompt, prompt[: begun.n_tokens + 1]]
    inputs, cache = begun.rest(loaded, rows)
    again = torch.tensor([prompt[-1]] * 2, device=loaded.device)
    try:
        _, cache = _run(loaded, inputs, cache)
        if not _is_of_attention(cache):
            return math.inf
        found, _ = _run(loaded, _step(inputs, again), cache)
    except IndexError:
        # A model that runs its layers again may keep more than its cache has layers for.
        return math.inf
    whole, _ = _run(loaded, left_padded(loaded, [[*row, prompt[-1]] for row in rows]))
    return float((found - whole).std() / whole.std())


def _is_of_attention(cache: Any) -> bool:
    """Whether nothing but keys and values is kept, which padding leaves alone and rows can be taken from."""
    known = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    return type(cache) is DynamicCache and known.issuperset(type(layer).__name__ for layer in cache.layers)


def _run(loaded: LoadedModel, inputs: dict[str, torch.Tensor], cache: Any = None) -> tuple[torch.Tensor, Any]:
    """Run tokens behind what a cache holds; give the last logits, float32, and the cache with the tokens in it."""
    name = _cache_name(loaded)
    extra = {"logits_to_keep": 1} if accepts(loaded, "logits_to_keep") else {}
    output = loaded.model(**inputs, use_cache=True, **extra, **({} if cache is None else {name: cache}))
    return output.logits[:, -1].float(), getattr(output, name, None)


def _cache_name(loaded: LoadedModel) -> str:
    # It depends on the version of Transformers.
    return "cache" if accepts(loaded, "cache") else "past_key_values"


def _step(inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give the arguments of `forward` for the next token of each row."""
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return {"input_ids": tokens[:, None], "attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}


def _decode(
    begun: Beginning,
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    n_new_tokens: int,
    check: Callable[..., None],
) -> list[list[int]]:
    """Continue prompts greedily; a row that has ended leaves the batch."""
    ends = _end_token_ids(loaded)
    answers: list[list[int]] = [[] for _ in token_ids]
    running = list(range(len(token_ids)))
    with without_gradients(loaded.model), contiguous_head(loaded):
        inputs, cache = begun.rest(loaded, token_ids)
        while True:
            logits, cache = _run(loaded, inputs, cache)
            check(logits, running)
            tokens = logits.argmax(-1).to(loaded.device)
            same_everywhere(tokens, within=loaded.layout.size)
            for row, token in zip(running, tokens.tolist(), strict=True):
                answers[row].append(token)
            going = [index for index, row in enumerate(running) if answers[row][-1] not in ends]
            if not going or len(answers[running[0]]) == n_new_tokens:
                return answers
            if len(going) < len(running):
                running = [running[index] for index in going]
                # On the CPU, since layers may lie on several devices.
                kept = torch.tensor(going)
                tokens, inputs["attention_mask"] = tokens[kept], inputs["attention_mask"][kept]
                cache.batch_select_indices(kept)
            inputs = _step(inputs, tokens)


def stream(
    loaded: LoadedModel, token_ids: Sequence[int], *, max_new_tokens: int = 512, temperature: float = 0.0
) -> Generator[str]:
    """Continue one prompt, piece by piece, as far as the model can; nothing else may run it meanwhile.

    At temperature 0 it is greedy; else tokens are drawn with PyTorch's random numbers, from all of the vocabulary.
    """
    check_prompts(loaded, [token_ids], 1)
    n_tokens = min(max_new_tokens, (n_positions(loaded) or max_new_tokens + len(token_ids)) - len(token_ids))
    stop = threading.Event()
    streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    watched = {
        # Nobody may listen any more.
        "stopping_criteria": [lambda ids, scores, **_: torch.full((1,), stop.is_set(), device=ids.device)],
        "streamer": streamer,
        "temperature": temperature,
    }

    def run() -> None:
        try:
            _run_generate(loaded, [token_ids], n_tokens, _finite(loaded, [token_ids], [0]), **watched)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(run)
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
        future.result()


def answer_logits(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    n_tokens: int,
) -> AnswerLogits:
    """Run one batch of prompts with given answers and say what the model predicts at the answers' first tokens.

    It holds `n_tokens * vocabulary` logits for each prompt, so keep batches small.
    """
    check_prompts(loaded, token_ids, n_tokens)
    answers = [list(ids[:n_tokens]) for ids in answer_ids]
    whole = [[*ids, *tail[:-1]] for ids, tail in zip(token_ids, answers, strict=True)]
    width = max(1, *(len(tail) for tail in answers), 1)
    extra = {"logits_to_keep": width} if accepts(loaded, "logits_to_keep") else {}
    begun = begin(loaded, token_ids, width)
    with without_gradients(loaded.model), contiguous_head(loaded):
        inputs = continued(loaded, whole, begun)
        logits = loaded.model(**inputs, **extra).logits[:, -width:]
        # All sequences end at the last column, so an answer of m tokens is predicted by the last m of them.
        lengths = torch.tensor([len(tail) for tail in answers])
        rows, columns = (torch.arange(width) >= width - lengths[:, None]).nonzero(as_tuple=True)
        offsets = columns - (width - lengths[rows])
        targets = torch.tensor([token for tail in answers for token in tail], dtype=torch.int64)
        full = len(rows) == logits.shape[0] * width
        found = logits.flatten(0, 1) if full else logits[rows.to(logits.device), columns.to(logits.device)]
        # The largest logit is NaN if any of them is.
        broken = (~found.amax(-1).isfinite()).nonzero()
    if len(broken):
        raise _not_finite(loaded, token_ids, int(rows[broken[0, 0].cpu()]))
    return AnswerLogits(rows, offsets, targets, found)


def _run_generate(
    loaded: LoadedModel,
    token_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    check: Callable[..., None],
    *,
    temperature: float = 0.0,
    **watched: Any,
) -> list[list[int]]:
    """Run the model's own `generate`, greedily at temperature 0; return the answers, filled up with padding."""
    inputs = left_padded(loaded, token_ids)
    rows = range(len(token_ids))

    def checked(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check(scores, rows)
        return scores

    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how = drawn if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        **how,
        eos_token_id=sorted(_end_token_ids(loaded)) or None,
        pad_token_id=loaded.pad_token_id,
        bos_token_id=loaded.model.generation_config.bos_token_id,
    )
    # `generate` takes from the model's own settings whatever a given config leaves open, so they are exchanged.
    original, loaded.model.generation_config = loaded.model.generation_config, config
    try:
        with without_gradients(loaded.model), contiguous_head(loaded):
            continued: torch.Tensor = loaded.model.generate(**inputs, logits_processor=[checked], **watched)
    finally:
        loaded.model.generation_config = original
    answers: list[list[int]] = continued[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


def _end_token_ids(loaded: LoadedModel) -> set[int]:
    of_model = loaded.model.generation_config.eos_token_id
    ends = of_model if isinstance(of_model, list) else [of_model]
    return {int(token) for token in (*ends, loaded.tokenizer.eos_token_id) if token is not None}


def _finite(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], indices: Sequence[int]) -> Callable[..., None]:
    """Make a check that stops the generation at logits, of some rows, from which no token can be chosen."""

    def check(scores: torch.Tensor, rows: Sequence[int]) -> None:
        # The largest logit is NaN if any of them is.
        broken = (~scores.amax(-1).isfinite()).nonzero()
        if len(broken):
            raise _not_finite(loaded, token_ids, indices[rows[int(broken[0, 0])]])

    return check


def _not_finite(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], index: int) -> NumericalError:
    text = " ".join(loaded.tokenizer.decode(token_ids[index], skip_special_tokens=True).split())
    return NumericalError(
        f"The model {loaded.source} gives logits that are NaN or infinite for prompt {index + 1} of {len(token_ids)} "
        f"({textwrap.shorten(text, 100, placeholder=' …')!r}), expected finite ones; use float32 or a weaker edit."
    )
