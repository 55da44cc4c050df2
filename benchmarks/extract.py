"""Time the collection of activations against a bare forward pass and against one prompt at a time.

Run: python benchmarks/extract.py MODEL [--harmful FILE --harmless FILE] [--n 400] [--repeats 3] [--original 4]

`collect_activations` takes turns with what it is compared to, batch by batch, so that a machine that others use slows
both alike; each batch counts with the median of its repeats. Its time is that from text to hidden states on the CPU,
with the derivation of the model's map.

- all layers against a bare pass: the decoder without the head, on the same batches, whose padded tensors lie ready
  before the clock starts;
- the layers up to that of a direction (0.6 of the depth), which is what `direction` and `run` collect, against the
  original way: one prompt at a time through `generate(max_new_tokens=1, use_cache=False, output_hidden_states=True)`.
  Of each batch only a few prompts go that way, evenly spaced by length, and are scaled up to the batch; `--original 0`
  runs all of them.

The prompts are the embedded ones, repeated as far as needed, unless files are given.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch

from remove_refusals.directions.activations import collect_activations
from remove_refusals.directions.direction import layer_index
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.types import ModelMap
from remove_refusals.models.batches import accepts, left_padded, longest_first
from remove_refusals.models.chat_template import render
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.progress import Progress
from remove_refusals.prompts import embedded_prompts, load_prompts
from remove_refusals.types import PromptSet

Batch = list[list[int]]


@dataclass(frozen=True)
class BatchTimes:
    """What one batch took, in seconds: ours, and what it is compared to."""

    n_prompts: int
    n_tokens: int
    ours: float
    other: float


def wait(loaded: LoadedModel) -> None:
    """Wait until the device has done what it was given."""
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()


def bare_seconds(loaded: LoadedModel, batch: Batch) -> float:
    """Time the decoder without the head on one padded batch."""
    inputs = left_padded(loaded, batch)
    extra = {"use_cache": False} if accepts(loaded, "use_cache") else {}
    decoder = getattr(loaded.model, loaded.model.base_model_prefix)
    wait(loaded)
    start = time.perf_counter()
    with torch.inference_mode():
        decoder(**inputs, **extra)
    wait(loaded)
    return time.perf_counter() - start


def original_seconds(loaded: LoadedModel, batch: Batch, layer: int, n: int | None) -> float:
    """Time `n` prompts of a batch one at a time through `generate`, keeping one hidden state; scale to the batch."""
    count = min(n or len(batch), len(batch))
    chosen = [batch[(2 * number + 1) * len(batch) // (2 * count)] for number in range(count)]
    wait(loaded)
    start = time.perf_counter()
    for ids in chosen:
        inputs = torch.tensor([ids], device=loaded.device)
        output = loaded.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=1,
            use_cache=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
            do_sample=False,
        )
        output.hidden_states[0][layer][:, -1].cpu()
    return (time.perf_counter() - start) * len(batch) / count


def time_batches(
    loaded: LoadedModel,
    model_map: ModelMap,
    sets: Sequence[PromptSet],
    n_layers: int,
    other: Callable[[Batch], float],
) -> list[BatchTimes]:
    """Collect the activations of each set, and after each batch time it in the other way.

    Args:
        loaded: The model.
        model_map: Its map.
        sets: The prompts.
        n_layers: How many layers to look at.
        other: Runs a batch and returns its seconds.

    Returns:
        The times of each batch; those of rendering are in the first of each set.
    """
    rows: list[BatchTimes] = []
    for prompts in sets:
        token_ids = render(loaded, prompts.prompts)
        order = longest_first([len(ids) for ids in token_ids])
        before, started = 0, time.perf_counter()

        def after_batch(done: int, token_ids: Batch = token_ids, order: list[int] = order) -> None:
            nonlocal before, started
            ours = time.perf_counter() - started
            batch = [token_ids[index] for index in order[before:done]]
            rows.append(BatchTimes(len(batch), sum(map(len, batch)), ours, other(batch)))
            before, started = done, time.perf_counter()

        collect_activations(
            loaded,
            prompts,
            n_layers=n_layers,
            progress=Progress(lambda _, done, total: after_batch(done)),
        )
    return rows


def repeated(prompts: PromptSet, n: int) -> PromptSet:
    """Give `n` prompts, from the beginning again where there are fewer."""
    return replace(prompts, prompts=tuple(islice(cycle(prompts.prompts), n)))


def totals(runs: Sequence[Sequence[BatchTimes]]) -> tuple[float, float]:
    """Sum up each batch's medians over the runs: ours and the other."""
    batches = list(zip(*runs, strict=True))
    return (
        sum(statistics.median(row.ours for row in rows) for rows in batches),
        sum(statistics.median(row.other for row in rows) for rows in batches),
    )


