"""What is known of each tensor of a traced forward pass: which parameters it is a sum of.

Knowledge is kept by storage, so that a view knows what its base knows. A tensor counts as known only where its last
axis is the residual stream's channels: what is known of a storage says nothing of a tensor that has them elsewhere.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from remove_refusals.formula import ChannelStep


@dataclass(frozen=True)
class Term:
    """One summand of a tensor: a parameter or buffer whose `axis` became the channels, behind `steps`, first one first.

    The source of an opaque term is the operation that ended the trace, its axis None; `number` tells it from others.
    """

    source: str
    axis: int | None
    steps: tuple[ChannelStep, ...] = ()
    number: int = 0


Terms = frozenset[Term]

ZERO: Terms = frozenset()
"""The terms of a tensor of zeros."""

CONSTANT = Term("a constant", None)
"""What no parameter has written and is not known to be zero."""

TWICE = "what it holds already, behind a norm or the like"

REARRANGED: Terms = frozenset({Term("a part or a rearrangement of channels", None)})
"""The terms of a tensor that holds known channels elsewhere than along its last axis."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """List the tensors in nested lists, tuples and mappings, in their order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def first_of_width(value: Any, d_model: int) -> torch.Tensor | None:
    """Find the residual stream, or else several side by side, among a module's inputs or outputs, however nested."""
    found = [tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.dim() >= 2]
    exact = (tensor for tensor in found if tensor.shape[-1] == d_model)
    wider = (t for t in found if t.dim() >= 3 and t.shape[-1] and t.shape[-1] % d_model == 0)
    return next(itertools.chain(exact, wider), None)


def storage_of(tensor: torch.Tensor) -> int:
    """Give what identifies a tensor's storage, as long as that exists; views of one storage have it in common."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class Weight:
    """A tensor `scale * parameter (or buffer) + offset`; `axes` gives the parameter's axis for each of its strides."""

    name: str
    axes: Mapping[int, int]
    is_parameter: bool
    scale: float = 1.0
    offset: float = 0.0


