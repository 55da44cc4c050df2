"""Rounding to quantised formats: quick ways that choose what plain ones do."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remove_refusals.models.checkpoint import TensorEntry
from remove_refusals.models.quantised import BlockTensor, _turned

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import quantised

FORMATS = ("FP8 e4m3 in blocks", "MXFP4", "NVFP4", "INT4 in groups")
PLACE = (Path("none"), TensorEntry("none", "U8", (1,), 0, 1))


def block(kind):
    """A tensor of a format, of which nothing is read."""
    return BlockTensor(kind, PLACE, PLACE, (1, 32))


def turned_plainly(error, step, column):
    """Every number brought into order, as the rule says it."""
    needed = -(column * error).to(torch.float64).sum(1, keepdim=True)
    gain = column * step
    size = torch.where(gain * needed.sign() > 0, gain.abs(), 0)
    cost = torch.where(size > 0, step * (step + 2 * error) / size, torch.inf)
    order = cost.argsort(dim=1, stable=True)
    sizes = size.gather(1, order).to(torch.float64)
    chosen = (sizes.cumsum(1) - sizes / 2 <= needed.abs()) & (sizes > 0)
    return torch.zeros_like(error).scatter_(1, order, chosen.to(torch.float32))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 1 << 30),
    d_model=st.sampled_from([1, 2, 31, 32, 33, 511, 513, 2000]),
    scale=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    grain=st.sampled_from([0, 2, 64]),
)
def test_what_goes_to_its_other_neighbour_is_what_full_order_chooses(seed, d_model, scale, grain):
    generator = torch.Generator().manual_seed(seed)
    step = torch.exp2(torch.randint(-3, 3, (5, d_model), generator=generator).float())
    share = torch.rand(5, d_model, generator=generator) - 0.5
    column = torch.randn(1, d_model, generator=generator)
    if grain:
        # Many cost the same, to the last bit.
        share, column = (share * grain).round() / grain, column.sign()
    # What is off by a share of a step is off towards its other neighbour's far side.
    drift = scale * torch.randn(5, 1, generator=generator) * column
    error = (share * step + drift * step).clamp(-step / 2, step / 2)
    step = -torch.where(error == 0, 1, error.sign()) * step
    found = _turned(error.clone(), step, column)
    wanted = turned_plainly(error, step, column)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    if grain:
        # Sums and costs are exact here.
        assert torch.equal(found, wanted)
    added, least = ((one * step * (step + 2 * error)).sum(1) for one in (found, wanted))
    left, best = ((column * (error + one * step)).sum(1).abs() for one in (found, wanted))
    assert torch.allclose(added, least, rtol=1e-3, atol=1e-4) and torch.allclose(left, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_nearest_and_the_other_neighbour_are_those_of_a_search_in_the_grid(kind):
    tensor = block(kind)
    grid = tensor.grid
    middles = (grid[1:] + grid[:-1]) / 2
    edges = torch.cat((grid, middles, torch.tensor([-0.0, 1e-30, -1e-30, 1e9, -1e9])))
    beside = [torch.nextafter(edges, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    numbers = torch.cat((edges, *beside, torch.randn(2000) * grid[-1] / 3)).view(1, 1, -1)
    nearest, step = tensor._neighbours(numbers, torch.ones_like(numbers))
    wanted = numbers.clamp(grid[0], grid[-1])
    upper = torch.bucketize(wanted, grid).clamp(max=len(grid) - 1)
    lower = (upper - 1).clamp(min=0)
    up = grid[upper] - wanted <= wanted - grid[lower]
    assert torch.equal(nearest, grid[torch.where(up, upper, lower)])
    assert torch.equal(nearest + step, grid[torch.where(up, lower, upper)])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_byte_comes_back_from_the_numbers_that_it_holds(kind):
    tensor = block(kind)
    raw = torch.arange(256).to(torch.uint8)
    raw = raw[(raw & 127) != 127] if tensor.fp8 else raw
    raw = raw[: len(raw) // 2 * 2].view(1, 2, -1)
    numbers = tensor._numbers(raw)
    codes = tensor._codes(numbers)
    again = codes if tensor.fp8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    assert torch.equal(tensor._numbers(again), numbers)
    # Only a negative zero becomes a positive one.
    zero = {"FP8 e4m3 in blocks": (128,), "INT4 in groups": ()}.get(kind, (8, 128))
    halves = (raw,) if tensor.fp8 else (raw & 15, raw & 240)
    same = torch.stack([~torch.isin(half, torch.tensor(zero, dtype=torch.uint8)) for half in halves]).all(0)
    assert torch.equal(again[same], raw[same])


def test_a_part_is_cut_into_strips_of_whole_blocks():
    tensor = replace(block("MXFP4"), weights=(PLACE[0], replace(PLACE[1], shape=(4, 300, 20, 16))))
    raw = torch.arange(4 * 300 * 320).to(torch.int32).view(4, 300, 320).to(torch.uint8)
    scales = torch.arange(4 * 300 * 20).view(4, 300, 20).to(torch.uint8)
    strips = list(tensor.strips(raw, scales))
    assert len(strips) > 1
    for codes, shared in strips:
        assert codes.shape[2] * 2 == shared.shape[2] * 32 and codes.shape[1] == shared.shape[1] == 300
    for whole, index in ((raw, 0), (scales, 1)):
        # Views of the part, each of its bytes in one of them.
        for strip in strips:
            strip[index].fill_(7)
        assert bool((whole == 7).all()) and sum(strip[index].numel() for strip in strips) == whole.numel()


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int4", "nvfp4"])
def test_the_benchmark_edits_and_measures_each_format(kind, tmp_path):
    row = quantised.measured(kind, 256, 128, tmp_path).split()
    assert row[0] == kind and len(row) == 7
    # Of the direction hardly anything is left, and the weights are still those.
    assert float(row[5]) < 0.05 and float(row[6]) < 0.2
