"""Two tensors on disk against one another: the sums are right, and do not depend on how much is read at once."""

import pytest
import torch
from safetensors.torch import save_file

from remove_refusals.baking.certificate import PlainTensor, deviation
from remove_refusals.directions.plan import PlanEntry
from remove_refusals.formula import BLOCK, project_out
from remove_refusals.models.checkpoint import checkpoint_tensors, same_bytes

D_MODEL = 64


STRENGTH = 0.75


def entry(shape, axis):
    basis = torch.nn.functional.normalize(torch.randn(D_MODEL, 1, generator=torch.Generator().manual_seed(0)), dim=0)
    return PlanEntry("weight", "mlp", 0, axis, shape, STRENGTH, basis, ())


@pytest.fixture
def saved(tmp_path):
    """A function that saves tensors as a checkpoint of its own and gives their places."""

    def save(name, **tensors):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return checkpoint_tensors(tmp_path / name)

    return save


# The numbers of a block, and somewhat more; along each axis, and matrices of which several make a block.
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((D_MODEL, 20_000), 0), ((20_000, D_MODEL), 1), ((300, D_MODEL, 60), 1), ((3, D_MODEL, 9000), 1)],
)
@pytest.mark.parametrize("variant", ["plain", "norm-preserving"])
def test_sums_are_right_whatever_is_read_at_once(saved, shape, axis, variant):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator).to(torch.bfloat16)
    after = torch.randn(shape, generator=generator).to(torch.bfloat16)
    assert base.numel() > 2 * BLOCK
    places = [saved(name, weight=tensor)["weight"] for name, tensor in (("a", base), ("b", after))]
    first, second = (PlainTensor(place, axis) for place in places)
    plan = entry(shape, axis)
    found = deviation(first, second, plan, variant, memory=1 << 30)
    for memory in (1, 3 << 20, 6 << 20):
        assert deviation(first, second, plan, variant, memory=memory) == found

    exact, other = base.double(), after.double()
    planned = project_out(base.float(), plan.basis, STRENGTH, axis, variant).double()
    column = plan.basis[:, 0].double()
    expected = {
        "before": torch.tensordot(exact, column, ([axis], [0])),
        "after": torch.tensordot(other, column, ([axis], [0])),
        "original": exact,
        "saved": other,
        "planned": planned,
        "error": other - planned,
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(float(value.square().sum()), rel=1e-5), name


def test_tensors_of_two_data_types_are_cut_alike(saved):
    base = torch.randn(D_MODEL, 20_000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    plan = entry(base.shape, 0)
    after = project_out(base.float(), plan.basis, STRENGTH, 0)
    first, second = (
        PlainTensor(saved(name, weight=tensor)["weight"], 0) for name, tensor in (("a", base), ("b", after))
    )
    for memory in (1 << 20, 6 << 20, 1 << 26):
        assert deviation(first, second, plan, "plain", memory=memory).error == 0


def test_bytes_are_compared_to_the_last(saved):
    tensor = torch.arange(9_000_000, dtype=torch.int64).to(torch.uint8)
    other = tensor.clone()
    other[-1] += 1
    first = saved("a", same=tensor, last=tensor.clone(), shape=tensor.clone())
    second = saved("b", same=tensor.clone(), last=other, shape=tensor.clone().view(2, -1))
    assert same_bytes(first["same"], second["same"])
    assert not same_bytes(first["last"], second["last"])
    assert not same_bytes(first["shape"], second["shape"])
