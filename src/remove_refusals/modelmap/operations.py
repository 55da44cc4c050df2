"""What each tensor operation does to the terms of its operands.

A product with a parameter starts a term; sums unite terms; moving, scaling by a number per token and mixing over tokens
keep them; a gain, centring and a depthwise convolution add a step. Whatever is not listed here, or is done along the
channels, ends in an *opaque* term that names the operation: it can cost an exact edit and never fakes one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from remove_refusals.formula import ChannelStep
from remove_refusals.modelmap.knowledge import CONSTANT, ZERO, Knowledge, Terms, Weight, tensors_in

Rule = Callable[[Knowledge, Sequence[Any]], Terms | None]
"""From what is known and an operation's positional arguments to the terms of its output."""

# What leaves every dimension where it is.
_COPIES = "alias clone contiguous detach _to_copy lift_fresh".split()

# What selects, copies or moves rows, also of one parameter.
_MOVES = """neg dropout native_dropout repeat view _unsafe_view reshape expand permute transpose t slice select squeeze
    unsqueeze split split_with_sizes chunk unbind unfold narrow diagonal as_strided""".split()

# Beside each the argument that must not name the channels.
_KEEP = dict.fromkeys("index_select gather take_along_dim cumsum flip sum mean".split(), 1) | {"roll": 2}
_UNITE = dict.fromkeys("index_add index_copy scatter scatter_add".split(), 1)
_UNITE |= {"slice_scatter": 2, "select_scatter": 2}

_FRESH = "zeros zeros_like new_zeros empty empty_like new_empty new_empty_strided empty_strided zero".split()

# Where the value that fills a tensor stands.
_FILLS = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2, "fill": 1}

# Where the two operands stand; a bias, if any, comes first.
_PRODUCTS = dict.fromkeys("mm bmm matmul _grouped_mm grouped_mm_fallback".split(), 0) | {"addmm": 1, "baddbmm": 1}

TWO_ACTIVATIONS = "a product of two activations"

_RULES: dict[str, Rule] = dict.fromkeys(_FRESH, lambda known, args: ZERO)


def _rule(*names: str, **options: Any) -> Callable[[Rule], Rule]:
    """Make a function the rule of some operations."""

    def note(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, partial(rule, **options) if options else rule))
        return rule

    return note


def terms_after(known: Knowledge, name: str, args: Sequence[Any], out: Any) -> Terms | None:
    """Give the terms of an operation's output from its arguments by its schema; None if no parameter has reached it."""
    if name in _KEEP and _names_channels(args[0], args[_KEEP[name]]):
        value, dims = args[0], args[_KEEP[name]]
        if name == "mean" and value.shape[-1] == known.d_model and dims in ([-1], [value.dim() - 1]):
            known.learn_mean(out, value)
        return _ended(known, f"{name} over channels", value)
    if name in _COPIES or name in _MOVES or name in _KEEP:
        return known.terms(args[0], known.channels_of(args[0]) if name in _COPIES else -1)
    if name in _UNITE and _names_channels(args[0], args[_UNITE[name]]):
        return _ended(known, f"{name} over channels", args)
    if name in _UNITE or name in {"cat", "stack", "copy"}:
        return _united(known, name, args)
    if name in _FILLS:
        return ZERO if _is_zero(args[_FILLS[name]]) else None
    return _RULES[name](known, args) if name in _RULES else _ended(known, name, args)


def channel_dim(known: Knowledge, name: str, args: Sequence[Any]) -> int:
    """Give the dimension of an operation's output that holds the channels its terms speak of."""
    if name == "convolution":
        return 1
    if name in _COPIES:
        return known.channels_of(args[0])
    if name in _PRODUCTS:
        left, right = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        return -2 if known.weight(right) is None and known.weight(left) is not None else -1
    return -1


