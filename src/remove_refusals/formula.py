"""The one formula, take a subspace out of what is written, and the pull-back of a direction: neither stands elsewhere.

Files are edited by `project_out`: float32, cast back once, and the same bits however the tensor is laid out, cut into
slices or spread over threads, since what is computed for one input depends on that input alone and sums have a fixed
order. Hooks use `taken_out`, which lets gradients through, and LoRAs `low_rank`; a test holds the three together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from remove_refusals.errors import DirectionError
from remove_refusals.settings import Variant

BLOCK = 1 << 19
"""How many float32 numbers an edit holds beside the tensor, twice over (4 MiB), which stays in a core's cache."""

_NUMBERS_AT_ONCE = 1 << 24  # of float32, that `low_rank` holds beside a tensor (64 MiB)


def orthonormal_basis(vectors: torch.Tensor) -> torch.Tensor:
    """Orthonormalise the columns of `[d_model, k]` in float64; gives float32, for `k = 1` the unit vector."""
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


Share = tuple[torch.Tensor | None, float]
"""What is taken out: a basis `[d_model, k]`, or None for all that is written, and how much of it."""


@dataclass(frozen=True)
class ChannelStep:
    """One linear step between a writer's output and the residual stream, acting on each channel.

    `gain` multiplies by `parameter + offset`, channel by channel; `center` subtracts the mean over channels; `taps` is
    a depthwise convolution over tokens, each of whose taps multiplies channel by channel.
    """

    kind: Literal["gain", "center", "taps"]
    parameter: str | None = None
    """The gain, of `d_model` numbers, or the taps, `[d_model, 1, n_taps]`; None for `center`."""
    offset: float = 0.0
    """1.0 for the gains of Gemma, 0.0 for most; for `taps` 1.0 if what enters is also added to what leaves."""


