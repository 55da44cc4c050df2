"""Follow parameters through one forward pass: which of them end up, linearly, in which tensor.

A dispatch mode sees every tensor operation and keeps *terms* beside each tensor: the parameters whose output it is a
sum of, and the per-channel steps (norm gains, centring) that each has passed through since. Values never matter, so the
pass may run on the meta device, where no weights are needed.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from remove_refusals.modelmap.experts import routing_of, sorts_tokens
from remove_refusals.modelmap.knowledge import Knowledge, Term, Terms, Weight, first_of_width, storage_of, tensors_in
from remove_refusals.modelmap.operations import changed_weight, channel_dim, terms_after
from remove_refusals.models import hooked


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module, from `start` to `end` in the order of all begins and ends.

    `before` and `after` are the terms of its first input and output of the stream's width, `beside` of other inputs.
    A `routed` module is told which experts each token goes through; one that `sorts` says it by the tokens' order.
    """

    module: str
    before: Terms | None
    beside: frozenset[Terms]
    after: Terms | None
    start: int
    end: int
    routed: bool = False
    sorts: bool = False


@dataclass(frozen=True)
class Trace:
    """Every module call of a forward pass, in the order in which they ended, and which parameters it touched.

    Those `used_elsewhere` were touched while their own module was not being called. `made_in` gives for each term the
    modules that were being called whenever it was made, by what wrote it or by its last step.
    """

    calls: tuple[ModuleCall, ...]
    used: frozenset[str]
    used_elsewhere: frozenset[str]
    made_in: Mapping[Term, frozenset[str]]


def _rows_of(index: Any) -> list[Any]:
    """A full mask's row numbers, one tensor for each of its dimensions; any other index as it is."""
    if not isinstance(index, torch.Tensor) or index.dtype not in {torch.bool, torch.uint8}:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64, device="meta")] * index.dim()


_COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@dataclass
class _MadeUpValues:
    """Answers the questions about values that the meta device cannot: with 1 or True, and all elements are non-zero.

    Each path that matters is then taken, since masks are full and every expert has tokens; counts that do not add up
    leave the rest to the last. With `numbered`, an index among the non-zero elements is its place, otherwise 1 as well.
    """

    numbered: bool
    _masks: dict[int, tuple[torch.Tensor, torch.Size]] = field(default_factory=dict)
    _compared: dict[int, tuple[torch.Tensor, bool]] = field(default_factory=dict)

    def run(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation, or make its result up."""
        value = args[0] if args else None
        if not isinstance(value, torch.Tensor) or not value.is_meta:
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            return self._number(value)
        if name == "nonzero":
            rows = torch.empty((value.numel(), value.dim()), dtype=torch.int64, device="meta")
            self._masks[storage_of(rows)] = rows, value.shape
            return rows
        if name == "_to_copy" and str(kwargs.get("device")) == "cpu":
            return torch.ones(value.shape, dtype=kwargs.get("dtype") or value.dtype)
        if name in {"_grouped_mm", "grouped_mm_fallback"}:
            return torch.empty((*value.shape[:-1], args[1].shape[-1]), dtype=value.dtype, device="meta")
        if name in {"index", "index_put", "index_put_"}:
            args = (value, [row for index in args[1] for row in _rows_of(index)], *args[2:])
        if name == "split_with_sizes":
            sizes, dim = args[1][:-1], args[2] if len(args) > 2 else 0
            args = (value, [*sizes, value.shape[dim] - sum(sizes)], dim)
        out = func(*args, **kwargs)
        is_place = value.numel() == 1 and storage_of(value) in self._masks
        if is_place and name in _COMPARISONS and isinstance(args[1], int):
            self._compared[storage_of(out)] = out, _COMPARISONS[name](self._number(value), args[1])
        return out

    def _number(self, value: torch.Tensor) -> bool | int | float:
        if value.dtype == torch.bool:
            return self._compared.get(storage_of(value), (value, True))[1]
        if value.is_floating_point():
            return 1.0
        rows, shape = self._masks.get(storage_of(value), (None, None))
        if rows is None or shape is None or not self.numbered:
            return 1
        # Every element of the mask was counted, so the place of a number in the list of rows says what it is.
        row, column = divmod(int(value.storage_offset()), max(1, rows.shape[1]))
        return row // math.prod(shape[column + 1 :]) % shape[column]


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what is known up to date with every operation."""

    def __init__(self, known: Knowledge, values: _MadeUpValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self._values = values

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket.__name__
        in_place = packet.endswith("_") and not packet.startswith("__")
        name = packet.rstrip("_") if in_place else packet
        # Every operation's arguments are in their order here, whichever way the caller named them.
        rest = func._schema.arguments[len(args) :]
        values = [*args, *(kwargs.get(part.name, part.default_value) for part in rest)]
        out = self._values.run(func, packet, args, kwargs)
        inputs = tensors_in(values)
        used = {weight.name for weight in map(self.known.weight, inputs) if weight is not None}
        self.known.used |= used
        self.known.used_elsewhere |= {one for one in used if one.rpartition(".")[0] not in self.known.open_modules}
        before = set(map(storage_of, inputs))
        new = [tensor for tensor in tensors_in(out) if storage_of(tensor) not in before]
        if not in_place and (not new or self._is_weight(name, values, new)):
            return out
        terms = terms_after(self.known, name, values, out)
        if terms is not None and in_place:
            self.known.overwrite(values[0], terms)
        elif terms is not None:
            dim = channel_dim(self.known, name, values)
            for tensor in new:
                self.known.learn(tensor, terms, dim=dim)
        return out

    def _is_weight(self, name: str, values: Sequence[Any], new: Sequence[torch.Tensor]) -> bool:
        """Note whether new tensors are still one parameter."""
        floats = [tensor for tensor in tensors_in(values) if tensor.is_floating_point()]
        weight = self.known.weight(floats[0]) if len(floats) == 1 else None
        changed = changed_weight(weight, name, values) if weight is not None else None
        if changed is None:
            return False
        for tensor in new:
            # Indexing adds dimensions at the front, so the last strides are of the same axes in both.
            pairs = zip(reversed(tensor.stride()), reversed(floats[0].stride()), strict=False)
            axes = {stride: changed.axes[before] for stride, before in pairs if before in changed.axes}
            self.known.learn_weight(tensor, replace(changed, axes=axes))
        return True


@contextmanager
def _recorded_calls(model: torch.nn.Module, known: Knowledge) -> Iterator[list[ModuleCall]]:
    """Note the terms at the entry and the exit of every module."""
    calls: list[ModuleCall] = []
    open_calls: list[tuple[Terms | None, frozenset[Terms], int]] = []
    clock = itertools.count()

    names = {module: name for name, module in model.named_modules()}

    def begin(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        known.open_modules.append(names[module])
        first = first_of_width((args, kwargs), known.d_model)
        others = [t for t in tensors_in((args, kwargs)) if t is not first and t.shape[-1:] == (known.d_model,)]
        beside = frozenset(terms for terms in map(known.terms, others) if terms)
        open_calls.append((known.terms(first), beside, next(clock)))

    def finish(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name, (before, beside, start) = known.open_modules.pop(), open_calls.pop()
        after = known.terms(first_of_width(output, known.d_model))
        routed = routing_of((args, kwargs), known.d_model) is not None
        sorts = sorts_tokens(module, output)
        calls.append(ModuleCall(name, before, beside, after, start, next(clock), routed, sorts))

    every = names.values()
    with hooked(model, before=[(name, begin) for name in every], behind=[(name, finish) for name in every]):
        yield calls


def trace_forward(model: torch.nn.Module, d_model: int, forward: Callable[[], Any], *, numbered: bool = True) -> Trace:
    """Run `forward`, which calls `model`, if need be on the meta device, and follow its parameters."""
    known = Knowledge(d_model)
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Of several axes with one stride, all but the first have size 1.
        axes = {stride: axis for axis, stride in reversed(list(enumerate(tensor.stride())))}
        known.learn_weight(tensor, Weight(name, axes, name in parameters))
    try:
        with torch.no_grad(), _recorded_calls(model, known) as calls, _Tracer(known, _MadeUpValues(numbered)):
            forward()
    except IndexError:
        if not numbered:
            raise
        # Some models count one expert more than they have, for padding, and never choose it.
        return trace_forward(model, d_model, forward, numbered=False)
    used, used_elsewhere = (frozenset(names & parameters) for names in (known.used, known.used_elsewhere))
    return Trace(calls=tuple(calls), used=used, used_elsewhere=used_elsewhere, made_in=known.made_in)
