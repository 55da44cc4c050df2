"""What an edit leaves: a checkpoint edited file by file with its certificate, adapters, or an edit in memory.

And what a run needs on given devices.
"""

from remove_refusals.baking.base import (
    Base,
    base_of,
    check_base,
    check_unchanged,
    described,
    load_intervention,
    open_base,
    recorded_edit,
)
from remove_refusals.baking.disk import Baked, bake, certify_directory, with_boundaries, write_baked
from remove_refusals.baking.gguf import bake_gguf_lora
from remove_refusals.baking.lora import bake_lora
from remove_refusals.baking.memory import bake_in_place, load_changed, load_edited
from remove_refusals.baking.scale import Devices, ScalePlan, plan_run

__all__ = [
    "Baked",
    "Base",
    "Devices",
    "ScalePlan",
    "bake",
    "bake_gguf_lora",
    "bake_in_place",
    "bake_lora",
    "base_of",
    "certify_directory",
    "check_base",
    "check_unchanged",
    "described",
    "load_changed",
    "load_edited",
    "load_intervention",
    "open_base",
    "plan_run",
    "recorded_edit",
    "with_boundaries",
    "write_baked",
]
