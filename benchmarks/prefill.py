"""Time the prefill of a batch through `generate` against a bare decoder pass with the head on the last position.

Run: python benchmarks/prefill.py MODEL_DIRECTORY [--prompts 32] [--repeats 5]

On the CPU, PyTorch's `linear` is slow on a non-contiguous slice with weights that need no gradient: with a vocabulary
of 262144 it can cost more than the rest of the prefill. The ratios show whether that happens here: both for parameters
as they are loaded and for frozen ones (`requires_grad_(False)`), they should be near 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from remove_refusals.models.batches import left_padded
from remove_refusals.models.generate import generate
from remove_refusals.models.load import LoadedModel, load

SENTENCE = "Explain in a few words how a rainforest works, and what lives in it. "


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Run a function once to warm up and then time it; return the median in seconds."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def bare_pass(loaded: LoadedModel, token_ids: list[list[int]]) -> torch.Tensor:
    """Run the decoder and the head on a contiguous last position; return the next tokens, `[n]`."""
    with torch.inference_mode():
        hidden = loaded.model.base_model(**left_padded(loaded, token_ids)).last_hidden_state
        logits: torch.Tensor = loaded.model.get_output_embeddings()(hidden[:, -1].contiguous())
        return logits.argmax(-1)


def main() -> None:
    """Print the times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    loaded = load(options.model, batch_size=options.prompts)
    token_ids = [loaded.tokenizer(SENTENCE * (1 + index % 3))["input_ids"] for index in range(options.prompts)]
    print(f"{options.prompts} prompts of up to {max(map(len, token_ids))} tokens, vocabulary {loaded.vocabulary_size}")
    for label, frozen in (("as loaded", False), ("frozen", True)):
        loaded.model.requires_grad_(not frozen)
        bare = median_seconds(lambda: bare_pass(loaded, token_ids), options.repeats)
        ours = median_seconds(lambda: generate(loaded, token_ids, max_new_tokens=1), options.repeats)
        print(f"{label:>9}: bare decoder and head {bare:.3f} s, generate {ours:.3f} s, ratio {ours / bare:.2f}")


if __name__ == "__main__":
    main()
