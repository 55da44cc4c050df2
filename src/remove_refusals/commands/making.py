"""Commands that make something: a direction, an edited model."""

from pathlib import Path
from typing import Annotated

import typer

from remove_refusals.configuration import ConfigFile
from remove_refusals.measure_options import (
    Also,
    CalibrationFile,
    JudgeOption,
    Longest,
    TaskFiles,
    TaskLimit,
    Tasks,
    Text,
    more_sets,
    task_names,
)
from remove_refusals.options import (
    Affine,
    AlarmingTest,
    AllowLeak,
    BatchSize,
    Column,
    Device,
    DeviceMap,
    Dtype,
    Force,
    FourBit,
    Harmful,
    HarmfulTest,
    Harmless,
    HarmlessTest,
    KlTokens,
    Layer,
    LayerRange,
    MaxKl,
    MaxMemory,
    MaxNewTokens,
    MaxRefusals,
    ModelArgument,
    NPrompts,
    NTest,
    Offload,
    OptionalDirectionFile,
    PerLayer,
    Plain,
    Position,
    Projected,
    RemoteCode,
    Revision,
    Seed,
    SelectOption,
    Sites,
    Split,
    Strength,
    SystemPrompt,
    TemplateFile,
    TiedOption,
    Trials,
    VariantOption,
    chat_format,
    check_choice,
    direction_settings,
    edit_settings,
    select_settings,
)

_LEFT_OPEN = ("0.6", 1.0, None, "embedding,attn,mlp", "plain")
"""The defaults of the options that say what to take out, which leave that to the search."""


def run(
    model: ModelArgument = "demo",
    config: ConfigFile = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The directory to make; MODEL-ablated by default.")
    ] = None,
    force: Force = False,
    direction: OptionalDirectionFile = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    device_map: DeviceMap = None,
    offload: Offload = None,
    max_memory: MaxMemory = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    column: Column = None,
    split: Split = None,
    n_prompts: NPrompts = 32,
    seed: Seed = 0,
    select: SelectOption = None,
    max_kl: MaxKl = None,
    max_refusals: MaxRefusals = None,
    trials: Trials = 200,
    layer: Layer = "0.6",
    position: Position = -1,
    projected: Projected = False,
    per_layer: PerLayer = False,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    tied: TiedOption = "untie",
    variant: VariantOption = "plain",
    affine: Affine = False,
    allow_leak: AllowLeak = False,
    harmful_test: HarmfulTest = None,
    harmless_test: HarmlessTest = None,
    alarming_test: AlarmingTest = None,
    n_test: NTest = None,
    max_new_tokens: MaxNewTokens = 100,
    kl_tokens: KlTokens = 32,
    longest: Longest = None,
    also: Also = None,
    text: Text = None,
    tasks: Tasks = None,
    task_files: TaskFiles = None,
    task_limit: TaskLimit = None,
    judge: JudgeOption = "phrases",
    calibration: CalibrationFile = None,
) -> None:
    """The whole job: activations, direction, ablation, evaluation, and the saved model."""
    from remove_refusals import console, pipeline
    from remove_refusals.settings import LoadSettings, MeasureSettings, PromptSource, RunSettings

    source = PromptSource
    finding = direction_settings(
        source(harmful, column, split),
        source(harmless, column, split),
        n_prompts,
        seed,
        layer,
        position,
        projected,
        per_layer,
    )
    # Whoever says what to take out wants just that.
    as_given = direction is not None or (layer, strength, layers, sites, variant) != _LEFT_OPEN
    as_given = as_given or projected or per_layer or affine or len(finding.positions) > 1
    check_choice(select, as_given=as_given)
    settings = RunSettings(
        model=model,
        loading=LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision, device_map, offload, max_memory),
        chat=chat_format(system_prompt, chat_template, plain),
        direction=finding,
        edit=edit_settings(strength, layers, sites, tied, variant, allow_leak, affine),
        measure=MeasureSettings(
            source(harmful_test, column, split),
            source(harmless_test, column, split),
            source(alarming_test, column, split),
            n_test,
            max_new_tokens,
            kl_tokens,
            longest,
            more_sets(also, column, split),
            text,
            task_names(tasks),
            task_files,
            task_limit,
            judge,
            calibration,
        ),
        select=select_settings(select, max_kl, max_refusals, trials, as_given=as_given),
        batch_size=batch_size,
    )
    target = output or Path(f"{Path(model).name}-ablated")
    with console.progress() as on_progress:
        result = pipeline.run(settings, target, force=force, direction_file=direction, on_progress=on_progress)

    def show() -> None:
        if result.selection is not None:
            console.show_selection(result.selection)
        console.show_evaluation(result.evaluation, result.warnings)

    data = {"output": str(target), "scores": result.evaluation.to_json(), "warnings": list(result.warnings)}
    data |= {} if result.selection is None else {"selection": result.selection.summary()}
    last = f"Saved to {target}: the edited model, its records and its model card; report.html shows them."
    console.finish(data, last, show)


def find(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .safetensors or .pt file; a directory for --per-layer.")
    ],
    force: Force = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    device_map: DeviceMap = None,
    offload: Offload = None,
    max_memory: MaxMemory = None,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    column: Column = None,
    split: Split = None,
    n_prompts: NPrompts = 32,
    seed: Seed = 0,
    layer: Layer = "0.6",
    position: Position = -1,
    projected: Projected = False,
    per_layer: PerLayer = False,
) -> None:
    """Only the direction: the difference of mean activations on harmful and harmless prompts."""
    from remove_refusals import atomic, console, direction_files, stages
    from remove_refusals.settings import LoadSettings, PromptSource

    if per_layer:
        atomic.check_target(output, force=force, directory=True)
    else:
        direction_files.check_direction_path(output, force=force)
    source = PromptSource
    settings = direction_settings(
        source(harmful, column, split),
        source(harmless, column, split),
        n_prompts,
        seed,
        layer,
        position,
        projected,
        per_layer,
    )
    chat = chat_format(system_prompt, chat_template, plain)
    prompts = stages.training_prompts(settings)
    loaded = stages.load_model(
        model, LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision, device_map, offload, max_memory)
    )
    with console.progress() as on_progress:
        found = stages.find_direction(
            loaded, settings, chat=chat, prompts=prompts, batch_size=batch_size, on_progress=on_progress
        )
    first, where = found.directions[0], ", ".join(map(str, settings.positions))
    if per_layer:
        with atomic.atomic_directory(output, force=force) as directory:
            direction_files.save_directions(found.directions, directory)
        layers = f"{len(found.directions)} layers"
    else:
        direction_files.save_direction(first, output, force=force)
        layers = f"layer {first.origin.layer}"
    console.finish(
        {"output": str(output), "directions": [direction_files.describe_direction(one) for one in found.directions]},
        f"Saved to {output}: d_model {first.d_model}, {layers}, position {where}.",
    )
