"""A GGUF file as an edit sees it: what it says of its model, and tensors as float32 and back, some blocks at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remove_refusals.apply.gguf_names import gguf_package
from remove_refusals.errors import CheckpointError

_NUMBERS_AT_ONCE = 1 << 23
"""How many numbers of a tensor are dequantised at once (32 MiB in float32)."""


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: Its name.
        kind: Its type, as the `gguf` package has it.
        shape: Its shape in NumPy's order.
        offset: Its first byte in the file.
        n_bytes: How many bytes it has.
    """

    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def type_name(self) -> str:
        """The type's name, such as `Q8_0`."""
        return str(self.kind.name)

    def can_be_written(self) -> bool:
        """Whether the `gguf` package can quantise to the type."""
        gguf = gguf_package()
        try:
            gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[self.kind][0]), np.float32), self.kind)
        except NotImplementedError:
            return False
        return True


@dataclass(frozen=True, eq=False)
class GgufFile:
    """What a GGUF file holds.

    Attributes:
        path: The file.
        fields: The metadata's scalar values and texts, by key.
        tensors: The tensors by name.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def raw(self, tensor: GgufTensor, *, path: Path | None = None) -> np.ndarray[Any, Any]:
        """Map a tensor's bytes.

        Args:
            tensor: The tensor.
            path: Another file of the same layout, to be written to.

        Returns:
            Unsigned bytes of the tensor's shape, but for the last axis, which counts bytes; read-only without `path`.
        """
        block, size = gguf_package().GGML_QUANT_SIZES[tensor.kind]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        mode: Any = "r" if path is None else "r+"
        return np.memmap(path or self.path, dtype=np.uint8, mode=mode, offset=tensor.offset, shape=shape)

    def values(self, name: str) -> torch.Tensor:
        """Give a tensor as float32.

        Raises:
            CheckpointError: If there is none of that name.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"The file {self.path.name} has no tensor '{name}', expected one; give the whole file of a model."
            )
        return decoded(self.raw(self.tensors[name]), self.tensors[name].kind)


def open_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's metadata and the places of its tensors.

    Args:
        path: The file.

    Returns:
        What it holds; arrays among the metadata, such as the vocabulary, are left out.

    Raises:
        CheckpointError: If it is no GGUF file or is cut off.
        OutputError: If the `gguf` package is not installed.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"The file {path} cannot be read as GGUF ({str(error).splitlines()[0] if str(error) else 'cut off'}), "
            "expected a whole GGUF file; check the path or download it again."
        ) from error
    array = gguf.GGUFValueType.ARRAY
    fields = {key: field.contents() for key, field in reader.fields.items() if field.types and field.types[0] != array}
    tensors = {
        tensor.name: GgufTensor(
            tensor.name,
            tensor.tensor_type,
            tuple(int(size) for size in reversed(tensor.shape)),
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    }
    return GgufFile(path, fields, tensors)


def parts(tensor: GgufTensor, axis: int) -> Iterator[tuple[slice | int, ...]]:
    """Cut a tensor's bytes into parts of whole blocks that hold the axis of width d_model whole.

    Args:
        tensor: The tensor.
        axis: -1, or -2 of a matrix or of one for each expert.

    Yields:
        Indices of the tensor's bytes.
    """
    block, size = gguf_package().GGML_QUANT_SIZES[tensor.kind]
    if axis == -1:
        step = max(1, _NUMBERS_AT_ONCE // tensor.shape[-1])
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        yield from ((slice(start, start + step),) if len(tensor.shape) > 1 else () for start in range(0, rows, step))
        return
    n_blocks = tensor.shape[-1] // block
    step = max(1, _NUMBERS_AT_ONCE // (block * tensor.shape[-2]))
    for lead in range(tensor.shape[0]) if len(tensor.shape) == 3 else [None]:
        for start in range(0, n_blocks, step):
            columns = (slice(None), slice(start * size, (start + step) * size))
            yield columns if lead is None else (lead, *columns)


def decoded(raw: np.ndarray[Any, Any], kind: Any) -> torch.Tensor:
    """Dequantise bytes.

    Args:
        raw: `[..., n_bytes]`, whole blocks along the last axis.
        kind: Their type.

    Returns:
        `[..., n_numbers]`, float32.
    """
    whole = np.ascontiguousarray(raw)
    values: np.ndarray[Any, Any] = gguf_package().quants.dequantize(whole, kind)
    return torch.from_numpy(np.array(values, dtype=np.float32))


def encoded(values: torch.Tensor, kind: Any) -> np.ndarray[Any, Any]:
    """Quantise float32 numbers; the inverse of `decoded` but for rounding.

    Args:
        values: `[..., n_numbers]`, float32, whole blocks along the last axis.
        kind: The type.

    Returns:
        `[..., n_bytes]`, unsigned bytes.
    """
    packed: np.ndarray[Any, Any] = gguf_package().quants.quantize(values.contiguous().numpy(), kind)
    return np.ascontiguousarray(packed).view(np.uint8)
