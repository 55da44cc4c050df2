"""The room modelmap."""

from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.experts import Routing, routing_of
from remove_refusals.modelmap.knowledge import first_of_width
from remove_refusals.modelmap.names import StoredNames, name_for, saved_shapes, stored_names
from remove_refusals.modelmap.skeleton import is_tied, skeleton, skeleton_of
from remove_refusals.modelmap.types import DiskTensor, HookPoint, Mixture, ModelMap, Site, Writer

__all__ = [
    "DiskTensor",
    "HookPoint",
    "Mixture",
    "ModelMap",
    "Routing",
    "Site",
    "StoredNames",
    "Writer",
    "first_of_width",
    "is_tied",
    "map_model",
    "name_for",
    "routing_of",
    "saved_shapes",
    "skeleton",
    "skeleton_of",
    "stored_names",
]
