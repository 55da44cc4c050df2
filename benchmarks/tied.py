"""What it does to edit an embedding that is also the unembedding: untied first, or both as one tensor.

    python benchmarks/tied.py MODEL --layers 9-17 --harmful F --harmless F --harmful-test F --harmless-test F

The same intervention is saved in both ways; refusals and damage are measured on the saved files with the same prompts.
"""

import argparse
import tempfile
from pathlib import Path

from remove_refusals.baking.disk import bake
from remove_refusals.directions.direction import find_direction
from remove_refusals.directions.intervention import as_intervention
from remove_refusals.measure.answers import EvaluationPrompts, measuring_prompts
from remove_refusals.measure.evaluate import evaluate
from remove_refusals.modelmap.derive import map_model
from remove_refusals.models.load import load
from remove_refusals.settings import (
    SITE_KINDS,
    DirectionSettings,
    EditSettings,
    MeasureSettings,
    PromptSource,
    Tied,
)
from remove_refusals.types import Intervention


def main() -> None:
    """Parse the command line and print one line for each intervention and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("harmful", "harmless", "harmful-test", "harmless-test"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--layers", required=True, help="the range that is edited beside the embedding, as 9-17")
    parser.add_argument("--layer", type=int, help="where the direction is found; by default in the range's middle")
    parser.add_argument("--n-test", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=30)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    first, last = map(int, options.layers.split("-"))
    loaded = load(options.model, dtype=options.dtype)
    model_map = map_model(loaded.model)
    print(f"tied in the base: {model_map.tied}")
    source = DirectionSettings(
        harmful=PromptSource(source=options.harmful),
        harmless=PromptSource(source=options.harmless),
        n_prompts=128,
        layer=options.layer or (first + last + 1) // 2,
        projected=True,
    )
    found = find_direction(loaded, source)
    measure = MeasureSettings(
        harmful=PromptSource(source=options.harmful_test),
        harmless=PromptSource(source=options.harmless_test),
        n_test=options.n_test,
    )
    prompts = measuring_prompts(measure, found.prompts)
    prompts = EvaluationPrompts(prompts.harmful, prompts.harmless)
    embedding = as_intervention(found.direction, loaded, EditSettings(sites=("embedding",)))
    layers = as_intervention(found.direction, loaded, EditSettings(layers=(first, last), sites=SITE_KINDS[1:]))
    both = Intervention(embedding.directions, embedding.edits + layers.edits)
    settings = MeasureSettings(max_new_tokens=options.max_new_tokens, kl_tokens=options.max_new_tokens)
    for name, intervention in (("embedding alone", embedding), (f"embedding and layers {options.layers}", both)):
        ways: tuple[Tied, ...] = ("untie", "both")
        for tied in ways:
            with tempfile.TemporaryDirectory() as directory:
                saved = bake(loaded, intervention, Path(directory) / "edited", EditSettings(tied=tied)).directory
                scores = evaluate(loaded, load(str(saved), dtype=options.dtype), prompts, settings)
            assert scores.kl is not None and scores.kl.harmless_answered is not None
            refusals, distance = scores.sets["harmful"].refusals, scores.kl.harmless_answered
            print(
                f"{name}, {tied}: refusals {refusals.base.count} -> {refusals.edited.count} of {refusals.base.n}; "
                f"first-token KL {distance.first_token.value:.3f}, KL along answers {distance.mean.value:.3f} "
                f"[{distance.mean.low:.3f}, {distance.mean.high:.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
