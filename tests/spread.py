"""What a model gives in one process, and in several: run by torchrun as `spread.py OUTPUT TP REPLICAS MODEL…`."""

import sys
from pathlib import Path
from typing import Any

import torch

from remove_refusals.directions import ablated, collect_activations, intervene, mean_difference_per_layer, steered
from remove_refusals.files import Journal
from remove_refusals.measure import Answered, Label
from remove_refusals.measure.answers import distances_along
from remove_refusals.modelmap import map_model
from remove_refusals.models import Answer, LoadedModel, answer_logits, fingerprint, generate, load_model, render
from remove_refusals.processes import joined, number
from remove_refusals.progress import SILENT, Progress
from remove_refusals.search.continuations import frozen
from remove_refusals.search.descent import descend, first_layer_that_counts, start_steering
from remove_refusals.search.material import OwnAnswers, gather
from remove_refusals.settings import GradientSettings, LoadSettings
from remove_refusals.types import Direction, DirectionOrigin, PromptSet

VERBS = {
    "harmful": "steal break burn rob hack kill shoot cheat harm bomb",
    "harmless": "bake water paint cook sing draw sew plant read walk",
}
PROMPTS = {
    name: PromptSet(name, tuple(f"Please {word} it" for word in verbs.split()), "test") for name, verbs in VERBS.items()
}
SETTINGS = GradientSettings(batch_size=4, n_steps=4, n_more_steps=2, kl_tokens=4, n_check_tokens=4)


def answered(loaded: LoadedModel, name: str) -> Answered:
    """Made-up answers, the same everywhere."""
    generator = torch.Generator().manual_seed(len(name))
    label = Label.REFUSAL if name == "harmful" else Label.COMPLIANCE
    part = PROMPTS[name]
    drawn = [tuple(torch.randint(8, 90, (8,), generator=generator).tolist()) for _ in part.prompts]
    answers = tuple(Answer(text="", token_ids=ids, finished=False) for ids in drawn)
    return Answered(part, tuple(map(tuple, render(loaded, part.prompts))), answers, (label,) * len(part))


def directions(n_layers: int, d_model: int) -> list[Direction]:
    """Directions that no model has a part in, so that each step is compared on its own."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.nn.functional.normalize(torch.randn(n_layers, d_model, 1, generator=generator), dim=1)
    return [Direction(one, DirectionOrigin(method="test", layer=index)) for index, one in enumerate(vectors, start=1)]


def gradients(loaded: LoadedModel, given: list[Direction], own: OwnAnswers) -> torch.Tensor:
    material, steering = gather(own, SETTINGS), start_steering(loaded, given, SETTINGS, 0)
    leaves = steering.strengths.requires_grad_(), steering.directions.requires_grad_()
    with frozen(loaded, gradients=True), steered(loaded.model, steering.steers()):
        loss = material.refusals(0).clamp_min(1e-30).log().mean() + material.damages(0).mean()
        found = torch.autograd.grad(loss, leaves)
    return torch.cat([part.flatten() for part in found])


def computed(directory: Path, **loading: Any) -> dict[str, Any]:
    """Activations, hooked logits, answers, gradients and a whole descent."""
    loaded = load_model(str(directory), LoadSettings(**loading), progress=Progress(on_note=print))
    model_map = map_model(loaded.model)
    given = directions(model_map.n_layers, model_map.d_model)
    own = OwnAnswers(loaded, answered(loaded, "harmful"), answered(loaded, "harmless"))
    ids, along = list(own.answered.token_ids), [answer.token_ids for answer in own.answered.answers]
    activations = [collect_activations(loaded, part) for part in PROMPTS.values()]
    found: dict[str, Any] = {
        "fingerprint": fingerprint(loaded),
        "activations": torch.cat([part.hidden for part in activations]),
        "directions": torch.stack([one.basis for one in mean_difference_per_layer(*activations)]),
        "answers": [answer.token_ids for answer in generate(loaded, ids, max_new_tokens=8)],
        "gradients": gradients(loaded, given, own),
    }
    with ablated(loaded, intervene(given[1], model_map.n_layers, strength=0.7)):
        found["hooked logits"] = answer_logits(loaded, ids, along, 4).logits.detach().clone()
        found["hooked answers"] = [answer.token_ids for answer in generate(loaded, ids, max_new_tokens=8)]
    without = ablated(loaded, given[0])
    measured = distances_along(loaded, loaded, ids, along, 4, edited_context=lambda: without)
    found["distances"] = torch.tensor([one.kl for one in measured])
    material = gather(own, SETTINGS, first_layer_that_counts(given, gather(own, SETTINGS), SETTINGS))
    candidates = descend(given, material, SETTINGS, (PROMPTS["harmful"], None), Journal(), SILENT)
    scores = [[one.refusal, one.damage, *(edit.strength for edit in one.intervention.edits)] for one in candidates]
    found["descent"] = torch.tensor([value for row in scores for value in row])
    return found


def main() -> None:
    output, tp, replicas, *models = sys.argv[1:]
    loading = {"tp": tp if tp != "none" else None, "replicas": int(replicas) if replicas != "none" else None}
    with joined():
        found = {name: computed(Path(name), **loading) for name in models}
        torch.save(found, f"{output}.{number()}.pt")


if __name__ == "__main__":
    main()
