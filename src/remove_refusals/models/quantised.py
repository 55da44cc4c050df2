"""Quantised tensors in which blocks of numbers share a scale: read as floats, and written again in the same format.

- FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3): `NAME` holds e4m3 numbers `[d_model, n]`, `NAME_scale_inv` or
  `NAME_scale` a float for each block, of 128 by 128 unless the configuration says otherwise, for each row, or for all.
- MXFP4 (OCP Microscaling Formats 1.0; gpt-oss): `NAME_blocks` holds e2m1 numbers `[experts, d_model, n / 32, 16]`, two
  in a byte, the lower half first; `NAME_scales` a power of two for each row of 32.
- NVFP4: `NAME_packed` holds e2m1 numbers `[d_model, n / 2]`, two in a byte as above, `NAME_scale` an e4m3 number for
  each row of 16, and all of these are divided by `NAME_global_scale` (compressed-tensors); or the three are `NAME`,
  `NAME_scale` and `NAME_scale_2`, which multiplies (ModelOpt). What holds for all of them is left as it is.
- INT4 (compressed-tensors, `pack-quantized`, symmetric): `NAME_packed` holds integers from -8 to 7, eight in an int32
  `[d_model, n / 8]`, 8 added to each, the lowest bits first; `NAME_scale` a float for each group of a row, and
  `NAME_shape` the two sizes.

Rounding each number to the nearest would undo an edit, which moves most by much less than a step. What rounding puts
back along the direction is therefore taken out where it costs least: of the numbers of one input, those go to their
other neighbour that add the least error for what they take out.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from remove_refusals.errors import CheckpointError
from remove_refusals.formula import tree_sum
from remove_refusals.models.checkpoint import (
    FLOAT_DTYPES,
    Place,
    TensorEntry,
    TensorSlice,
    opened,
    read_slice,
    read_tensor,
    tensor_slices,
)

Format = Literal[
    "FP8 e4m3 in blocks", "FP8 e4m3 per channel", "FP8 e4m3 per tensor", "MXFP4", "NVFP4", "INT4 in groups"
]

FP8_BLOCK = (128, 128)
_MXFP4_BLOCK, MXFP4_BYTES = 32, 16
_NVFP4_BLOCK = 16
INT4_WORD = 8
INT4_GROUP = 256
"""The widest group of numbers with one scale that is edited: slices are as wide as a group at least."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# Parts in which whole rows are looked through for their largest numbers.
_WIDE_PART = 1 << 21

# How many numbers are computed with at once, and rounded at once, so that they stay in a core's cache.
_STRIP, _ROUNDED_AT_ONCE = 1 << 18, 1 << 17

# How often the costs are halved, and how many around the last are then brought into order: few inputs have more there.
_HALVINGS, _CLOSE = 17, (32, 512)

# Less than this share of what is needed is not yet enough, however the sum was rounded.
_SURELY = 1 - 1e-5

_EXPONENT = 0x7F800000
"""The bits of a float32 that are its power of two."""

BYTES_PER_NUMBER = 8
"""What is held for each number of a part, generously."""


