"""Follow parameters through one forward pass: which of them end up, linearly, in which tensor.

A forward pass is run under a dispatch mode that sees every tensor operation. Beside each tensor it keeps *terms*: the
parameters whose output the tensor is a sum of, and the per-channel steps (norm gains, centring) that each has passed
through since. A matrix product with a parameter starts a new term; sums unite terms; selecting, reshaping, scaling by a
number per token and mixing over tokens keep them; a gain adds a step; anything else ends them in an *opaque* term that
names the operation. Values never matter, so the pass may run on the meta device, where no weights are needed.

What is learned this way does not depend on the names of modules or parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from remove_refusals.types import ChannelStep


@dataclass(frozen=True)
class Term:
    """One summand of a tensor.

    Attributes:
        source: The parameter's or buffer's name; for an opaque term the operation that ended the trace.
        axis: The parameter's axis that became the tensor's channels; None for an opaque term.
        steps: The per-channel steps that the summand has passed through since, first step first.
    """

    source: str
    axis: int | None
    steps: tuple[ChannelStep, ...] = ()


Terms = frozenset[Term]


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        module: The module's name in the model.
        before: The terms of its first input of the residual stream's width, when it was called.
        after: The terms of its first output of the residual stream's width, when it returned.
        start: The position of the call's begin in the order of all begins and ends.
        end: The position of the call's end.
    """

    module: str
    before: Terms | None
    after: Terms | None
    start: int
    end: int


@dataclass(frozen=True)
class Trace:
    """What one forward pass did.

    Attributes:
        calls: Every module call, in the order in which they ended.
        read_axes: For each parameter that was multiplied with a tensor, the axes that were summed over.
        gains: The parameters that were used as per-channel gains.
        used: Every parameter that any operation touched.
    """

    calls: tuple[ModuleCall, ...]
    read_axes: Mapping[str, frozenset[int]]
    gains: frozenset[str]
    used: frozenset[str]


@dataclass(frozen=True)
class _Weight:
    """A tensor computed from one parameter alone; `axes` maps a stride of the tensor to the parameter's axis."""

    name: str
    axes: Mapping[int, int]
    offset: float = 0.0


# Operations that keep every summand's channels: they select, move or mix rows, or scale them by a number.
_KEEP = frozenset(
    """alias clone contiguous copy detach _to_copy lift_fresh view _unsafe_view reshape expand permute transpose t slice
    select index index_select gather squeeze unsqueeze repeat roll flip masked_fill neg native_dropout dropout cumsum
    take_along_dim as_strided constant_pad_nd split split_with_sizes chunk unbind unfold narrow movedim swapaxes
    diagonal _reshape_alias repeat_interleave nan_to_num set_data real""".split()
)
# Operations that unite the summands of their operands.
_UNITE = frozenset(
    """cat stack where index_add index_put _index_put_impl index_copy scatter scatter_add scatter_reduce slice_scatter
    select_scatter masked_scatter _foreach_add""".split()
)
_FRESH = frozenset("zeros zeros_like new_zeros empty empty_like new_empty new_empty_strided empty_strided".split())
_REDUCE = frozenset("sum mean".split())
_PRODUCTS = frozenset("mm addmm bmm baddbmm matmul linear _grouped_mm mv addmv".split())


