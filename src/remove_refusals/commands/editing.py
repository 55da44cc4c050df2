"""The command that edits weights for good, or makes what carries an edit beside them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from remove_refusals.commands.carrying import As, BakedDirection, GgufFile, Repeat, carry, check_kind, chosen
from remove_refusals.options import (
    Affine,
    AllowLeak,
    Certify,
    Device,
    Dtype,
    Force,
    Jobs,
    LayerRange,
    Memory,
    ModelArgument,
    RemoteCode,
    Revision,
    Sites,
    Strength,
    TiedOption,
    VariantOption,
    edit_settings,
)

_ALL = (1.0, None, "embedding,attn,mlp", False)
"""The defaults of the options that say how much is taken out where."""


def bake(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make; a file for GGUF.")],
    file: GgufFile = None,
    direction: BakedDirection = None,
    repeat: Repeat = None,
    force: Force = False,
    kind: As = "checkpoint",
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    tied: TiedOption = "untie",
    variant: VariantOption = "plain",
    affine: Affine = False,
    allow_leak: AllowLeak = False,
    memory: Memory = "1GiB",
    jobs: Jobs = None,
    certify: Certify = True,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
) -> None:
    """Edit the weights for good, file by file on disk; the same command goes on where a killed one stopped.

    No model is loaded, unless an option needs it or there are no safetensors files; it says so.
    """
    from remove_refusals import atomic, baking, console, disk_baking, errors, modelmap, stages
    from remove_refusals.settings import LoadSettings

    check_kind(kind, file)
    atomic.check_target(output, force=force, directory=kind in ("checkpoint", "lora"))
    edit = edit_settings(strength, layers, sites, tied, variant, allow_leak, affine)
    directions, intervene = chosen(direction, repeat, edit, as_given=(strength, layers, sites, affine) != _ALL)
    loading = LoadSettings(device, dtype, False, trust_remote_code, revision)
    if kind != "checkpoint":
        carry(kind, model, file, directions, intervene, output, edit, loading, force=force)
        return
    options: dict[str, Any] = {
        "tied": edit.tied,
        "allow_leak": edit.allow_leak,
        "variant": edit.variant,
        "force": force,
    }
    reason = "--device or --dtype is given." if device is not None or dtype != "auto" else ""
    if not reason:
        try:
            checkpoint = disk_baking.open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
            model_map = checkpoint.model_map
            with console.progress() as on_progress:
                baked = disk_baking.bake_on_disk(
                    checkpoint,
                    intervene(model_map),
                    output,
                    memory=memory,
                    jobs=jobs,
                    certified=certify,
                    on_progress=on_progress,
                    **options,
                )
        except errors.NotStreamedError as error:
            reason = str(error)
    if reason:
        loaded = stages.load_model(model, loading)
        model_map = modelmap.map_model(loaded.model)
        baked = baking.bake(loaded, intervene(model_map), output, model_map=model_map, **options)
    console.finish(
        {"output": str(output), "record": baked.record},
        f"Saved to {output}." + (f" Edited in memory: {reason}" if reason else ""),
        lambda: console.show_plan(baked.plan, model_map),
    )
