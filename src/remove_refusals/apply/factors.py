"""Plan entry → the two low-rank factors of what an edit adds to a tensor, from which every adapter is made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from remove_refusals.errors import ArchitectureError, ModelError
from remove_refusals.map_types import EditPlan, PlanEntry

_NUMBERS_AT_ONCE = 1 << 24
"""How many float32 numbers are held beside a tensor (64 MiB)."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of rank k: `W' = W + left @ right`, for each of the leading axis's experts where there is one.

    Attributes:
        left: `[..., n_rows, k]`, float32.
        right: `[..., k, n_columns]`, float32; without the leading axis where all experts share it.
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        """The number k of columns of `left`."""
        return self.left.shape[-1]


def low_rank(entry: PlanEntry, tensor: torch.Tensor) -> LowRank:
    """Give the change that an entry of a plan makes to a tensor, as two factors.

    For a writer on its rows, `W - s Q (Qᵀ W)`: `left = -s Q` and `right = Qᵀ W`; on its columns, as an embedding,
    `left = -s W Q` and `right = Qᵀ`. An offset is added to each row of `left`.

    Args:
        entry: What happens to the tensor; its axis is one of the last two.
        tensor: The tensor, `[n_rows, n_columns]` or `[n_experts, n_rows, n_columns]`, floating point.

    Returns:
        The factors, on the tensor's device.

    Raises:
        ModelError: If the tensor is not that of the entry, quantised or not in memory.
        ArchitectureError: If the tensor has another number of axes, or is edited along the axis of its experts.
    """
    if tensor.is_meta or not tensor.is_floating_point() or tensor.shape != entry.shape:
        raise ModelError(
            f"Tensor '{entry.parameter}' is of shape {tuple(tensor.shape)} and dtype {tensor.dtype} on "
            f"{tensor.device}, expected a floating-point tensor of shape {entry.shape} in memory; load the model "
            "without quantisation and without offloading."
        )
    axis = entry.axis % tensor.dim() - tensor.dim()
    if tensor.dim() not in (2, 3) or axis == -3:
        raise ArchitectureError(
            f"Tensor '{entry.parameter}' of shape {entry.shape} is edited along axis {entry.axis}, expected a matrix "
            "or one for each expert; leave its site out or save the edited weights instead."
        )
    basis = entry.basis.to(tensor.device)
    components = _components(tensor.detach().movedim(axis, -1), basis)
    if axis == -2:
        left = (-entry.strength * basis).expand(*tensor.shape[:-2], *basis.shape)
        return LowRank(left, components.movedim(-1, axis))
    left = -entry.strength * components
    if entry.offset:
        left = left + torch.tensor(entry.offset, device=left.device)
    return LowRank(left, basis.T)


def _components(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """`rows @ basis` in float32, some rows at a time, so that a large vocabulary needs no full copy."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, rows[0].numel()))
    return torch.cat([part.to(torch.float32) @ basis for part in torch.split(rows, step)])


def check_low_rank(plan: EditPlan, *, allowed_bias: Callable[[PlanEntry], bool] = lambda entry: False) -> None:
    """Check that a plan's edits are of low rank, and that a carrier can take its biases.

    Args:
        plan: What happens to which tensor.
        allowed_bias: Whether the carrier takes the edit of a vector.

    Raises:
        ArchitectureError: If the variant is not `plain`, or a bias cannot be carried; the message names it.
    """
    if plan.variant != "plain":
        raise ArchitectureError(
            f"The variant is '{plan.variant}', whose change of a tensor has full rank, expected 'plain' for an "
            "adapter; leave the variant out or save the edited weights instead."
        )
    for entry in plan.entries:
        if is_bias(entry) and not allowed_bias(entry):
            raise ArchitectureError(
                f"Parameter '{entry.parameter}' of shape {entry.shape} writes to the residual stream and is no matrix, "
                "expected matrices alone, since this kind of adapter carries no other change; save the edited weights "
                "instead, or an adapter of another kind."
            )


def is_bias(entry: PlanEntry) -> bool:
    """Whether an entry's tensor is a vector, or one for each expert, that a writer adds."""
    return len(entry.shape) == 1 or "bias" in entry.parameter.rpartition(".")[2]
