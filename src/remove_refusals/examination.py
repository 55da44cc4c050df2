"""Look at a model without changing it: where its refusal lives, and what is left of it without one direction."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from remove_refusals.activations import collect_activations
from remove_refusals.analysis import MOST_PROMPTS, Separation, separation
from remove_refusals.apply.hooks import ablated
from remove_refusals.atomic import atomic_directory
from remove_refusals.chat_template import render, template_tail_length
from remove_refusals.contributions import Contributions, site_contributions
from remove_refusals.direction_files import direction_sha256
from remove_refusals.directions import mean_difference
from remove_refusals.errors import ArchitectureError, DirectionError
from remove_refusals.evaluation import Evaluation, EvaluationPrompts, evaluate
from remove_refusals.experts import ExpertChoice, WriterShare, expert_choices, writer_shares
from remove_refusals.map_types import ModelMap
from remove_refusals.modelmap import map_model
from remove_refusals.models import LoadedModel
from remove_refusals.plan import intervene
from remove_refusals.prompts import draw
from remove_refusals.records import versions, write_json, write_jsonl
from remove_refusals.report_page.page import write_html_report
from remove_refusals.settings import RunSettings, published_name
from remove_refusals.stages import OnProgress, load_model, measure_settings, stage_progress, test_prompts
from remove_refusals.types import Activations, ChatFormat, Direction, PromptSet

MOST_POSITIONS = 8
"""So many tokens of the chat template's tail are looked at, from the end."""