def changed_weight(weight: Weight, name: str, args: Sequence[Any]) -> Weight | None:
    """Give what an operation makes of a weight, without regard to its shape; None if more than scale and shift."""
    if name in _COPIES or name in _MOVES or name in {"index", "index_select", "gather"}:
        return replace(weight, scale=-weight.scale, offset=-weight.offset) if name == "neg" else weight
    if len(args) < 2 or not any(isinstance(value, int | float) for value in args[:2]):
        return None
    number_first = isinstance(args[0], int | float)
    number = float(args[0] if number_first else args[1])
    rest = args[2] if len(args) > 2 else None
    if name in {"add", "sub", "rsub"}:
        if rest not in {None, 1}:
            return None
        negated = name == "rsub" or (name == "sub" and number_first)
        shift = number if name == "add" or negated else -number
        sign = -1 if negated else 1
        return replace(weight, scale=sign * weight.scale, offset=sign * weight.offset + shift)
    if number == 0 or rest is not None or not (name == "mul" or (name == "div" and not number_first)):
        return None
    factor = number if name == "mul" else 1 / number
    return replace(weight, scale=factor * weight.scale, offset=factor * weight.offset)


def _ended(known: Knowledge, name: str, values: Any) -> Terms | None:
    """The opaque term of an operation that any parameter has reached."""
    return known.opaque(name) if any(known.terms(tensor) for tensor in tensors_in(values)) else None


def _or_constant(terms: Terms | None) -> Terms:
    return frozenset({CONSTANT}) if terms is None else terms


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _names_channels(value: torch.Tensor, dims: Any) -> bool:
    if not isinstance(dims, int | list | tuple) or dims == []:
        return True
    dims = [dims] if isinstance(dims, int) else dims
    return any(dim % max(1, value.dim()) == value.dim() - 1 for dim in dims)


def _per_row(value: Any) -> bool:
    """Whether a factor is a number, or one number for each token."""
    return not isinstance(value, torch.Tensor) or value.numel() == 1 or value.shape[-1] == 1 or value.stride(-1) == 0


def _united(known: Knowledge, name: str, args: Sequence[Any]) -> Terms | None:
    if any(isinstance(value, str) for value in args):
        return _ended(known, name, args)
    united, number = known.united(args[1] if name == "copy" else args), args[-1]
    is_value = name == "scatter" and isinstance(number, int | float) and number != 0
    return united | {CONSTANT} if is_value and united is not None else united


def _product(known: Knowledge, args: Sequence[Any], *, at: int) -> Terms | None:
    left, right = args[at : at + 2]
    added = _or_constant(known.terms(args[0])) if at else ZERO
    for operand, dim in ((right, -1), (left, -2)):
        weight = known.weight(operand)
        if weight is not None and operand.dim() >= 2:
            if weight.offset:
                return known.opaque("a product with a changed parameter")
            return known.written(operand, dim) | added
    carried = known.terms(right)
    if carried and right.dim() >= 2 and known.is_channels(right):
        return carried | added
    return _ended(known, TWO_ACTIVATIONS, args[: at + 2])


