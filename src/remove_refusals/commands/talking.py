"""Commands that let a model answer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remove_refusals.errors import DirectionError
from remove_refusals.options import (
    Affine,
    BatchSize,
    Column,
    Device,
    Dtype,
    Force,
    FourBit,
    LayerRange,
    MaxNewTokens,
    ModelArgument,
    OptionalDirectionFile,
    Plain,
    RemoteCode,
    Revision,
    Sites,
    Split,
    Strength,
    SystemPrompt,
    TemplateFile,
    chat_format,
    edit_settings,
    made_intervention,
)

if TYPE_CHECKING:
    from remove_refusals.settings import EditSettings
    from remove_refusals.types import Direction, Intervention, ModelMap


def chat(
    model: ModelArgument,
    direction: OptionalDirectionFile = None,
    no_ablation: Annotated[bool, typer.Option("--no-ablation", help="Talk to the model as it is.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Both answers, one after the other.")] = False,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    affine: Affine = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut off.")] = 512,
) -> None:
    """Talk to a model with the direction taken out as it runs; /help there says what can be changed, Ctrl-D ends it."""
    from remove_refusals import chat as chatting
    from remove_refusals import console, direction_files, stages
    from remove_refusals.settings import LoadSettings

    if no_ablation and compare:
        raise DirectionError("Both --no-ablation and --compare are given, expected one of them; leave one out.")
    if direction is None and not no_ablation:
        raise DirectionError(
            "No direction is given, expected --direction FILE; make one with `remove-refusals direction`, or pass "
            "--no-ablation."
        )
    given = None if direction is None or no_ablation else direction_files.load_directions(direction)
    edit = edit_settings(strength, layers, sites, affine=affine)
    loaded = stages.load_model(model, LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision))
    make, model_map = None, None
    if given is not None:
        _, model_map = made_intervention(loaded, given, edit)
        make = _maker(given, edit, model_map)
    put = chat_format(system_prompt, chat_template, plain)
    chatting.converse(
        loaded,
        make,
        console.typed_lines(),
        console.write,
        state=chatting.ChatState(
            strength, edit.layers, "compare" if compare else "original" if no_ablation else "ablated", put.system_prompt
        ),
        chat=put,
        model_map=model_map,
        max_new_tokens=max_new_tokens,
    )


def _maker(
    directions: "tuple[Direction, ...]", edit: "EditSettings", model_map: "ModelMap"
) -> "Callable[[float, tuple[int, int] | None], Intervention]":
    """Give what makes the intervention of another strength and other layers."""
    from remove_refusals import stages

    return lambda strength, layers: stages.make_intervention(
        directions, replace(edit, strength=strength, layers=layers), model_map
    )


def generate(
    model: ModelArgument,
    prompts: Annotated[str, typer.Option(help="A file or data set of prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A JSON Lines file.")],
    direction: OptionalDirectionFile = None,
    force: Force = False,
    column: Column = None,
    split: Split = None,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    affine: Affine = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    max_new_tokens: MaxNewTokens = 100,
) -> None:
    """Answer prompts in batches, greedily; without --direction the model answers as it is."""
    from remove_refusals import answers, atomic, console, direction_files, records, stages
    from remove_refusals.settings import LoadSettings, PromptSource

    atomic.check_target(output, force=force, directory=False)
    prompt_set = PromptSource(prompts, column, split).load("prompts", "")
    given = None if direction is None else direction_files.load_directions(direction)
    edit = edit_settings(strength, layers, sites, affine=affine)
    loaded = stages.load_model(model, LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision))
    intervention, model_map = None, None
    if given is not None:
        intervention, model_map = made_intervention(loaded, given, edit)
    with console.progress() as on_progress:
        rows = answers.answer_rows(
            loaded,
            prompt_set,
            intervention,
            model_map=model_map,
            chat=chat_format(system_prompt, chat_template, plain),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=stages.stage_progress(on_progress, "answers", 0, len(prompt_set)),
        )
    records.write_jsonl(output, rows, force=force)
    console.say(f"Saved {len(rows)} answers to {output}.")