@dataclass
class Knowledge:
    """What is known of each storage, by its address; storages are kept alive so that their addresses stay theirs.

    `used` and `made_in` are those of a `Trace`, buffers included; `open_modules` are being called now, outermost first.
    """

    d_model: int
    used: set[str] = field(default_factory=set)
    used_elsewhere: set[str] = field(default_factory=set)
    open_modules: list[str] = field(default_factory=list)
    made_in: dict[Term, frozenset[str]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _weights: dict[int, Weight] = field(default_factory=dict)
    _terms: dict[int, Terms] = field(default_factory=dict)
    _channel_strides: dict[int, int] = field(default_factory=dict)
    _means: dict[int, int] = field(default_factory=dict)
    _alive: list[torch.Tensor] = field(default_factory=list)

    def weight(self, tensor: Any) -> Weight | None:
        """Give the parameter that a value is computed from alone, if there is one."""
        return self._weights.get(storage_of(tensor)) if isinstance(tensor, torch.Tensor) else None

    def learn_weight(self, tensor: torch.Tensor, weight: Weight) -> None:
        """Note that a tensor is computed from one parameter alone; the first that was noted stays."""
        self._alive.append(tensor)
        self._weights.setdefault(storage_of(tensor), weight)

    def is_channels(self, tensor: Any, dim: int = -1) -> bool:
        """Whether a dimension of a tensor is the channels that its terms speak of, of one or several streams."""
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < max(1, -dim, dim + 1):
            return False
        width, stride = tensor.shape[dim], self._channel_strides.get(storage_of(tensor))
        return width > 0 and width % self.d_model == 0 and tensor.stride(dim) == stride

    def channels_of(self, tensor: torch.Tensor) -> int:
        """Give the dimension of a tensor that is the channels, counted from the end; the last if none is."""
        return next((dim for dim in range(-1, -tensor.dim() - 1, -1) if self.is_channels(tensor, dim)), -1)

    def terms(self, tensor: Any, dim: int = -1) -> Terms | None:
        """Give the terms of a value whose channels lie along a dimension; None for what no parameter has reached."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return None
        if self.weight(tensor) is not None:
            return self.written(tensor, dim)
        known = self._terms.get(storage_of(tensor))
        if not known or self.is_channels(tensor, dim):
            return known
        return REARRANGED

    def written(self, tensor: torch.Tensor, dim: int) -> Terms:
        """Give the terms of what a parameter writes when one of its dimensions becomes the channels."""
        weight = self.weight(tensor)
        assert weight is not None
        axis = weight.axes.get(tensor.stride(dim)) if tensor.dim() >= max(1, -dim) else None
        return frozenset({self.made(Term(weight.name, axis)), *([CONSTANT] if weight.offset else [])})

    def stepped(self, terms: Terms, step: ChannelStep) -> Terms:
        """Give the terms after one more per-channel step; nothing can be said of opaque ones, which stay."""
        return frozenset(
            term if term.axis is None else self.made(replace(term, steps=(*term.steps, step))) for term in terms
        )

    def made(self, term: Term) -> Term:
        """Note that a term was made now, and give it back."""
        modules = frozenset(self.open_modules)
        self.made_in[term] = self.made_in.get(term, modules) & modules
        return term

    def opaque(self, operation: str) -> Terms:
        """Give the terms of a tensor that cannot be followed beyond an operation."""
        return frozenset({Term(operation, None, number=next(self._numbers))})

    def learn(self, tensor: torch.Tensor, terms: Terms, *, dim: int = -1) -> None:
        """Note the terms of a new tensor whose channels lie along a dimension."""
        self._alive.append(tensor)
        if self.weight(tensor) is None:
            self._terms[storage_of(tensor)] = terms
            self._channel_strides[storage_of(tensor)] = tensor.stride(dim) if tensor.dim() else 1

    def overwrite(self, tensor: torch.Tensor, terms: Terms) -> None:
        """Note the terms of a tensor that was written to; what it does not cover of its storage stays."""
        known = self._terms.get(storage_of(tensor)) if self.weight(tensor) is None else self.terms(tensor)
        self._weights.pop(storage_of(tensor), None)
        if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
            terms = terms | (frozenset({CONSTANT}) if known is None else known)
            if known is not None and not self.is_channels(tensor):
                terms = terms | REARRANGED
            self._terms[storage_of(tensor)] = terms
        else:
            self.learn(tensor, terms)

    def learn_mean(self, mean: torch.Tensor, whole: torch.Tensor) -> None:
        """Note that a tensor is the mean of another over its channels."""
        self._means[storage_of(mean)] = storage_of(whole)

    def is_mean_of(self, mean: Any, whole: Any) -> bool:
        """Whether a tensor is the mean of another over its channels."""
        if not isinstance(mean, torch.Tensor) or not isinstance(whole, torch.Tensor):
            return False
        return mean.shape[-1:] == (1,) and self._means.get(storage_of(mean)) == storage_of(whole)

    def united(self, *values: Any) -> Terms | None:
        """Give the terms of a collection of values; None if no parameter has reached any of them."""
        return self.summed(*(self.terms(tensor) for tensor in tensors_in(values) if tensor.is_floating_point()))

    def summed(self, *parts: Terms | None) -> Terms | None:
        """Give the terms of a sum, in which what no parameter has reached is a constant; None if that is all."""
        if all(part is None for part in parts):
            return None
        known_parts = [frozenset({CONSTANT}) if part is None else part for part in parts]
        whole: Terms = frozenset().union(*known_parts)
        if whole in known_parts:
            return whole
        chosen: dict[tuple[str, int | None, int], Term] = {}
        for term in sorted(whole, key=lambda term: len(term.steps)):
            key = (term.source, term.axis, term.number)
            known = chosen.setdefault(key, term)
            if known is term:
                continue
            last = term.steps[-1]
            # What passed through a depthwise convolution is joined with the same that passed beside it. Of anything
            # else that is there twice, behind different steps, no one edit is right for both.
            if last.kind == "taps" and last.offset == 0 and known.steps == term.steps[:-1]:
                chosen[key] = self.made(replace(term, steps=(*known.steps, replace(last, offset=1.0))))
            else:
                (chosen[TWICE, None, 0],) = self.opaque(TWICE)
        return frozenset(chosen.values())
