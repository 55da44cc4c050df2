"""What a mixture's experts module is told: which experts each token goes through, and with what weights.

A router's own output is not what counts: groups, biases of the selection and normalisation come behind it. But where
the experts are told no choice and get the tokens sorted by expert (JetMoE, Llama 4), all of it lies in the router.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from remove_refusals.modelmap.knowledge import first_of_width
from remove_refusals.models import hooked


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


Run = Callable[..., Any]
"""How experts are run: from a routing's arguments to what is written."""


def sorts_tokens(module: Any, output: Any) -> bool:
    """Tell whether a module is the router of experts that get their tokens sorted, by what it gives."""
    n_experts, n_chosen = (getattr(module, name, None) for name in ("num_experts", "top_k"))
    if not n_experts or not n_chosen or not isinstance(output, tuple):
        return False
    if len(output) == 5 and isinstance(output[3], list):
        return bool(len(output[3]) == n_experts)
    wide = [isinstance(part, torch.Tensor) and part.dim() == 2 and part.shape[1] == n_experts for part in output]
    return len(wide) == 2 and all(wide)


def choice_of(router: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the experts of each token and their weights, `[n_tokens, n_chosen]`, in what such a router gives."""
    n_chosen = router.top_k
    if len(output) == 2:
        # A weight for every expert, 0 where it is not chosen.
        weights, chosen = output[0].topk(n_chosen, dim=-1)
        return chosen, weights
    order, _, gates, sizes, _ = output
    chosen, weights = torch.empty_like(order), torch.empty_like(gates)
    chosen[order], weights[order] = _expert_of_rows(sizes, order.device), gates
    return chosen.reshape(-1, n_chosen), weights.reshape(-1, n_chosen)


def with_choice(output: Any, chosen: torch.Tensor, weights: torch.Tensor) -> Any:
    """Give what such a router gives with another choice in it."""
    weights = weights.to(output[0].dtype if len(output) == 2 else output[2].dtype)
    if len(output) == 2:
        return torch.zeros_like(output[0]).scatter(1, chosen, weights), output[1]
    experts, order = chosen.flatten().sort(stable=True)
    sizes = torch.bincount(experts, minlength=len(output[3])).tolist()
    return order, order.div(chosen.shape[1], rounding_mode="trunc"), weights.flatten()[order], sizes, output[4]


def expert_of_rows(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Give the expert that wrote each row of what experts give that get their tokens sorted."""
    n_experts = module.num_experts
    sizes = next((one for one in args if isinstance(one, list)), [len(output) // n_experts] * n_experts)
    return _expert_of_rows(sizes, output.device)


def _expert_of_rows(sizes: list[int], device: torch.device) -> torch.Tensor:
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


def routing_within(block: torch.nn.Module, name: str, states: torch.Tensor) -> tuple[Routing, Run]:
    """Read the routing of such a router, of this name in its block, for `[n_tokens, d_model]`, and how to run it."""
    router = block.get_submodule(name)
    choice = choice_of(router, router.forward(states))

    def run(states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        def whole(weights: torch.Tensor) -> torch.Tensor:
            hook = (name, lambda module, args, kwargs, output: with_choice(output, chosen, weights))
            with hooked(block, behind=[hook]):
                found = first_of_width(block.forward(states.unsqueeze(1)), states.shape[-1])
            assert found is not None
            return found

        # Biases and shared experts are no expert's.
        return whole(weights) - whole(torch.zeros_like(weights))

    leaves, structure = tree_flatten(((states, *choice), {}))
    return Routing(states, *choice, tuple(leaves), structure), run
