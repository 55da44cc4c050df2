"""The room baking."""

from remove_refusals.baking.base import (
    Baked,
    BaseModel,
    Carried,
    base_in_memory,
    base_on_disk,
    check_not_source,
    load_intervention,
    open_checkpoint,
)
from remove_refusals.baking.certificate import certify, certify_directory, disk_reader
from remove_refusals.baking.disk import bake_on_disk
from remove_refusals.baking.gguf import bake_gguf_lora
from remove_refusals.baking.lora import bake_lora, is_adapter, load_edited, with_adapter
from remove_refusals.baking.memory import bake, write_baked

__all__ = [
    "Baked",
    "BaseModel",
    "Carried",
    "bake",
    "bake_gguf_lora",
    "bake_lora",
    "bake_on_disk",
    "base_in_memory",
    "base_on_disk",
    "certify",
    "certify_directory",
    "check_not_source",
    "disk_reader",
    "is_adapter",
    "load_edited",
    "load_intervention",
    "open_checkpoint",
    "with_adapter",
    "write_baked",
]
