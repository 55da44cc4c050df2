"""The room baking."""

from remove_refusals.baking.base import Baked, BaseModel, check_not_source, open_checkpoint
from remove_refusals.baking.certificate import Certificate, certify, disk_reader
from remove_refusals.baking.disk import bake_on_disk
from remove_refusals.baking.lora import is_adapter, load_edited, with_adapter
from remove_refusals.baking.memory import bake, write_baked

__all__ = [
    "Baked",
    "BaseModel",
    "Certificate",
    "bake",
    "bake_on_disk",
    "certify",
    "check_not_source",
    "disk_reader",
    "is_adapter",
    "load_edited",
    "open_checkpoint",
    "with_adapter",
    "write_baked",
]
