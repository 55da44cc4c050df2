"""What a forward pass is found to do with its parameters, on small modules written by hand.

Each module that is followed to the end is held to it by numbers: with its parameters edited on the axes that were
found, behind the steps that were found, its output has nothing along the direction; with one of them left out, it has.
"""

import copy

import pytest
import torch
from torch.nn import functional

import zoo
from remove_refusals.directions.direction import direction_from_vectors
from remove_refusals.directions.intervention import intervene
from remove_refusals.directions.plan import resolve
from remove_refusals.errors import ArchitectureError
from remove_refusals.formula import ChannelStep, orthonormal_basis, project_out, pull_back
from remove_refusals.modelmap.derive import map_model
from remove_refusals.modelmap.knowledge import CONSTANT, Term
from remove_refusals.modelmap.trace import trace_forward
from remove_refusals.types import DirectionOrigin

D = 8
N_IN = 6
BATCH, TOKENS = 2, 5


class Small(torch.nn.Module):
    """A function of an input `[batch, tokens, 6]` and of named parameters."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x):
        return self.function(self, x)


def found(module):
    """The terms of a module's output, and its parameters that were used."""
    inputs = torch.empty(BATCH, TOKENS, N_IN, device="meta")
    weightless = copy.deepcopy(module).to("meta")
    with torch.device("meta"):
        trace = trace_forward(weightless, D, lambda: weightless(inputs))
    return trace.calls[-1].after


@torch.no_grad()
def component(module, terms, basis):
    """What is left along the direction once the terms' parameters are edited, as a share of the output."""
    edited = copy.deepcopy(module)
    for term in terms:
        pulled = pull_back(basis, term.steps, module.get_parameter)
        parameter = edited.get_parameter(term.source)
        parameter.copy_(project_out(parameter, pulled, 1.0, term.axis))
    out = edited(torch.randn(BATCH, TOKENS, N_IN, generator=torch.Generator().manual_seed(1)))
    assert out.shape[-1] == D
    return float((out @ basis).norm() / out.norm())


def check(module, *expected):
    """Hold a module to its terms, and the terms to the numbers."""
    terms = found(module)
    assert terms == frozenset(expected)
    basis = orthonormal_basis(torch.randn(D, 1, generator=torch.Generator().manual_seed(2)))
    assert component(module, terms, basis) < 1e-5
    for left_out in terms:
        assert component(module, terms - {left_out}, basis) > 1e-3


def gain(name, offset=0.0):
    return ChannelStep("gain", name, offset)


def causal(h, kernel):
    """A depthwise convolution over tokens that looks back."""
    return functional.conv1d(h.transpose(1, 2), kernel, groups=D, padding=2)[..., :TOKENS].transpose(1, 2)


