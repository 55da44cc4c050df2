"""What `bake --as` makes in place of an edited checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remove_refusals.errors import DirectionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from remove_refusals.carriers import BaseModel
    from remove_refusals.settings import EditSettings, LoadSettings
    from remove_refusals.types import Direction

As = Annotated[str, typer.Option("--as", help="checkpoint, or an adapter beside it: lora, gguf-lora.")]
KINDS = ("checkpoint", "lora", "gguf-lora")
"""What `--as` accepts."""


def check_kind(kind: str) -> None:
    """Check the value of `--as`.

    Raises:
        DirectionError: If it is not among the accepted ones.
    """
    if kind not in KINDS:
        raise DirectionError(f"--as is {kind!r}, expected one of {', '.join(KINDS)}.")


def carry(
    kind: str,
    model: str,
    given: "tuple[Direction, ...]",
    output: Path,
    edit: "EditSettings",
    loading: "LoadSettings",
    *,
    force: bool,
) -> None:
    """Write an adapter and say so.

    Args:
        kind: One of `KINDS` but the first.
        model: A directory, a hub id, or `demo`.
        given: The directions.
        output: The file or directory to be made.
        edit: What to take out where.
        loading: How the model is loaded, where it has to be.
        force: Whether to replace an existing output.

    Raises:
        RemoveRefusalsError: As from `carriers`.
    """
    from remove_refusals import carriers, console, stages

    def write(base: "BaseModel") -> "carriers.Carried":
        intervention = stages.make_intervention(given, edit, base.model_map)
        options: dict[str, Any] = {
            "tied": edit.tied,
            "allow_leak": edit.allow_leak,
            "variant": edit.variant,
            "force": force,
        }
        make = carriers.bake_lora if kind == "lora" else carriers.bake_gguf_lora
        return make(base, intervention, output, **options)

    carried, model_map = _with_base(model, loading, write)
    names = {entry.parameter for entry in carried.plan.entries}
    console.say(f"The adapter changes {len(names)} tensors of model type {model_map.model_type}; the base stays.")
    if model_map.tied and model_map.input_embedding in names:
        console.say("The embedding is tied: loaded, the adapter leaves the unembedding alone; merged, it changes both.")
    console.say(f"Saved to {output}: a {'PEFT' if kind == 'lora' else 'llama.cpp'} LoRA of the edit.")


def _with_base(model: str, loading: "LoadSettings", write: "Callable[[BaseModel], Any]") -> tuple[Any, Any]:
    """Read tensors from disk where that is enough, and load the model where it is not."""
    from remove_refusals import carriers, disk_baking, errors, modelmap, stages

    try:
        checkpoint = disk_baking.open_checkpoint(
            model, revision=loading.revision, trust_remote_code=loading.trust_remote_code
        )
        return write(carriers.base_on_disk(checkpoint)), checkpoint.model_map
    except errors.NotStreamedError:
        loaded = stages.load_model(model, loading)
        model_map = modelmap.map_model(loaded.model)
        return write(carriers.base_in_memory(loaded, model_map)), model_map
