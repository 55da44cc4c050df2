"""From prompts to a direction, from a direction to what is taken out where, and what a direction is made of."""

from remove_refusals.directions.activations import collect_activations, collect_both, measure_boundaries, project_tokens
from remove_refusals.directions.attribution import (
    expert_choices,
    routing_interchange,
    site_contributions,
    writer_shares,
)
from remove_refusals.directions.direction import (
    FoundDirection,
    direction_from_vectors,
    find_direction,
    mean_difference,
    mean_difference_per_layer,
    training_prompts,
)
from remove_refusals.directions.hooks import Placement, SiteKey, Steer, ablated, added, is_steerable, steered
from remove_refusals.directions.intervention import Taken, as_intervention, intervene, middle_direction
from remove_refusals.directions.plan import EditPlan, PlanEntry, check_exact, resolve
from remove_refusals.directions.saved import (
    DIRECTIONS,
    check_direction_path,
    describe_direction,
    direction_sha256,
    load_direction,
    load_directions,
    save_direction,
    save_directions,
)
from remove_refusals.directions.separation import MOST_PROMPTS, measure_separation, separation

__all__ = [
    "DIRECTIONS",
    "MOST_PROMPTS",
    "EditPlan",
    "FoundDirection",
    "Placement",
    "PlanEntry",
    "SiteKey",
    "Steer",
    "Taken",
    "ablated",
    "added",
    "as_intervention",
    "check_direction_path",
    "check_exact",
    "collect_activations",
    "collect_both",
    "describe_direction",
    "direction_from_vectors",
    "direction_sha256",
    "expert_choices",
    "find_direction",
    "intervene",
    "is_steerable",
    "load_direction",
    "load_directions",
    "mean_difference",
    "mean_difference_per_layer",
    "measure_boundaries",
    "measure_separation",
    "middle_direction",
    "project_tokens",
    "resolve",
    "routing_interchange",
    "save_direction",
    "save_directions",
    "separation",
    "site_contributions",
    "steered",
    "training_prompts",
    "writer_shares",
]
