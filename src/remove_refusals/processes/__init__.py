"""Several processes of one job, as torchrun starts them."""

from remove_refusals.processes.group import (
    agreed,
    check_processes,
    check_shared,
    from_first,
    gathered,
    is_first,
    join,
    joined,
    n_processes,
    number,
    same_everywhere,
    speaks,
)

__all__ = [
    "agreed",
    "check_processes",
    "check_shared",
    "from_first",
    "gathered",
    "is_first",
    "join",
    "joined",
    "n_processes",
    "number",
    "same_everywhere",
    "speaks",
]
