"""Tensors of a traced forward pass that are computed from one parameter alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

# Operations that copy, cast, index or rearrange.
_KEEP = frozenset(
    """alias clone contiguous detach _to_copy lift_fresh repeat view _unsafe_view reshape expand permute transpose t
    slice select index index_select squeeze unsqueeze split split_with_sizes chunk unbind unfold narrow diagonal
    as_strided gather dropout native_dropout neg""".split()
)


@dataclass(frozen=True)
class Weight:
    """A tensor computed from one parameter alone: `scale * parameter + offset`.

    Attributes:
        name: The parameter's or buffer's name.
        axes: The parameter's axis for each stride of the tensor.
        is_parameter: Whether it is a parameter; a buffer cannot be edited.
        scale: What it was multiplied by.
        offset: What was added to it.
    """

    name: str
    axes: Mapping[int, int]
    is_parameter: bool
    scale: float = 1.0
    offset: float = 0.0

    def axis(self, tensor: torch.Tensor, dim: int) -> int | None:
        """Give the parameter's axis that a dimension of the tensor is."""
        return self.axes.get(tensor.stride(dim)) if tensor.dim() >= max(1, -dim) else None


def changed_weight(weight: Weight, name: str, args: Sequence[Any]) -> Weight | None:
    """Give what an operation makes of a weight, without regard to its shape.

    Args:
        weight: The weight, the operation's only floating-point tensor.
        name: The operation's name.
        args: Its arguments in the order of its schema, defaults included.

    Returns:
        The weight after the operation; None if it is no longer a parameter scaled and shifted.
    """
    if name in _KEEP:
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


def axes_of(new: torch.Tensor, old: torch.Tensor, weight: Weight) -> Mapping[int, int]:
    """Give the parameter's axes for the strides of a tensor that was copied from another of the same weight."""
    # Indexing adds dimensions at the front, so the last ones are the same in both.
    pairs = zip(reversed(new.stride()), reversed(old.stride()), strict=False)
    return {stride: weight.axes[known] for stride, known in pairs if known in weight.axes}
