"""Half precision on a CPU without instructions for it: products in float32, weights and results in their own type."""

import copy
import pickle
import threading

import pytest
import torch
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import tiny
import zoo
from remove_refusals import arithmetic
from remove_refusals.arithmetic import Float32Products, compute_in_float32
from remove_refusals.models import generate, load

HALF = frozenset({torch.bfloat16, torch.float16})
TYPES = ("llama", "gpt2", "qwen3_moe", "gpt_oss", "falcon_h1", "gemma3_text")
F = torch.nn.functional


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    """Tests see the CPU that this is for, whichever they run on."""
    monkeypatch.setattr(arithmetic, "slow_dtypes", lambda: HALF)


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits.float()


class Products(TorchDispatchMode):
    """Notes in which types the kernels of products ran."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        one_row = name == "linear" and tensors[0].numel() == tensors[0].shape[-1]
        if any(part in name for part in ("mm", "matmul", "linear", "conv", "attention")) and not one_row:
            self.dtypes |= {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", sorted(HALF, key=str), ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_as_near_to_float32_as_plain_ones(model_type, dtype):
    model = zoo.build(model_type).to(dtype)
    inputs = zoo.inputs(model, 12)
    plain = logits(model, inputs)
    with Float32Products(HALF), Products() as products:
        ours = logits(model, inputs)
    assert products.dtypes == {torch.float32}
    exact = logits(copy.deepcopy(model).float(), inputs)
    scale = exact.std()
    assert (ours - exact).pow(2).mean().sqrt() < 1.2 * (plain - exact).pow(2).mean().sqrt() + 1e-4 * scale
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("model_type", TYPES[:4])
def test_gradients_agree_and_the_graph_holds_no_weight_in_float32(model_type, frozen):
    model = zoo.build(model_type).to(torch.bfloat16).requires_grad_(not frozen)
    ids = zoo.inputs(model, 12)["input_ids"]
    weights = {tuple(parameter.shape[-2:]) for parameter in model.parameters() if parameter.dim() > 1}
    weights |= {shape[::-1] for shape in weights}
    held = []

    def gradient(model, save=lambda tensor: tensor):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = model(inputs_embeds=embedded, use_cache=False).logits.float().log_softmax(-1)[..., 5].mean()
        wanted = [embedded, *(() if frozen else (model.lm_head.weight,))]
        return [found.float() for found in torch.autograd.grad(loss, wanted)]

    with Float32Products(HALF):
        ours = gradient(model, lambda tensor: (held.append(tensor), tensor)[1])
    plain, exact = gradient(model), gradient(copy.deepcopy(model).float())
    for one, other, true in zip(ours, plain, exact, strict=True):
        assert (one - true).norm() < 1.5 * (other - true).norm() + 1e-3 * true.norm()
    assert held
    assert not [tensor for tensor in held if tensor.dtype == torch.float32 and tuple(tensor.shape[-2:]) in weights]


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_product_in_blocks_is_the_product(rows, monkeypatch):
    monkeypatch.setattr(arithmetic, "_BLOCK", 100)
    monkeypatch.setattr(arithmetic, "_LARGE_BLOCK", 200)
    stream, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((rows, 30), (17, 30), (17,)))
    with Float32Products(HALF):
        found = F.linear(stream, weight, bias=bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), F.linear(stream.float(), weight.float(), bias.float()), rtol=1e-2, atol=1e-2
    )


def test_other_products_keep_their_type_and_other_types_are_let_alone():
    a, b = torch.randn(3, 4, 5).bfloat16(), torch.randn(3, 5, 4).bfloat16()
    exact = a.double() @ b.double()
    with Float32Products(frozenset({torch.bfloat16})):
        found = [
            a @ b,
            a.bmm(b),
            torch.einsum("bij,bjk->bik", a, b),
            torch.baddbmm(torch.zeros_like(exact).bfloat16(), a, b),
        ]
        assert (a.half() @ b.half()).equal(torch.matmul(a.half(), b.half()))
        assert (a.double() @ b.double()).equal(exact)
    for one in found:
        assert one.equal(exact.to(torch.bfloat16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("half")
    tiny.llama().bfloat16().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_a_loaded_model_computes_so_wherever_it_runs(folder, tmp_path):
    loaded = load(folder, dtype="bfloat16", device="cpu")
    model, ids = loaded.model, {"input_ids": torch.arange(1, 20).reshape(1, -1)}
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with Float32Products(HALF):
        wanted, answers = (
            logits(bare, ids),
            [answer.token_ids for answer in generate(load(bare, tiny.tokenizer()), [[1, 2]])],
        )
    assert not logits(bare, ids).equal(wanted)
    states = []
    thread = threading.Thread(target=lambda: states.append(logits(model, ids)))
    thread.start()
    thread.join()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    again = load(tmp_path, dtype="bfloat16", device="cpu").model
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        states.append(logits(one, ids))
    assert all(state.equal(wanted) for state in states)
    assert [answer.token_ids for answer in generate(loaded, [[1, 2]])] == answers
    with torch.inference_mode():
        assert model.model(**ids).last_hidden_state.dtype == model.dtype == torch.bfloat16
    assert _get_current_function_mode() is None


def test_an_error_inside_leaves_nothing_on(folder):
    model = load(folder, dtype="bfloat16", device="cpu").model

    def fail(*given):
        raise ValueError("stop")

    for module in (model.model.layers[0], model.model, model):
        handle = module.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(ValueError, match="stop"):
            model(torch.ones(1, 3, dtype=torch.int64))
        handle.remove()
        assert _get_current_function_mode() is None


def test_a_float32_model_has_no_hook(folder):
    model = load(folder, device="cpu").model
    compute_in_float32(model)
    assert model.dtype == torch.float32
    assert not model._forward_hooks
