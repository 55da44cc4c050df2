"""The one formula, and what it needs: take a subspace out of a tensor along one axis.

Everything is computed in float32 (orthonormalisation in float64) and cast back once.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from remove_refusals.errors import DirectionError

Variant = Literal["plain", "norm-preserving", "row-norm"]
"""What else an edit does to a tensor; see `project_out`."""

VARIANTS: tuple[Variant, ...] = ("plain", "norm-preserving", "row-norm")

ROWS_AT_ONCE = 1 << 24
"""How many float32 numbers an edit holds beside the tensor (64 MiB), so that a large vocabulary needs no full copy."""


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
    offset: Sequence[float] = (),
) -> torch.Tensor:
    """Take a share of the component along `basis` out of a tensor: `W - strength * Q (Qᵀ W) + Q offset`.

    The offset makes it affine (Marshall, Scherlis and Belrose 2024, "Refusal in LLMs is an affine function").

    Args:
        tensor: Any shape with `shape[axis] == d_model`, floating point; left as it is.
        basis: `[d_model, k]`, float32, orthonormal columns.
        strength: The share that is taken out; 0 returns an equal tensor.
        axis: The axis of width d_model.
        variant: `plain`; `norm-preserving` scales what each single input writes back to its old norm, which adds
            nothing along `basis`; `row-norm` scales each output coordinate to its old norm over the inputs, as some
            tools do, which puts a part of the direction back and is here to compare with.
        offset: `k` numbers along `basis` that are added to each row, with `plain` only; empty for none.

    Returns:
        A new tensor of the same shape and dtype, contiguous.
    """
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    if strength == 0 and not offset:
        return out
    basis = basis.to(tensor.device)
    rows = out.movedim(axis, -1)
    added = basis @ torch.tensor(offset, device=basis.device) if offset else None
    if rows.dim() == 1:
        rows.copy_(_project_rows(rows, basis, strength, variant, added))
        return out
    step = max(1, ROWS_AT_ONCE // max(1, rows[0].numel()))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        part.copy_(_project_rows(part, basis, strength, variant, added))
    return _with_row_norms(out, tensor, axis) if variant == "row-norm" else out


def _project_rows(
    rows: torch.Tensor, basis: torch.Tensor, strength: float, variant: Variant, added: torch.Tensor | None
) -> torch.Tensor:
    values = rows.to(torch.float32)
    edited = values - strength * (values @ basis) @ basis.T
    if added is not None:
        edited = edited + added
    if variant != "norm-preserving":
        return edited
    after = edited.norm(dim=-1, keepdim=True)
    # What lies wholly within the direction has nothing left that could be scaled.
    scale = torch.where(after > 0, values.norm(dim=-1, keepdim=True) / after.clamp_min(1e-30), after)
    return edited * scale


def _with_row_norms(edited: torch.Tensor, original: torch.Tensor, axis: int) -> torch.Tensor:
    """Scale each output coordinate back to its norm over the inputs; a leading axis of experts is kept apart."""
    inputs = [index for index in range(edited.dim()) if index != axis % edited.dim()][-1:]
    after, before = (value.to(torch.float32).norm(dim=inputs, keepdim=True) for value in (edited, original.detach()))
    scaled: torch.Tensor = edited.to(torch.float32) * before / after.clamp_min(1e-30)
    return scaled.to(edited.dtype)


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
