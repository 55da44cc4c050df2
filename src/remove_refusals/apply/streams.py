"""The residual stream among what a module takes or returns."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from remove_refusals.errors import ArchitectureError
from remove_refusals.terms import first_of_width


def with_stream(value: Any, module: str, d_model: int, changed: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the residual stream among what a module takes or returns.

    Args:
        value: The arguments or the result.
        module: The module's name, for the error.
        d_model: The width of the residual stream.
        changed: Gives the tensor that takes the stream's place.

    Returns:
        The same structure with the stream changed.

    Raises:
        ArchitectureError: If there is no tensor of that width.
    """
    leaves, structure = tree_flatten(value)
    stream = first_of_width(leaves, d_model)
    if stream is None:
        raise ArchitectureError(
            f"A hooked module '{module}' was run without a tensor of width {d_model}, expected what it took and "
            "returned when the model was mapped; report this model type."
        )
    return tree_unflatten([changed(leaf) if leaf is stream else leaf for leaf in leaves], structure)