def report(
    loaded: LoadedModel,
    against_bare: Sequence[Sequence[BatchTimes]],
    against_original: Sequence[Sequence[BatchTimes]],
    map_seconds: float,
    layer: int,
) -> None:
    """Print what was run, the times, and the ratios."""
    sizes = [row.n_prompts for row in against_bare[0]]
    (all_layers, bare), (up_to_layer, original) = totals(against_bare), totals(against_original)
    all_layers, up_to_layer = all_layers + map_seconds, up_to_layer + map_seconds
    print(
        f"{sum(sizes)} prompts, {sum(row.n_tokens for row in against_bare[0])} tokens without padding, in {len(sizes)} "
        f"batches of {min(sizes)} to {max(sizes)}; {loaded.model.dtype} on {loaded.device}, {torch.get_num_threads()} "
        f"threads, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; medians of {len(against_bare)}"
    )
    print(f"ours, all layers           {all_layers:8.2f} s, {map_seconds:.2f} s of it for the map")
    print(f"bare, all layers           {bare:8.2f} s")
    print(f"ours, up to layer {layer:<3}      {up_to_layer:8.2f} s, {map_seconds:.2f} s of it for the map")
    print(f"original                   {original:8.2f} s")
    print(f"ours / bare, all layers        {all_layers / bare:6.3f}  (expected at most 1.15)")
    print(f"original / ours, up to layer {layer:<3}{original / up_to_layer:5.2f}   (expected at least 5)")
    print(f"original / ours, all layers    {original / all_layers:5.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, a hub id or 'demo'")
    parser.add_argument("--harmful", help="a file of prompts")
    parser.add_argument("--harmless", help="a file of prompts")
    parser.add_argument("--n", type=int, default=400, help="prompts of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--original", type=int, default=4, help="prompts of each batch in the original way; 0 for all")
    options = parser.parse_args()
    sets = [
        repeated(load_prompts(file, name=name) if file else embedded_prompts(f"{name}_train"), options.n)
        for name, file in (("harmful", options.harmful), ("harmless", options.harmless))
    ]
    loaded = load(options.model)
    start = time.perf_counter()
    model_map = map_model(loaded.model)
    map_seconds = time.perf_counter() - start
    layer = layer_index(0.6, model_map.n_layers)

    def bare(batch: Batch) -> float:
        return bare_seconds(loaded, batch)

    def original(batch: Batch) -> float:
        return original_seconds(loaded, batch, layer, options.original)

    warm_up = render(loaded, sets[0].prompts[:8])
    bare(warm_up)
    original(warm_up[:1])
    against_bare, against_original = [], []
    for _ in range(options.repeats):
        against_bare.append(time_batches(loaded, model_map, sets, model_map.n_layers, bare))
        against_original.append(time_batches(loaded, model_map, sets, layer, original))

    report(loaded, against_bare, against_original, map_seconds, layer)
    tried = sum(min(options.original or row.n_prompts, row.n_prompts) for row in against_original[0])
    print(f"Of the {2 * options.n} prompts, {tried} went the original way; its time is scaled up to each batch.")


if __name__ == "__main__":
    main()
