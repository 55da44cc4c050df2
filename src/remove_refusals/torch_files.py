"""Files of `torch.save` from anywhere, read without trust."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from remove_refusals.errors import DirectionError

# What PyTorch's restricted unpickler was seen to raise when single bytes of a saved vector were changed.
_DAMAGE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError, struct.error)


def read_torch_file(content: bytes, path: Path) -> object:
    """Read what `torch.save` wrote, tensors and plain containers only; nothing in it is executed.

    Args:
        content: The file's bytes.
        path: The file, for the message.

    Returns:
        What it holds, on the CPU.

    Raises:
        DirectionError: If it is not such a file, is damaged, or holds anything else, such as code.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise DirectionError(
            f"The direction file {path} is not in the format of `torch.save`, expected a vector saved by it; save it "
            "again with a current PyTorch."
        )
    try:
        value: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DirectionError(
            f"The direction file {path} is damaged or holds something other than tensors, which was not executed, "
            "expected one plain tensor; do not trust this file."
        ) from error
    except _DAMAGE as error:
        raise DirectionError(
            f"The direction file {path} is corrupt ({type(error).__name__}), expected a vector saved by `torch.save`; "
            "make it again."
        ) from error
    return value