def pulled_back(
    columns: torch.Tensor, steps: Sequence[ChannelStep], tensor_of: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Find what becomes `columns`, `[..., d_model, k]`, behind per-channel steps; gradients reach the columns.

    A writer whose output is orthogonal to `gain ⊙ q` adds nothing along `q` behind a norm, since the norm's division by
    a number per token rotates nothing. A depthwise convolution with n taps needs up to n + 1 columns for each.
    """
    for step in reversed(steps):
        if step.parameter is None:
            columns = columns - columns.mean(dim=-2, keepdim=True)
            continue
        values = tensor_of(step.parameter).detach().to(columns).reshape(columns.shape[-2], -1)
        if step.kind == "gain":
            columns = (values + step.offset) * columns
        else:
            # Each tap brings the component of another token, so none of them may bring any.
            taps = [tap.unsqueeze(1) * columns for tap in values.unbind(1)]
            spanned, sizes, _ = torch.linalg.svd(
                torch.cat([*taps, *([columns] if step.offset else [])], dim=1), full_matrices=False
            )
            columns = spanned[:, sizes > 1e-7 * sizes[0]]
    return columns


def pull_back(
    basis: torch.Tensor, steps: Sequence[ChannelStep], tensor_of: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Pull an orthonormal basis back; gives orthonormal columns again: a writer without them adds none of the basis."""
    return orthonormal_basis(pulled_back(basis.to(torch.float64), steps, tensor_of)) if steps else basis


def taken_out(stream: torch.Tensor, basis: torch.Tensor, strength: torch.Tensor | float) -> torch.Tensor:
    """Give `y - s (y Q) Qᵀ`; gradients reach basis and strength.

    `stream` is `[n_rows, ..., d_model]` or can be read so, as several streams side by side; `basis` is `[d_model, k]`
    or `[n_rows, d_model, k]`, orthonormal; `strength` is a number, `[]` or `[n_rows]`.
    """
    basis, n_rows = basis.to(stream.device), basis.shape[:-2].numel()
    if isinstance(strength, torch.Tensor):
        n_rows, strength = max(n_rows, strength.numel()), strength.to(stream.device).reshape(-1, 1, 1)
    values = stream.to(torch.float32).reshape(n_rows, -1, basis.shape[-2])
    values = values - strength * (values @ basis) @ basis.mT
    changed: torch.Tensor = values.reshape(stream.shape).to(stream.dtype)
    return changed


def low_rank(
    tensor: torch.Tensor, basis: torch.Tensor, strength: float, axis: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the edit of `[n_rows, n_columns]`, or of one for each expert, as two factors: `W' = W + left @ right`.

    Of an edit of the rows they are `-s Q` and `Qᵀ W`, of the columns, as an embedding's, `-s W Q` and `Qᵀ`; float32, on
    the tensor's device. What all experts share has no leading axis on the right.
    """
    basis, axis = basis.to(tensor.device), axis % tensor.dim() - tensor.dim()
    rows = tensor.detach().movedim(axis, -1)
    # Some rows at a time, so that a large vocabulary needs no full copy.
    parts = torch.split(rows, max(1, _NUMBERS_AT_ONCE // max(1, rows[0].numel())))
    components = torch.cat([part.to(torch.float32) @ basis for part in parts])
    if axis == -1:
        return -strength * components, basis.T
    return (-strength * basis).expand(*tensor.shape[:-2], *basis.shape), components.movedim(-1, axis)


def project_out(
    tensor: torch.Tensor,
    basis: torch.Tensor,
    strength: float,
    axis: int = -1,
    variant: Variant = "plain",
    first: Sequence[Share] = (),
) -> torch.Tensor:
    """Give a contiguous copy of a tensor after `project_out_in_place`."""
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    project_out_in_place(out, basis, strength, axis, variant, first)
    return out


def project_out_in_place(
    tensor: torch.Tensor,
    basis: torch.Tensor,
    strength: float,
    axis: int = -1,
    variant: Variant = "plain",
    first: Sequence[Share] = (),
) -> None:
    """Take a share of a subspace out of a tensor along its axis of width d_model: `W - s Q (Qᵀ W)`.

    The tensor is contiguous, of any floating-point dtype, and may be any part of a larger one that has the axis whole.
    `norm-preserving` scales what each single input writes back to its old norm, which adds nothing along `basis`. What
    is taken out `first`, as of one expert, is so before the same rounding.
    """
    wanted = [share for share in (*first, (basis, strength)) if share[1] != 0]
    if not wanted or tensor.numel() == 0:
        return
    shares = [
        (None if one is None else [column.reshape(1, -1, 1) for column in one.to(tensor.device).unbind(1)], share)
        for one, share in wanted
    ]
    # All blocks use the same memory: the system would clear new memory page by page, which costs more than arithmetic.
    room: torch.Tensor | None = None
    for block in blocks(tensor, axis % tensor.dim()):
        if room is None:
            room = torch.empty(2, block.numel(), dtype=torch.float32, device=block.device)
        values, product = room[:, : block.numel()].view(2, *block.shape)
        if block.dtype == torch.float32 and block.is_contiguous():
            values = block
        else:
            values.copy_(block)
        for columns, share in shares:
            _project(values, product, columns, share, variant)
        if values is not block:
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
    """Say how many of at most `numbers` a part of a tensor may have so that it ends where one of its `blocks` does."""
    d_model, inner = max(1, shape[axis]), max(1, math.prod(shape[axis + 1 :]))
    at_once = max(1, BLOCK // d_model)
    block = d_model * (at_once if inner > at_once else at_once // inner * inner)
    return max(1, numbers // block) * block


def _project(
    values: torch.Tensor,
    product: torch.Tensor,
    columns: Sequence[torch.Tensor] | None,
    strength: float,
    variant: Variant,
) -> None:
    """The formula for `[outer, d_model, inner]` in float32, in place; `product` is room of the same shape."""
    if columns is None:
        values.mul_(1.0 - strength)
        return
    before = tree_sum(values * values).sqrt_() if variant == "norm-preserving" else None
    components = [strength * tree_sum(torch.mul(values, column, out=product)) for column in columns]
    for column, component in zip(columns, components, strict=True):
        values.sub_(torch.mul(column, component, out=product))
    if before is not None:
        after = tree_sum(values * values).sqrt_()
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
