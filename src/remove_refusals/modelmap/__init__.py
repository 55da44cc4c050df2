"""The room modelmap."""

from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.experts import Routing, choice_of, expert_of_rows, routing_of, routing_within, with_choice
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
    "choice_of",
    "expert_of_rows",
    "first_of_width",
    "is_tied",
    "map_model",
    "name_for",
    "routing_of",
    "routing_within",
    "saved_shapes",
    "skeleton",
    "skeleton_of",
    "stored_names",
    "with_choice",
]