PRODUCTS = {
    "linear": (lambda m, x: functional.linear(x, m.w), (D, N_IN), 0),
    "matmul": (lambda m, x: x @ m.w, (N_IN, D), 1),
    "from the left": (lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2), (D, N_IN), 0),
    "transposed from the left": (lambda m, x: (m.w.t() @ x.transpose(1, 2)).transpose(1, 2), (N_IN, D), 1),
    "transposed": (lambda m, x: x @ m.w.t(), (D, N_IN), 0),
    "transposed and copied": (lambda m, x: x @ m.w.t().contiguous(), (D, N_IN), 0),
    "addmm": (
        lambda m, x: torch.addmm(torch.zeros(D).to(x), x.flatten(0, 1), m.w).view(BATCH, TOKENS, D),
        (N_IN, D),
        1,
    ),
    "square, rows": (lambda m, x: functional.linear(functional.pad(x, (0, 2)), m.w), (D, D), 0),
    "square, columns": (lambda m, x: functional.pad(x, (0, 2)) @ m.w, (D, D), 1),
    "square, transposed": (lambda m, x: functional.pad(x, (0, 2)) @ m.w.t(), (D, D), 0),
    "heads in front": (lambda m, x: torch.einsum("btnh,nhd->btd", x.unflatten(-1, (2, 3)), m.w), (2, 3, D), 2),
    "heads behind": (lambda m, x: torch.einsum("btnh,dnh->btd", x.unflatten(-1, (2, 3)), m.w), (D, 2, 3), 0),
    "heads as one": (lambda m, x: functional.linear(x, m.w.reshape(D, -1)), (D, 2, 3), 0),
    "permuted": (lambda m, x: x @ m.w.permute(0, 2, 1).reshape(N_IN, D), (2, D, 3), 1),
    "pointwise convolution": (lambda m, x: functional.conv1d(x.transpose(1, 2), m.w).transpose(1, 2), (D, N_IN, 1), 0),
    "scaled": (lambda m, x: x @ (0.5 * m.w), (N_IN, D), 1),
    "embedding": (lambda m, x: functional.embedding((x > 0).sum(-1), m.w), (N_IN + 1, D), 1),
    "rows by index": (lambda m, x: m.w[(x > 0).sum(-1)], (N_IN + 1, D), 1),
    "rows repeated": (lambda m, x: m.w.repeat(BATCH, 1, 1) * x[..., :1], (TOKENS, D), 1),
    "a row expanded": (lambda m, x: m.w.expand(BATCH, TOKENS, D) * x[..., :1], (1, D), 1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_parameters_axis_is_found_whichever_way_it_is_multiplied(name):
    function, shape, axis = PRODUCTS[name]
    check(Small(function, w=shape), Term("w", axis))


def test_gains_apply_to_what_was_there_before_them():
    shapes = dict(w=(D, N_IN), b=(D,), g=(D,))
    check(Small(lambda m, x: functional.linear(x, m.w) * m.g + m.b, **shapes), Term("w", 0, (gain("g"),)), Term("b", 0))
    check(
        Small(lambda m, x: (functional.linear(x, m.w) + m.b) * m.g, **shapes),
        Term("w", 0, (gain("g"),)),
        Term("b", 0, (gain("g"),)),
    )
    check(
        Small(lambda m, x: (functional.linear(x, m.w) * m.g + m.b) * (1 + m.h), **shapes, h=(D,)),
        Term("w", 0, (gain("g"), gain("h", 1.0))),
        Term("b", 0, (gain("h", 1.0),)),
    )


def test_numbers_and_one_number_for_each_token_are_no_steps():
    function = lambda m, x: 3.0 * functional.linear(x, m.w) / 7.0 * torch.sigmoid(x[..., :1])  # noqa: E731
    check(Small(function, w=(D, N_IN)), Term("w", 0))


def test_norms_are_followed_whether_written_out_or_not():
    def root_mean_square(m, x):
        h = functional.linear(x, m.w)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * m.g

    check(Small(root_mean_square, w=(D, N_IN), g=(D,)), Term("w", 0, (gain("g"),)))
    fused = Small(lambda m, x: functional.rms_norm(functional.linear(x, m.w), (D,), m.g), w=(D, N_IN), g=(D,))
    check(fused, Term("w", 0, (gain("g"),)))
    centred = Small(
        lambda m, x: functional.layer_norm(functional.linear(x, m.w), (D,), m.g, m.b), w=(D, N_IN), g=(D,), b=(D,)
    )
    check(centred, Term("w", 0, (ChannelStep("center"), gain("g"))), Term("b", 0))


def test_a_depthwise_convolution_keeps_each_tap():
    shapes = dict(w=(D, N_IN), k=(D, 1, 3))
    check(
        Small(lambda m, x: causal(functional.linear(x, m.w), m.k), **shapes),
        Term("w", 0, (ChannelStep("taps", "k"),)),
    )

    def with_its_input(m, x):
        h = functional.linear(x, m.w)
        return h + causal(h, m.k)

    check(Small(with_its_input, **shapes), Term("w", 0, (ChannelStep("taps", "k", 1.0),)))


def chosen(x):
    """An expert out of three for each token: `[batch * tokens]`."""
    return (x > 0).sum(-1).flatten() % 3


EXPERTS = {
    "index": (lambda m, x: torch.bmm(m.w[chosen(x)], x.flatten(0, 1).unsqueeze(-1)).view((*x.shape[:2], D)), 1),
    "index_select": (
        lambda m, x: torch.bmm(m.w.index_select(0, chosen(x)), x.flatten(0, 1)[..., None]).view((*x.shape[:2], D)),
        1,
    ),
    "einsum": (lambda m, x: (torch.einsum("eoi,bti->bteo", m.w, x) * x[..., :3, None].sigmoid()).sum(2), 1),
    "one by one": (lambda m, x: one_by_one(m.w, x), 1),
}


def one_by_one(experts, x):
    out = torch.zeros(BATCH * TOKENS, D, device=x.device)
    for number, expert in enumerate(experts):
        rows = torch.where(chosen(x) == number)[0]
        out.index_add_(0, rows, functional.linear(x.flatten(0, 1)[rows], expert))
    return out.view(BATCH, TOKENS, D)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_found_however_they_are_chosen(name):
    function, axis = EXPERTS[name]
    check(Small(function, w=(3, D, N_IN)), Term("w", axis))


def test_rows_may_be_split_joined_masked_and_written_to():
    shapes = dict(w=(D, N_IN), v=(N_IN, D))
    both = Term("w", 0), Term("v", 1)
    check(Small(lambda m, x: torch.cat([functional.linear(x, m.w)[:, :2], (x @ m.v)[:, 2:]], dim=1), **shapes), *both)
    check(Small(lambda m, x: torch.where(x[..., :1] > 0, functional.linear(x, m.w), x @ m.v), **shapes), *both)

    def in_place(m, x):
        out = functional.linear(x, m.w)
        out[:, 1:3] += (x @ m.v)[:, :2]
        return out.masked_fill(x[..., :1] > 1, 0.0)

    check(Small(in_place, **shapes), *both)


LINEAR = lambda m, x: functional.linear(x, m.w)  # noqa: E731
ENDED = {
    "tanh": lambda h: h + torch.tanh(h),
    "two activations": lambda h: h * h.sigmoid(),
    "cumprod": lambda h: h.cumprod(1),
    "softmax": lambda h: h.softmax(-1),
    "flip over channels": lambda h: h.flip(-1),
    "roll over channels": lambda h: h.roll(1, -1),
    "halves the other way round": lambda h: torch.cat([h[..., D // 2 :], h[..., : D // 2]], dim=-1),
    "masked channels": lambda h: h.masked_fill(torch.arange(D, device=h.device) > 3, 0.0),
    "channels by index": lambda h: h[..., torch.arange(D, device=h.device).flip(0)],
    "tokens as channels": lambda h: h.repeat(1, 2, 1)[:, :D].transpose(1, 2),
    "mixed channels": lambda h: functional.avg_pool1d(h, 3, 1, 1),
}


@pytest.mark.parametrize("name", ENDED)
def test_what_mixes_channels_or_is_not_linear_ends_in_an_opaque_term(name):
    assert found(Small(LINEAR, w=(D, N_IN))) == {Term("w", 0)}
    terms = found(Small(lambda m, x: ENDED[name](LINEAR(m, x)), w=(D, N_IN)))
    assert any(term.axis is None for term in terms)


def test_what_is_added_to_itself_behind_a_gain_is_opaque():
    terms = found(Small(lambda m, x: LINEAR(m, x) + LINEAR(m, x) * m.g, w=(D, N_IN), g=(D,)))
    assert any(term.axis is None for term in terms)


def test_an_unknown_operation_is_named():
    terms = found(Small(lambda m, x: LINEAR(m, x).cumprod(1), w=(D, N_IN)))
    assert {term.source for term in terms} == {"cumprod"}


def test_a_number_that_no_parameter_wrote_is_a_constant():
    assert found(Small(lambda m, x: LINEAR(m, x) + 1.0, w=(D, N_IN))) == {Term("w", 0), CONSTANT}
    assert found(Small(lambda m, x: LINEAR(m, x) + 0.0, w=(D, N_IN))) == {Term("w", 0)}


def test_a_product_with_a_shifted_parameter_is_not_the_parameters():
    terms = found(Small(lambda m, x: x @ (1 + m.w), w=(N_IN, D)))
    assert all(term.axis is None for term in terms) and terms


class Wrapped(torch.nn.Module):
    """An MLP that returns something beside what it computed, from its input."""

    def __init__(self, mlp, beside):
        super().__init__()
        self.mlp, self.beside = mlp, beside

    def forward(self, hidden):
        return self.mlp(hidden) + self.beside(hidden)


@pytest.mark.parametrize(("beside", "operation"), [(torch.tanh, "tanh"), (lambda h: h.cumprod(1), "cumprod")])
def test_what_is_added_to_the_stream_beside_its_writers_is_a_leak(beside, operation):
    model = zoo.build("llama")
    assert map_model(model).verdict == "exact"

    class Leaky(type(model)):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].mlp = Wrapped(self.model.layers[1].mlp, beside)

    leaky = Leaky(zoo.tiny_config("llama")).eval()
    model_map = map_model(leaky)
    assert model_map.verdict == "hooks only"
    assert model_map.leaks == (f"In layer 1 the residual stream takes in {operation}, which no parameter writes.",)
    taken = direction_from_vectors(torch.ones(zoo.D_MODEL), DirectionOrigin(method="given"))
    with pytest.raises(ArchitectureError, match=operation):
        resolve(intervene(taken, zoo.N_LAYERS), model_map, leaky.get_parameter)
