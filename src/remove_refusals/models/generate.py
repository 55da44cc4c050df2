"""Run a model on rendered prompts: batched greedy answers, streamed answers, log-probabilities of given answers."""

import textwrap
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextIteratorStreamer

from remove_refusals.errors import NumericalError
from remove_refusals.files import Record
from remove_refusals.models.batches import (
    accepts,
    check_prompts,
    contiguous_head,
    first_batch_size,
    in_batches,
    in_order,
    left_padded,
    n_positions,
)
from remove_refusals.models.load import LoadedModel
from remove_refusals.models.thinking import text_of
from remove_refusals.progress import SILENT, Progress


class Answer(Record):
    """A greedy continuation of one prompt: its text without special tokens; `finished` unless it was cut off."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, eq=False)
class AnswerLogits:
    """What a model predicts along given answers; one row for each answer token that was looked at.

    `rows`, `offsets` and `targets`, `[n]`, int64, are each token's answer in the batch, ascending, its place there, and
    the token; `log_probabilities`, `[n, vocabulary]`, float32, natural, are given the prompt and the answer so far.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    targets: torch.Tensor
    log_probabilities: torch.Tensor


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

    def answer(indices: Sequence[int]) -> list[Answer]:
        inputs = left_padded(loaded, [token_ids[index] for index in indices])
        watched = {"logits_processor": [_finite(loaded, token_ids, indices)]}
        found = []
        for row in _run_generate(loaded, inputs | watched, max_new_tokens)[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((index for index, token in enumerate(row) if token in ends), None)
            kept = row if length is None else row[: length + 1]
            text = text_of(loaded.tokenizer, row[:length])
            found.append(Answer(text=text, token_ids=tuple(kept), finished=length is not None))
        return found

    lengths = [len(ids) for ids in token_ids]
    return in_order(in_batches(loaded, lengths, answer, most=first_batch_size(loaded), progress=progress))


def stream(loaded: LoadedModel, token_ids: Sequence[int], *, max_new_tokens: int = 512) -> Generator[str]:
    """Continue one prompt greedily, piece by piece, as far as the model can; nothing else may run it meanwhile."""
    check_prompts(loaded, [token_ids], 1)
    n_tokens = min(max_new_tokens, (n_positions(loaded) or max_new_tokens + len(token_ids)) - len(token_ids))
    stop = threading.Event()
    streamer = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    watched = {
        "logits_processor": [_finite(loaded, [token_ids], [0])],
        # Nobody may listen any more.
        "stopping_criteria": [lambda ids, scores, **_: torch.full((1,), stop.is_set(), device=ids.device)],
        "streamer": streamer,
    }

    def run() -> None:
        try:
            _run_generate(loaded, left_padded(loaded, [token_ids]) | watched, n_tokens)
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
    inputs = left_padded(loaded, [[*ids, *tail[:-1]] for ids, tail in zip(token_ids, answers, strict=True)])
    width = max(1, *(len(tail) for tail in answers), 1)
    wanted = {"use_cache": False, "logits_to_keep": width}
    extra = {name: value for name, value in wanted.items() if accepts(loaded, name)}
    with torch.inference_mode(), contiguous_head(loaded):
        logits = loaded.model(**inputs, **extra).logits[:, -width:]
        # All sequences end at the last column, so an answer of m tokens is predicted by the last m of them.
        lengths = torch.tensor([len(tail) for tail in answers])
        rows, columns = (torch.arange(width) >= width - lengths[:, None]).nonzero(as_tuple=True)
        offsets = columns - (width - lengths[rows])
        targets = torch.tensor([token for tail in answers for token in tail], dtype=torch.int64)
        found = logits[rows.to(logits.device), columns.to(logits.device)].float().log_softmax(-1)
        broken = found.isnan().any(-1).nonzero()
    if len(broken):
        raise _not_finite(loaded, token_ids, int(rows[broken[0, 0].cpu()]))
    return AnswerLogits(rows, offsets, targets, found)


def _run_generate(loaded: LoadedModel, inputs: dict[str, Any], max_new_tokens: int) -> torch.Tensor:
    """Run the model's own `generate` greedily; return prompts and answers, `[n, length]`."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(_end_token_ids(loaded)) or None,
        pad_token_id=loaded.pad_token_id,
        bos_token_id=loaded.model.generation_config.bos_token_id,
    )
    # `generate` takes from the model's own settings whatever a given config leaves open, so they are exchanged.
    original, loaded.model.generation_config = loaded.model.generation_config, config
    try:
        with torch.inference_mode(), contiguous_head(loaded):
            continued: torch.Tensor = loaded.model.generate(**inputs)
    finally:
        loaded.model.generation_config = original
    return continued


def _end_token_ids(loaded: LoadedModel) -> set[int]:
    of_model = loaded.model.generation_config.eos_token_id
    ends = of_model if isinstance(of_model, list) else [of_model]
    return {int(token) for token in (*ends, loaded.tokenizer.eos_token_id) if token is not None}


def _finite(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], indices: Sequence[int]) -> Callable[..., Any]:
    """Make a logits processor that stops the generation at logits from which no token can be chosen."""

    def check(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The largest logit is NaN if any of them is.
        broken = (~scores.amax(-1).isfinite()).nonzero()
        if len(broken):
            raise _not_finite(loaded, token_ids, indices[int(broken[0, 0])])
        return scores

    return check


def _not_finite(loaded: LoadedModel, token_ids: Sequence[Sequence[int]], index: int) -> NumericalError:
    text = " ".join(loaded.tokenizer.decode(token_ids[index], skip_special_tokens=True).split())
    return NumericalError(
        f"The model {loaded.source} gives logits that are NaN or infinite for prompt {index + 1} of {len(token_ids)} "
        f"({textwrap.shorten(text, 100, placeholder=' …')!r}), expected finite ones; use float32 or a weaker edit."
    )
