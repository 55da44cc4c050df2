"""The room search."""

from remove_refusals.search.candidates import (
    CANDIDATES,
    Candidate,
    Confirmation,
    Selection,
    load_candidates,
    save_candidates,
)
from remove_refusals.search.continuations import (
    Probe,
    Vocabulary,
    frozen,
    keep_below,
    log_probabilities,
    make_probes,
    make_vocabulary,
)
from remove_refusals.search.descent import descend, first_layer_that_counts
from remove_refusals.search.layers import (
    Bench,
    LayerRule,
    LayerScore,
    Option,
    make_options,
    search_layers,
    tail_positions,
)
from remove_refusals.search.material import (
    N_OPENING_TOKENS,
    Openings,
    damages,
    gather,
    learn_openings,
    likely_tokens,
    refusal_probabilities,
)
from remove_refusals.search.references import References, references
from remove_refusals.search.search import SearchPrompts, pick, select, split_for_search

__all__ = [
    "CANDIDATES",
    "N_OPENING_TOKENS",
    "Bench",
    "Candidate",
    "Confirmation",
    "LayerRule",
    "LayerScore",
    "Openings",
    "Option",
    "Probe",
    "References",
    "SearchPrompts",
    "Selection",
    "Vocabulary",
    "damages",
    "descend",
    "first_layer_that_counts",
    "frozen",
    "gather",
    "keep_below",
    "learn_openings",
    "likely_tokens",
    "load_candidates",
    "log_probabilities",
    "make_options",
    "make_probes",
    "make_vocabulary",
    "pick",
    "references",
    "refusal_probabilities",
    "save_candidates",
    "search_layers",
    "select",
    "split_for_search",
    "stage",
    "tail_positions",
]