_OUTLIER_SHARE = 0.5
"""From here on the plain difference leans on one coordinate: the harmless mean's component is removed first, and the
direction is taken out of the upper half of the layers only. Taken out everywhere it destroys such a model."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What was found of a model. What was not measured is None or empty.

    Attributes:
        separation: How far apart harmful and harmless prompts lie at the last token, layer by layer.
        elsewhere: The same at the other tokens of the chat template's tail.
        tokens: The token at each position, by its position.
        direction: The difference of the means where the last token separates best.
        layers: The first and the last layer that it is taken out of to see what is left without it.
        contributions: What each site adds along it.
        shares: How much of what each writer can write lies along it.
        choices: Which experts the routers choose.
        evaluation: What the model answers as it is, and with that direction taken out as it runs.
    """

    separation: Separation
    elsewhere: tuple[Separation, ...]
    tokens: dict[int, str]
    direction: Direction
    layers: tuple[int, int]
    contributions: Contributions
    shares: tuple[WriterShare, ...]
    choices: tuple[ExpertChoice, ...]
    evaluation: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the content of `analysis.json`; the evaluation has records of its own."""
        origin = self.direction.origin
        positions = [
            {
                "position": part.position,
                "token": self.tokens[part.position],
                "auroc": [None if layer.auroc is None else asdict(layer.auroc) for layer in part.layers],
            }
            for part in (self.separation, *self.elsewhere)
        ]
        return {
            **self.separation.to_json(),
            "positions": positions,
            "direction": {
                "layer": origin.layer,
                "position": origin.position,
                "method": origin.method,
                "sha256": direction_sha256(self.direction),
                "taken_out_of": list(self.layers),
            },
            "contributions": self.contributions.to_json(),
            "writer_shares": [asdict(share) for share in self.shares],
            "expert_choices": [asdict(choice) for choice in self.choices],
            "versions": versions(),
        }


def analyze(
    settings: RunSettings,
    output: Path | str | None = None,
    *,
    answers: bool = True,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Examination:
    """Look at a model without changing it, and leave a directory with the records and a page of them.

    The direction is found on the prompts of `settings.direction`; what is left of the refusal without it is measured on
    those of `settings.measure`, which have none in common with them.

    Args:
        settings: The model, the prompts, and how to measure; what is to be edited plays no part.
        output: The directory to be made; None makes none.
        answers: Whether the model answers, as it is and with the direction taken out as it runs.
        force: Whether an existing output is replaced.
        on_progress: Told of every stage.

    Returns:
        What was found.

    Raises:
        RemoveRefusalsError: Of the type that fits what went wrong; nothing is left half-made.
    """
    if output is None:
        return _examine(settings, answers=answers, on_progress=on_progress)
    with atomic_directory(Path(output), force=force) as directory:
        found = _examine(settings, answers=answers, on_progress=on_progress)
        write_json(directory / "analysis.json", found.to_json())
        if found.evaluation is not None:
            write_json(directory / "scores.json", found.evaluation.to_json())
            write_jsonl(directory / "rows.jsonl", (row.to_json() for row in found.evaluation.rows))
        write_html_report(directory)
    return found


def _examine(settings: RunSettings, *, answers: bool, on_progress: OnProgress | None) -> Examination:
    finding = settings.direction
    harmful, harmless = (
        _at_most(part, finding.seed)
        for part in (
            finding.harmful.load("harmful", "harmful_train"),
            finding.harmless.load("harmless", "harmless_train"),
        )
    )
    prompts = test_prompts(settings.measure, (harmful, harmless))
    loaded = load_model(settings.model, settings.loading)
    model_map = map_model(loaded.model)
    if answers and model_map.unhooked:
        raise ArchitectureError(
            f"Hooks on model type '{model_map.model_type}' are not exact ({model_map.unhooked[0].rstrip('.')}), "
            "expected hooks that are to see what is left without a direction; pass `--no-answers`."
        )
    tokens = _tail(loaded, harmful, settings.chat)
    options: dict[str, Any] = {"chat": settings.chat, "batch_size": settings.batch_size}
    # All positions in one pass.
    total = len(harmful) + len(harmless)
    activations = []
    for before, part in ((0, harmful), (len(harmful), harmless)):
        told = stage_progress(on_progress, "activations", before, total)
        activations.append(
            collect_activations(loaded, part, positions=tuple(tokens), model_map=model_map, on_progress=told, **options)
        )
    seed, name = finding.seed, published_name(loaded.source)
    parts = [
        separation(activations[0], activations[1], position=position, seed=seed, model=name) for position in tokens
    ]
    direction = _direction(activations, parts[0])
    found = Examination(
        parts[0],
        tuple(parts[1:]),
        tokens,
        direction,
        _layers(direction, model_map),
        site_contributions(loaded, harmful, harmless, direction, model_map, position=parts[0].position, **options),
        writer_shares(loaded, direction, model_map),
        expert_choices(loaded, harmful, harmless, model_map, position=parts[0].position, **options),
    )
    if not answers:
        return found
    return replace(found, evaluation=_without(loaded, found, model_map, prompts, settings, on_progress))


def _at_most(prompts: PromptSet, seed: int) -> PromptSet:
    return draw(prompts, MOST_PROMPTS, seed) if len(prompts) > MOST_PROMPTS else prompts


def _tail(loaded: LoadedModel, prompts: PromptSet, chat: ChatFormat) -> dict[int, str]:
    """The tokens that stand behind every prompt, the last one first; at least the last of all."""
    length = template_tail_length(loaded.tokenizer, **vars(chat))
    ids = render(loaded.tokenizer, prompts.prompts[:1], **vars(chat))[0]
    positions = range(-1, -max(1, min(length, MOST_POSITIONS)) - 1, -1)
    return {position: str(loaded.tokenizer.decode([ids[position]])) for position in positions}


def _direction(activations: Sequence[Activations], separated: Separation) -> Direction:
    measured = [layer for layer in separated.layers if layer.auroc is not None]
    if not measured:
        raise DirectionError(
            f"The activations at position {separated.position} are the same on harmful and harmless prompts at every "
            "layer, expected them to differ; use other prompts or another chat template."
        )
    # Of layers that separate alike the one in the middle of them: the first may have the direction in part only.
    most = max(layer.auroc.value for layer in measured if layer.auroc is not None)
    best = [layer for layer in measured if layer.auroc is not None and layer.auroc.value >= most - 0.005]
    chosen = best[len(best) // 2]
    return mean_difference(
        activations[0],
        activations[1],
        layer=chosen.layer,
        position=separated.position,
        projected=chosen.largest_coordinate_share >= _OUTLIER_SHARE,
        model=separated.model,
        seed=separated.seed,
    )


def _layers(direction: Direction, model_map: ModelMap) -> tuple[int, int]:
    projected = direction.origin.method.startswith("projected")
    return (model_map.n_layers // 2 if projected else 0, model_map.n_layers - 1)


def _without(
    loaded: LoadedModel,
    found: Examination,
    model_map: ModelMap,
    prompts: EvaluationPrompts,
    settings: RunSettings,
    on_progress: OnProgress | None,
) -> Evaluation:
    intervention = intervene(found.direction, model_map.n_layers, layers=found.layers)
    evaluation = evaluate(
        loaded,
        loaded,
        prompts,
        measure_settings(settings),
        edited_context=lambda: ablated(loaded.model, intervention, model_map=model_map),
        on_progress=stage_progress(on_progress, "evaluation"),
    )
    name = published_name(loaded.source)
    return replace(evaluation, base=name, edited=f"{name} without one direction")
