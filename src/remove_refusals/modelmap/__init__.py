"""The room modelmap."""

from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.knowledge import first_of_width
from remove_refusals.modelmap.skeleton import by_stored_name, disk_names, disk_tensors, skeleton, skeleton_of
from remove_refusals.modelmap.types import DiskTensor, HookPoint, ModelMap, Site, Writer

__all__ = [
    "DiskTensor",
    "HookPoint",
    "ModelMap",
    "Site",
    "Writer",
    "by_stored_name",
    "disk_names",
    "disk_tensors",
    "first_of_width",
    "map_model",
    "skeleton",
    "skeleton_of",
]
