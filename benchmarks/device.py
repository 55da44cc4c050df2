"""The whole job on one device, timed stage by stage: `run` with its defaults, and what it measured of its result.

    python benchmarks/device.py MODEL -o device.json --device cuda --dtype bfloat16
    python benchmarks/device.py demo -o device.json --device cpu --n-test 8 --max-new-tokens 16

On a GPU a model of 1.5B takes a few minutes. `results.py --page` writes the record up.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from remove_refusals import pipeline, progress
from remove_refusals.files import Record
from remove_refusals.measure import Evaluation
from remove_refusals.models import pick_device
from remove_refusals.settings import (
    LoadSettings,
    MeasureSettings,
    PromptSource,
    RunSettings,
    SelectSettings,
    published_name,
)
from results_stages import Cost, Machine, Seconds, device_memory, machine, seconds_of


class Device(Record):
    """What `run` took on one device, and what it measured of its result.

    Of the process's start, the imports, the cost has the processor seconds alone.
    """

    model: str
    dtype: str
    machine: Machine
    cost: Cost
    steps: dict[str, Seconds]
    evaluation: Evaluation
    warnings: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--select", choices=("auto", "layer", "none"), default="auto")
    for name in ("harmful-test", "harmless-test", "alarming-test"):
        parser.add_argument(f"--{name}", help="a file of prompts; by default the embedded set")
    parser.add_argument("--n-test", type=int, help="at most so many prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    options = parser.parse_args(arguments)
    settings = RunSettings(
        model=options.model,
        loading=LoadSettings(device=options.device, dtype=options.dtype),
        batch_size=options.batch_size,
        select=None if options.select == "none" else SelectSettings(method=options.select),
        measure=MeasureSettings(
            harmful=PromptSource(source=options.harmful_test),
            harmless=PromptSource(source=options.harmless_test),
            alarming=PromptSource(source=options.alarming_test),
            n_test=options.n_test,
            max_new_tokens=options.max_new_tokens,
        ),
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        result = pipeline.run(settings, Path(directory) / "edited")
    memory = progress.peak_memory()[0]
    cost = Cost(wall_s=time.monotonic() - started, cpu_s=time.process_time(), peak_memory=memory, **device_memory())
    record = Device(
        model=published_name(options.model),
        dtype=options.dtype,
        machine=machine(str(pick_device(options.device))),
        cost=cost,
        steps=seconds_of(result.costs),
        evaluation=result.evaluation,
        warnings=result.warnings,
    )
    record.write(options.output, force=True)
    for step, took in record.steps.items():
        print(f"{step}: {took.wall_s:.1f} s, {took.cpu_s:.1f} s of processors")
    print(f"in all {cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of processors")


if __name__ == "__main__":
    main()
