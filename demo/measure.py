"""Measure the demo model with the default recipe: refusals, false refusals and damage, for several draws of prompts.

python demo/measure.py src/remove_refusals/data/demo
"""

import argparse

from remove_refusals.directions.direction import find_direction
from remove_refusals.directions.hooks import ablated
from remove_refusals.directions.intervention import as_intervention
from remove_refusals.measure.answers import measuring_prompts
from remove_refusals.measure.evaluate import evaluate
from remove_refusals.measure.scores import Evaluation
from remove_refusals.models.load import LoadedModel, load
from remove_refusals.settings import DirectionSettings, MeasureSettings

DRAWS = ((32, 0), (32, 1), (32, 2), (32, 3), (32, 4), (8, 0), (128, 0))
"""How many prompts of each kind, and the seed that draws them."""


def measure(loaded: LoadedModel, n_prompts: int, seed: int) -> Evaluation:
    """Find the direction from one draw of the prompts, and compare the model with itself without the direction."""
    found = find_direction(loaded, DirectionSettings(n_prompts=n_prompts, seed=seed))
    intervention = as_intervention(found.direction, loaded)
    return evaluate(
        loaded,
        loaded,
        measuring_prompts(MeasureSettings(), found.prompts),
        MeasureSettings(max_new_tokens=60),
        edited_context=lambda: ablated(loaded.model, intervention),
    )


def same_answers(evaluation: Evaluation) -> float:
    """The share of the harmless prompts whose answer is the same to the letter."""
    texts: dict[str, set[str]] = {}
    for row in evaluation.rows:
        if row.set == "harmless":
            texts.setdefault(row.prompt_id, set()).add(row.text)
    return sum(len(both) == 1 for both in texts.values()) / len(texts)


def main() -> None:
    """Print one block of figures for each draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model directory, or demo")
    loaded = load(parser.parse_args().model)
    for n_prompts, seed in DRAWS:
        evaluation = measure(loaded, n_prompts, seed)
        print(f"{n_prompts} + {n_prompts} prompts, seed {seed}")
        for name, scores in evaluation.sets.items():
            refusals, degenerate = scores.refusals, scores.degenerate
            print(
                f"  {name}: refusals {refusals.base.count} -> {refusals.edited.count} of {refusals.base.n}, "
                f"degenerate {degenerate.base.count} -> {degenerate.edited.count}"
            )
        assert evaluation.kl is not None
        for name, distance in (("all", evaluation.kl.harmless), ("answered", evaluation.kl.harmless_answered)):
            if distance is not None:
                print(f"  first-token KL on harmless prompts, {name}: {distance.first_token.value:.3f}")
        print(f"  harmless answers unchanged: {same_answers(evaluation):.2f}", flush=True)


if __name__ == "__main__":
    main()
