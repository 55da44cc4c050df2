"""The command: parse, call, print. Nothing heavy is imported before a command runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from remove_refusals.errors import CertificateError, DirectionError, PromptError, RemoveRefusalsError

if TYPE_CHECKING:
    from remove_refusals import pipeline
    from remove_refusals.models import LoadedModel
    from remove_refusals.types import ChatFormat, Direction, Intervention, ModelMap


class _Commands(TyperGroup):
    """The commands; their errors and Ctrl-C are caught here, before Typer answers them in its own way."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _one_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    name="remove-refusals",
    help="Find the direction in a language model's residual stream that mediates refusal, take it out, and measure "
    "what that did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)

MODEL, PROMPTS, EDIT, MEASURE = "Model", "Direction", "Edit", "Measurement"

ModelArgument = Annotated[str, typer.Argument(help="A model directory, a hub id, or 'demo' for the embedded model.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; the first that is there.", rich_help_panel=MODEL)]
Dtype = Annotated[
    str,
    typer.Option(help="auto: the checkpoint's on an accelerator, float32 on the CPU.", rich_help_panel=MODEL),
]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="Load with bitsandbytes.", rich_help_panel=MODEL)]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MODEL)
]
Revision = Annotated[str | None, typer.Option(help="The hub's branch, tag or commit.", rich_help_panel=MODEL)]
SystemPrompt = Annotated[str | None, typer.Option(help="A system message before each prompt.", rich_help_panel=MODEL)]
TemplateFile = Annotated[
    Path | None, typer.Option("--chat-template", help="A Jinja file in place of the model's.", rich_help_panel=MODEL)
]
Plain = Annotated[bool, typer.Option("--plain", help="No chat template, for base models.", rich_help_panel=MODEL)]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Prompts at once; found automatically.", rich_help_panel=MODEL)
]
Harmful = Annotated[str | None, typer.Option(help="File or data set of refused prompts.", rich_help_panel=PROMPTS)]
Harmless = Annotated[str | None, typer.Option(help="File or data set of answered prompts.", rich_help_panel=PROMPTS)]
Column = Annotated[str | None, typer.Option(help="The prompts' column in tables.", rich_help_panel=PROMPTS)]
Split = Annotated[str | None, typer.Option(help="The split of data sets.", rich_help_panel=PROMPTS)]
NPrompts = Annotated[int, typer.Option(min=1, help="How many of each are drawn.", rich_help_panel=PROMPTS)]
Seed = Annotated[int, typer.Option(help="What draws them.", rich_help_panel=PROMPTS)]
Layer = Annotated[str, typer.Option(help="Where: a fraction of depth (0.6) or an index (15).", rich_help_panel=PROMPTS)]
Position = Annotated[int, typer.Option(max=-1, help="Which token, from the end.", rich_help_panel=PROMPTS)]
Projected = Annotated[
    bool,
    typer.Option("--projected", help="Remove the component along the harmless mean.", rich_help_panel=PROMPTS),
]
DirectionFile = Annotated[
    Path, typer.Option("--direction", help="A direction: .safetensors, or .pt of the seed scripts.")
]
OptionalDirectionFile = Annotated[
    Path | None, typer.Option("--direction", help="Use this direction instead.", rich_help_panel=PROMPTS)
]
Strength = Annotated[float, typer.Option(help="The share that is taken out.", rich_help_panel=EDIT)]
LayerRange = Annotated[
    str | None, typer.Option("--layers", help="Only these layers, such as 8-20.", rich_help_panel=EDIT)
]
Sites = Annotated[str, typer.Option(help="Which of embedding, attn, mlp; joined by commas.", rich_help_panel=EDIT)]
TiedOption = Annotated[str, typer.Option("--tied", help="A tied embedding: untie, or edit both.", rich_help_panel=EDIT)]
AllowLeak = Annotated[
    bool, typer.Option("--allow-leak", help="Edit even where no edit is exact; measure it.", rich_help_panel=EDIT)
]
VariantOption = Annotated[
    str, typer.Option("--variant", help="plain, norm-preserving or row-norm.", rich_help_panel=EDIT)
]
HarmfulTest = Annotated[str | None, typer.Option(help="Refused prompts to measure on.", rich_help_panel=MEASURE)]
HarmlessTest = Annotated[str | None, typer.Option(help="Answered prompts to measure on.", rich_help_panel=MEASURE)]
AlarmingTest = Annotated[str | None, typer.Option(help="Alarming but harmless prompts.", rich_help_panel=MEASURE)]
NTest = Annotated[int | None, typer.Option(min=1, help="At most so many of each; all.", rich_help_panel=MEASURE)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Where an answer is cut off.", rich_help_panel=MEASURE)]
KlTokens = Annotated[
    int, typer.Option(min=1, help="Tokens of each answer that the KL is measured on.", rich_help_panel=MEASURE)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


@app.command(epilog="Example: remove-refusals run google/gemma-3-1b-it --output gemma-ablated --layers 12-25")
def run(
    model: ModelArgument = "demo",
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
) -> None:
    """The whole job: activations, direction, ablation, evaluation, and the saved model."""
    from remove_refusals import console, pipeline

    source = pipeline.PromptSource
    settings = pipeline.RunSettings(
        model=model,
        loading=pipeline.LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision),
        chat=_chat_format(system_prompt, chat_template, plain),
        direction=_direction_settings(
            source(harmful, column, split), source(harmless, column, split), n_prompts, seed, layer, position, projected
        ),
        edit=_edit_settings(strength, layers, sites, tied, variant, allow_leak),
        measure=pipeline.MeasureSettings(
            source(harmful_test, column, split),
            source(harmless_test, column, split),
            source(alarming_test, column, split),
            n_test,
            max_new_tokens,
            kl_tokens,
        ),
        batch_size=batch_size,
    )
    target = output or Path(f"{Path(model).name}-ablated")
    with console.progress() as on_progress:
        result = pipeline.run(settings, target, force=force, direction_file=direction, on_progress=on_progress)
    console.show_evaluation(result.evaluation, result.warnings)
    console.say(f"Saved to {target}: the edited model, ablation.json, scores.json, rows.jsonl and its model card.")


@app.command("direction", epilog="Example: remove-refusals direction demo -o demo.safetensors")
def find(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors or .pt file.")],
    force: Force = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
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
) -> None:
    """Only the direction: the difference of mean activations on harmful and harmless prompts."""
    from remove_refusals import console, pipeline, records

    records.check_direction_path(output, force=force)
    source = pipeline.PromptSource
    settings = _direction_settings(
        source(harmful, column, split), source(harmless, column, split), n_prompts, seed, layer, position, projected
    )
    chat = _chat_format(system_prompt, chat_template, plain)
    prompts = pipeline.training_prompts(settings)
    loaded = pipeline.load_model(model, pipeline.LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision))
    with console.progress() as on_progress:
        found = pipeline.find_direction(
            loaded, settings, chat=chat, prompts=prompts, batch_size=batch_size, on_progress=on_progress
        )
    records.save_direction(found.direction, output, force=force)
    console.say(
        f"Saved to {output}: d_model {found.direction.d_model}, layer {found.direction.origin.layer}, "
        f"position {found.direction.origin.position}."
    )