@dataclass(frozen=True, eq=False)
class BlockTensor:
    """A quantised tensor and its scales: how it is stored, as a certificate gives it, and where the two lie."""

    dtype: Format
    weights: Place
    scales: Place
    block: tuple[int, int]
    """How many rows and columns share a scale."""
    factor: float = 1.0
    divisor: float = 1.0
    """What all scales are multiplied by, and divided by."""

    axis = 1

    @property
    def names(self) -> tuple[str, str]:
        """The two names on disk."""
        return self.weights[1].name, self.scales[1].name

    @property
    def shape(self) -> tuple[int, int, int]:
        """The tensor as floats: `[outer, d_model, n]`."""
        sizes = self.weights[1].shape
        if self.dtype == "MXFP4":
            return sizes[0], sizes[1], sizes[2] * _MXFP4_BLOCK
        return 1, sizes[0], sizes[1] * {"INT4 in groups": INT4_WORD, "NVFP4": 2}.get(self.dtype, 1)

    @property
    def fp8(self) -> bool:
        """Whether the numbers are e4m3, and not packed two in a byte."""
        return self.dtype.startswith("FP8")

    @property
    def wide(self) -> bool:
        """Whether a scale holds for whole rows, which parts cut."""
        return self.fp8 and self.dtype != "FP8 e4m3 in blocks"

    @property
    def scale_dtype(self) -> torch.dtype:
        """The data type of the scales: bytes for powers of two, or floats."""
        return {"MXFP4": torch.uint8, "NVFP4": torch.float8_e4m3fn}.get(
            self.dtype, FLOAT_DTYPES.get(self.scales[1].dtype, torch.float32)
        )

    @cached_property
    def grid(self) -> torch.Tensor:
        """Every number that the format has, in rising order, float32."""
        if self.dtype == "INT4 in groups":
            return torch.arange(-8.0, 8.0)
        positive = torch.tensor(_E2M1)
        if self.fp8:
            positive = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
        return torch.cat((-positive.flip(0)[:-1], positive))

    @property
    def _share(self) -> int:
        """How many numbers lie in a byte."""
        return 1 if self.fp8 else 2

    def parts(self, numbers: int) -> list[tuple[TensorSlice, TensorSlice]]:
        """Cut weights and scales alike, into whole blocks of at most so many numbers, or one column of blocks."""
        outer, d_model, n = self.shape
        if self.wide:
            count = math.prod(self.scales[1].shape)
            whole = TensorSlice((1, count, 1), 0, count * self.scale_dtype.itemsize)
            return [(part, whole) for part in tensor_slices((outer, d_model, n), 1, 1, numbers)]
        scales, wide = self.scales[1].shape[-2:], self.block[1]
        columns = max(1, numbers // (d_model * wide))
        first = tensor_slices((outer, d_model, n // self._share), 1, 1, columns * d_model * wide // self._share)
        second = tensor_slices((outer, *scales), 1, self.scale_dtype.itemsize, columns * scales[0])
        return list(zip(first, second, strict=True))

    def read(self, files: tuple[int, int], part: tuple[TensorSlice, TensorSlice]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one of `parts` from both files: the bytes of the numbers, uint8, and the scales, both as stored."""
        raw = read_slice(files[0], self.weights[1].start, part[0], torch.uint8)
        return raw, read_slice(files[1], self.scales[1].start, part[1], self.scale_dtype)

    def strips(self, raw: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Cut what `read` gave into views of whole blocks that are few enough to be computed with in a core's cache."""
        outer, d_model, n = raw.shape[0], raw.shape[1], raw.shape[2] * self._share
        block = min(self.block[1], n)
        whole = _STRIP // max(1, d_model * block)
        width = max(1, whole) * block if not self.wide else max(1, _STRIP // d_model)
        group = max(1, whole // -(-n // block)) if width >= n else 1
        for index in range(0, outer, group):
            for left in range(0, n, width):
                right = min(n, left + width)
                numbers = raw[index : index + group, :, left // self._share : right // self._share]
                if self.wide:
                    yield numbers, scales
                else:
                    yield numbers, scales[index : index + group, :, left // block : -(-right // block)]

    def values(self, raw: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Give what bytes and scales stand for: floats `[outer, d_model, n]`, float32, contiguous."""
        numbers = self._numbers(raw)
        return numbers.mul_(self.expand(scales, numbers.shape))

    def _numbers(self, raw: torch.Tensor) -> torch.Tensor:
        """Give numbers as the format has them, before they are scaled."""
        numbers = self._of_byte.to(raw.device).index_select(0, raw.reshape(-1).to(torch.int32)).view(torch.float32)
        if math.isnan(float(numbers.sum())):
            raise CheckpointError(
                f"The tensor {self.weights[1].name} holds NaN, expected finite numbers; download the checkpoint again."
            )
        return numbers.view(*raw.shape[:-1], -1)

    @cached_property
    def _of_byte(self) -> torch.Tensor:
        """The number of each byte, or the two as one of eight bytes; minus nothing is nothing."""
        if self.fp8:
            return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32) + 0.0
        codes = torch.arange(16)
        of_code = codes - 8.0 if self.dtype == "INT4 in groups" else torch.tensor([*_E2M1, *(-one for one in _E2M1)])
        pairs = torch.stack((of_code.repeat(16), of_code.repeat_interleave(16)), dim=1) + 0.0
        return pairs.view(torch.int64).flatten()

    def _codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Give the code of each of the format's numbers, uint8."""
        if self.dtype == "INT4 in groups":
            return (numbers + 8).to(torch.uint8)
        if self.fp8:
            return (numbers + 0.0).to(torch.float8_e4m3fn).view(torch.uint8)
        # Three lines that meet where the distance between numbers doubles.
        size = numbers.abs()
        size = torch.minimum(torch.minimum(2 * size, size + 2), size / 2 + 4)
        return (size + 8 * (numbers < 0)).to(torch.uint8)

    def _block_in(self, shape: torch.Size) -> tuple[int, int]:
        """How many rows and columns of a part share a scale."""
        return min(self.block[0], shape[1]), min(self.block[1], shape[2])

    def _factors(self, scales: torch.Tensor) -> torch.Tensor:
        """Give what numbers are multiplied by, float32."""
        if self.dtype == "MXFP4":
            return torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.to(torch.int32) - 127)
        return scales.to(torch.float32) * self.factor / self.divisor

    def expand(self, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Give each number its scale, float32."""
        rows, columns = self._block_in(shape)
        factors = self._factors(scales)
        outer, tall, wide = factors.shape
        spread = factors.view(outer, tall, 1, wide, 1).expand(-1, -1, rows, -1, columns)
        return spread.reshape(outer, tall * rows, wide * columns)[:, : shape[1], : shape[2]]

    def floats(self, numbers: int) -> Iterator[torch.Tensor]:
        """Read the tensor strip by strip: `[outer, d_model, n]`, float32."""
        with opened(self.weights[0]) as weights, opened(self.scales[0]) as scales:
            for part in self.parts(numbers):
                for strip in self.strips(*self.read((weights, scales), part)):
                    yield self.values(*strip)

    def rounded(self, target: torch.Tensor, scales: torch.Tensor, column: torch.Tensor | None) -> torch.Tensor:
        """Round floats `[outer, d_model, n]` to the format with scales that are `fitting`; give the bytes.

        What each input writes along the column, `[d_model]`, is kept; None rounds each number to the nearest.
        """
        # One input's numbers lie together: sums and choices are made among them.
        target, scale = (one.mT.contiguous() for one in (target, self.expand(scales, target.shape)))
        parts = []
        at_once = max(1, _ROUNDED_AT_ONCE // (target.shape[0] * target.shape[2]))
        for left in range(0, target.shape[1], at_once):
            wanted, shared = target[:, left : left + at_once], scale[:, left : left + at_once]
            nearest, step = self._neighbours(wanted, shared)
            if column is not None:
                error = (nearest * shared).sub_(wanted)
                turned = _turned(error.flatten(0, 1), (step * shared).flatten(0, 1), column.reshape(1, -1))
                nearest.addcmul_(step, turned.view(step.shape))
            parts.append(self._codes(nearest))
        codes = torch.cat(parts, dim=1).mT.contiguous()
        return codes if self.fp8 else codes[..., 0::2] | (codes[..., 1::2] << 4)

    def _neighbours(self, target: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the nearest number of the format, before it is scaled, and how far from it the other neighbour lies."""
        wanted = target / scale
        if not bool((scale > 0).all()):
            wanted = torch.where(scale > 0, wanted, 0)
        wanted.clamp_(float(self.grid[0]), float(self.grid[-1]))
        gap = self._gap(wanted)
        upper = (wanted / gap).ceil_().mul_(gap)
        lower = (upper - gap).clamp_(min=float(self.grid[0]))
        # Multiplied, since `where` takes as long as ten of these.
        up = (upper - wanted <= wanted - lower).to(torch.float32)
        gap = upper.sub_(lower)
        return lower.addcmul_(gap, up), up.mul_(-2).add_(1).mul_(gap)

    def _gap(self, numbers: torch.Tensor) -> torch.Tensor:
        """Give how far the number of the format that is not below lies from the one before it."""
        if self.dtype == "INT4 in groups":
            return torch.ones_like(numbers)
        bits = numbers.view(torch.int32)
        # Of what is above zero the one before lies towards zero: a power of two counts as the smaller numbers.
        bits = (bits - bits.clamp(0, 1)).bitwise_and_(_EXPONENT)
        digits, least = (3, -6) if self.fp8 else (1, 0)
        return bits.view(torch.float32).clamp_(min=2.0**least).mul_(2.0**-digits)

    def fitting(self, target: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Raise the scales of blocks whose largest number no longer fits.

        A block keeps its scale otherwise, so that what an edit leaves alone keeps its bits.
        """
        rows, columns = self._block_in(target.shape)
        down, right = -target.shape[1] % rows, -target.shape[2] % columns
        padded = torch.nn.functional.pad(target, (0, right, 0, down)) if down or right else target
        outer, tall, wide = padded.shape
        blocks = padded.view(outer, tall // rows, rows, wide // columns, columns)
        # Half a step beyond the last number still rounds to it; a new scale would move every number of the block.
        half = float(self.grid[-1] - self.grid[-2]) / 2
        beyond = half if self.dtype == "INT4 in groups" else 0.0
        # One axis after the other is many times as quick as both at once.
        most, least = (blocks.amax(2), blocks.amin(2)) if rows > 1 else (blocks.squeeze(2), blocks.squeeze(2))
        largest = torch.maximum(most.amax(-1) / (self.grid[-1] + beyond), least.amin(-1) / (self.grid[0] - beyond))
        if self.dtype == "MXFP4":
            mantissa, exponent = torch.frexp(largest)
            # A power of two is its own scale.
            needed = exponent + 127 - (mantissa == 0.5).to(torch.int32)
            needed = torch.maximum(scales.to(torch.int32), needed * (largest > 0)).clamp_(0, 254).to(torch.uint8)
            return torch.where(largest > self._factors(scales) * (1 + half / float(self.grid[-1])), needed, scales)
        known = self._factors(scales)
        reach = known * (1 + (half - beyond) / float(self.grid[-1]))
        needed = _rounded_up(largest * self.divisor / self.factor, scales.dtype)
        if self.fp8:
            # Doubled, a scale moves none of its numbers but the smallest.
            doubled = known * torch.exp2(torch.frexp(largest / reach).exponent.to(torch.float32))
            needed = torch.where(known > 0, doubled, needed)
        return torch.where(largest > reach, needed, scales.to(torch.float32)).to(scales.dtype)

    @cached_property
    def _anew(self) -> torch.Tensor:
        """The scales of whole rows that their largest numbers need."""
        none = torch.zeros(1, dtype=self.scale_dtype)
        found = [self.fitting(values, none).to(torch.float32) for values in self.floats(_WIDE_PART)]
        return torch.stack(found).amax(0).to(self.scale_dtype)

    def fresh(self, values: torch.Tensor) -> torch.Tensor:
        """Quantise floats anew, each block with the scale that its largest number needs, and give them as floats."""
        scales = self._anew if self.wide else self.fitting(values, torch.zeros(1, dtype=self.scale_dtype))
        scale = self.expand(scales, values.shape)
        return self._neighbours(values, scale)[0].mul_(scale)

    def squared_steps(self, numbers: int) -> float:
        """Sum the squares of the distance between each number and the next larger one that the format has."""
        total = 0.0
        with opened(self.weights[0]) as weights, opened(self.scales[0]) as scales:
            for part in self.parts(numbers):
                for raw, stored in self.strips(*self.read((weights, scales), part)):
                    # Below zero the number before lies away from it.
                    steps = self._gap(-self._numbers(raw).abs())
                    steps.mul_(self.expand(stored, steps.shape))
                    total += float(torch.linalg.vector_norm(steps, dim=1).to(torch.float64).square().sum())
        return total


def _turned(error: torch.Tensor, step: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Choose which numbers go to their other neighbour so that the errors of each input cancel along a direction.

    Both are `[n_inputs, d_model]`, the column `[1, d_model]`; gives ones and zeros. Those come first that add the least
    error for what they take out, then the earlier. Halving finds a cost up to which all are needed, so that only the
    few around the last one have to be brought into order.
    """
    needed = -tree_sum((column * error).unsqueeze(-1)).squeeze(-1)
    # What would take out nothing has no size, and costs endlessly much or no number.
    size = (column * step).mul_(needed.sign()).clamp_(min=0).abs_()
    cost = error.mul_(2).add_(step).mul_(step).clamp_(min=0).div_(size)
    needed.abs_()
    low = torch.zeros_like(needed, dtype=torch.int32)
    high, least, turned = torch.full_like(low, _EXPONENT), torch.full_like(needed, -1), torch.empty_like(cost)
    for _ in range(_HALVINGS):
        # Positive floats are in the order of their bits.
        middle = low + ((high - low) >> 1)
        floats = middle.view(torch.float32)
        below = turned.copy_(cost).le_(floats).mul_(size).sum(1, keepdim=True) < needed * _SURELY
        low, high, least = (
            torch.where(below, middle, low),
            torch.where(below, high, middle),
            least.where(~below, floats),
        )
    turned.copy_(cost).le_(least)
    begun = (turned * size).sum(1, keepdim=True, dtype=torch.float64)
    cost.div_(1 - turned)
    known: tuple[torch.Tensor, ...] = cost, size, needed, begun
    rows = torch.arange(len(cost), device=cost.device)
    for count in (*_CLOSE, cost.shape[1]):
        more, unsure = _next(min(count, cost.shape[1]), known)
        turned.index_add_(0, rows, more)
        if not bool(unsure.any()):
            break
        known, rows = tuple(one[unsure] for one in known), rows[unsure]
    return turned


def _next(count: int, known: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose among the cheapest, of equal ones the first; none of the inputs for which more have to be looked at."""
    cost, size, needed, begun = known
    close = cost.topk(count, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
    costs, order = cost.gather(1, close).sort(dim=1, stable=True)
    order = close.gather(1, order)
    sizes = size.gather(1, order).mul_(costs < torch.inf)
    reached = (begun + sizes.cumsum(1, dtype=torch.float64)).to(torch.float32)
    chosen = (reached - sizes / 2 <= needed) & (sizes > 0)
    # The first that stays where it is must be cheaper than whatever was not looked at.
    left, dearest = costs.masked_fill(chosen | (sizes == 0), torch.inf).amin(1), costs[:, -1]
    unsure = (left >= dearest) & (dearest < torch.inf) & (count < cost.shape[1])
    chosen &= ~unsure.unsqueeze(1)
    return torch.zeros_like(cost).scatter_(1, order, chosen.to(cost.dtype)), unsure


def _rounded_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give the smallest numbers of a data type that are no smaller, as float32, where it has any."""
    top = torch.finfo(dtype).max
    near = values.clamp(max=top).to(dtype)
    codes = near.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
    above = (codes + 1).view(dtype).to(torch.float32)
    near = near.to(torch.float32)
    return torch.where((near < values) & (near < top), above, near)


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give what a configuration says of how the weights are quantised; nothing if they are not."""
    parts = (config, config.get("text_config") or {})
    found = (part.get(key) for part in parts for key in ("quantization_config", "compression_config"))
    return next((one for one in found if isinstance(one, dict) and one), {})


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Read how many rows and columns of FP8 share a scale."""
    found = quantisation(config)
    groups = (found.get("config_groups") or {}).values()
    sizes = [found.get("weight_block_size"), *((one.get("weights") or {}).get("block_structure") for one in groups)]
    return next(((int(size[0]), int(size[1])) for size in sizes if isinstance(size, list)), FP8_BLOCK)


def find_block_tensor(name: str, stored: Mapping[str, Place], block: tuple[int, int]) -> BlockTensor | None:
    """Look among a checkpoint's tensors for a quantised one, by the name that the unquantised one would have.

    `block` is how many rows and columns of FP8 share a scale, where blocks do.
    """
    weights, scales = stored.get(name), stored.get(f"{name}_scale_inv") or stored.get(f"{name}_scale")
    if weights is not None and scales is not None and weights[1].dtype == "F8_E4M3" and len(weights[1].shape) == 2:
        return _fp8(weights, scales, block)
    packed = stored.get(f"{name}_packed") or weights
    for part in ("global_scale", "scale_2"):
        whole = stored.get(f"{name}_{part}")
        if packed is not None and scales is not None and whole is not None and packed[1].dtype == "U8":
            return _nvfp4(packed, scales, whole, divides=part == "global_scale")
    weights, scales = stored.get(f"{name}_blocks"), stored.get(f"{name}_scales")
    if weights is not None and scales is not None and len(weights[1].shape) == 4:
        _check(weights[1], "U8", (*weights[1].shape[:3], MXFP4_BYTES))
        _check(scales[1], "U8", weights[1].shape[:3])
        return BlockTensor("MXFP4", weights, scales, (1, _MXFP4_BLOCK))
    weights, scales = stored.get(f"{name}_packed"), stored.get(f"{name}_scale")
    if weights is not None and scales is not None:
        group = _int4_group(name, stored, weights, scales)
        return BlockTensor("INT4 in groups", weights, scales, (1, group))
    return None


def _fp8(weights: Place, scales: Place, block: tuple[int, int]) -> BlockTensor:
    """Tell by the shape of its scales how an FP8 tensor is quantised."""
    d_model, n = weights[1].shape
    in_blocks = -(-d_model // block[0]), -(-n // block[1])
    kinds: dict[tuple[int, ...], tuple[Format, tuple[int, int]]] = {
        **dict.fromkeys(((), (1,), (1, 1)), ("FP8 e4m3 per tensor", (d_model, n))),
        **dict.fromkeys(((d_model,), (d_model, 1)), ("FP8 e4m3 per channel", (1, n))),
        in_blocks: ("FP8 e4m3 in blocks", block),
    }
    if scales[1].dtype not in ("BF16", "F16", "F32") or scales[1].shape not in kinds:
        raise CheckpointError(
            f"The tensor {scales[1].name} is {scales[1].dtype} {scales[1].shape}, expected floats of shape {in_blocks} "
            f"for blocks of {block[0]} by {block[1]}, {(d_model, 1)} for rows, or (1,) for the tensor; use an "
            "unquantised checkpoint of this model."
        )
    kind, shared = kinds[scales[1].shape]
    return BlockTensor(kind, weights, scales, shared)


def _nvfp4(weights: Place, scales: Place, whole: Place, *, divides: bool) -> BlockTensor:
    """Check that e2m1 numbers lie two in a byte, with a scale for each 16, and read what holds for all scales."""
    d_model, count = (*weights[1].shape, 1, 1)[:2]
    _check(weights[1], "U8", (d_model, count // 8 * 8))
    _check(scales[1], "F8_E4M3", (d_model, count // 8))
    found = read_tensor(*whole).flatten().tolist()
    if len(found) != 1 or not 0 < found[0] < math.inf:
        raise CheckpointError(
            f"The tensor {whole[1].name} holds {found[:3]}, expected one positive number; use an unquantised "
            "checkpoint of this model."
        )
    factor, divisor = (1.0, found[0]) if divides else (found[0], 1.0)
    return BlockTensor("NVFP4", weights, scales, (1, _NVFP4_BLOCK), factor, divisor)


def _check(entry: TensorEntry, dtype: str, shape: tuple[int, ...]) -> None:
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise CheckpointError(
            f"The tensor {entry.name} is {entry.dtype} {entry.shape}, expected {dtype} {shape} as its format has it; "
            "use an unquantised checkpoint of this model."
        )


def _int4_group(name: str, stored: Mapping[str, Place], weights: Place, scales: Place) -> int:
    """Check that packed integers are symmetric, of four bits, and in groups that lie together; give a group's size."""
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
    sizes, place = None, stored.get(f"{name}_shape")
    if place is not None and place[1].dtype in ("I32", "I64") and place[1].shape == (2,):
        sizes = read_tensor(*place, torch.int32 if place[1].dtype == "I32" else torch.int64).tolist()
    if sizes != [d_model, n]:
        raise CheckpointError(
            f"The tensor {name}_shape holds {sizes}, expected {[d_model, n]} as eight numbers in each of the words of "
            f"{weights[1].name} make it; use an unquantised checkpoint of this model."
        )
    return n // groups


_PACKED = ("_packed", "_blocks")
_BESIDE = ("_global_scale", "_scale", "_scales", "_scale_inv", "_scale_2", "_shape", "_zero_point", "_g_idx")
# Of the numbers that go into a layer.
_INPUTS = (".input_scale", ".input_global_scale")


def plain_shapes(stored: Mapping[str, Place | torch.Tensor]) -> dict[str, tuple[int, ...] | None]:
    """Name what the files hold as an unquantised checkpoint would, with the shapes; None for what is packed."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, held in stored.items():
        end = next((end for end in (*_PACKED, *_BESIDE) if name.endswith(end)), "")
        stem = name.removesuffix(end)
        if name.endswith(_INPUTS):
            continue
        if end in _PACKED and any(stem + other in stored for other in ("_scale", "_scales")):
            shapes[stem] = None
        elif end in _BESIDE and any(stem + other in stored for other in ("", *_PACKED)):
            continue
        elif isinstance(held, torch.Tensor):
            shapes[name] = tuple(held.shape)
        else:
            # Two numbers in a byte.
            shapes[name] = None if held[1].dtype == "U8" and f"{name}_scale" in stored else held[1].shape
    return shapes
