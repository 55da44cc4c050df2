"""Time an evaluation against the bare generation of the same batches.

    python benchmarks/evaluate.py MODEL [--n-test 150] [--max-new-tokens 100] [--dtype bfloat16]

Bare: both models generate greedily for all prompts, through the model's own `generate`, in the batches that the
evaluation uses; nothing is labelled or compared. The ratio should be at most 1.2. Base and edited model are the same
one here, loaded twice, since what an edit does to the time is how much longer answers get. The two take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from remove_refusals.measure.answers import EvaluationPrompts
from remove_refusals.measure.evaluate import evaluate
from remove_refusals.models.batches import first_batch_size, left_padded, longest_first
from remove_refusals.models.chat_template import render
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import prompts_from
from remove_refusals.settings import MeasureSettings, PromptSource
from remove_refusals.types import PromptSet


def bare_generation(loaded: LoadedModel, prompts: EvaluationPrompts, max_new_tokens: int) -> int:
    """Generate for all prompts, batch by batch; return how many tokens came."""
    ends = loaded.model.generation_config.eos_token_id
    n_tokens = 0
    for part in prompts.by_name().values():
        token_ids = render(loaded, part.prompts)
        order, size = longest_first([len(ids) for ids in token_ids]), first_batch_size(loaded)
        for start in range(0, len(order), size):
            inputs = left_padded(loaded, [token_ids[index] for index in order[start : start + size]])
            with torch.inference_mode():
                found = loaded.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=loaded.pad_token_id,
                )
            n_tokens += found[:, inputs["input_ids"].shape[1] :].numel()
    return n_tokens


def seconds_of(function: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--n-test", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    for name in ("harmful-test", "harmless-test", "alarming-test"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    base, edited = (load(options.model, dtype=options.dtype) for _ in range(2))

    def first(prompts: PromptSet) -> PromptSet:
        return PromptSet(prompts.name, prompts.prompts[: options.n_test], prompts.source)

    prompts = EvaluationPrompts(
        first(prompts_from(PromptSource(source=options.harmful_test), "harmful", "harmful_test")),
        first(prompts_from(PromptSource(source=options.harmless_test), "harmless", "harmless_test")),
        first(prompts_from(PromptSource(source=options.alarming_test), "alarming", "harmless_alarming")),
    )
    settings = MeasureSettings(max_new_tokens=options.max_new_tokens)
    bare, ours = [], []
    for _ in range(options.repeats):
        bare.append(
            sum(
                seconds_of(lambda m=model: bare_generation(m, prompts, options.max_new_tokens))
                for model in (base, edited)
            )
        )
        ours.append(seconds_of(lambda: evaluate(base, edited, prompts, settings)))
    sizes = " + ".join(str(len(part)) for part in prompts.by_name().values())
    before, after = statistics.median(bare), statistics.median(ours)
    print(f"{sizes} prompts, {options.max_new_tokens} tokens, two models")
    print(f"bare generation {before:.1f} s, evaluation {after:.1f} s: ratio {after / before:.2f}")


if __name__ == "__main__":
    main()
