"""What spreading a model costs and whether it gives the same: hooks on each token, a device map, and torchrun.

    python benchmarks/distributed.py MODEL -o distributed.json
    python benchmarks/distributed.py MODEL -o distributed.json --device-map '{"": "cpu"}' --reference cpu
    torchrun --nproc-per-node 2 benchmarks/distributed.py MODEL -o distributed.json --tp auto

Without torchrun the model is loaded as a whole or as `--device-map` says, with it as `--tp` and `--replicas` say. On a
GPU a model of 1.5B takes a few minutes.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from remove_refusals.directions import ablated, collect_activations, direction_from_vectors, intervene
from remove_refusals.files import Record
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel, fits_twice, generate, load_model, render
from remove_refusals.processes import is_first, joined, n_processes
from remove_refusals.progress import Progress
from remove_refusals.prompts import embedded_prompts
from remove_refusals.settings import LoadSettings, published_name
from remove_refusals.types import PromptSet


class Spread(Record):
    """What was measured: seconds are the least of three, `hook_overhead` is what hooks add to an answer's seconds."""

    model: str
    layout: str
    n_processes: int
    devices: tuple[str, ...]
    fits_twice: bool
    activations_seconds: float
    answers_seconds: float
    hooked_seconds: float
    hook_overhead: float
    tokens: int
    apart: float | None = None
    """How far activations are from the reference's, relative to the largest."""
    same_answers: int | None = None


def seconds(loaded: LoadedModel, ids: Sequence[list[int]], context: AbstractContextManager[None]) -> tuple[float, int]:
    """Give the least of three times that a model takes to answer in a context, and how many tokens it gives."""
    with context:
        answers = generate(loaded, ids, max_new_tokens=24)
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            answers = generate(loaded, ids, max_new_tokens=24)
            taken.append(time.perf_counter() - began)
    return min(taken), sum(len(answer.token_ids) for answer in answers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-map", type=lambda text: json.loads(text) if text.startswith("{") else text)
    parser.add_argument("--tp")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--reference", help="a device that holds the whole model, to compare with")
    parser.add_argument("--n-prompts", type=int, default=16)
    options = parser.parse_args(arguments)
    prompts = PromptSet("harmless", embedded_prompts("harmless_test").prompts[: options.n_prompts], "embedded")
    said: list[str] = []
    given = {name: getattr(options, name) for name in ("device", "dtype", "device_map", "tp", "replicas")}
    with joined():
        loaded = load_model(options.model, LoadSettings(**given), progress=Progress(on_note=said.append))
        ids = render(loaded, prompts.prompts)
        began = time.perf_counter()
        hidden = collect_activations(loaded, prompts).hidden
        took = time.perf_counter() - began
        plain, n = seconds(loaded, ids, nullcontext())
        vector = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        # So little is taken out that the answers stay the same.
        little = intervene(direction_from_vectors(vector), map_model(loaded.model).n_layers, strength=1e-6)
        hooked, n_hooked = seconds(loaded, ids, ablated(loaded, little))
        apart = same = None
        if options.reference is not None:
            other = load_model(options.model, LoadSettings(device=options.reference, dtype=options.dtype))
            expected = collect_activations(other, prompts).hidden
            apart = float((hidden - expected).abs().max() / expected.abs().max())
            pairs = zip(*(generate(one, ids, max_new_tokens=24) for one in (loaded, other)), strict=True)
            same = sum(first == second for first, second in pairs)
        record = Spread(
            model=published_name(loaded.source),
            layout=said[0] if said else f"device map {options.device_map}",
            n_processes=n_processes(),
            devices=tuple(sorted({str(parameter.device) for parameter in loaded.model.parameters()})),
            fits_twice=fits_twice(loaded),
            activations_seconds=took,
            answers_seconds=plain,
            hooked_seconds=hooked,
            hook_overhead=(hooked / n_hooked) / (plain / n) - 1,
            tokens=n,
            apart=apart,
            same_answers=same,
        )
        if is_first():
            record.write(options.output, force=True)
            print(json.dumps(record.to_json(), indent=2))


if __name__ == "__main__":
    main()
