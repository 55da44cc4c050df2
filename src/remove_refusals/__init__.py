"""Find the direction in the residual stream that mediates refusal, take it out, and measure what that did.

The names below are the public interface; each is imported from its module when it is first used, so that importing the
package, and the command's help, stay quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remove_refusals.activations import collect_activations
    from remove_refusals.analysis import Separation, measure_separation, separation
    from remove_refusals.apply.hooks import ablated
    from remove_refusals.baking import bake
    from remove_refusals.calibration import Calibration, calibrate, load_calibration
    from remove_refusals.comparisons import holm, paired_difference, paired_rates
    from remove_refusals.corrections import rogan_gladen
    from remove_refusals.differences import diff
    from remove_refusals.direction_files import load_direction, load_directions, save_direction, save_directions
    from remove_refusals.directions import direction_from_vectors, mean_difference, mean_difference_per_layer
    from remove_refusals.disk_baking import bake_on_disk, open_checkpoint
    from remove_refusals.errors import RemoveRefusalsError
    from remove_refusals.evaluation import evaluate
    from remove_refusals.examination import Examination, analyze
    from remove_refusals.generation import generate
    from remove_refusals.hub import Pushed, push
    from remove_refusals.judges import Label, judge_phrases
    from remove_refusals.judges.choosing import make_judge
    from remove_refusals.modelmap import map_model
    from remove_refusals.models import load
    from remove_refusals.pipeline import run
    from remove_refusals.plan import intervene, intervene_per_layer
    from remove_refusals.prompts import embedded_prompts, load_prompts
    from remove_refusals.report_page.page import html_report, write_html_report
    from remove_refusals.restoring import restore
    from remove_refusals.selection.choose import SelectSettings, select, split_for_search
    from remove_refusals.settings import RunSettings
    from remove_refusals.types import Activations, Direction, Intervention, PromptSet

__version__ = version("remove-refusals")

_HOME = {
    "Activations": "types",
    "Calibration": "calibration",
    "Direction": "types",
    "Examination": "examination",
    "Intervention": "types",
    "Label": "judges",
    "PromptSet": "types",
    "Pushed": "hub",
    "RemoveRefusalsError": "errors",
    "RunSettings": "settings",
    "SelectSettings": "selection.choose",
    "Separation": "analysis",
    "ablated": "apply.hooks",
    "analyze": "examination",
    "bake": "baking",
    "bake_on_disk": "disk_baking",
    "calibrate": "calibration",
    "collect_activations": "activations",
    "diff": "differences",
    "direction_from_vectors": "directions",
    "embedded_prompts": "prompts",
    "evaluate": "evaluation",
    "generate": "generation",
    "holm": "comparisons",
    "html_report": "report_page.page",
    "intervene": "plan",
    "intervene_per_layer": "plan",
    "judge_phrases": "judges",
    "load": "models",
    "load_calibration": "calibration",
    "load_direction": "direction_files",
    "load_directions": "direction_files",
    "load_prompts": "prompts",
    "make_judge": "judges.choosing",
    "map_model": "modelmap",
    "mean_difference": "directions",
    "mean_difference_per_layer": "directions",
    "measure_separation": "analysis",
    "open_checkpoint": "disk_baking",
    "paired_difference": "comparisons",
    "paired_rates": "comparisons",
    "push": "hub",
    "restore": "restoring",
    "rogan_gladen": "corrections",
    "run": "pipeline",
    "save_direction": "direction_files",
    "save_directions": "direction_files",
    "select": "selection.choose",
    "separation": "analysis",
    "split_for_search": "selection.choose",
    "write_html_report": "report_page.page",
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
    "bake_on_disk",
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
    "intervene_per_layer",
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
    "open_checkpoint",
    "paired_difference",
    "paired_rates",
    "push",
    "restore",
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