@app.command(epilog="Example: remove-refusals chat demo --direction demo.safetensors --compare")
def chat(
    model: ModelArgument,
    direction: OptionalDirectionFile = None,
    no_ablation: Annotated[bool, typer.Option("--no-ablation", help="Talk to the model as it is.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Both answers, one after the other.")] = False,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
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
    """Talk to a model with the direction taken out as it runs; end with Ctrl-D."""
    from remove_refusals import chat as chatting
    from remove_refusals import console, pipeline, records

    if no_ablation and compare:
        raise DirectionError("Both --no-ablation and --compare are given, expected one of them; leave one out.")
    if direction is None and not no_ablation:
        raise DirectionError(
            "No direction is given, expected --direction FILE; make one with `remove-refusals direction`, or pass "
            "--no-ablation."
        )
    given = None if direction is None or no_ablation else records.load_direction(direction)
    edit = _edit_settings(strength, layers, sites)
    loaded = pipeline.load_model(model, pipeline.LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision))
    intervention, model_map = None, None
    if given is not None:
        intervention, model_map = _intervention(loaded, given, edit)
    chatting.converse(
        loaded,
        intervention,
        console.typed_lines(),
        console.write,
        sides="compare" if compare else "original" if no_ablation else "ablated",
        chat=_chat_format(system_prompt, chat_template, plain),
        model_map=model_map,
        max_new_tokens=max_new_tokens,
    )


