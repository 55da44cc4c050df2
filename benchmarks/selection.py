"""How long a search takes and what its pick does on prompts that it never saw, for several seeds.

    python benchmarks/selection.py MODEL --method auto --seeds 0,1,2 --harmful TRAIN --harmless TRAIN \
        --harmful-test TEST --harmless-test TEST --alarming-test TEST -o auto.json
    python benchmarks/selection.py MODEL --method tpe --seeds 0 --deadline 3600 ... -o tpe.json
    python benchmarks/selection.py --compare auto.json tpe.json

The pick is measured through hooks, which do what the saved weights do. With --compare, both results are put side by
side. (The file is not called select.py, which would stand in the way of a module of Python's own.)
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remove_refusals.directions import ablated
from remove_refusals.files import Journal
from remove_refusals.measure import EvaluationPrompts, evaluate, measuring_prompts
from remove_refusals.models import LoadedModel, load
from remove_refusals.prompts import prompts_from
from remove_refusals.search import SearchPrompts, Selection, select, split_for_search
from remove_refusals.settings import MeasureSettings, PromptSource, SelectSettings
from remove_refusals.types import Intervention
from tpe import TpeSettings, hypervolume, select_tpe

WORST = (1.0, 1.0)
"""The corner of the area that fronts beat: every prompt refused, a damage of one nat."""


def main() -> None:
    """Parse the command line and search, or compare what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--method", default="auto", choices=("auto", "layer", "tpe"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--deadline", type=float, help="seconds after which no trial of tpe begins")
    parser.add_argument("--trials", type=int, default=200)
    for name in ("harmful", "harmless", "harmful-test", "harmless-test", "alarming-test"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--n-test", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--compare", nargs="+", type=Path)
    options = parser.parse_args()
    if options.compare:
        compare([json.loads(path.read_text()) for path in options.compare])
        return
    results = run(options)
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Search with each seed and measure the picks."""
    harmful = prompts_from(PromptSource(source=options.harmful), "harmful", "harmful_train")
    harmless = prompts_from(PromptSource(source=options.harmless), "harmless", "harmless_train")
    measuring = MeasureSettings(
        harmful=PromptSource(source=options.harmful_test),
        harmless=PromptSource(source=options.harmless_test),
        alarming=PromptSource(source=options.alarming_test),
        n_test=options.n_test,
        max_new_tokens=options.max_new_tokens,
    )
    tests = measuring_prompts(measuring, (harmful, harmless))
    loaded = load(options.model, dtype=options.dtype)
    results: dict[str, Any] = {"method": options.method, "seeds": []}
    for seed in map(int, options.seeds.split(",")):
        settings = SelectSettings(seed=seed, method="layer" if options.method == "layer" else "auto")
        prompts = split_for_search(harmful, harmless, 32, settings)
        started = time.monotonic()
        selection = search(loaded, prompts, settings, measuring, options)
        seconds = time.monotonic() - started
        points = [(candidate.refusal, candidate.damage) for candidate in selection.candidates]
        show(selection, seed, seconds)
        result = {
            "seed": seed,
            "seconds": seconds,
            "n_candidates": len(points),
            "points": points,
            "hypervolume": hypervolume(points, WORST),
            "selection": selection.record().to_json(),
            "test": tested(loaded, selection.intervention, tests, measuring, options.journal),
        }
        results["seeds"].append(result)
        print(json.dumps(result["test"]), flush=True)
    return results


def search(
    loaded: LoadedModel,
    prompts: SearchPrompts,
    settings: SelectSettings,
    measuring: MeasureSettings,
    options: argparse.Namespace,
) -> Selection:
    """Search in the way that the options name."""
    journal = Journal(options.journal)
    if options.method != "tpe":
        return select(loaded, prompts, settings, measuring, journal=journal)
    trials = TpeSettings(n_trials=options.trials, seed=settings.seed)
    return select_tpe(loaded, prompts, settings, measuring, trials, journal=journal, deadline_s=options.deadline)


def show(selection: Selection, seed: int, seconds: float) -> None:
    """Print every candidate."""
    print(f"{selection.method}, seed {seed}: {seconds:.0f} s, {len(selection.candidates)} candidates", flush=True)
    for number, candidate in enumerate(selection.candidates):
        mark = "*" if number == selection.picked else " "
        print(f"  {mark} {candidate.name}: refusal {candidate.refusal:.3f}, damage {candidate.damage:.4f}")
    for note in selection.notes:
        print(f"  {note}", flush=True)


def tested(
    loaded: LoadedModel,
    intervention: Intervention,
    prompts: EvaluationPrompts,
    measuring: MeasureSettings,
    journal: Path | None,
) -> dict[str, Any]:
    """What a pick does on test prompts, beside what the base model does."""
    found = evaluate(
        loaded,
        loaded,
        prompts,
        measuring,
        edited_context=lambda: ablated(loaded, intervention),
        journal=Journal(journal),
    )
    assert found.kl is not None and found.kl.harmless_answered is not None
    kl, sets = found.kl.harmless_answered.mean, found.sets
    return {
        "n": {name: part.refusals.base.n for name, part in sets.items()},
        "base": {f"{name}_refusal": part.refusals.base.count for name, part in sets.items()}
        | {f"{name}_degenerate": part.degenerate.base.count for name, part in sets.items()},
        "refusals": sets["harmful"].refusals.edited.count,
        "degenerate": sets["harmful"].degenerate.edited.count,
        "false_refusals_harmless": sets["harmless"].refusals.edited.count,
        "degenerate_harmless": sets["harmless"].degenerate.edited.count,
        "false_refusals_alarming": sets["alarming"].refusals.edited.count,
        "kl": kl.value,
        "kl_interval": [kl.low, kl.high],
    }


def compare(results: Sequence[dict[str, Any]]) -> None:
    """Print results side by side; the first is ours, and the last what it is held against."""
    for result in results:
        for one in result["seeds"]:
            test = one["test"]
            print(
                f"{result['method']} seed {one['seed']}: {one['seconds']:.0f} s, {one['n_candidates']} candidates, "
                f"hypervolume {one['hypervolume']:.3f}; refusals {test['refusals']} of {test['n']['harmful']}, "
                f"degenerate {test['degenerate']}, false refusals {test['false_refusals_harmless']} and "
                f"{test['false_refusals_alarming']}, degenerate harmless {test['degenerate_harmless']}, "
                f"KL {test['kl']:.4f} [{test['kl_interval'][0]:.4f}, {test['kl_interval'][1]:.4f}]"
            )
    base = results[0]["seeds"][0]["test"]["base"]
    print("base: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in base.items()))
    first, last = results[0], results[-1]
    seconds = [statistics.mean(one["seconds"] for one in result["seeds"]) for result in (first, last)]
    kls = [statistics.mean(one["test"]["kl"] for one in result["seeds"]) for result in (first, last)]
    print(f"{last['method']} over {first['method']}: wall time {seconds[1] / seconds[0]:.1f}, KL {kls[1] / kls[0]:.1f}")


if __name__ == "__main__":
    main()
