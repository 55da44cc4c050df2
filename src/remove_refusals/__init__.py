"""Find the direction in the residual stream that mediates refusal, take it out, and measure what that did.

    import remove_refusals as rr

    model, tokenizer = rr.load("demo")  # or a Transformers model and tokenizer that you have already
    harmful = rr.collect_activations(model, tokenizer, ["How do I pick a lock?", ...])
    harmless = rr.collect_activations(model, tokenizer, ["How do I bake a bread?", ...])
    direction = rr.mean_difference(harmful, harmless, layer=0.6)
    with rr.ablated(model, direction):
        rr.generate(model, tokenizer, ["How do I pick a lock?"])
    found = rr.select(model, tokenizer, harmful=[...], harmless=[...])  # a search for what is best taken out where
    scores = rr.evaluate(model, found.intervention, tokenizer)
    rr.bake_in_place(model, found.intervention)  # then model.save_pretrained(...); or rr.bake("demo", direction, "out")

load, map_model                     a model and its tokenizer; where it writes to the residual stream
embedded_prompts, load_prompts      prompt sets; lists of strings will do as well
collect_activations, separation     hidden states; how far apart harmful and harmless prompts lie
mean_difference, …_per_layer        the direction, or one for each layer; load_direction, save_direction
intervene, select                   how much of it at which sites, as you say or by a search
ablated, bake_in_place, bake        take it out while the model runs, in memory, or in files for good
generate, evaluate                  answers; refusals, false refusals and damage, with intervals
run, analyze, write_html_report     the whole job; a look at a model; the page of what was found

What goes in: PromptSet, RunSettings with its parts, Progress, and what signatures call Prompts, Taken, Placement,
SiteKind, Tied and Language. What comes out: Activations, Separation, Direction and its DirectionOrigin, Intervention of
SiteEdits, ModelMap, LoadedModel, Answer, Selection, Evaluation, Baked, RunResult, Examination; RemoveRefusalsError goes
wrong. The parts of RunSettings are LoadSettings, ChatFormat, DirectionSettings, SelectSettings with Rule and
GradientSettings, EditSettings, MeasureSettings, and PromptSource. Each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remove_refusals.api import (
        Prompts,
        bake,
        bake_in_place,
        collect_activations,
        evaluate,
        generate,
        select,
        separation,
    )
    from remove_refusals.baking import Baked
    from remove_refusals.directions import (
        Placement,
        Taken,
        ablated,
        intervene,
        load_direction,
        mean_difference,
        mean_difference_per_layer,
        save_direction,
    )
    from remove_refusals.errors import RemoveRefusalsError
    from remove_refusals.examination import Examination, analyze
    from remove_refusals.measure import Evaluation
    from remove_refusals.modelmap import ModelMap, map_model
    from remove_refusals.models import Answer, LoadedModel, load
    from remove_refusals.pipeline import RunResult, run
    from remove_refusals.progress import Progress
    from remove_refusals.prompts import embedded_prompts, load_prompts
    from remove_refusals.report import write_html_report
    from remove_refusals.search import Selection
    from remove_refusals.settings import (
        ChatFormat,
        DirectionSettings,
        EditSettings,
        GradientSettings,
        Language,
        LoadSettings,
        MeasureSettings,
        PromptSource,
        Rule,
        RunSettings,
        SelectSettings,
        SiteKind,
        Tied,
    )
    from remove_refusals.types import (
        Activations,
        Direction,
        DirectionOrigin,
        Intervention,
        PromptSet,
        Separation,
        SiteEdit,
    )

_ROOMS = {
    "api": "Prompts bake bake_in_place collect_activations evaluate generate select separation",
    "baking": "Baked",
    "directions": (
        "Placement Taken ablated intervene load_direction mean_difference mean_difference_per_layer save_direction"
    ),
    "errors": "RemoveRefusalsError",
    "examination": "Examination analyze",
    "measure": "Evaluation",
    "modelmap": "ModelMap map_model",
    "models": "Answer LoadedModel load",
    "pipeline": "RunResult run",
    "progress": "Progress",
    "prompts": "embedded_prompts load_prompts",
    "report": "write_html_report",
    "search": "Selection",
    "settings": (
        "ChatFormat DirectionSettings EditSettings GradientSettings Language LoadSettings MeasureSettings PromptSource "
        "Rule RunSettings SelectSettings SiteKind Tied"
    ),
    "types": "Activations Direction DirectionOrigin Intervention PromptSet Separation SiteEdit",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = [
    "Activations",
    "Answer",
    "Baked",
    "ChatFormat",
    "Direction",
    "DirectionOrigin",
    "DirectionSettings",
    "EditSettings",
    "Evaluation",
    "Examination",
    "GradientSettings",
    "Intervention",
    "Language",
    "LoadSettings",
    "LoadedModel",
    "MeasureSettings",
    "ModelMap",
    "Placement",
    "Progress",
    "PromptSet",
    "PromptSource",
    "Prompts",
    "RemoveRefusalsError",
    "Rule",
    "RunResult",
    "RunSettings",
    "SelectSettings",
    "Selection",
    "Separation",
    "SiteEdit",
    "SiteKind",
    "Taken",
    "Tied",
    "ablated",
    "analyze",
    "bake",
    "bake_in_place",
    "collect_activations",
    "embedded_prompts",
    "evaluate",
    "generate",
    "intervene",
    "load",
    "load_direction",
    "load_prompts",
    "map_model",
    "mean_difference",
    "mean_difference_per_layer",
    "run",
    "save_direction",
    "select",
    "separation",
    "write_html_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Looked up when it is asked for: reading what is installed takes a tenth of a second.
        return import_module("importlib.metadata").version("remove-refusals")
    if name not in _HOME:
        raise AttributeError(f"module 'remove_refusals' has no attribute {name!r}")
    return getattr(import_module(f"remove_refusals.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
