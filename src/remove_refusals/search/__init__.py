"""The room search: which directions are taken out, how much, and where."""

from remove_refusals.search.candidates import CANDIDATES, Selection, load_candidates, save_candidates
from remove_refusals.search.search import SearchPrompts, select, split_for_search

__all__ = [
    "CANDIDATES",
    "SearchPrompts",
    "Selection",
    "load_candidates",
    "save_candidates",
    "select",
    "split_for_search",
]
