"""What a mixture's experts module is told: which experts each token goes through, and with what weights.

A router's own output is not what counts: groups, biases of the selection and normalisation come behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from remove_refusals.modelmap.knowledge import first_of_width


@dataclass(frozen=True, eq=False)
class Routing:
    """The arguments of an experts module: the tokens' states, the experts of each, and the experts' weights.

    `chosen` and `weights` are `[n_tokens, n_chosen]`; an index from the number of experts on is no expert's.
    """

    states: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    _leaves: tuple[Any, ...]
    _structure: Any

    def arguments(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> Any:
        """Give the module's arguments, positional ones and those by name, with others in the place of these three."""
        new = {id(self.states): states, id(self.chosen): chosen, id(self.weights): weights.to(self.weights.dtype)}
        return tree_unflatten([new.get(id(leaf), leaf) for leaf in self._leaves], self._structure)

    def written(self, run: Callable[..., Any], chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Give what the experts write for these tokens when chosen and weighed otherwise, `[n_tokens, d_model]`."""
        args, kwargs = self.arguments(self.states, chosen, weights)
        d_model = self.states.shape[-1]
        found = first_of_width(run(*args, **kwargs), d_model)
        assert found is not None
        return found.reshape(-1, d_model)

    def at(self, rows: torch.Tensor) -> "Routing":
        """Give the same for some of the tokens alone."""
        states = self.states.reshape(-1, self.states.shape[-1])[rows]
        # A module that takes sequences gets sequences of one token.
        states = states.unsqueeze(1) if self.states.dim() == 3 else states
        chosen, weights = self.chosen[rows], self.weights[rows]
        args = self.arguments(states, chosen, weights)
        leaves, structure = tree_flatten(args)
        return Routing(states, chosen, weights, tuple(leaves), structure)


def routing_of(arguments: Any, d_model: int) -> Routing | None:
    """Find the three among a module's arguments, `(args, kwargs)`; None for a module that is told no experts."""
    leaves, structure = tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() == 2]
    whole = (torch.int32, torch.int64)
    for chosen in (tensor for tensor in tensors if tensor.dtype in whole):
        alike = (one for one in tensors if one.is_floating_point() and one.shape == chosen.shape)
        weights, states = next(alike, None), first_of_width(leaves, d_model)
        if weights is not None and states is not None and states is not weights:
            return Routing(states, chosen, weights, tuple(leaves), structure)
    return None
