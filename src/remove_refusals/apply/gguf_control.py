"""Directions → a control vector for llama.cpp: what `--control-vector` adds to the residual stream behind some layers.

Adding a vector is not ablation. It moves every token by the same amount, whatever component the token had along the
direction, and nothing keeps later layers from writing the direction again; too much of it breaks a model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from remove_refusals.apply.gguf_names import gguf_package
from remove_refusals.errors import DirectionError
from remove_refusals.types import Direction


def control_vector(
    directions: Sequence[Direction],
    n_layers: int,
    *,
    strength: float = 1.0,
    layers: tuple[int, int] | None = None,
) -> dict[int, torch.Tensor]:
    """Say what is to be added behind which layer so that the mean of the refused prompts moves to that of the answered.

    A vector is `-strength` times the difference of the means, where the direction knows its length, and otherwise
    `-strength` times the unit vector. One direction goes behind the layer whose output it was found on, since vectors
    behind several layers add up; of one for each layer, each goes behind its own.

    Args:
        directions: One direction, or one for each layer.
        n_layers: The model's number of layers.
        strength: What the vectors are multiplied by; llama.cpp multiplies again, with `--control-vector-scaled`.
        layers: The first and the last layer that get a vector, both included, in place of that.

    Returns:
        `[d_model]` vectors in float32, by the number of the layer behind which they are added.

    Raises:
        DirectionError: If a direction has several columns, there is neither one nor one for each layer, it is not known
            where it was found and `layers` is not given, or llama.cpp adds nothing behind that layer.
    """
    if len(directions) not in (1, n_layers):
        raise DirectionError(
            f"There are {len(directions)} directions, expected one or one for each of the model's {n_layers} layers; "
            "use directions that were found on this model."
        )
    for direction in directions:
        if direction.basis.shape[1] != 1:
            raise DirectionError(
                f"The direction has {direction.basis.shape[1]} columns, expected 1 for a control vector; find one at "
                "one position."
            )
    first, last = layers if layers is not None else _own_layers(directions, n_layers)
    if not 1 <= first <= last < n_layers:
        raise DirectionError(
            f"The layers are {first}-{last}, expected some of 1-{n_layers - 1}, behind which llama.cpp adds control "
            "vectors; give --layers."
        )
    chosen = {layer: directions[layer if len(directions) > 1 else 0] for layer in range(first, last + 1)}
    return {
        layer: -strength * (direction.origin.length or 1.0) * direction.basis[:, 0]
        for layer, direction in chosen.items()
    }


def _own_layers(directions: Sequence[Direction], n_layers: int) -> tuple[int, int]:
    if len(directions) > 1:
        return 1, n_layers - 1
    found = directions[0].origin.layer
    if found is None:
        raise DirectionError(
            "The direction does not know behind which layer it was found, expected a number; give --layers."
        )
    # It was found before that layer, which is behind the one below.
    return found - 1, found - 1


def write_control_vector(vectors: dict[int, torch.Tensor], path: Path, *, n_layers: int, hint: str) -> None:
    """Write a control vector to a file.

    Args:
        vectors: As from `control_vector`.
        path: The file; whoever calls moves it into place.
        n_layers: The model's number of layers.
        hint: What kind of model it is for; llama.cpp only prints it.
    """
    writer = gguf_package().GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", n_layers)
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
