"""Quantised tensors found among a checkpoint's by their names, and checked to be of a format that can be edited."""

from collections.abc import Mapping

import torch

from remove_refusals.blockformats import FP8_BLOCK, INT4_GROUP, INT4_WORD, MXFP4_BYTES, BlockTensor
from remove_refusals.checkpoint import TensorEntry
from remove_refusals.errors import CheckpointError
from remove_refusals.slices import FLOAT_DTYPES, Place, bytes_of, opened, read_into


def find_block_tensor(name: str, stored: Mapping[str, Place]) -> BlockTensor | None:
    """Look for a quantised tensor of a known format among a checkpoint's.

    Args:
        name: The name that the unquantised tensor would have.
        stored: The checkpoint's tensors.

    Returns:
        The tensor, or None if there is none of a known format under that name.
    """
    weights, scales = stored.get(name), stored.get(f"{name}_scale_inv")
    if weights is not None and scales is not None and weights[1].dtype == "F8_E4M3" and len(weights[1].shape) == 2:
        expected = tuple(-(-size // FP8_BLOCK) for size in weights[1].shape)
        _check(scales[1], "F32", expected)
        return BlockTensor("FP8 e4m3 in blocks", weights, scales)
    weights, scales = stored.get(f"{name}_blocks"), stored.get(f"{name}_scales")
    if weights is not None and scales is not None and len(weights[1].shape) == 4:
        _check(weights[1], "U8", (*weights[1].shape[:3], MXFP4_BYTES))
        _check(scales[1], "U8", weights[1].shape[:3])
        return BlockTensor("MXFP4", weights, scales)
    weights, scales = stored.get(f"{name}_packed"), stored.get(f"{name}_scale")
    if weights is not None and scales is not None:
        _check_int4(name, stored, weights, scales)
        return BlockTensor("INT4 in groups", weights, scales)
    return None


def _check(entry: TensorEntry, dtype: str, shape: tuple[int, ...]) -> None:
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise CheckpointError(
            f"The tensor {entry.name} is {entry.dtype} {entry.shape}, expected {dtype} {shape} as its format has it; "
            "use an unquantised checkpoint of this model."
        )


def _check_int4(name: str, stored: Mapping[str, Place], weights: Place, scales: Place) -> None:
    """Check that packed integers are symmetric, of four bits, and in groups that lie together."""
    other = next((other for part in ("zero_point", "g_idx") if (other := f"{name}_{part}") in stored), None)
    if other is not None:
        raise CheckpointError(
            f"The checkpoint has the tensor {other}, expected packed integers without a zero point and without an "
            "order of their own; use an unquantised checkpoint of this model."
        )
    d_model, words = (*weights[1].shape, 1, 1)[:2]
    _check(weights[1], "I32", (d_model, words))
    n, groups = words * INT4_WORD, max((1, *scales[1].shape[1:]))
    whole = n % groups == 0 and n // groups <= INT4_GROUP and n // groups % INT4_WORD == 0
    if scales[1].dtype not in FLOAT_DTYPES or scales[1].shape != (d_model, groups) or not whole:
        raise CheckpointError(
            f"The tensor {scales[1].name} is {scales[1].dtype} {scales[1].shape}, expected floats for groups of 8 to "
            f"{INT4_GROUP} of the {n} numbers in each of {d_model} rows; use an unquantised checkpoint of this model."
        )
    sizes = _sizes(stored.get(f"{name}_shape"))
    if sizes != [d_model, n]:
        raise CheckpointError(
            f"The tensor {name}_shape holds {sizes}, expected {[d_model, n]} as eight numbers in each of the words of "
            f"{weights[1].name} make it; use an unquantised checkpoint of this model."
        )


def _sizes(place: Place | None) -> list[int] | None:
    """Read two integers."""
    if place is None or place[1].dtype not in ("I32", "I64") or place[1].shape != (2,):
        return None
    sizes = torch.empty(2, dtype=torch.int32 if place[1].dtype == "I32" else torch.int64)
    with opened(place[0]) as file:
        read_into(file, bytes_of(sizes), place[1].start)
    return [int(size) for size in sizes]
