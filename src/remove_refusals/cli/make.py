"""Commands that make something: a direction, an edited model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remove_refusals.cli.options import (
    AlarmingTest,
    AllowLeak,
    Also,
    BatchSize,
    CalibrationFile,
    Certify,
    Column,
    ConfigFile,
    Device,
    DeviceMap,
    Dtype,
    Force,
    FourBit,
    Harmful,
    HarmfulTest,
    Harmless,
    HarmlessTest,
    Jobs,
    JudgeOption,
    KlTokens,
    Layer,
    LayerRange,
    MaxKl,
    MaxMemory,
    MaxNewTokens,
    MaxRefusals,
    Memory,
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
    TaskFiles,
    TaskLimit,
    Tasks,
    TemplateFile,
    TiedOption,
    VariantOption,
    chat_format,
    check_choice,
    direction_settings,
    edit_settings,
    more_sets,
    select_settings,
    task_names,
)
from remove_refusals.errors import DirectionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from remove_refusals.baking import BaseModel, Carried
    from remove_refusals.modelmap import ModelMap
    from remove_refusals.settings import EditSettings, LoadSettings
    from remove_refusals.types import Intervention


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
    layer: Layer = "0.6",
    position: Position = -1,
    projected: Projected = False,
    per_layer: PerLayer = False,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    tied: TiedOption = "untie",
    variant: VariantOption = "plain",
    allow_leak: AllowLeak = False,
    harmful_test: HarmfulTest = None,
    harmless_test: HarmlessTest = None,
    alarming_test: AlarmingTest = None,
    n_test: NTest = None,
    max_new_tokens: MaxNewTokens = 100,
    kl_tokens: KlTokens = 32,
    also: Also = None,
    tasks: Tasks = None,
    task_files: TaskFiles = None,
    task_limit: TaskLimit = None,
    judge: JudgeOption = "phrases",
    calibration: CalibrationFile = None,
) -> None:
    """The whole job: activations, direction, ablation, evaluation, and the saved model."""
    from remove_refusals import pipeline
    from remove_refusals.cli import printing as console
    from remove_refusals.settings import LoadSettings, MeasureSettings, PromptSource, RunSettings

    finding = direction_settings(
        PromptSource(source=harmful, column=column, split=split),
        PromptSource(source=harmless, column=column, split=split),
        n_prompts,
        seed,
        layer,
        position,
        projected,
        per_layer,
    )
    # Whoever says what to take out wants just that.
    as_given = direction is not None or (layer, strength, layers, sites, variant) != _LEFT_OPEN
    as_given = as_given or projected or per_layer or len(finding.positions) > 1
    check_choice(select, as_given=as_given)
    settings = RunSettings(
        model=model,
        loading=LoadSettings(
            device=device,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            trust_remote_code=trust_remote_code,
            revision=revision,
            device_map=device_map,
            offload=offload,
            max_memory=max_memory,
        ),
        chat=chat_format(system_prompt, chat_template, plain),
        direction=finding,
        edit=edit_settings(strength, layers, sites, tied, variant, allow_leak),
        measure=MeasureSettings(
            harmful=PromptSource(source=harmful_test, column=column, split=split),
            harmless=PromptSource(source=harmless_test, column=column, split=split),
            alarming=PromptSource(source=alarming_test, column=column, split=split),
            n_test=n_test,
            max_new_tokens=max_new_tokens,
            kl_tokens=kl_tokens,
            more=more_sets(also, column, split),
            tasks=task_names(tasks),
            task_directory=task_files,
            task_limit=task_limit,
            judge=judge,
            calibration=calibration,
        ),
        select=select_settings(select, max_kl, max_refusals, as_given=as_given),
        batch_size=batch_size,
    )
    target = output or Path(f"{Path(model).name}-ablated")
    with console.progress() as progress:
        result = pipeline.run(settings, target, force=force, direction_file=direction, progress=progress)

    def show() -> None:
        if result.selection is not None:
            console.show_selection(result.selection)
        console.show_evaluation(result.evaluation, result.warnings)

    data = {"output": str(target), "scores": result.evaluation.to_json(), "warnings": list(result.warnings)}
    data |= {} if result.selection is None else {"selection": result.selection.summary().to_json()}
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
    from remove_refusals import files as atomic
    from remove_refusals.cli import printing as console
    from remove_refusals.directions import direction as direction_files
    from remove_refusals.directions import find_direction, training_prompts
    from remove_refusals.models import load_model
    from remove_refusals.settings import LoadSettings, PromptSource

    if per_layer:
        atomic.check_target(output, force=force, directory=True)
    else:
        direction_files.check_direction_path(output, force=force)
    settings = direction_settings(
        PromptSource(source=harmful, column=column, split=split),
        PromptSource(source=harmless, column=column, split=split),
        n_prompts,
        seed,
        layer,
        position,
        projected,
        per_layer,
    )
    prompts = training_prompts(settings)
    loaded = load_model(
        model,
        LoadSettings(
            device=device,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            trust_remote_code=trust_remote_code,
            revision=revision,
            device_map=device_map,
            offload=offload,
            max_memory=max_memory,
        ),
        chat=chat_format(system_prompt, chat_template, plain),
        batch_size=batch_size,
    )
    with console.progress() as progress:
        found = find_direction(loaded, settings, prompts=prompts, progress=progress)
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


_ALL = (1.0, None, "embedding,attn,mlp")
"""The defaults of the options that say how much is taken out where."""


As = Annotated[
    str,
    typer.Option("--as", help="checkpoint; beside the base: lora or gguf-lora."),
]


BakedDirection = Annotated[
    Path | None,
    typer.Option("--direction", help="A direction: .safetensors or .pt; or a directory of one for each layer."),
]


Repeat = Annotated[
    Path | None, typer.Option("--repeat", help="Make the edit again that run or bake made in this directory.")
]


def bake(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make; a file for GGUF.")],
    direction: BakedDirection = None,
    repeat: Repeat = None,
    force: Force = False,
    kind: As = "checkpoint",
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    tied: TiedOption = "untie",
    variant: VariantOption = "plain",
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
    from remove_refusals import errors
    from remove_refusals import files as atomic
    from remove_refusals.baking import disk as disk_baking
    from remove_refusals.baking import memory as baking
    from remove_refusals.baking import open_checkpoint
    from remove_refusals.cli import printing as console
    from remove_refusals.modelmap import derive as modelmap
    from remove_refusals.models import load_model
    from remove_refusals.settings import LoadSettings

    check_kind(kind)
    atomic.check_target(output, force=force, directory=kind in ("checkpoint", "lora"))
    edit = edit_settings(strength, layers, sites, tied, variant, allow_leak)
    intervene = chosen(direction, repeat, edit, as_given=(strength, layers, sites) != _ALL)
    loading = LoadSettings(device=device, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
    if kind != "checkpoint":
        _adapter(kind, model, intervene, output, edit, loading, force=force)
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
            checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
            model_map = checkpoint.model_map
            with console.progress() as progress:
                baked = disk_baking.bake_on_disk(
                    checkpoint,
                    intervene(model_map),
                    output,
                    memory=memory,
                    jobs=jobs,
                    certified=certify,
                    on_progress=progress.on_progress,
                    **options,
                )
        except errors.NotStreamedError as error:
            reason = str(error)
    if reason:
        loaded = load_model(model, loading)
        model_map = modelmap.map_model(loaded.model)
        baked = baking.bake(loaded, intervene(model_map), output, model_map=model_map, **options)
    console.finish(
        {"output": str(output), "record": baked.record.to_json()},
        f"Saved to {output}." + (f" Edited in memory: {reason}" if reason else ""),
        lambda: console.show_plan(baked.plan, model_map),
    )


KINDS = ("checkpoint", "lora", "gguf-lora")
"""What `--as` accepts."""


def check_kind(kind: str) -> None:
    """Check the value of `--as`.

    Raises:
        DirectionError: If it is not among the accepted ones.
    """
    if kind not in KINDS:
        raise DirectionError(f"--as is {kind!r}, expected one of {', '.join(KINDS)}.")


def chosen(
    direction: Path | None, repeat: Path | None, edit: "EditSettings", *, as_given: bool
) -> "Callable[[ModelMap], Intervention]":
    """Give what makes the intervention for a model.

    Args:
        direction: The option `--direction`.
        repeat: The option `--repeat`.
        edit: What the other options say.
        as_given: Whether they say how much is to be taken out where.

    Raises:
        DirectionError: If not just one of the two is given, `--repeat` beside options that it would ignore, or what
            they name cannot be read.
    """
    from remove_refusals.baking import load_intervention
    from remove_refusals.directions import direction as direction_files
    from remove_refusals.directions import make_intervention

    if (direction is None) == (repeat is None) or (repeat is not None and as_given):
        raise DirectionError(
            "Expected one of --direction and --repeat, and beside --repeat none of --strength, --layers and --sites, "
            "since the directory's record says that; leave the others out."
        )
    if repeat is not None:
        intervention = load_intervention(repeat)
        return lambda model_map: intervention
    assert direction is not None
    given = direction_files.load_directions(direction)
    return lambda model_map: make_intervention(given, edit, model_map)


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
    from remove_refusals.baking import bake_gguf_lora, bake_lora
    from remove_refusals.cli import printing as console

    def write(base: "BaseModel") -> "Carried":
        make = bake_lora if kind == "lora" else bake_gguf_lora
        return make(base, intervene(base.model_map), output, **_options(edit), force=force)

    carried, model_map = _with_base(model, loading, write)
    names = {entry.parameter for entry in carried.plan.entries}
    remarks = [f"The adapter changes {len(names)} tensors of model type {model_map.model_type}; the base stays."]
    if model_map.tied and model_map.input_embedding in names:
        remarks.append("The embedding is tied: loaded, the adapter leaves the unembedding alone; merged, both change.")
    console.finish(
        {"output": str(output), "record": carried.record.to_json()},
        f"Saved to {output}: a {'PEFT' if kind == 'lora' else 'llama.cpp'} LoRA of the edit.",
        lambda: console.say_all(remarks),
    )


def _options(edit: "EditSettings") -> dict[str, Any]:
    return {"tied": edit.tied, "allow_leak": edit.allow_leak, "variant": edit.variant}


def _with_base(model: str, loading: "LoadSettings", write: "Callable[[BaseModel], Any]") -> tuple[Any, Any]:
    """Read tensors from disk where that is enough, and load the model where it is not."""
    from remove_refusals import errors
    from remove_refusals.baking import base as carriers
    from remove_refusals.baking import open_checkpoint
    from remove_refusals.modelmap import derive as modelmap
    from remove_refusals.models import load_model

    try:
        checkpoint = open_checkpoint(model, revision=loading.revision, trust_remote_code=loading.trust_remote_code)
        return write(carriers.base_on_disk(checkpoint)), checkpoint.model_map
    except errors.NotStreamedError:
        loaded = load_model(model, loading)
        model_map = modelmap.map_model(loaded.model)
        return write(carriers.base_in_memory(loaded, model_map)), model_map


def push(
    directory: Annotated[Path, typer.Argument(help="What `run` or `bake` left.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub, such as me/my-model.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; private by default.")] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Only an adapter's files, its card and its records.")
    ] = False,
    with_answers: Annotated[
        bool, typer.Option("--with-answers", help="Also rows.jsonl and HTML pages, with answers to harmful prompts.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Where the base's card is, for the licence: a directory or a hub id.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="The hub's address; HF_ENDPOINT by default.")] = None,
) -> None:
    """Send what `run` or `bake` left to the hub, with its model card.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from remove_refusals.cli import printing as console
    from remove_refusals.report import card as hub

    with console.transfers():
        pushed = hub.push(
            directory,
            repo,
            private=not public,
            adapter_only=adapter_only,
            with_answers=with_answers,
            base=base,
            endpoint=endpoint,
        )
    remarks = [f"Note: {note}" for note in pushed.notes]
    remarks += [f"Left out: {', '.join(pushed.left_out)}."] if pushed.left_out else []
    who = "private" if pushed.private else "public"
    console.finish(
        pushed.to_json(),
        f"Sent {len(pushed.files)} files to {pushed.url} ({who}), commit {pushed.commit}.",
        lambda: console.say_all(remarks),
    )
