"""What `bake --as` makes in place of an edited checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remove_refusals.errors import DirectionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from remove_refusals.carriers import BaseModel
    from remove_refusals.map_types import ModelMap
    from remove_refusals.settings import EditSettings, LoadSettings
    from remove_refusals.types import Direction, Intervention

As = Annotated[
    str,
    typer.Option("--as", help="checkpoint; beside the base: lora, gguf-lora, control-vector; or gguf: FILE, edited."),
]
GgufFile = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The GGUF file that --as gguf edits.")]

BakedDirection = Annotated[
    Path | None,
    typer.Option("--direction", help="A direction: .safetensors or .pt; or a directory of one for each layer."),
]
Repeat = Annotated[
    Path | None, typer.Option("--repeat", help="Make the edit again that run or bake made in this directory.")
]

KINDS = ("checkpoint", "lora", "gguf-lora", "control-vector", "gguf")
"""What `--as` accepts."""


def check_kind(kind: str, file: Path | None) -> None:
    """Check the value of `--as`, and that there is a file to edit where there should be one.

    Raises:
        DirectionError: If it is not among the accepted ones, or the file is missing or superfluous.
    """
    if kind not in KINDS:
        raise DirectionError(f"--as is {kind!r}, expected one of {', '.join(KINDS)}.")
    if (kind == "gguf") != (file is not None):
        found = f"the file {file} is given" if file is not None else "no file is given"
        raise DirectionError(
            f"--as is {kind!r} and {found}, expected a GGUF file behind the model's name with --as gguf and with "
            "nothing else."
        )


def chosen(
    direction: Path | None, repeat: Path | None, edit: "EditSettings", *, as_given: bool
) -> "tuple[tuple[Direction, ...], Callable[[ModelMap], Intervention]]":
    """Give the directions, and what makes the intervention for a model.

    Args:
        direction: The option `--direction`.
        repeat: The option `--repeat`.
        edit: What the other options say.
        as_given: Whether they say how much is to be taken out where.

    Raises:
        DirectionError: If not just one of the two is given, `--repeat` beside options that it would ignore, or what
            they name cannot be read.
    """
    from remove_refusals import direction_files, interventions, stages

    if (direction is None) == (repeat is None) or (repeat is not None and as_given):
        raise DirectionError(
            "Expected one of --direction and --repeat, and beside --repeat none of --strength, --layers, --sites and "
            "--affine, since the directory's record says that; leave the others out."
        )
    if repeat is not None:
        intervention = interventions.load_intervention(repeat)
        return intervention.directions, lambda model_map: intervention
    assert direction is not None
    given = direction_files.load_directions(direction)
    return given, lambda model_map: stages.make_intervention(given, edit, model_map)


def carry(
    kind: str,
    model: str,
    file: Path | None,
    directions: "tuple[Direction, ...]",
    intervene: "Callable[[ModelMap], Intervention]",
    output: Path,
    edit: "EditSettings",
    loading: "LoadSettings",
    *,
    force: bool,
) -> None:
    """Write what `--as` asks for and say so.

    Args:
        kind: One of `KINDS` but the first.
        model: A directory, a hub id, or `demo`.
        file: The GGUF file to edit.
        directions: The directions, for a control vector.
        intervene: Makes the intervention for a model, for all else.
        output: The file or directory to be made.
        edit: What to take out where.
        loading: How the model is loaded, where it has to be.
        force: Whether to replace an existing output.

    Raises:
        RemoveRefusalsError: As from `carriers` and `gguf_baking`.
    """
    if kind == "control-vector":
        _control_vector(model, directions, output, edit, loading, force=force)
    elif file is not None:
        _edited_gguf(model, file, intervene, output, edit, loading, force=force)
    else:
        _adapter(kind, model, intervene, output, edit, loading, force=force)


def _adapter(
    kind: str,
    model: str,
    intervene: "Callable[[ModelMap], Intervention]",
    output: Path,
    edit: "EditSettings",
    loading: "LoadSettings",
    *,
    force: bool,
) -> None:
    from remove_refusals import carriers, console

    def write(base: "BaseModel") -> "carriers.Carried":
        make = carriers.bake_lora if kind == "lora" else carriers.bake_gguf_lora
        return make(base, intervene(base.model_map), output, **_options(edit), force=force)

    carried, model_map = _with_base(model, loading, write)
    names = {entry.parameter for entry in carried.plan.entries}
    remarks = [f"The adapter changes {len(names)} tensors of model type {model_map.model_type}; the base stays."]
    if model_map.tied and model_map.input_embedding in names:
        remarks.append("The embedding is tied: loaded, the adapter leaves the unembedding alone; merged, both change.")
    console.finish(
        {"output": str(output), "record": carried.record},
        f"Saved to {output}: a {'PEFT' if kind == 'lora' else 'llama.cpp'} LoRA of the edit.",
        lambda: console.say_all(remarks),
    )


def _edited_gguf(
    model: str,
    file: Path,
    intervene: "Callable[[ModelMap], Intervention]",
    output: Path,
    edit: "EditSettings",
    loading: "LoadSettings",
    *,
    force: bool,
) -> None:
    from remove_refusals import console, gguf_baking

    model_map = _map_of(model, loading)
    baked = gguf_baking.bake_gguf(file, model_map, intervene(model_map), output, **_options(edit), force=force)
    kinds = ", ".join(sorted({writer.type for writer in baked.writers}))
    left = baked.record["certificate"]["largest_share_beyond_plan"]
    remarks = [
        f"Edited {len(baked.writers)} tensors ({kinds}); every other byte is as it was.",
        f"At most {left:.2%} of the direction beyond the plan is left in any of them.",
    ]
    if baked.tied:
        remarks.append("The file's token embedding is its output too: both were edited as one.")
    console.finish(
        {"output": str(output), "record": baked.record},
        f"Saved to {output}, with a record in {gguf_baking.record_path(output).name}.",
        lambda: console.say_all(remarks),
    )


def _control_vector(
    model: str,
    given: "tuple[Direction, ...]",
    output: Path,
    edit: "EditSettings",
    loading: "LoadSettings",
    *,
    force: bool,
) -> None:
    from remove_refusals import carriers, console

    model_map = _map_of(model, loading)
    layers = carriers.bake_control_vector(
        given, model_map, output, strength=edit.strength, layers=edit.layers, force=force
    )
    known = all(direction.origin.length is not None for direction in given)
    unit = "the difference of the means" if known else "a unit vector, since the direction does not know its length"
    where = f"layer {layers[0]}" if len(layers) == 1 else f"each of layers {layers[0]}-{layers[-1]}"
    remark = f"Takes off, behind {where}, {edit.strength:g} times {unit}. Adding a vector is not ablation."
    console.finish(
        {"output": str(output), "layers": list(layers), "strength": edit.strength},
        f"Saved to {output}: a llama.cpp control vector.",
        lambda: console.say(remark),
    )


def _options(edit: "EditSettings") -> dict[str, Any]:
    return {"tied": edit.tied, "allow_leak": edit.allow_leak, "variant": edit.variant}


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


def _map_of(model: str, loading: "LoadSettings") -> "ModelMap":
    """Map a model from its configuration."""
    from remove_refusals import modelmap, skeleton

    trusted = loading.trust_remote_code
    return modelmap.map_model(skeleton.skeleton_of(model, revision=loading.revision, trust_remote_code=trusted))
