"""Laws of the one formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from remove_refusals import formula as linalg
from remove_refusals.errors import DirectionError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw):
    d_model = draw(st.integers(2, 24))
    rank = draw(st.integers(1, min(3, d_model)))
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=2))
    axis = draw(st.integers(0, len(shape)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tensor = torch.randn([*shape[:axis], d_model, *shape[axis:]], generator=generator)
    basis = linalg.orthonormal_basis(torch.randn(d_model, rank, generator=generator))
    return tensor.to(draw(st.sampled_from(DTYPES))), basis, axis


def component(tensor, basis, axis):
    return tensor.movedim(axis, -1).float() @ basis


@given(cases())
@settings(max_examples=60, deadline=None)
def test_strength_zero_leaves_every_byte(case):
    tensor, basis, axis = case
    kept = linalg.project_out(tensor, basis, 0.0, axis)
    assert kept.dtype == tensor.dtype and torch.equal(kept, tensor)
    assert kept.data_ptr() != tensor.data_ptr()


@given(cases())
@settings(max_examples=60, deadline=None)
def test_full_strength_leaves_nothing_beyond_rounding(case):
    tensor, basis, axis = case
    before = tensor.clone()
    edited = linalg.project_out(tensor, basis, 1.0, axis)
    assert torch.equal(tensor, before)
    scale = tensor.float().norm()
    assert component(edited, basis, axis).norm() <= 2 * torch.finfo(tensor.dtype).eps * scale + 1e-6


@given(cases(), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_strength_scales_the_component_and_leaves_the_rest(case, strength):
    tensor, basis, axis = case
    tensor = tensor.float()
    edited = linalg.project_out(tensor, basis, strength, axis)
    torch.testing.assert_close(
        component(edited, basis, axis), (1 - strength) * component(tensor, basis, axis), atol=1e-4, rtol=1e-4
    )
    rest = [linalg.project_out(value, basis, 1.0, axis) for value in (edited, tensor)]
    torch.testing.assert_close(*rest, atol=1e-4, rtol=1e-4)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_twice_is_once(case):
    tensor, basis, axis = case
    once = linalg.project_out(tensor.float(), basis, 1.0, axis)
    torch.testing.assert_close(linalg.project_out(once, basis, 1.0, axis), once, atol=1e-5, rtol=1e-5)


def test_large_tensors_in_parts_equal_the_whole(monkeypatch):
    tensor, basis = torch.randn(50, 4, 8), linalg.orthonormal_basis(torch.randn(8, 1))
    whole = tensor - (tensor @ basis) @ basis.T
    monkeypatch.setattr(linalg, "BLOCK", 40)
    torch.testing.assert_close(linalg.project_out(tensor, basis, 1.0, -1), whole)


@given(cases(), st.sampled_from(["plain", "norm-preserving"]), st.data())
@settings(max_examples=60, deadline=None)
def test_slices_and_layouts_give_the_same_bits(case, variant, data):
    tensor, basis, axis = case
    whole = linalg.project_out(tensor, basis, 0.9, axis, variant)
    place = data.draw(st.integers(0, tensor.dim() - 1))
    moved = linalg.project_out(tensor.movedim(axis, place), basis, 0.9, place, variant)
    assert torch.equal(moved.movedim(place, axis), whole)
    for other in set(range(tensor.dim())) - {axis}:
        parts = [linalg.project_out(part, basis, 0.9, axis, variant) for part in tensor.split(2, dim=other)]
        assert torch.equal(torch.cat(parts, dim=other), whole)


def test_threads_give_the_same_bits():
    tensor, basis = torch.randn(64, 40_000), linalg.orthonormal_basis(torch.randn(64, 2))
    threads = torch.get_num_threads()
    whole = linalg.project_out(tensor, basis, 1.0, 0)
    try:
        torch.set_num_threads(3)
        assert torch.equal(linalg.project_out(tensor, basis, 1.0, 0), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("shape", "axis"), [((16, 5), 0), ((5, 16), 1), ((3, 16, 5), 1), ((3, 5, 16), 2)])
def test_files_hooks_and_low_rank_pairs_are_one_edit(shape, axis):
    weight, basis = torch.randn(shape), linalg.orthonormal_basis(torch.randn(16, 2))
    edited = linalg.project_out(weight, basis, 0.7, axis)
    hooked = linalg.taken_out(weight.movedim(axis, -1), basis, 0.7).movedim(-1, axis)
    left, right = linalg.low_rank(weight, basis, 0.7, axis)
    torch.testing.assert_close(hooked, edited)
    torch.testing.assert_close(weight + left @ right, edited)


def test_each_row_has_its_own_basis_and_strength():
    stream, strengths = torch.randn(3, 4, 16), torch.tensor([0.0, 0.5, 1.2])
    bases = torch.stack([linalg.orthonormal_basis(torch.randn(16, 2)) for _ in range(3)])
    found = linalg.taken_out(stream, bases, strengths)
    for row in range(3):
        wanted = linalg.project_out(stream[row], bases[row], float(strengths[row]))
        torch.testing.assert_close(found[row], wanted)
    # Streams side by side, and all tokens in one row.
    torch.testing.assert_close(linalg.taken_out(stream.flatten(1), bases, strengths), found.flatten(1))
    torch.testing.assert_close(linalg.taken_out(stream.flatten(0, 1), bases, strengths), found.flatten(0, 1))


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradients_reach_strengths_and_directions_through_steps():
    steps = (linalg.ChannelStep("center"), linalg.ChannelStep("gain", "g", 1.0))
    gain, stream = torch.randn(6, dtype=torch.float64), torch.randn(2, 3, 6)

    def loss(direction, strength):
        columns = linalg.pulled_back(direction.unsqueeze(-1), steps, {"g": gain}.__getitem__)
        return linalg.taken_out(stream, columns / columns.norm(dim=-2, keepdim=True), strength).sum(1)

    direction = torch.randn(2, 6, requires_grad=True)
    strength = torch.tensor([0.3, 0.8], requires_grad=True)
    assert torch.autograd.gradcheck(loss, (direction, strength), eps=1e-2, atol=1e-2, rtol=1e-2)


def test_a_vector_is_pulled_back_as_a_basis_is():
    steps = (linalg.ChannelStep("gain", "g", 1.0), linalg.ChannelStep("center"))
    tensor_of = {"g": torch.randn(6)}.__getitem__
    basis = linalg.orthonormal_basis(torch.randn(6, 1))
    columns = linalg.pulled_back(basis[None], steps, tensor_of)[0]
    torch.testing.assert_close(columns / columns.norm(), linalg.pull_back(basis, steps, tensor_of))


def test_share_left():
    weight, basis = torch.randn(16, 5), linalg.orthonormal_basis(torch.randn(16, 1))
    assert tiny.share_left(weight, weight, basis, 0) == pytest.approx(1.0)
    assert tiny.share_left(linalg.project_out(weight, basis, 0.75, 0), weight, basis, 0) == pytest.approx(0.25, 1e-3)
    assert tiny.share_left(linalg.project_out(weight, basis, 1.0, 0), weight, basis, 0) < 1e-6


def test_basis_spans_the_vectors():
    vectors = torch.randn(12, 3)
    basis = linalg.orthonormal_basis(vectors)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis @ (basis.T @ vectors), vectors, atol=1e-5, rtol=1e-5)


def test_a_single_vector_keeps_its_sign():
    vector = torch.randn(9)
    torch.testing.assert_close(linalg.orthonormal_basis(vector[:, None])[:, 0], vector / vector.norm())


@pytest.mark.parametrize(
    ("vectors", "what"),
    [
        (torch.zeros(4, 1), "non-zero"),
        (torch.tensor([[1.0], [float("nan")]]), "finite"),
        (torch.ones(4, 2), "dependent"),
    ],
)
def test_unusable_vectors_are_refused(vectors, what):
    with pytest.raises(DirectionError, match=what):
        linalg.orthonormal_basis(vectors)


def test_norm_preserving_keeps_each_inputs_norm_and_stays_exact():
    weight, basis = torch.randn(16, 5), linalg.orthonormal_basis(torch.randn(16, 2))
    edited = linalg.project_out(weight, basis, 1.0, 0, "norm-preserving")
    torch.testing.assert_close(edited.norm(dim=0), weight.norm(dim=0))
    assert tiny.share_left(edited, weight, basis, 0) < 1e-6


def test_norm_preserving_leaves_what_lies_within_the_direction_at_zero():
    basis = linalg.orthonormal_basis(torch.tensor([[1.0], [0.0]]))
    edited = linalg.project_out(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), basis, 1.0, 0, "norm-preserving")
    assert torch.equal(edited, torch.tensor([[0.0, 0.0], [0.0, 2.0]]))


@pytest.mark.parametrize("variant", ("plain", "norm-preserving"))
@pytest.mark.parametrize(("shape", "axis"), [((4, 0), 0), ((0, 4), 1)])
def test_a_tensor_without_numbers_stays_without(variant, shape, axis):
    basis = linalg.orthonormal_basis(torch.ones(4, 1))
    assert linalg.project_out(torch.empty(shape), basis, 1.0, axis, variant).shape == shape
