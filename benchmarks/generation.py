"""Time greedy answers against the model's own `generate` on the same prompts, in CPU seconds for each prompt.

    python benchmarks/generation.py MODEL [--prompts FILE] [--n 24] [--max-new-tokens 24] [--dtype bfloat16]

Plain: the model's own `generate`, 32 prompts at a time. Ours: what the prompts begin with is run once, answers that
have ended leave the batch, and its size follows the memory. Says too how many answers have the same tokens: all of
them, but where rounding decides between two tokens.
"""

import argparse
import time
from collections.abc import Callable

from remove_refusals.models.batches import in_batches, in_order
from remove_refusals.models.chat_template import render
from remove_refusals.models.generate import _finite, _run_generate, generate
from remove_refusals.models.load import load
from remove_refusals.prompts import prompts_from
from remove_refusals.settings import PromptSource


def seconds_of(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Time one call, in seconds of the CPU."""
    started = time.process_time()
    found = run()
    return time.process_time() - started, found


def main() -> None:
    """Print both times and how many answers agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    loaded = load(options.model, dtype=options.dtype)
    source = PromptSource(source=options.prompts)
    token_ids = render(loaded, prompts_from(source, "harmful", "harmful_test").prompts[: options.n])

    def ours() -> list[list[int]]:
        return [list(answer.token_ids) for answer in generate(loaded, token_ids, max_new_tokens=options.max_new_tokens)]

    def plain() -> list[list[int]]:
        def run(indices: list[int]) -> list[list[int]]:
            rows = [token_ids[index] for index in indices]
            return _run_generate(loaded, rows, options.max_new_tokens, _finite(loaded, token_ids, indices))

        return in_order(in_batches(loaded, [len(ids) for ids in token_ids], run, most=32))

    (before, expected), (after, found) = seconds_of(plain), seconds_of(ours)
    same = sum(row == other[: len(row)] for row, other in zip(found, expected, strict=True))
    n_tokens = sum(map(len, found))
    print(f"{len(token_ids)} prompts of {sum(map(len, token_ids))} tokens, {n_tokens} tokens of answers")
    print(f"plain {before / len(token_ids):.2f} s, ours {after / len(token_ids):.2f} s for each prompt on the CPU")
    print(f"ratio {before / after:.2f}; {same} of {len(found)} answers have the same tokens")


if __name__ == "__main__":
    main()