@app.command(epilog="Example: remove-refusals generate demo --direction demo.safetensors --prompts p.txt -o a.jsonl")
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
    from remove_refusals import atomic, console, pipeline, records

    atomic.check_target(output, force=force, directory=False)
    prompt_set = pipeline.PromptSource(prompts, column, split).load("prompts", "")
    given = None if direction is None else records.load_direction(direction)
    edit = _edit_settings(strength, layers, sites)
    loaded = pipeline.load_model(model, pipeline.LoadSettings(device, dtype, load_in_4bit, trust_remote_code, revision))
    intervention, model_map = None, None
    if given is not None:
        intervention, model_map = _intervention(loaded, given, edit)
    with console.progress() as on_progress:
        rows = pipeline.answer_rows(
            loaded,
            prompt_set,
            intervention,
            model_map=model_map,
            chat=_chat_format(system_prompt, chat_template, plain),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    records.write_jsonl(output, rows, force=force)
    console.say(f"Saved {len(rows)} answers to {output}.")


@app.command(epilog="Example: remove-refusals bake demo --direction demo.safetensors -o demo-ablated")
def bake(
    model: ModelArgument,
    direction: DirectionFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to make.")],
    force: Force = False,
    strength: Strength = 1.0,
    layers: LayerRange = None,
    sites: Sites = "embedding,attn,mlp",
    tied: TiedOption = "untie",
    variant: VariantOption = "plain",
    allow_leak: AllowLeak = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
) -> None:
    """Edit the weights for good and save the model with its tokenizer."""
    from remove_refusals import atomic, baking, console, pipeline, records

    atomic.check_target(output, force=force, directory=True)
    edit = _edit_settings(strength, layers, sites, tied, variant, allow_leak)
    given = records.load_direction(direction)
    loaded = pipeline.load_model(model, pipeline.LoadSettings(device, dtype, False, trust_remote_code, revision))
    intervention, model_map = _intervention(loaded, given, edit)
    baked = baking.bake(
        loaded,
        intervention,
        output,
        tied=edit.tied,
        allow_leak=edit.allow_leak,
        variant=edit.variant,
        force=force,
        model_map=model_map,
    )
    console.show_plan(baked.plan, model_map)
    console.say(f"Saved to {output}.")


@app.command(epilog="Example: remove-refusals evaluate demo demo-ablated -o scores.json")
def evaluate(
    base: ModelArgument,
    edited: Annotated[str, typer.Argument(help="The edited model: a directory or a hub id.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the scores as JSON.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Also save every answer as JSON Lines.")] = None,
    force: Force = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    trust_remote_code: RemoteCode = False,
    system_prompt: SystemPrompt = None,
    chat_template: TemplateFile = None,
    plain: Plain = False,
    batch_size: BatchSize = None,
    column: Column = None,
    split: Split = None,
    harmful_test: HarmfulTest = None,
    harmless_test: HarmlessTest = None,
    alarming_test: AlarmingTest = None,
    n_test: NTest = None,
    max_new_tokens: MaxNewTokens = 100,
    kl_tokens: KlTokens = 32,
) -> None:
    """Refusals, false refusals and damage of two models, side by side on the same prompts."""
    from remove_refusals import atomic, console, pipeline, records

    for path in (output, rows):
        if path is not None:
            atomic.check_target(path, force=force, directory=False)
    source = pipeline.PromptSource
    settings = pipeline.RunSettings(
        model=base,
        loading=pipeline.LoadSettings(device, dtype, load_in_4bit, trust_remote_code),
        chat=_chat_format(system_prompt, chat_template, plain),
        measure=pipeline.MeasureSettings(
            source(harmful_test, column, split),
            source(harmless_test, column, split),
            source(alarming_test, column, split),
            n_test,
            max_new_tokens,
            kl_tokens,
        ),
        batch_size=batch_size,
    )
    with console.progress() as on_progress:
        evaluation, notes = pipeline.compare(settings, edited, on_progress=on_progress)
    console.show_evaluation(evaluation, notes)
    if output is not None:
        records.write_json(output, evaluation.to_json(), force=force)
    if rows is not None:
        records.write_jsonl(rows, (row.to_json() for row in evaluation.rows), force=force)


@app.command(epilog="Example: remove-refusals inspect demo")
def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """What an edit would touch and what it would leave, from the configuration alone."""
    from remove_refusals import console, inspection

    found = inspection.inspect(model, trust_remote_code=trust_remote_code)
    if as_json:
        console.say_json(found)
    else:
        console.show_map(found)


@app.command(epilog="Example: remove-refusals certify demo-ablated --base demo")
def certify(
    directory: Annotated[Path, typer.Argument(help="The edited model, with its ablation.json.")],
    base: Annotated[str, typer.Option(help="The model that it was made from.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure on saved files what is left of the direction; exit code 3 if they do not hold the edit."""
    from remove_refusals import console, inspection

    certificate = inspection.certify_directory(directory, base, trust_remote_code=trust_remote_code)
    if as_json:
        console.say_json(certificate.to_json())
    else:
        console.show_certificate(certificate)
    if not certificate.passed:
        raise CertificateError(
            f"{len(certificate.problems)} things in {directory} are not as its record says, expected none; "
            "make the directory again."
        )


def _direction_settings(
    harmful: Any, harmless: Any, n_prompts: int, seed: int, layer: str, position: int, projected: bool
) -> "pipeline.DirectionSettings":
    from remove_refusals.pipeline import DirectionSettings

    return DirectionSettings(harmful, harmless, n_prompts, seed, _layer(layer), position, projected)


def _layer(text: str) -> float | int:
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise DirectionError(
            f"The layer is {text!r}, expected a fraction of depth such as 0.6 or an index such as 15."
        ) from None


def _edit_settings(
    strength: float,
    layers: str | None,
    sites: str,
    tied: str = "untie",
    variant: str = "plain",
    allow_leak: bool = False,
) -> "pipeline.EditSettings":
    from remove_refusals.linalg import VARIANTS
    from remove_refusals.pipeline import EditSettings
    from remove_refusals.types import SITE_KINDS

    kinds = tuple(kind for kind in SITE_KINDS if kind in sites.split(","))
    if set(kinds) != set(sites.split(",")):
        raise DirectionError(f"The sites are {sites!r}, expected some of {','.join(SITE_KINDS)}, joined by commas.")
    return EditSettings(
        strength,
        _range(layers),
        kinds,
        _one_of("--tied", tied, ("untie", "both")),
        _one_of("--variant", variant, VARIANTS),
        allow_leak,
    )


def _one_of(option: str, value: str, accepted: tuple[Any, ...]) -> Any:
    if value not in accepted:
        raise DirectionError(f"{option} is {value!r}, expected one of {', '.join(accepted)}.")
    return value


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not dash:
        last = first
    if not (first.isdecimal() and last.isdecimal()):
        raise DirectionError(f"The layers are {text!r}, expected a range such as 8-20 or one layer such as 12.")
    return int(first), int(last)


def _chat_format(system_prompt: str | None, chat_template: Path | None, plain: bool) -> "ChatFormat":
    from remove_refusals.types import ChatFormat

    text = None
    if chat_template is not None:
        try:
            text = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"The chat template {chat_template} cannot be read ({error}), expected a Jinja file in UTF-8."
            ) from error
    return ChatFormat(system_prompt, text, plain)


def _intervention(
    loaded: "LoadedModel", direction: "Direction", settings: "pipeline.EditSettings"
) -> tuple["Intervention", "ModelMap"]:
    from remove_refusals import modelmap, pipeline

    model_map = modelmap.map_model(loaded.model)
    return pipeline.make_intervention(direction, settings, model_map), model_map


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn this library's errors into their sentence on standard error and their exit code."""
    try:
        yield
    except RemoveRefusalsError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; nothing was left half-made.\n")
        raise SystemExit(130) from None


def main() -> None:
    """Run the command; the console script and `python -m remove_refusals` call this."""
    app()
