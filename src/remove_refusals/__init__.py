"""Find the direction in the residual stream that mediates refusal, take it out, and measure what that did.

The names below are the public interface; each is imported from its module when it is first used, so that importing the
package, and the command's help, stay quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remove_refusals.baking.base import open_base
    from remove_refusals.baking.disk import bake
    from remove_refusals.baking.memory import bake_in_place
    from remove_refusals.directions.activations import collect_activations
    from remove_refusals.directions.direction import direction_from_vectors, mean_difference, mean_difference_per_layer
    from remove_refusals.directions.hooks import ablated
    from remove_refusals.directions.intervention import intervene
    from remove_refusals.directions.saved import load_direction, load_directions, save_direction, save_directions
    from remove_refusals.directions.separation import measure_separation, separation
    from remove_refusals.errors import RemoveRefusalsError
    from remove_refusals.examination import Examination, analyze, diff
    from remove_refusals.measure.evaluate import evaluate
    from remove_refusals.measure.judges.calibration import Calibration, calibrate, load_calibration
    from remove_refusals.measure.judges.choose import make_judge
    from remove_refusals.measure.judges.labels import Label
    from remove_refusals.measure.judges.phrases import judge_phrases
    from remove_refusals.measure.statistics import holm, paired_difference, paired_rates, rogan_gladen
    from remove_refusals.modelmap.derive import map_model
    from remove_refusals.models.generate import generate
    from remove_refusals.models.load import load
    from remove_refusals.pipeline import run
    from remove_refusals.prompts import embedded_prompts, load_prompts
    from remove_refusals.report.card import Pushed, push
    from remove_refusals.report.page import html_report, write_html_report
    from remove_refusals.search.search import select, split_for_search
    from remove_refusals.settings import RunSettings, SelectSettings
    from remove_refusals.types import Activations, Direction, Intervention, PromptSet, Separation

__version__ = version("remove-refusals")

_HOME = {
    "Activations": "types",
    "Calibration": "measure.judges.calibration",
    "Direction": "types",
    "Examination": "examination",
    "Intervention": "types",
    "Label": "measure.judges.labels",
    "PromptSet": "types",
    "Pushed": "report.card",
    "RemoveRefusalsError": "errors",
    "RunSettings": "settings",
    "SelectSettings": "settings",
    "Separation": "types",
    "ablated": "directions.hooks",
    "analyze": "examination",
    "bake": "baking.disk",
    "bake_in_place": "baking.memory",
    "calibrate": "measure.judges.calibration",
    "collect_activations": "directions.activations",
    "diff": "examination",
    "direction_from_vectors": "directions.direction",
    "embedded_prompts": "prompts",
    "evaluate": "measure.evaluate",
    "generate": "models.generate",
    "holm": "measure.statistics",
    "html_report": "report.page",
    "intervene": "directions.intervention",
    "judge_phrases": "measure.judges.phrases",
    "load": "models.load",
    "load_calibration": "measure.judges.calibration",
    "load_direction": "directions.saved",
    "load_directions": "directions.saved",
    "load_prompts": "prompts",
    "make_judge": "measure.judges.choose",
    "map_model": "modelmap.derive",
    "mean_difference": "directions.direction",
    "mean_difference_per_layer": "directions.direction",
    "measure_separation": "directions.separation",
    "open_base": "baking.base",
    "paired_difference": "measure.statistics",
    "paired_rates": "measure.statistics",
    "push": "report.card",
    "rogan_gladen": "measure.statistics",
    "run": "pipeline",
    "save_direction": "directions.saved",
    "save_directions": "directions.saved",
    "select": "search.search",
    "separation": "directions.separation",
    "split_for_search": "search.search",
    "write_html_report": "report.page",
}

__all__ = [
    "Activations",
    "Calibration",
    "Direction",
    "Examination",
    "Intervention",
    "Label",
    "PromptSet",
    "Pushed",
    "RemoveRefusalsError",
    "RunSettings",
    "SelectSettings",
    "Separation",
    "ablated",
    "analyze",
    "bake",
    "bake_in_place",
    "calibrate",
    "collect_activations",
    "diff",
    "direction_from_vectors",
    "embedded_prompts",
    "evaluate",
    "generate",
    "holm",
    "html_report",
    "intervene",
    "judge_phrases",
    "load",
    "load_calibration",
    "load_direction",
    "load_directions",
    "load_prompts",
    "make_judge",
    "map_model",
    "mean_difference",
    "mean_difference_per_layer",
    "measure_separation",
    "open_base",
    "paired_difference",
    "paired_rates",
    "push",
    "rogan_gladen",
    "run",
    "save_direction",
    "save_directions",
    "select",
    "separation",
    "split_for_search",
    "write_html_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'remove_refusals' has no attribute {name!r}")
    return getattr(import_module(f"remove_refusals.{_HOME[name]}"), name)