@_rule("add", "rsub")
def _add(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    found = [known.terms(value) for value in args[:2]]
    if found == [None, None]:
        return None
    return known.summed(*(ZERO if _is_zero(value) else terms for value, terms in zip(args[:2], found, strict=True)))


@_rule("sub")
def _subtract(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    terms = known.terms(args[0])
    if terms and known.is_mean_of(args[1], args[0]):
        return known.stepped(terms, ChannelStep("center"))
    return _add(known, args)


@_rule("mul")
def _multiply(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    for value, factor in ((args[0], args[1]), (args[1], args[0])):
        terms = known.terms(value)
        if terms == ZERO:
            return ZERO
        if terms is None or not isinstance(value, torch.Tensor) or (_per_row(value) and not _per_row(factor)):
            continue
        if _per_row(factor):
            return terms
        if known.weight(value) is None:
            stepped = _with_gain(known, terms, value, factor)
            if stepped is not None:
                return stepped
    return _ended(known, TWO_ACTIVATIONS, args[:2])


def _with_gain(known: Knowledge, terms: Terms, value: torch.Tensor, factor: torch.Tensor) -> Terms | None:
    gain = known.weight(factor)
    if gain is None or not gain.is_parameter or gain.scale == 0 or not known.is_channels(value):
        return None
    if factor.numel() != known.d_model or factor.shape[-1] != known.d_model or value.shape[-1] != known.d_model:
        return None
    return known.stepped(terms, ChannelStep("gain", gain.name, gain.offset / gain.scale))


@_rule("div")
def _divide(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    value, divisor, *rounding = args
    if _per_row(divisor) and not any(rounding):
        return known.terms(value)
    return _ended(known, "a quotient of two activations", args[:2])


@_rule("addcmul")
def _add_product(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    return known.summed(_multiply(known, args[1:3]), known.terms(args[0]))


@_rule("where")
def _where(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    condition, *values = args[:3]
    if not _per_row(condition):
        return _ended(known, "where over channels", values)
    united = known.united(*values)
    filled = any(not isinstance(value, torch.Tensor) and value != 0 for value in values)
    return united | {CONSTANT} if united is not None and filled else united


@_rule("masked_fill")
def _masked_fill(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    value, mask, number = args[:3]
    if not (known.terms(number) == ZERO or _is_zero(number)) or not _per_row(mask):
        return _ended(known, "masked_fill", [value])
    return known.terms(value)


@_rule("index")
def _index(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    value, indices = args[0], args[1]
    masked = sum(index.dim() if index.dtype in {torch.bool, torch.uint8} else 1 for index in tensors_in(indices))
    reaches_last = masked + sum(index is None for index in indices) >= value.dim() and indices[-1] is not None
    return _ended(known, "index over channels", [value]) if reaches_last else known.terms(value)


@_rule("index_put", "_index_put_impl")
def _index_put(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    if _index(known, args) != known.terms(args[0]):
        return _ended(known, "index_put over channels", args)
    return known.united(args[0], args[2])


@_rule("embedding")
def _embedding(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    return known.terms(args[0]) if known.weight(args[0]) is not None else _ended(known, "embedding", [args[0]])


@_rule("convolution")
def _convolution(known: Knowledge, args: Sequence[Any]) -> Terms | None:
    value, kernel, bias, _, _, _, transposed, _, groups = args[:9]
    weight = known.weight(kernel)
    added = ZERO if bias is None else _or_constant(known.terms(bias))
    if weight is None or weight.offset:
        return _ended(known, "convolution", args)
    if groups == 1:
        return known.written(kernel, 1 if transposed else 0) | added
    terms = known.terms(value, 1)
    depthwise = groups == known.d_model and tuple(kernel.shape[:2]) == (known.d_model, 1) and not transposed
    if terms and depthwise and known.is_channels(value, 1) and weight.is_parameter:
        return known.stepped(terms, ChannelStep("taps", weight.name)) | added
    return _ended(known, "a grouped convolution", args)


@_rule("native_layer_norm", centers=True)
@_rule("_fused_rms_norm", "rms_norm", centers=False)
def _norm(known: Knowledge, args: Sequence[Any], *, centers: bool = False) -> Terms | None:
    value, shape, gain, bias = (*args, None, None)[:4]
    terms = known.terms(value)
    if not terms:
        return _ended(known, "a norm", args)
    if list(shape) != [known.d_model] or not known.is_channels(value):
        return _ended(known, "a norm over other than the channels", args)
    if centers:
        terms = known.stepped(terms, ChannelStep("center"))
    if gain is not None:
        stepped = _with_gain(known, terms, value, gain)
        if stepped is None:
            return _ended(known, "a norm whose gain is no parameter", args)
        terms = stepped
    return terms | (_or_constant(known.terms(bias)) if centers and isinstance(bias, torch.Tensor) else ZERO)


_RULES |= {name: partial(_product, at=at) for name, at in _PRODUCTS.items()}
