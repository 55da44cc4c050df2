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

from remove_refusals.measure.answers import EvaluationPrompts
from remove_refusals.measure.judges.labels import Label
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.types import ModelMap
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.prompts import check_disjoint, prompts_from
from remove_refusals.search.candidates import Candidate, hypervolume
from remove_refusals.search.references import References, confirm, references
from remove_refusals.search.search import SearchPrompts, select, split_for_search
from remove_refusals.settings import MeasureSettings, PromptSource, SelectSettings
from remove_refusals.types import PromptSet

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
    tests = EvaluationPrompts(
        prompts_from(PromptSource(source=options.harmful_test), "harmful", "harmful_test"),
        prompts_from(PromptSource(source=options.harmless_test), "harmless", "harmless_test"),
        prompts_from(PromptSource(source=options.alarming_test), "alarming", "harmless_alarming"),
    ).by_name()
    check_disjoint(harmful, harmless, *tests.values())
    loaded = load(options.model, dtype=options.dtype)
    model_map = map_model(loaded.model)
    results: dict[str, Any] = {"method": options.method, "seeds": []}
    own: dict[str, References] = {}
    for seed in map(int, options.seeds.split(",")):
        settings = SelectSettings(method=options.method, seed=seed)
        prompts = split_for_search(harmful, harmless, 32, settings)
        result = search(loaded, model_map, prompts, settings, options)
        if not own:
            own = {
                name: references(loaded, first(part, options.n_test), MeasureSettings()) for name, part in tests.items()
            }
        result["test"] = measure(loaded, model_map, result.pop("pick"), own)
        results["seeds"].append(result)
        print(json.dumps(result["test"]), flush=True)
    return results


def first(prompts: PromptSet, n: int | None) -> PromptSet:
    """The first prompts of a set."""
    return PromptSet(prompts.name, prompts.prompts[:n], prompts.source)


def search(
    loaded: LoadedModel,
    model_map: ModelMap,
    prompts: SearchPrompts,
    settings: SelectSettings,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One search, timed; prints every candidate."""
    started = time.monotonic()
    selection = select(
        loaded, prompts, settings, model_map=model_map, journal=options.journal, deadline_s=options.deadline
    )
    seconds = time.monotonic() - started
    print(
        f"{settings.method}, seed {settings.seed}: {seconds:.0f} s, {len(selection.candidates)} candidates", flush=True
    )
    for number, candidate in enumerate(selection.candidates):
        mark = "*" if number == selection.picked else " "
        print(f"  {mark} {candidate.name}: refusal {candidate.refusal:.3f}, damage {candidate.damage:.4f}")
    for note in selection.notes:
        print(f"  {note}", flush=True)
    points = [(candidate.refusal, candidate.damage) for candidate in selection.candidates]
    return {
        "seed": settings.seed,
        "seconds": seconds,
        "n_candidates": len(points),
        "points": points,
        "hypervolume": hypervolume(points, WORST),
        "selection": selection.record().to_json(),
        "pick": selection.candidate,
    }


def measure(loaded: LoadedModel, model_map: ModelMap, pick: Candidate, own: dict[str, References]) -> dict[str, Any]:
    """What a pick does on test prompts, beside what the base model does."""
    answers = MeasureSettings()
    found = confirm(loaded, pick.intervention, model_map, own["harmful"], own["harmless"], answers)
    alarming = confirm(loaded, pick.intervention, model_map, own["alarming"], own["alarming"], answers)
    base = {
        f"{name}_{label}": sum(own_label is label for own_label in part.labels)
        for name, part in own.items()
        for label in (Label.REFUSAL, Label.DEGENERATE)
    }
    assert found.damage is not None
    return {
        "n": {name: len(part) for name, part in own.items()},
        "base": base,
        "refusals": found.refusals.count,
        "degenerate": found.degenerate.count,
        "false_refusals_harmless": found.false_refusals.count,
        "degenerate_harmless": found.degenerate_harmless.count,
        "false_refusals_alarming": alarming.refusals.count,
        "kl": found.damage.value,
        "kl_interval": [found.damage.low, found.damage.high],
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