# Without values, a question about a value is answered with 1 or True, and every element counts as non-zero: each path
# that matters is then taken, since masks are full and every expert has tokens.
_MADE_UP: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "_local_scalar_dense": lambda value: value.dtype == torch.bool or (1.0 if value.is_floating_point() else 1),
    "nonzero": lambda value: torch.empty((value.numel(), value.dim()), dtype=torch.int64, device="meta"),
}


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@dataclass
class _State:
    """What is known of each storage; storages are kept alive so that their addresses stay theirs."""

    d_model: int
    weights: dict[int, _Weight] = field(default_factory=dict)
    terms: dict[int, Terms] = field(default_factory=dict)
    means: dict[int, int] = field(default_factory=dict)
    alive: list[torch.Tensor] = field(default_factory=list)
    read_axes: dict[str, set[int]] = field(default_factory=dict)
    gains: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps `_State` up to date with every operation."""

    def __init__(self, state: _State) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = state
        self._rules: dict[str, Callable[[Sequence[Any], Mapping[str, Any], Any], Terms | None]] = {
            "add": self._add,
            "sub": self._add,
            "rsub": self._add,
            "mul": self._multiply,
            "div": self._multiply,
            "embedding": self._embedding,
            "convolution": self._convolution,
            "native_layer_norm": self._norm,
            "_fused_rms_norm": self._norm,
            "rms_norm": self._norm,
            "addcmul": self._add_product,
            **{name: partial(self._product, name) for name in _PRODUCTS},
            **dict.fromkeys(_REDUCE, self._reduce),
            **dict.fromkeys(_FRESH, lambda args, kwargs, out: frozenset()),
            **dict.fromkeys(_KEEP, lambda args, kwargs, out: self.terms(args[0])),
            **dict.fromkeys(_UNITE, lambda args, kwargs, out: self._unite(args)),
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        out = _MADE_UP[name](args[0]) if name in _MADE_UP and args[0].is_meta else func(*args, **kwargs)
        in_place = name.endswith("_") and not name.startswith("__")
        name = name.rstrip("_") if in_place else name
        outputs = _tensors(out)
        inputs = _tensors((args, kwargs))
        self.state.alive.extend(outputs)
        for tensor in inputs:
            weight = self.weight(tensor)
            if weight is not None:
                self.state.used.add(weight.name)
        if self._derive_weight(name, args, inputs, outputs):
            return out
        rule = self._rules.get(name)
        terms = rule(args, kwargs, out) if rule else self._opaque(name, inputs)
        if terms is not None:
            if in_place and name in {"copy", "index_put", "_index_put_impl", "index_copy", "masked_scatter", "scatter"}:
                terms = terms | (self._unite(args) or frozenset())
            for tensor in outputs:
                if self.weight(tensor) is None:
                    self.state.terms[_key(tensor)] = terms
        return out

    def weight(self, tensor: Any) -> _Weight | None:
        return self.state.weights.get(_key(tensor)) if isinstance(tensor, torch.Tensor) else None

    def terms(self, tensor: Any) -> Terms | None:
        """The terms of a tensor; None for one that no parameter has reached: a constant, a mask, a position."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return None
        weight = self.weight(tensor)
        if weight is None:
            return self.state.terms.get(_key(tensor))
        axis = weight.axes.get(tensor.stride(-1)) if tensor.dim() else None
        return frozenset({Term(weight.name, axis)})

    def _opaque(self, name: str, inputs: Sequence[torch.Tensor]) -> Terms | None:
        if any(self.terms(tensor) for tensor in inputs):
            return frozenset({Term(name, None)})
        return None

    def _unite(self, value: Any) -> Terms | None:
        found = [terms for terms in map(self.terms, _tensors(value)) if terms is not None]
        return frozenset().union(*found) if found else None

    def _derive_weight(
        self, name: str, args: Sequence[Any], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> bool:
        """Whether the result is still one parameter: copied, cast, indexed, or changed by a number."""
        others = [tensor for tensor in inputs if self.weight(tensor) is None and tensor.is_floating_point()]
        sources = [tensor for tensor in inputs if self.weight(tensor) is not None]
        if len(sources) != 1 or others or not outputs or name == "embedding":
            return False
        source, weight = sources[0], self.weight(sources[0])
        assert weight is not None
        if name in {"add", "sub"} and isinstance(args[1], (int, float)):
            weight = replace(weight, offset=weight.offset + (args[1] if name == "add" else -args[1]))
        elif name not in _KEEP and name not in {"mul", "div", "rsub"}:
            return False
        for out in outputs:
            if _key(out) != _key(source):
                pairs = zip(reversed(out.stride()), reversed(source.stride()), strict=False)
                axes = {new: weight.axes[old] for new, old in pairs if old in weight.axes}
                self.state.weights[_key(out)] = replace(weight, axes=axes)
        return True

    def _is_per_row(self, tensor: Any) -> bool:
        return not isinstance(tensor, torch.Tensor) or tensor.numel() == 1 or tensor.shape[-1] == 1

    def _add(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        first, second = args[0], args[1]
        for whole, mean in ((first, second), (second, first)):
            if isinstance(mean, torch.Tensor) and isinstance(whole, torch.Tensor):
                terms = self.terms(whole)
                if terms and self.state.means.get(_key(mean)) == _key(whole):
                    return _with_step(terms, ChannelStep("center"))
        found = [self.terms(first), self.terms(second)]
        if found[0] is None and found[1] is None:
            return None
        unknown = any(
            terms is None and not (isinstance(value, (int, float)) and value == 0)
            for value, terms in zip((first, second), found, strict=True)
        )
        united = frozenset().union(*(terms for terms in found if terms is not None))
        return united | {Term("a constant", None)} if unknown else united

    def _multiply(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        first, second = args[0], args[1]
        if self.terms(first) is None and self.terms(second) is None:
            return None
        for value, factor in ((first, second), (second, first)):
            terms = self.terms(value)
            if terms is None or (self._is_per_row(value) and not self._is_per_row(factor)):
                continue
            if self._is_per_row(factor):
                return terms
            gain = self.weight(factor)
            if gain is not None and self.weight(value) is None and factor.numel() == factor.shape[-1]:
                self.state.gains.add(gain.name)
                return _with_step(terms, ChannelStep("gain", gain.name, gain.offset))
        for value, factor in ((first, second), (second, first)):
            if self.terms(value) is not None and self.terms(factor) is None and not factor.is_floating_point():
                return self.terms(value)
        return frozenset({Term("a product of two activations", None)})

    def _add_product(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        product = self._multiply(args[1:3], {}, out)
        start = self.terms(args[0])
        return None if product is None and start is None else (product or frozenset()) | (start or frozenset())

    def _reduce(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        value = args[0]
        dims = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim", range(value.dim()))
        dims = [dims] if isinstance(dims, int) else list(dims)
        if not value.dim() or value.dim() - 1 in [dim % value.dim() for dim in dims]:
            self.state.means[_key(out)] = _key(value)
            return self._opaque("a reduction over channels", [value])
        return self.terms(value)

    def _embedding(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        weight = self.weight(args[0])
        if weight is None:
            return self._opaque("embedding", [args[0]])
        return frozenset({Term(weight.name, weight.axes.get(args[0].stride(-1)))})

    def _convolution(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        weight = self.weight(args[1])
        if weight is None:
            return self._opaque("convolution", _tensors(args))
        bias = self.terms(args[2]) if len(args) > 2 else None
        return frozenset({Term(weight.name, weight.axes.get(args[1].stride(0)))}) | (bias or frozenset())

    def _norm(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        terms = self.terms(args[0])
        if terms is None:
            return None
        if isinstance(out, tuple) and len(out) == 3:
            terms = _with_step(terms, ChannelStep("center"))
        gain = self.weight(args[2]) if len(args) > 2 else None
        if gain is not None:
            self.state.gains.add(gain.name)
            terms = _with_step(terms, ChannelStep("gain", gain.name, gain.offset))
        bias = self.terms(args[3]) if len(args) > 3 and isinstance(args[3], torch.Tensor) else None
        return terms | (bias or frozenset())

    def _product(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Terms | None:
        values = [*args, *kwargs.values()]
        bias: Any = None
        out_dim, sum_dim = -1, -2
        if name in {"addmm", "baddbmm", "addmv"}:
            bias, left, right = values[:3]
        elif name == "linear":
            left, right, bias = (*values, None)[:3]
            out_dim, sum_dim = 0, 1
        else:
            left, right = values[:2]
        added = self.terms(bias) or frozenset()
        for operand, kept, summed in ((right, out_dim, sum_dim), (left, -2, -1)):
            weight = self.weight(operand)
            if weight is not None and operand.dim() >= 2:
                read = weight.axes.get(operand.stride(summed))
                if read is not None:
                    self.state.read_axes.setdefault(weight.name, set()).add(read)
                return frozenset({Term(weight.name, weight.axes.get(operand.stride(kept)))}) | added
        carried = self.terms(right)
        if carried and right.dim() >= 2 and right.shape[-1] == self.state.d_model and right.stride(-1) == 1:
            return carried | added
        return self._opaque("a product of two activations", [left, right])


def _with_step(terms: Terms, step: ChannelStep) -> Terms:
    return frozenset(replace(term, steps=(*term.steps, step)) for term in terms)


def _first_of_width(value: Any, d_model: int) -> torch.Tensor | None:
    """The first floating-point tensor whose last axis is the residual stream's, or several streams side by side."""
    for tensor in _tensors(value):
        if tensor.is_floating_point() and tensor.dim() >= 2 and tensor.shape[-1] == d_model:
            return tensor
    for tensor in _tensors(value):
        if tensor.is_floating_point() and tensor.dim() >= 3 and tensor.shape[-1] and tensor.shape[-1] % d_model == 0:
            return tensor
    return None


@contextmanager
def _recorded_calls(model: torch.nn.Module, tracer: _Tracer) -> Iterator[list[ModuleCall]]:
    """Note the terms at the entry and the exit of every module."""
    calls: list[ModuleCall] = []
    open_calls: list[tuple[str, Terms | None, int]] = []
    clock = iter(range(10**9))

    def terms_of(value: Any) -> Terms | None:
        tensor = _first_of_width(value, tracer.state.d_model)
        return tracer.terms(tensor) if tensor is not None else None

    def begin(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            open_calls.append((name, terms_of((args, kwargs)), next(clock)))

        return hook

    def finish(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name, before, start = open_calls.pop()
        calls.append(ModuleCall(name, before, terms_of(output), start, next(clock)))

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(begin(name), with_kwargs=True))
        handles.append(module.register_forward_hook(finish, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def trace_forward(model: torch.nn.Module, d_model: int, forward: Callable[[], Any]) -> Trace:
    """Run `forward`, which calls `model`, and follow its parameters.

    Args:
        model: The model; its parameters may be on the meta device.
        d_model: The width of the residual stream.
        forward: Runs the forward pass.

    Returns:
        What was seen. The model is left as it was.
    """
    state = _State(d_model)
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        axes = {stride: axis for axis, stride in reversed(list(enumerate(tensor.stride())))}
        state.weights.setdefault(_key(tensor), _Weight(name, axes))
    tracer = _Tracer(state)
    with torch.no_grad(), _recorded_calls(model, tracer) as calls, tracer:
        forward()
    parameters = {name for name, _ in model.named_parameters()}
    return Trace(
        calls=tuple(calls),
        read_axes={name: frozenset(axes) for name, axes in state.read_axes.items() if name in parameters},
        gains=frozenset(state.gains),
        used=frozenset(state.used & parameters),
    )
