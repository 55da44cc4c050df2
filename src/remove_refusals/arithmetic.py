"""Products of half-precision numbers on a CPU that has no instructions for them: in float32, rounded to their type.

Such a CPU takes eight times as long over a product in bfloat16 or float16 as in float32. The weights stay as they are,
since float32 would double the memory they need.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_BLOCK, _LARGE_BLOCK, _MANY_ROWS = 1 << 20, 1 << 24, 256
"""Numbers of a weight that are float32 at a time: as fit into the CPU's cache, more where each is used many times."""

_functional = torch.nn.functional
_PRODUCTS = {
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.einsum,
    torch.matmul,
    torch.mm,
    _functional.conv1d,
    _functional.linear,
    _functional.scaled_dot_product_attention,
    *(getattr(torch.Tensor, name) for name in ("__matmul__", "__rmatmul__", "addmm", "baddbmm", "bmm", "matmul", "mm")),
}
# Of fused experts; its place and name depend on the version of PyTorch.
_GROUPED = {
    found
    for found in (getattr(_functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if found is not None
}


def slow_dtypes() -> frozenset[torch.dtype]:
    """Name the half-precision types that this CPU has no instructions for."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, there in supported.items() if not there)


class Float32Products(TorchFunctionMode):
    """Computes products of the given types on the CPU in float32, as long as the context lasts."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        """Take the types whose products are meant."""
        super().__init__()
        self.dtypes = dtypes

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a product in float32, anything else as it is."""
        options = kwargs or {}
        if function in _PRODUCTS or function in _GROUPED:
            values = (*args, *options.values())
            first = next((value for value in values if isinstance(value, torch.Tensor)), None)
            if first is not None and first.dtype in self.dtypes and first.device.type == "cpu" and "out" not in options:
                if function is _functional.linear:
                    return _linear(*args, **options)
                # With a bias or another type for the output it is computed as it is.
                given = [value for value in values if value is not None]
                if function in _GROUPED and len(given) == 3 and first.dim() == 2 and given[1].dim() == 3:
                    return _grouped(*given)
                if function not in _GROUPED:
                    return _Product.apply(function, first.dtype, tuple(options), *values)  # type: ignore[no-untyped-call]
        return function(*args, **options)


class _Product(torch.autograd.Function):
    """A product in float32 of which the graph keeps the factors as they are; backward computes it again."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], dtype: torch.dtype, names: tuple[str, ...], *values: Any
    ) -> Any:
        ctx.save_for_backward(*(value for value in values if isinstance(value, torch.Tensor)))
        ctx.others = [None if isinstance(value, torch.Tensor) else (value,) for value in values]
        ctx.function, ctx.dtype, ctx.names = function, dtype, names
        return _called(function, names, [_widened(value, dtype) for value in values]).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        tensors, values, wanted = iter(ctx.saved_tensors), [], []
        for other, needed in zip(ctx.others, ctx.needs_input_grad[3:], strict=True):
            value = next(tensors).detach() if other is None else other[0]
            if needed:
                value = _widened(value, ctx.dtype).requires_grad_()
                wanted.append(value)
            values.append(_widened(value, ctx.dtype))
        with torch.enable_grad():
            output = _called(ctx.function, ctx.names, values)
        found = iter(torch.autograd.grad(output, wanted, gradients[0].to(output.dtype)))
        return None, None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[3:])


class _InputGradient(torch.autograd.Function):
    """`linear` with a weight that needs no gradient."""

    @staticmethod
    def forward(ctx: Any, stream: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _in_blocks(stream, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _in_blocks(gradients[0], weight.T, None), None, None


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:  # noqa: A002
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return _Product.apply(_functional.linear, input.dtype, (), input, weight, bias)  # type: ignore[no-untyped-call]
        if input.requires_grad:
            return _InputGradient.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return _in_blocks(input, weight, bias)


def _in_blocks(stream: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply by a weight of which only a block of rows is float32 at a time."""
    n_rows = stream.numel() // max(1, stream.shape[-1])
    if n_rows == 1 and weight.is_contiguous():
        # Bound by reading the weight, which half precision makes shorter.
        return _functional.linear(stream, weight, bias)
    size = max(1, (_BLOCK if n_rows < _MANY_ROWS else _LARGE_BLOCK) // max(1, weight.shape[1]))
    wide, output = stream.float(), stream.new_empty(*stream.shape[:-1], weight.shape[0])
    for start in range(0, weight.shape[0], size):
        block = slice(start, start + size)
        part = None if bias is None else bias[block].float()
        output[..., block] = _functional.linear(wide, weight[block].float(), part)
    return output


def _grouped(stream: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by its expert's matrix; no other expert is looked at."""
    stops = ends.tolist()
    parts = [
        _linear(stream[start:stop], weight[index].T)
        for index, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
        if start < stop
    ]
    rest = stream.shape[0] - (stops[-1] if stops else 0)
    return torch.cat([*parts, stream.new_zeros(rest, weight.shape[-1])])


def _called(function: Callable[..., Any], names: tuple[str, ...], values: Sequence[Any]) -> Any:
    cut = len(values) - len(names)
    return function(*values[:cut], **dict(zip(names, values[cut:], strict=True)))


def _widened(value: Any, dtype: torch.dtype) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == dtype else value


class _Running(threading.local):
    """How many runs of such models one thread is in, one inside the other."""

    depth = 0
    mode: Float32Products | None = None


_running = _Running()


def compute_in_float32(model: torch.nn.Module, *parts: torch.nn.Module) -> None:
    """Let a model, and parts of it that are run by themselves, compute in float32 what this CPU is slow at.

    It takes hold at each run, in whichever thread, and is part of the model: a copy has it too.
    """
    slow = slow_dtypes()
    if any(parameter.dtype in slow and parameter.device.type in ("cpu", "meta") for parameter in model.parameters()):
        for module in {model, *parts}:
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)


def _enter(*given: Any) -> None:
    _running.depth += 1
    if _running.depth == 1:
        _running.mode = Float32Products(slow_dtypes())
        _running.mode.__enter__()  # type: ignore[no-untyped-call]


def _leave(*given: Any) -> None:
    # It is called even where an error came before `_enter` was.
    _running.depth = max(0, _running.depth - 1)
    if _running.depth == 0 and _running.mode is not None:
        _running.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _running.mode = None
