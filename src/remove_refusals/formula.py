"""The one formula, and what it needs: take a subspace out of a tensor along one axis.

Everything is computed in float32 (orthonormalisation in float64) and cast back once. An edit gives the same bits
however the tensor is laid out, cut into slices or spread over threads: what is computed for one input depends on that
input alone, and sums have a fixed order.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from remove_refusals.errors import DirectionError
from remove_refusals.settings import Variant

BLOCK = 1 << 19
"""How many float32 numbers an edit holds beside the tensor, twice over (4 MiB), which stays in a core's cache."""


def orthonormal_basis(vectors: torch.Tensor) -> torch.Tensor:
    """Orthonormalise columns.

    Args:
        vectors: `[d_model, k]`, any floating-point dtype.

    Returns:
        `[d_model, k]`, float32, orthonormal columns that span the same space; for `k = 1` the unit vector.

    Raises:
        DirectionError: If the columns are not finite or not independent.
    """
    columns: torch.Tensor = vectors.to(torch.float64)
    norms = columns.norm(dim=0)
    if not bool(torch.isfinite(columns).all()) or bool((norms == 0).any()):
        raise DirectionError(
            f"The vectors have norms {norms.tolist()}, expected finite and non-zero; "
            "use prompts on which the model's activations differ and are finite."
        )
    columns = columns / norms
    if columns.shape[1] == 1:
        return columns.to(torch.float32)
    basis, triangle = torch.linalg.qr(columns)
    if float(triangle.diagonal().abs().min()) < 1e-6:
        raise DirectionError(
            f"The {columns.shape[1]} vectors are linearly dependent, expected independent ones; leave one out."
        )
    signed: torch.Tensor = basis * triangle.diagonal().sign()
    return signed.to(torch.float32)


def project_out(
    tensor: torch.Tensor,
    basis: torch.Tensor,
    strength: float,
    axis: int = -1,
    variant: Variant = "plain",
) -> torch.Tensor:
    """Take a share of the component along `basis` out of a tensor: `W - strength * Q (Qᵀ W)`.

    Args:
        tensor: Any shape with `shape[axis] == d_model`, floating point; left as it is.
        basis: `[d_model, k]`, float32, orthonormal columns.
        strength: The share that is taken out; 0 returns an equal tensor.
        axis: The axis of width d_model.
        variant: `plain`; `norm-preserving` scales what each single input writes back to its old norm, which adds
            nothing along `basis`.

    Returns:
        A new tensor of the same shape and dtype, contiguous.
    """
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    project_out_in_place(out, basis, strength, axis, variant)
    return out


def project_out_in_place(
    tensor: torch.Tensor,
    basis: torch.Tensor,
    strength: float,
    axis: int = -1,
    variant: Variant = "plain",
) -> None:
    """Take a subspace out of a tensor along one axis, in the tensor's own memory.

    Args:
        tensor: `[..., d_model, ...]`, any floating-point dtype, contiguous; it may be any part of a larger
            tensor that has the axis whole.
        basis: As for `project_out`, as are `strength`, `axis` and `variant`.
        strength: The share that is taken out.
        axis: The axis of width d_model.
        variant: What else the edit does.
    """
    if strength == 0 or tensor.numel() == 0:
        return
    axis %= tensor.dim()
    columns = [column.reshape(1, -1, 1) for column in basis.to(tensor.device).unbind(1)]
    _project_blocks(tensor, columns, strength, axis, variant)


def _project_blocks(
    tensor: torch.Tensor,
    columns: Sequence[torch.Tensor],
    strength: float,
    axis: int,
    variant: Variant,
) -> None:
    """Apply the formula block by block, all of them in the same two pieces of memory.

    New memory for each block would cost more than the arithmetic: the system clears it page by page.
    """
    room: torch.Tensor | None = None
    for block in blocks(tensor, axis):
        if room is None:
            room = torch.empty(2, block.numel(), dtype=torch.float32, device=block.device)
        values, product = room[:, : block.numel()].view(2, *block.shape)
        if block.dtype == torch.float32 and block.is_contiguous():
            _project(block, product, columns, strength, variant)
            continue
        values.copy_(block)
        _project(values, product, columns, strength, variant)
        block.copy_(values)


def blocks(tensor: torch.Tensor, axis: int) -> Iterator[torch.Tensor]:
    """Cut a contiguous tensor into views `[outer, d_model, inner]` of at most `BLOCK` numbers, or one input."""
    d_model = tensor.shape[axis]
    outer, inner = (math.prod(part) for part in (tensor.shape[:axis], tensor.shape[axis + 1 :]))
    view = tensor.view(outer, d_model, inner)
    at_once = max(1, BLOCK // max(1, d_model))
    group = max(1, at_once // max(1, inner))
    for start in range(0, outer, group):
        for left in range(0, inner, at_once):
            yield view[start : start + group, :, left : left + at_once]


def whole_blocks(shape: Sequence[int], axis: int, numbers: int) -> int:
    """Say how many numbers a part of a tensor may have so that it ends where one of its `blocks` does.

    Args:
        shape: The tensor's shape.
        axis: The axis of width d_model.
        numbers: How many numbers are wanted at most.

    Returns:
        The largest such number up to that one, at least one block.
    """
    d_model, inner = max(1, shape[axis]), max(1, math.prod(shape[axis + 1 :]))
    at_once = max(1, BLOCK // d_model)
    block = d_model * (at_once if inner > at_once else at_once // inner * inner)
    return max(1, numbers // block) * block


def _project(
    values: torch.Tensor,
    product: torch.Tensor,
    columns: Sequence[torch.Tensor],
    strength: float,
    variant: Variant,
) -> None:
    """The formula for `[outer, d_model, inner]` in float32, in place; `product` is room of the same shape."""
    before = _norm(values) if variant == "norm-preserving" else None
    components = [strength * tree_sum(torch.mul(values, column, out=product)) for column in columns]
    for column, component in zip(columns, components, strict=True):
        values.sub_(torch.mul(column, component, out=product))
    if before is not None:
        after = _norm(values)
        # What lies wholly within the direction has nothing left that could be scaled.
        values.mul_(torch.where(after > 0, before / after.clamp_min(1e-30), after))


def tree_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum `[outer, n, inner]` over `n` by halves, a fixed order of single additions; the terms are overwritten."""
    left = terms.shape[1]
    while left > 1:
        half = left // 2
        terms[:, :half].add_(terms[:, left - half : left])
        left -= half
    return terms[:, :1].clone()


def _norm(values: torch.Tensor) -> torch.Tensor:
    return tree_sum(values * values).sqrt_()


def share_left(edited: torch.Tensor, original: torch.Tensor, basis: torch.Tensor, axis: int) -> float:
    """How much of a subspace an edit has left: `‖Qᵀ W'‖ / ‖Qᵀ W‖` (Frobenius norms).

    Args:
        edited: The tensor after the edit.
        original: The tensor before, of the same shape.
        basis: `[d_model, k]`, float32, orthonormal columns.
        axis: The axis of width d_model.

    Returns:
        The share, 0 if nothing was there before and nothing is there now.
    """
    after, before = (
        float((value.detach().movedim(axis, -1).to(torch.float32) @ basis.to(value.device)).norm())
        for value in (edited, original)
    )
    if before == 0:
        return 0.0 if after == 0 else float("inf")
    return after / before
